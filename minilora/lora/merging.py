"""Merging adapters into base weights, and taking that back to the very bits."""

import copy
import math
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minilora.files import read_tensors, tensor_content, write
from minilora.lora.by_model import (
    active_adapters,
    all_adapter_names,
    all_copies,
    in_place,
    install,
    known_adapters,
    original_parameters,
    require_compatible,
    require_layers,
    require_unmerged,
)
from minilora.lora.copies import is_copy
from minilora.lora.kinds import LoRAConv2d, LoRAEmbedding, LoRALinear, acts_as_linear, is_conv1d
from minilora.lora.layer import (
    LoRALayer,
    storage_format,
    weight_device,
    weight_dtype,
    weight_sample,
)
from minilora.lora.modes import inference
from minilora.lora.wrappers import named_modules
from minilora.quantization import QuantizedLinear, packed_format, weight_values

MODES = ("dequantize", "requantize")
LOST = 0.5  # the part of ΔW from which its rounding is warned of


class _DiskCopy:
    """Original weights in one safetensors file that goes when the last user of it goes."""

    def __init__(self, tensors: dict[str, Tensor]):
        folder = tempfile.mkdtemp(prefix="minilora-merge-")
        self.file = Path(folder) / "originals.safetensors"
        self._finalizer = weakref.finalize(self, shutil.rmtree, folder, True)
        write(self.file, tensor_content(tensors, {}, sums=False))

    def read(self) -> dict[str, Tensor]:
        return read_tensors(self.file)[0]

    def __deepcopy__(self, memo: dict) -> "_DiskCopy":
        return self  # a copied model reads the same file; it stays until both are gone

    def __reduce__(self):
        return _DiskCopy, (self.read(),)  # a pickle outlives the file, so it holds it


class _Emptied(NamedTuple):
    """A quantized base whose codes lie in a file."""

    disk: _DiskCopy
    name: str
    module: QuantizedLinear


@dataclass(frozen=True)
class MergedLayer:
    """How far the stored weight is from W + ΔW: relative to it, and in units of ‖ΔW‖."""

    name: str
    relative: float
    of_delta: float


@dataclass(frozen=True)
class MergeReport:
    """What quantizing merged weights again cost, worst layer first.

    `outputs` is the relative RMS difference of the model's outputs on `sample`, or None.
    """

    layers: tuple[MergedLayer, ...]
    outputs: float | None = None

    def __str__(self) -> str:
        lines = [
            f"{x.name}: {x.relative:.2%} of the weight, {x.of_delta:.2f} times the adapter's part"
            for x in self.layers[:5]
        ]
        if len(self.layers) > 5:
            lines.append(f"... and {len(self.layers) - 5} layers with less")
        outputs = "not measured (pass sample=)" if self.outputs is None else f"{self.outputs:.2%}"
        return "\n".join([*lines, f"outputs differ by: {outputs}"])


def _merged_tensors(layer: LoRALayer, names: tuple[str, ...]) -> dict[str, Tensor]:
    """W + Σ delta_weight (and b + Σ scaling · lora_bias) in f32 (f64), rounded once.

    Of a quantized layer W is decoded, and the sum is not rounded yet.
    """
    quantized = isinstance(layer.base, QuantizedLinear)
    if quantized:
        weight = wide = layer.base.dequantize(torch.float32)
    else:
        weight = layer.base.weight.detach()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    bias = None
    for adapter in names:
        wide = wide + layer.as_weight(layer.delta_weight(adapter).to(wide))
        factors: Any = layer.adapters[adapter]
        if factors.lora_bias is not None:
            bias = layer.base.bias.detach().to(wide) if bias is None else bias
            bias = bias + factors.lora_bias.detach().to(wide) * factors.scaling
    merged = {"weight": wide if quantized else wide.to(weight.dtype)}
    return merged if bias is None else merged | {"bias": bias.to(layer.base.bias.dtype)}


def _new_base(base: QuantizedLinear, merged: dict[str, Tensor], mode: str | None) -> nn.Module:
    """Return what stands in a quantized layer's place: plain, or of the same format again."""
    bias = merged.get("bias", base.bias)
    if mode == "requantize" and torch.equal(merged["weight"], base.dequantize(torch.float32)):
        again = copy.deepcopy(base)  # nothing was added: nothing is rounded anew
        again.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        return again
    if mode != "requantize":
        module: Any = base.plain_module(merged["weight"].to(base.dtype))
        if "bias" in merged:
            module.bias = nn.Parameter(merged["bias"], requires_grad=False)
        return module
    again = QuantizedLinear.from_weight(
        merged["weight"],
        base.spec,
        bias=bias,
        plain=base.plain,
    )
    again._dtype = base.dtype
    return again.train(base.training)


