"""What is planned for: a model's shape from a preset, a folder, a file, the hub or a module."""

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.files import read_json, short
from minilora.loading import KINDS, model_config, read_gguf
from minilora.lora import check_rank, is_linear, matrix_shape, plain_modules, select_targets
from minilora.models import GPT2, GPT2Config, Llama, LlamaConfig
from minilora.planning.presets import PRESETS, nearest

Config = GPT2Config | LlamaConfig


@dataclass(frozen=True)
class Shape:
    """A model's numbers.

    Attributes:
        name: as the user called it; what `minilora train` takes where that can be known.
        config: of the architecture.
        source: where the numbers come from.
        stored: whether `name` is a place with weights, so that a command can name it.
        foreign: why `minilora train` does not read such a model, "" where it does.
    """

    name: str
    config: Config
    source: str
    stored: bool = False
    foreign: str = ""

    @property
    def kind(self) -> str:
        """`"gpt2"` or `"llama"`."""
        return "gpt2" if isinstance(self.config, GPT2Config) else "llama"

    def empty(self, dtype: torch.dtype = torch.float32) -> Any:
        """Return the model on the meta device: shapes without memory."""
        if isinstance(self.config, GPT2Config):
            return GPT2(self.config, dtype=dtype, device="meta")
        return Llama(self.config, dtype=dtype, device="meta")

    @functools.cached_property
    def parameters(self) -> int:
        """Number of parameters, a tied head counted once."""
        return sum(p.numel() for p in self.empty().parameters())


def read_shape(model: Any) -> Shape:
    """Find a model's shape.

    Args:
        model: a preset's name, a Hugging Face folder or its config.json, a .gguf file, a name
            `owner/model` of the hub (needs huggingface_hub), a config, or a Llama or GPT2.

    Raises:
        ValueError: none of these, or a configuration that is not built.
        TypeError: another type.
        RuntimeError: a hub name without huggingface_hub, or one that can't be fetched.
    """
    if isinstance(model, Shape):
        return model
    if isinstance(model, (GPT2Config, LlamaConfig)):
        return Shape("a configuration", model, "as given")
    if isinstance(model, nn.Module):
        return _of_module(model)
    if not isinstance(model, (str, Path)):
        raise TypeError(
            f"plan() needs a model's name, path, config or module, found {type(model).__name__}"
        )
    name, place = str(model), Path(model)
    if place.is_dir():
        return Shape(name, _from_json(place / "config.json"), f"{name}/config.json", stored=True)
    if place.is_file():
        if place.suffix == ".json":
            return Shape(str(place.parent), _from_json(place), name)
        return Shape(name, model_config(read_gguf(place)), name, stored=True)
    if name.lower() in PRESETS:
        preset = PRESETS[name.lower()]
        stored = name.lower() == "smollm2-135m"
        return Shape(name.lower(), preset.config, preset.source, stored, preset.foreign)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return Shape(name, _from_json(_hub(name)), f"huggingface.co/{name}, config.json")
    raise ValueError(
        f"a model to plan for is a preset, a folder, a config.json, a .gguf file or a hub name, "
        f"found {name!r}; {nearest(name, PRESETS)}"
    )


def _of_module(model: Any) -> Shape:
    config = getattr(model, "config", None)
    if not isinstance(config, (GPT2Config, LlamaConfig)):
        raise ValueError(
            f"plan() knows what minilora's own Llama and GPT2 keep in memory, found "
            f"{type(model).__name__}; pass the name of a preset of its size instead"
        )
    name = model.name_or_path
    return Shape(name or type(model).__name__, config, "the module", stored=name is not None)


def _from_json(file: Path) -> Config:
    entries = read_json(file)
    kind = entries.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(
            f"'{file}' must name a model_type that can be planned ({', '.join(KINDS)}), found "
            f"{short(kind)}; pass the preset that is nearest in size"
        )
    return KINDS[kind].config.from_dict(entries)


def _hub(name: str) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise RuntimeError(
            f"{name!r} is no folder, and reading a hub name needs huggingface_hub, which is not "
            f"installed; pip install huggingface_hub, or pass a preset: {', '.join(PRESETS)}"
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # its own classes, requests' and OSError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RuntimeError(
            f"config.json of {name!r} could not be fetched from the hub ({reason:.200}); "
            f"{nearest(name.rpartition('/')[2], PRESETS)}"
        ) from error


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block or the head: out N, in K, rank r (0: no adapter)."""

    name: str
    N: int
    K: int
    r: int


def adapted(
    model: Any, r: int, targets: object = "all-linear", exclude: object = ()
) -> dict[str, Linear]:
    """List a model's linears with the rank that `inject` would give each, 0 for no adapter.

    Raises:
        ValueError: what `inject` refuses, other targets than linears, or a rank above what a
            layer's shape can use.
    """
    check_rank(r)
    modules = plain_modules(model)
    shapes = {n: matrix_shape(m) for n, m in modules.items() if is_linear(m)}
    chosen = dict.fromkeys(select_targets(model, targets, exclude))
    for name in chosen:
        if name not in shapes:
            raise ValueError(
                f"plan() plans for adapters on linear layers, found {name} among the targets; "
                f"leave it out with exclude=[{name!r}]"
            )
        if r > min(shapes[name]):
            raise ValueError(
                f"r={r} is above what {name} can use: its shape is {list(shapes[name])}, so no "
                f"change of it has a rank above {min(shapes[name])}; lower r, or exclude the layer"
            )
    return {
        name: Linear(name, *shape, r if name in chosen else 0) for name, shape in shapes.items()
    }
