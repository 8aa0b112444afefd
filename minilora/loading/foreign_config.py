"""Configurations of transformers, of models that are not built here."""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minilora.files import one_line, read_json, reading, short
from minilora.models import NotBuiltError


@dataclass(frozen=True)
class ForeignConfig:
    """A configuration of transformers, and the class of its causal language model.

    The rest goes by the common names of `ModelConfig`.
    """

    own: Any
    family: Any

    vocab_size = property(lambda self: self.own.vocab_size)
    hidden_size = property(lambda self: self.own.hidden_size)
    num_hidden_layers = property(lambda self: self.own.num_hidden_layers)
    # 0 of a model without attention
    num_attention_heads = property(lambda self: getattr(self.own, "num_attention_heads", 0))

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        found = getattr(self.own, "head_dim", None)
        return found or self.hidden_size // max(1, self.num_attention_heads)

    @property
    def max_position_embeddings(self) -> int:
        """Longest sequence, in tokens; the largest number where there is no limit."""
        found = getattr(self.own, "max_position_embeddings", None)
        return found if isinstance(found, int) else sys.maxsize

    def replace(self, **changes: Any) -> "ForeignConfig":
        """Return a copy with other values."""
        own = copy.deepcopy(self.own)
        for name, value in changes.items():
            setattr(own, name, value)
        return ForeignConfig(own, self.family)

    def empty(self, dtype: torch.dtype | None = None) -> Any:
        """Return the model on the meta device."""
        with torch.device("meta"), quiet():
            try:
                model = self.family(copy.deepcopy(self.own))
            except Exception as error:  # whatever its class makes of a damaged value
                raise ValueError(
                    f"config.json must describe a {self.family.__name__} as transformers makes "
                    f"it, found: {type(error).__name__}: {one_line(error, 200)}"
                ) from error
        return model.to(dtype)


def foreign_config(file: Path, why: NotBuiltError) -> ForeignConfig:
    """Return transformers' configuration and class for a `config.json` that is not built here."""
    try:
        import transformers
    except ImportError:
        found = "none"
    else:
        found = transformers.__version__
    if found == "none" or int(found.partition(".")[0]) < 5:
        raise RuntimeError(
            f"{why}; where transformers 5 is installed its own model is used, found {found}: "
            f"pip install -U transformers"
        ) from why
    entries = read_json(file)
    named = entries["model_type"]
    _refuse_downloads(file, entries)
    if named not in transformers.CONFIG_MAPPING:
        code = "; the code in its folder (auto_map) is never run" if "auto_map" in entries else ""
        raise ValueError(
            f"{why}; transformers {transformers.__version__} does not know it either{code}"
        ) from why
    with quiet(), reading(f"'{file}'"):
        try:
            config = transformers.CONFIG_MAPPING[named].from_pretrained(
                str(file), local_files_only=True
            )
        except Exception as error:
            raise ValueError(
                f"'{file}' must describe a {named} as transformers reads it, found: "
                f"{one_line(error, 200)}"
            ) from error
    known = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    family: Any = known.get(type(config), None)
    stated = entries.get("architectures") or [getattr(family, "__name__", named)]
    causal = ("CausalLM", "LMHeadModel")
    if (
        family is None
        or not family.__name__.endswith(causal)
        or not str(stated[0]).endswith(causal)
        or getattr(config, "is_encoder_decoder", False)
        or _sees_what_follows(config)
        or getattr(config, "vision_config", None) is not None
    ):
        raise ValueError(
            f"'{file}' must be of a causal language model of text, found {short(stated[0])} "
            f"({named}); in Python, minilora.inject puts adapters on any model, to be trained by "
            f"fit(loss=...) or in a loop of your own"
        ) from why
    return ForeignConfig(config, family)


def _sees_what_follows(config: Any) -> bool:
    """Whether a model, as BERT, is an encoder unless its configuration says otherwise."""
    return hasattr(config, "add_cross_attention") and not getattr(config, "is_decoder", True)


def _refuse_downloads(file: Path, entries: Any) -> None:
    """Refuse a configuration that has transformers fetch kernels, which are code."""
    for key, value in entries.items() if isinstance(entries, dict) else ():
        if isinstance(value, dict):
            _refuse_downloads(file, value)
        elif key.endswith("_implementation") and "/" in str(value):
            raise ValueError(
                f"'{file}' must name no code to fetch, found {key}={short(value)}; remove it"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block transformers says errors alone, and shows no progress."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
