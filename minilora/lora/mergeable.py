"""Merged weights, and whether they can be: the base's class, shared memory, finite sums."""

import functools
import math
import warnings

import torch
from torch import Tensor, nn

from minilora.lora.copies import is_copy
from minilora.lora.layer import LoRALayer
from minilora.lora.survey import Survey
from minilora.lora.wrappers import named_modules

LOST = 0.5  # the part of ΔW from which its rounding is warned of


def merged_tensors(layer: LoRALayer, names: tuple[str, ...]) -> dict[str, Tensor]:
    """W + Σ delta_weight (and b + Σ scaling · lora_bias) in f32 (f64), rounded once.

    Of a quantized layer W is decoded, and the sum is not rounded yet.
    """
    view, base = layer.view, layer.base
    if view.is_quantized:
        wide = base.dequantize(torch.float32)
    else:
        weight = base.weight.detach()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    bias = None
    for name in names:
        delta = layer.delta_weight(name).to(wide)
        wide = wide + (delta if view.is_quantized else view.as_weight(delta))
        adapter = layer.adapters[name]
        if adapter.lora_bias is not None:
            bias = base.bias.detach().to(wide) if bias is None else bias
            bias = bias + adapter.lora_bias.detach().to(wide) * adapter.scaling
    merged = {"weight": wide if view.is_quantized else wide.to(base.weight.dtype)}
    return merged if bias is None else merged | {"bias": bias.to(base.bias.dtype)}


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte and behind the last one."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size() if tensor.numel() else start


def _check_base(name: str, layer: LoRALayer, names: tuple[str, ...]) -> None:
    view, own = layer.view, layer.base._parameters
    if view.packed:
        raise ValueError(
            f"merge() can't add to {name}, which is packed ({view.packed}); save the adapter, load "
            f"it on the same model in full precision and merge it there"
        )
    # Under weight_norm, spectral_norm and pruning `weight` is recomputed by a hook.
    weight = own.get("weight")
    floats = view.is_quantized or (weight is not None and weight.is_floating_point())
    strange = any(type(p) is not nn.Parameter for p in own.values() if p is not None)
    if strange or not floats or not view.is_plain():
        raise ValueError(
            f"merge() adds to the weight of a plain nn.Linear, Conv1D, nn.Embedding or nn.Conv2d, "
            f"but {name} wraps a {view.type.__name__} whose weight is no plain parameter or which "
            f"computes something else; leave that layer unmerged or use a plain base"
        )
    if "bias" in changed(layer, names) and own.get("bias") is None:
        raise ValueError(
            f"merging lora_bias adds to the bias of {name}, found none; leave that adapter unmerged"
        )


def _sharers(survey: Survey, plan: dict[str, tuple[str, ...]]) -> dict[tuple[str, str], str]:
    """Return, for weights and biases that share memory with another tensor, that one's name."""
    inside = tuple(f"{name}.adapters." for name in survey.layers)
    spans = [
        (tensor.device, *_span(tensor), f"{name}.{key}")
        for name, module in named_modules(survey.model)
        if not is_copy(name) and not f"{name}.".startswith(inside)
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    ]
    found = {}
    for name, adapters in plan.items():
        layer = survey.layers[name]
        # A quantized base is replaced, not written to.
        parts = [] if layer.view.is_quantized else changed(layer, adapters)
        for part in parts:
            tensor = layer.base._parameters[part]
            start, end = _span(tensor)
            for device, first, last, owner in spans:
                same_memory = device == tensor.device and first < end and start < last
                if same_memory and owner != f"{name}.base.{part}":
                    found[name, part] = owner
    return found


def check_mergeable(
    survey: Survey, plan: dict[str, tuple[str, ...]], untie: bool, rounded: bool
) -> set[tuple[str, str]]:
    """Check that everything can be merged; return the (layer, key) that others hold too.

    `rounded` is whether quantized layers are stored in their dtype, and not in their format again.
    """
    chosen = {name: survey.layers[name] for name in plan}
    apart = set()
    lost: dict[str, tuple[float, float]] = {}
    for name, layer in chosen.items():
        _check_base(name, layer, plan[name])
    for (name, key), owner in _sharers(survey, plan).items():
        if not untie:
            raise ValueError(
                f"merging into {name} would change {owner} too, because both share one {key}; "
                f"pass --untie (in Python: untie=True) to give {name} a {key} of its own"
            )
        apart.add((name, key))
    copied = {p for copies in survey.copies.values() for p in copies.by_name.values()}
    copied |= set(survey.originals.values())
    for name, layer in chosen.items():
        dtype = layer.view.dtype
        merged = merged_tensors(layer, plan[name])
        if not layer.view.is_quantized:
            held = layer.base._parameters
            apart |= {(name, key) for key in merged if held[key] in copied}
        if not all(t.to(dtype).isfinite().all() for t in merged.values()):
            raise ValueError(
                f"the merged weight of {name} must be finite, found NaN or Inf in "
                f"{dtype}; check the adapter, or merge into a wider dtype"
            )
        if torch.finfo(dtype).bits < 32 and (rounded or not layer.view.is_quantized):
            lost[name] = _rounded_away(layer, plan[name], merged["weight"])
    _warn_of_rounding(lost)
    return apart


def _rounded_away(layer: LoRALayer, names: tuple[str, ...], merged: Tensor) -> tuple[float, float]:
    """Return ‖stored − (W + ΔW)‖ and ‖ΔW‖ of a layer."""
    delta = functools.reduce(torch.add, [layer.delta_weight(name) for name in names])
    if layer.view.is_quantized:
        wanted, dtype = delta.to(merged), layer.view.dtype
        moved = merged.to(dtype).to(merged) - (merged - wanted).to(dtype).to(merged)
    else:
        wanted = layer.view.as_weight(delta)
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
            stacklevel=4,
        )


def changed(layer: LoRALayer, names: tuple[str, ...]) -> list[str]:
    """Return which of the base's parameters merging these adapters changes."""
    biased = any(layer.adapters[name].lora_bias is not None for name in names)
    return ["weight", "bias"] if biased else ["weight"]
