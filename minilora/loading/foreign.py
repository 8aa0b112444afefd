"""Models that are not built here, as transformers' own: the same module names, the same adapters.

transformers makes the model, and renames and joins what is stored; each tensor is read here, when
transformers asks for it. Code that lies in a folder is never run.
"""

import copy
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.files import one_line, read_json, reading
from minilora.loading.fetching import hub_name
from minilora.loading.folder import (
    CONFIG,
    FLOAT_NAMES,
    GENERATION,
    Place,
    Places,
    find_tensors,
    folder_tensors,
    not_floating,
    stored_tensors,
)
from minilora.loading.foreign_config import ForeignConfig, foreign_config, quiet
from minilora.loading.quantized import QUANTIZED
from minilora.loading.source import Layers, check_finite, refuse_other_tensors
from minilora.lora import Survey, base_of, check_quantizable, select_targets
from minilora.lora import quantize as quantize_layers
from minilora.models import FAMILIES, NotBuiltError
from minilora.quantization import Quantization, QuantizedLinear, is_finite


@dataclass(frozen=True)
class ForeignSource:
    """What a folder holds for a class of transformers; see `Source`.

    Attributes:
        path: of the folder.
        config, family: of transformers.
        places: where tensors are stored, by their names in the file.
        dtype: of the floating-point tensors, None where they differ.
        layers: those that are stored quantized.
        metadata: None, as of any folder.
    """

    path: Path
    config: Any
    family: Any
    places: Places
    dtype: torch.dtype | None
    layers: Layers = field(default_factory=dict)
    metadata: None = None

    @property
    def end_of_text(self) -> str | None:
        """The token that ends a text where the tokenizer's files name none."""
        family = FAMILIES.get(self.config.model_type)
        return None if family is None else family.end_of_text


def open_foreign(folder: Path, why: NotBuiltError, quantized: Layers | None) -> ForeignSource:
    """Read what a folder says of a model that is not built here, and say that it isn't.

    `quantized` are the layers of a folder that `save_pretrained` quantized, None for another.
    """
    found = foreign_config(folder / CONFIG, why)
    config, family = found.own, found.family
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"'{folder}' holds a quantized {family.__name__}; of models that are not built here "
            f"only unquantized folders are read: load one of those with quantize= (--quantize)"
        )
    if quantized is None:
        places = folder_tensors(folder, lambda name: name)
    else:
        places = find_tensors([folder / QUANTIZED], lambda name: name)
    for name, place in places.items():
        if place.dtype.startswith("F") and place.dtype not in FLOAT_NAMES:
            raise ValueError(not_floating(name, place))
    stored = {FLOAT_NAMES[p.dtype] for p in places.values() if p.dtype in FLOAT_NAMES}
    dtype = next(iter(stored)) if len(stored) == 1 and quantized is None else config.dtype
    what = config.model_type
    if what in FAMILIES:
        what += f" with {str(why).partition(' is not built')[0]}"
    print(
        one_line(
            f"minilora: {what} is not built here: transformers' {family.__name__} is used; slower, "
            f"same adapters"
        ),
        file=sys.stderr,
    )
    return ForeignSource(folder, config, family, places, dtype, quantized or {})


class _Stored:
    """A stored tensor, read when transformers indexes it."""

    def __init__(self, read: Callable[[], Tensor]):
        self.read = read

    def __getitem__(self, index: Any) -> Tensor:
        return self.read()[index]


def _read(name: str, place: Place) -> Tensor:
    ((_, tensor),) = stored_tensors({name: place})
    return tensor.clone()  # a parameter must not be a view of a mapped file


