"""Tokenizers of transformers: taken wherever our own are, and for files that only it reads."""

from pathlib import Path
from typing import Any

from minilora.files import one_line
from minilora.text.from_folder import OTHERS, ids_in, stop_ids
from minilora.text.tokenizer import Tokenizer

_FILES = ("*.model", "vocab.*", "vocab-*", "*.tiktoken", "tekken.json")  # of vocabularies


def read_folder_tokenizer(folder: Path, end: str | None = None) -> Tokenizer:
    """Read a folder's tokenizer, by transformers' `AutoTokenizer` where there is no file of ours.

    Args:
        folder, end: as for `Tokenizer.from_pretrained`.

    Raises:
        ValueError: what `Tokenizer.from_pretrained` raises, where transformers can't read it or is
            not there.
    """
    try:
        return Tokenizer.from_pretrained(folder, end=end)
    except ValueError as error:
        stored = any(file for form in _FILES for file in folder.glob(form))
        if (folder / "tokenizer.json").is_file() or not stored:  # it would make an empty one
            raise
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise ValueError(
                f"{error}; where transformers is installed its AutoTokenizer is tried: pip install "
                f"transformers"
            ) from None
        try:
            theirs = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            return as_tokenizer(theirs)
        except Exception as other:  # of many libraries
            raise ValueError(
                f"{error}; transformers' AutoTokenizer can't read it either: {one_line(other, 200)}"
            ) from other


def as_tokenizer(tokenizer: Any, model: Any = None) -> Tokenizer:
    """Return a tokenizer as ours.

    Of one of transformers', what its folder and the model say ends a text goes with it.

    Args:
        tokenizer: a `Tokenizer`, which is returned, or one of transformers', whose vocabulary is
            shared. Of several chat templates "default" and "tool_use" are taken.
        model: the one it is used with, or None.

    Raises:
        TypeError: anything else, with the line that converts it.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "get_added_tokens_decoder"):
        line = "minilora.text.Tokenizer.from_pretrained(folder), where tokenizer.json lies"
        if type(tokenizer).__module__.startswith("tokenizers"):
            line = 'minilora.text.Tokenizer(tokenizer, eos="…")'
        raise TypeError(
            f"the tokenizer must be a minilora.text.Tokenizer or one of transformers' that has a "
            f"backend_tokenizer, found {type(tokenizer).__name__}; convert it by {line}"
        )
    named: dict[str, Any] = {}
    for key in ("bos", "eos", "pad", "unk"):
        token = getattr(tokenizer, f"{key}_token", None)
        named[key] = None if token is None else str(token)
    template = getattr(tokenizer, "chat_template", None)
    templates = template if isinstance(template, dict) else {"default": template}
    others = {k: str(v) for k in OTHERS if (v := getattr(tokenizer, k, None)) is not None}
    folder = getattr(tokenizer, "name_or_path", None)
    ends = stop_ids(Path(folder)) if folder and Path(folder).is_dir() else set()
    for name in ("config", "generation_config"):
        ends |= ids_in(getattr(getattr(model, name, None), "eos_token_id", None))
    return Tokenizer(
        backend, **named, stop_ids=ends, chat_template=templates.get("default"),
        tool_template=templates.get("tool_use"), others=others,
    )  # fmt: skip