def _requantized_error(name: str, layer: LoRALayer, names: tuple[str, ...]) -> MergedLayer:
    before = layer.base.dequantize(torch.float32)
    wanted = _merged_tensors(layer, names)["weight"]
    if torch.equal(before, wanted):
        return MergedLayer(name, 0.0, 0.0)
    stored = QuantizedLinear.from_weight(wanted, layer.base.spec).dequantize(torch.float32)
    error, delta = float((stored - wanted).norm()), float((wanted - before).norm())
    return MergedLayer(name, error / max(float(wanted.norm()), 1e-30), error / max(delta, 1e-30))


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte and behind the last one."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size() if tensor.numel() else start


def _check_kind(name: str, layer: LoRALayer, names: tuple[str, ...]) -> None:
    base = layer.base
    plain = (
        (
            type(layer) is LoRALinear
            and (type(base) is nn.Linear or is_conv1d(base) or acts_as_linear(base))
        )
        or type(layer) is LoRAEmbedding
        or (type(layer) is LoRAConv2d and type(base) is nn.Conv2d)
    )
    if isinstance(base, QuantizedLinear):
        plain = type(layer) is LoRALinear
    # Under weight_norm, spectral_norm and pruning `weight` is recomputed by a hook.
    weight = base._parameters.get("codes" if isinstance(base, QuantizedLinear) else "weight")
    floating = (
        isinstance(base, QuantizedLinear) or getattr(weight, "dtype", torch.int8).is_floating_point
    )
    if packed_format(base):
        raise ValueError(
            f"merge() can't add to {name}, which is packed ({packed_format(base)}); save the "
            f"adapter, load it on the same model in full precision and merge it there"
        )
    if not plain or type(weight) is not nn.Parameter or not floating:
        raise ValueError(
            f"merge() adds to the weight of a plain nn.Linear, Conv1D, nn.Embedding or nn.Conv2d, "
            f"but {name} wraps a {type(base).__name__} whose weight is no plain parameter or which "
            f"computes something else; leave that layer unmerged or use a plain base"
        )
    if "bias" in _changed(layer, names) and base._parameters.get("bias") is None:
        raise ValueError(
            f"merging lora_bias adds to the bias of {name}, found none; leave that adapter unmerged"
        )


def _sharers(
    model: nn.Module, layers: dict[str, LoRALayer], plan: dict[str, tuple[str, ...]]
) -> dict[tuple[str, str], str]:
    """Return, for weights and biases that share memory with another tensor, that one's name."""
    inside = tuple(f"{name}.adapters." for name in layers)
    spans = [
        (tensor.device, *_span(tensor), f"{name}.{key}")
        for name, module in named_modules(model)
        if not is_copy(name) and not f"{name}.".startswith(inside)
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    ]
    found = {}
    for name, layer in layers.items():
        # A quantized base is replaced, not written to.
        parts = [] if isinstance(layer.base, QuantizedLinear) else _changed(layer, plan[name])
        for part in parts:
            tensor = layer.base._parameters[part]
            start, end = _span(tensor)
            for device, first, last, owner in spans:
                same_memory = device == tensor.device and first < end and start < last
                if same_memory and owner != f"{name}.base.{part}":
                    found[name, part] = owner
    return found