class _Reader:
    """Reads a folder's tensors for transformers, and keeps those of some layers quantized.

    For the weight of such a layer transformers is given a stand-in: one number in the weight's
    shape, which takes no memory. `parts` are the quantized layers', by name.
    """

    def __init__(
        self, source: ForeignSource, dtype: torch.dtype, empty: Any, specs: dict[str, Quantization]
    ):
        self.source, self.dtype, self.empty, self.specs = source, dtype, empty, specs
        self.parts: dict[str, dict[str, Tensor]] = {layer: {} for layer in source.layers}
        self.stand_ins: dict[str, Tensor] = {}
        self.lock = threading.Lock()  # transformers reads in threads

    def state_dict(self) -> dict[str, _Stored]:
        """Return what transformers' `from_pretrained` takes as `state_dict`."""
        found = {}
        for name, place in self.source.places.items():
            owner, _, leaf = name.rpartition(".")
            if owner in self.source.layers and leaf != "bias":
                self.parts[owner][leaf] = _read(name, place)
            elif leaf == "weight" and (layer := self._layer(owner)) is not None:
                found[name] = _Stored(partial(self._encode, name, place, layer))
            else:
                found[name] = _Stored(partial(_read, name, place))
        for layer in self.source.layers:
            shape = self.empty.get_submodule(layer).weight.shape
            found[f"{layer}.weight"] = _Stored(partial(self._stand_in, layer, shape))
        return found

    def _layer(self, owner: str) -> str | None:
        """Return the layer to quantize that is stored under a name; transformers adds a prefix."""
        prefix = f"{self.empty.base_model_prefix}."
        names = (owner, prefix + owner, owner.removeprefix(prefix))
        return next((name for name in names if name in self.specs), None)

    def _encode(self, name: str, place: Place, layer: str) -> Tensor:
        with self.lock:  # one whole tensor at a time
            stored = _read(name, place)
            value = stored.to(self.dtype)
            check_finite(name, stored, value)
            matrix = base_of(self.empty.get_submodule(layer)).as_matrix(value)
            self.parts[layer] = self.specs[layer].encode(matrix)
        return self._stand_in(layer, value.shape)

    def _stand_in(self, layer: str, shape: torch.Size) -> Tensor:
        self.stand_ins[layer] = torch.zeros(1, dtype=self.dtype).expand(shape)
        return self.stand_ins[layer]

    def converted(self, model: nn.Module) -> set[str]:
        """Return the layers whose weight is not what is stored, but made of it by transformers."""
        weights: dict[str, Any] = {n: model.get_submodule(n).weight for n in self.stand_ins}
        return {
            name
            for name, weight in weights.items()
            if weight.data_ptr() != self.stand_ins[name].data_ptr()
        }

    def put(self, model: nn.Module) -> None:
        """Put the quantized layers in their places."""
        survey = Survey(model)
        for name, parts in self.parts.items():
            old, spec = survey.modules[name], self.specs[name]
            N, K = base_of(old).shape
            missing = sorted(spec.layout(N, K).keys() - parts.keys())
            reason = f"must have {', '.join(missing)}, found none" if missing else None
            reason = reason or spec.damage(parts, N, K)
            if reason is not None:
                raise ValueError(f"{name} in '{self.source.path}' {reason}; the file is damaged")
            plain = nn.Linear if isinstance(old, nn.Linear) else type(old)
            rest: Any = {"bias": old.bias, "dtype": self.dtype, "plain": plain}
            survey.replace(old, QuantizedLinear(parts, K, N, spec, **rest).eval())


def make_foreign(
    source: ForeignSource,
    dtype: torch.dtype | None,
    device: torch.device | str,
    quantize: Quantization | None,
    targets: tuple[Any, ...],
) -> Any:
    """Have transformers make the model; see `make_model`.

    Where a layer to quantize is stored as it is in the model, it is quantized as it is read.
    Others are quantized after loading.
    """
    dtype = dtype or source.dtype
    if dtype is None:
        raise ValueError(
            f"dtype=None needs weights stored in one dtype, or one that config.json names, found "
            f"neither in '{source.path}'; name a dtype, such as dtype=torch.float32"
        )
    empty = ForeignConfig(source.config, source.family).empty()
    specs = {name: spec for name, (spec, _) in source.layers.items()}
    modules = dict(empty.named_modules())
    if quantize is not None:
        specs = dict.fromkeys(select_targets(empty, *targets), quantize)
    _check_layers(source, specs, modules)
    reader = _Reader(source, dtype, empty, specs)
    model = _loaded(source, reader)
    if converted := reader.converted(model):
        reader = _Reader(source, dtype, empty, {n: specs[n] for n in specs.keys() - converted})
        model = _loaded(source, reader)
    reader.put(model)
    if left := sorted(specs.keys() - reader.parts.keys()):
        quantize_layers(model, specs[left[0]], targets=left)
    for name, value in model.named_parameters():
        if value.is_floating_point() and not is_finite(value):
            raise ValueError(
                f"{name} must be finite in {value.dtype}, found NaN or Inf; name a dtype that can "
                f"hold its values, such as dtype=torch.float32, or fetch the file again"
            )
    model.name_or_path = hub_name(source.path) or str(source.path)
    return model.to(device).eval()


def _check_layers(
    source: ForeignSource, specs: dict[str, Quantization], modules: dict[str, Any]
) -> None:
    """Raise unless a model of shapes alone has these layers, and each can be stored so."""
    tried = set()
    for name, spec in specs.items():
        if name not in modules:
            raise ValueError(
                f"'{source.path}' names a quantized layer {name}, which the model of its "
                f"config.json does not have"
            )
        module = modules[name]
        sort = type(module), module.weight.shape, module.bias is None
        if sort not in tried:  # which takes the time of a product
            tried.add(sort)
            check_quantizable(name, module, spec, values=False)


def _loaded(source: ForeignSource, reader: _Reader) -> Any:
    """Return the model with what its folder holds, all of it and nothing else."""
    options: dict[str, Any] = {"config": copy.deepcopy(source.config), "dtype": reader.dtype}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with quiet(), reading(f"'{source.path}'"):
        if (source.path / GENERATION).is_file():
            from transformers import GenerationConfig

            generation = read_json(source.path / GENERATION)
            options["generation_config"] = GenerationConfig.from_dict(generation)
        model, found = source.family.from_pretrained(
            None, state_dict=reader.state_dict(), **options
        )
    wrong = [f"{n} {list(a)} instead of {list(b)}" for n, a, b in found["mismatched_keys"]]
    problems = {
        "missing": sorted(found["missing_keys"]),
        "unexpected": sorted(found["unexpected_keys"]),
        "of another shape": sorted(wrong),
        "not converted": sorted(map(str, found.get("error_msgs", ()))),
    }
    refuse_other_tensors(source.path, problems)
    return model