def merge(
    model: nn.Module,
    adapters: str | Sequence[str] | None = None,
    *,
    keep: str | bool | None = "memory",
    untie: bool = False,
    mode: str | None = None,
    tolerance: float | None = 1.0,
    sample: Tensor | None = None,
) -> MergeReport | None:
    """Add `scaling · B A` of adapters to the base weights, in place: no branch is left to compute.

    The sum is formed in f32 (f64 for f64 bases) and rounded once to the storage dtype. The
    adapters themselves stay as they are; `save` still writes them. A warning says so where rounding
    to a 16-bit dtype loses over half of what they add.

    Args:
        model: a model with adapters; changed in place.
        adapters: a name, several, or None for the active ones.
        keep: what makes `unmerge` possible: `"memory"` keeps the original weights beside the
            merged ones (as many bytes again), `"disk"` in a temporary file, None or False nowhere
            (`unmerge` then raises).
        untie: give a layer that shares its weight (a head tied to the embedding) a weight of its
            own for the merged values; `unmerge` ties them again. False refuses such a layer.
        mode: what becomes of a quantized base: `"dequantize"` a plain layer in the dtype it had
            before, or `"requantize"` the same format again, which rounds the sum anew. Both start
            from the rounded weights; to merge into the full-precision ones, load that model, load
            the adapter there and merge.
        tolerance: refuse `"requantize"` where in some layer the new rounding exceeds this many
            times what the adapter adds, ‖ΔW‖_F; None accepts any.
        sample: an input for `model(sample)`; with `"requantize"` the report then says how far the
            outputs moved.

    Returns:
        With `mode="requantize"` a `MergeReport` with the error per layer, else None.

    Raises:
        ValueError: unknown names, nothing to merge, a weight shared with another module, a base
            of another kind, a quantized base without `mode`, a rounding error above the
            tolerance, a result that is not finite; the model is unchanged.
        RuntimeError: adapters are merged already.
    """
    layers = require_layers(model, "merge")
    require_unmerged(layers, "merge")
    keep = None if keep is False else keep
    if keep not in ("memory", "disk", None):
        raise ValueError(f"keep must be 'memory', 'disk' or None, found {keep!r}")
    names = active_adapters(model) if adapters is None else known_adapters(model, adapters, "merge")
    if not names:
        raise ValueError("merge() needs an adapter: none is active and none was named")
    require_compatible(model, names)
    plan = {n: tuple(a for a in names if a in layer.adapters) for n, layer in layers.items()}
    if adapters is None:
        plan = {n: layer.active for n, layer in layers.items()}
    plan = {n: wanted for n, wanted in plan.items() if wanted}
    chosen = {n: layers[n] for n in plan}
    small = {n: layer for n, layer in chosen.items() if isinstance(layer.base, QuantizedLinear)}
    _check_mode(small, mode)
    if tolerance is not None and (
        isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not tolerance > 0
    ):
        raise ValueError(f"tolerance must be a number above 0 or None, found {tolerance!r}")
    before = [n for n in all_copies(model) if in_place(model, n)]
    own = original_parameters(model)
    install(model, names)
    try:
        # What must not be written: weights that others read, and trained copies.
        apart = _kept_apart(model, plan, chosen, untie)
        errors = []
        if mode == "requantize":
            errors = [_requantized_error(n, layer, plan[n]) for n, layer in small.items()]
            errors.sort(key=lambda x: -x.of_delta)
            _check_tolerance(errors, tolerance)
        disk = None
        if keep == "disk":
            disk = _DiskCopy({f"{n}.{key}": layer.base._parameters[key]
                              for n, layer in chosen.items()
                              for key in (_held(layer.base) if n in small
                                          else _changed(layer, plan[n]))
                              if (n, key) not in apart})  # fmt: skip
        outputs = None
        if sample is not None and errors:
            with _active(layers, plan):
                outputs = _outputs(model, sample)
    except BaseException:
        install(model, before)
        raise
    with torch.no_grad():
        for name, layer in chosen.items():
            if name in small:
                _replace_base(name, layer, plan[name], keep, disk, mode)
            else:
                _merge_layer(name, layer, plan[name], keep, disk, apart, own)
    for name, layer in layers.items():
        if name not in chosen:  # the merged model is base + names: nothing else adds there either
            layer.merged, layer.original = names, {}
    if not errors:
        return None
    if outputs is None or sample is None:
        return MergeReport(tuple(errors))
    moved = (_outputs(model, sample) - outputs).norm() / outputs.norm()
    return MergeReport(tuple(errors), float(moved))


def _held(base: nn.Module) -> list[str]:
    return [name for name, parameter in base._parameters.items() if parameter is not None]


def _check_mode(small: dict[str, LoRALayer], mode: object) -> None:
    if mode not in (None, *MODES):
        raise ValueError(f"mode must be one of {', '.join(MODES)} or None, found {mode!r}")
    if small and mode is None:
        raise ValueError(
            f"merging into a quantized base needs mode='dequantize' (plain layers) or 'requantize' "
            f"(the same format, rounded anew), found none ({next(iter(small))} and "
            f"{len(small) - 1} more are quantized); or save the adapter, load it on the "
            f"full-precision model and merge there"
        )
    if not small and mode is not None:
        raise ValueError("mode= is for quantized bases, found none; leave it out")


def _check_tolerance(errors: list[MergedLayer], tolerance: float | None) -> None:
    over = [x for x in errors if tolerance is not None and not x.of_delta <= tolerance]
    if over:
        raise ValueError(
            f"mode='requantize' must not lose more than tolerance={tolerance:g} times what the "
            f"adapter adds, found {over[0].of_delta:.2f} times in {over[0].name} ({len(over)} of "
            f"{len(errors)} layers are above); use mode='dequantize', or pass "
            f"tolerance=None to merge all the same"
        )


@contextmanager
def _active(layers: dict[str, LoRALayer], plan: dict[str, tuple[str, ...]]) -> Iterator[None]:
    """Within the block exactly the adapters to be merged add to the output."""
    before = {name: layer.active for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.activate(plan.get(name, ()))
        yield
    finally:
        for name, layer in layers.items():
            layer.activate(before[name])


def _outputs(model: nn.Module, sample: Tensor) -> Tensor:
    with inference(model):
        found = model(sample)
    return getattr(found, "logits", found).double()


def _replace_base(
    name: str,
    layer: LoRALayer,
    names: tuple[str, ...],
    keep: str | None,
    disk: _DiskCopy | None,
    mode: str | None,
) -> None:
    """Put a new base in place of a quantized one, which stays what `unmerge` brings back."""
    old: QuantizedLinear = layer.base
    new = _new_base(old, _merged_tensors(layer, names), mode)
    layer.base_sample = weight_sample(name, weight_values(old))
    layer.base_format = storage_format(old)
    layer.base = new
    layer.merged = names
    if keep is None:
        layer.original = None
    elif disk is None:
        layer.original = {"base": old}
    else:
        for key in _held(old):
            old._parameters[key] = None
        layer.original = {"base": _Emptied(disk, name, old)}


def _kept_apart(
    model: nn.Module,
    plan: dict[str, tuple[str, ...]],
    chosen: dict[str, LoRALayer],
    untie: bool,
) -> set[tuple[str, str]]:
    """Check that everything can be merged; return the (layer, key) that need a new parameter."""
    apart = set()
    lost: dict[str, tuple[float, float]] = {}
    for name, layer in chosen.items():
        _check_kind(name, layer, plan[name])
    for (name, key), owner in _sharers(model, chosen, plan).items():
        if not untie:
            raise ValueError(
                f"merging into {name} would change {owner} too, because both share one {key}; "
                f"pass untie=True to give {name} a {key} of its own"
            )
        apart.add((name, key))
    copied = {id(p) for copies in all_copies(model).values() for p in copies.values()}
    for name, layer in chosen.items():
        dtype = weight_dtype(layer.base)
        merged = _merged_tensors(layer, plan[name])
        if not isinstance(layer.base, QuantizedLinear):
            held = layer.base._parameters
            apart |= {(name, key) for key in merged if id(held[key]) in copied}
        if not all(t.to(dtype).isfinite().all() for t in merged.values()):
            raise ValueError(
                f"the merged weight of {name} must be finite, found NaN or Inf in "
                f"{dtype}; check the adapter, or merge into a wider dtype"
            )
        if torch.finfo(dtype).bits < 32 and not isinstance(layer.base, QuantizedLinear):
            lost[name] = _rounded_away(layer, plan[name], merged["weight"])
    _warn_of_rounding(lost)
    return apart


def _rounded_away(layer: LoRALayer, names: tuple[str, ...], merged: Tensor) -> tuple[float, float]:
    """Return ‖stored − (W + ΔW)‖ and ‖ΔW‖ of a layer."""
    wanted = layer.as_weight(sum(layer.delta_weight(n) for n in names))  # type: ignore[arg-type]
    moved = merged.to(wanted.dtype) - layer.base.weight.detach().to(wanted.dtype)
    return float((moved - wanted).norm()), float(wanted.norm())


def _warn_of_rounding(lost: dict[str, tuple[float, float]]) -> None:
    """Warn where the storage dtype drowns what the adapters add."""
    error, size = (math.hypot(*(pair[i] for pair in lost.values())) for i in (0, 1))
    if error > LOST * size:
        worst = max(lost, key=lambda name: lost[name][0] / max(lost[name][1], 1e-30))
        warnings.warn(
            f"minilora: rounding to the base's dtype loses {error / size:.0%} of what the adapter "
            f"adds (worst: {worst}); load the base in float32 and merge there, or leave the "
            f"adapter beside it",
            UserWarning,
            stacklevel=4,
        )


def _changed(layer: LoRALayer, names: tuple[str, ...]) -> list[str]:
    """Return which of the base's parameters merging these adapters changes."""
    factors: list[Any] = [layer.adapters[n] for n in names]
    return ["weight", "bias"] if any(f.lora_bias is not None for f in factors) else ["weight"]


def _merge_layer(
    name: str,
    layer: LoRALayer,
    names: tuple[str, ...],
    keep: str | None,
    disk: _DiskCopy | None,
    apart: set[tuple[str, str]],
    own: dict[str, nn.Parameter],
) -> None:
    merged = _merged_tensors(layer, names)
    layer.base_sample = weight_sample(name, own.get(f"{name}.weight", layer.base.weight))
    originals: dict[str, Any] = {}
    for key, value in merged.items():
        held = layer.base._parameters[key]
        if (name, key) in apart:
            originals[key] = held  # the parameter itself, put back by unmerge
            layer.base._parameters[key] = nn.Parameter(value, requires_grad=False)
            continue
        if keep is not None:
            originals[key] = held.detach().clone() if disk is None else (disk, f"{name}.{key}")
        held.copy_(value)
    layer.original = None if keep is None else originals
    layer.merged = names


def unmerge(model: nn.Module) -> None:
    """Restore the base weights to the very bits they had before `merge`.

    Args:
        model: a merged model; changed in place.

    Raises:
        ValueError: a model without adapters.
        RuntimeError: nothing is merged, or `merge(keep=None)` kept no original.
    """
    layers = require_layers(model, "unmerge")
    merged = {name: layer for name, layer in layers.items() if layer.merged}
    if not merged:
        raise RuntimeError("unmerge() needs merged weights, found none; call minilora.merge first")
    lost = next((name for name, layer in merged.items() if layer.original is None), None)
    if lost is not None:
        raise RuntimeError(
            f"unmerge() needs the original weights, but merge(keep=None) kept none (first: "
            f"{lost}); load the base again, or merge with keep='memory' or 'disk'"
        )
    files: dict[Path, dict[str, Tensor]] = {}
    originals: dict[str, dict[str, Any]] = {}
    for name, layer in merged.items():
        kept: Any = layer.original
        for key, value in kept.items():
            if isinstance(value, _Emptied):
                files.setdefault(value.disk.file, value.disk.read())
            if not isinstance(value, tuple) or isinstance(value, _Emptied):
                originals.setdefault(name, {})[key] = value
                continue
            disk, entry = value
            if disk.file not in files:
                files[disk.file] = disk.read()
            originals.setdefault(name, {})[key] = files[disk.file][entry]
    with torch.no_grad():
        for name, layer in merged.items():
            for key, value in originals.get(name, {}).items():
                if key == "base":
                    layer.base = _back_in_place(_refilled(value, files), layer.base)
                elif isinstance(value, nn.Parameter):
                    layer.base._parameters[key] = value
                else:
                    layer.base._parameters[key].copy_(value)
            layer.merged, layer.original = (), None
            layer.base_sample = layer.base_format = None
    active = {name for layer in layers.values() for name in layer.active}
    install(model, [name for name in all_adapter_names(model) if name in active])


def _back_in_place(base: QuantizedLinear, merged: Any) -> QuantizedLinear:
    """Do to the kept base what was done to the merged one meanwhile: casts, moves, the mode."""
    base.to(weight_device(merged))
    if weight_dtype(merged) != base.dtype:
        base.to(weight_dtype(merged))
    return base.train(merged.training)


def _refilled(kept: Any, files: dict[Path, dict[str, Tensor]]) -> QuantizedLinear:
    if isinstance(kept, _Emptied):
        for key in kept.module._parameters:
            value = files[kept.disk.file].get(f"{kept.name}.{key}")
            if value is not None:
                kept.module._parameters[key] = nn.Parameter(value, requires_grad=False)
        return kept.module
    return kept
