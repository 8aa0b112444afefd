"""Adapters into the base's weights and out again: merge, unmerge."""

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minilora.adapters import (
    active_adapters,
    known_adapters,
    require_layers,
    require_unmerged,
)
from minilora.copies import (
    all_adapter_names,
    all_copies,
    conflict,
    in_place,
    install,
    original_parameters,
)
from minilora.layers import LoRAConv2d, LoRAEmbedding, LoRALinear, is_conv1d
from minilora.lora_layer import LoRALayer, weight_sample


class _DiskCopy:
    """Original weights in one safetensors file that goes when the last user of it goes."""

    def __init__(self, tensors: dict[str, Tensor]):
        folder = tempfile.mkdtemp(prefix="minilora-merge-")
        self.file = Path(folder) / "originals.safetensors"
        self._finalizer = weakref.finalize(self, shutil.rmtree, folder, True)
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, self.file)

    def __deepcopy__(self, memo: dict) -> "_DiskCopy":
        return self  # a copied model reads the same file; it stays until both are gone

    def __reduce__(self):
        return _DiskCopy, (load_file(self.file),)  # a pickle outlives the file, so it holds it


def _merged_tensors(layer: LoRALayer, names: tuple[str, ...]) -> dict[str, Tensor]:
    """W + Σ delta_weight (and b + Σ scaling · lora_bias), summed in f32 (f64), rounded once."""
    weight = layer.base.weight.detach()
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    bias = None
    for name in names:
        wide += layer.as_weight(layer.delta_weight(name).to(wide))
        factors: Any = layer.adapters[name]
        if factors.lora_bias is not None:
            bias = layer.base.bias.detach().to(wide) if bias is None else bias
            bias = bias + factors.lora_bias.detach().to(wide) * factors.scaling
    merged = {"weight": wide.to(weight.dtype)}
    return merged if bias is None else merged | {"bias": bias.to(layer.base.bias.dtype)}


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte and behind the last one."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size() if tensor.numel() else start


def _check_kind(name: str, layer: LoRALayer, names: tuple[str, ...]) -> None:
    base = layer.base
    plain = (
        (type(layer) is LoRALinear and (type(base) is nn.Linear or is_conv1d(base)))
        or type(layer) is LoRAEmbedding
        or (type(layer) is LoRAConv2d and type(base) is nn.Conv2d)
    )
    # Under weight_norm, spectral_norm and pruning `weight` is recomputed by a hook.
    weight = base._parameters.get("weight")
    if not plain or type(weight) is not nn.Parameter or not weight.is_floating_point():
        raise ValueError(
            f"merge() adds to the weight of a plain nn.Linear, Conv1D, nn.Embedding or nn.Conv2d, "
            f"but {name} wraps a {type(base).__name__} whose weight is no plain parameter; leave "
            f"that layer unmerged or use a plain base"
        )
    if "bias" in _changed(layer, names) and base._parameters.get("bias") is None:
        raise ValueError(
            f"merging lora_bias adds to the bias of {name}, found none; leave that adapter unmerged"
        )


def _sharers(
    model: nn.Module, layers: dict[str, LoRALayer], plan: dict[str, tuple[str, ...]]
) -> dict[tuple[str, str], str]:
    """Return, for weights and biases that share memory with another tensor, that one's name."""
    inside = tuple(f"{name}.{part}." for name in layers for part in ("adapters", "held"))
    spans = [
        (tensor.device, *_span(tensor), f"{name}.{key}")
        for name, module in model.named_modules()
        if not f"{name}.".startswith(inside)
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    ]
    found = {}
    for name, layer in layers.items():
        for part in _changed(layer, plan[name]):
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
    keep: str | None = "memory",
    untie: bool = False,
) -> None:
    """Add `scaling · B A` of adapters to the base weights, in place: no branch is left to compute.

    The sum is formed in f32 (f64 for f64 bases) and rounded once to the storage dtype. The
    adapters themselves stay as they are; `save` still writes them.

    Args:
        model: a model with adapters; changed in place.
        adapters: a name, several, or None for the active ones.
        keep: what makes `unmerge` possible: `"memory"` keeps the original weights beside the
            merged ones (as many bytes again), `"disk"` in a temporary file, None nowhere
            (`unmerge` then raises).
        untie: give a layer that shares its weight (a head tied to the embedding) a weight of its
            own for the merged values; `unmerge` ties them again. False refuses such a layer.

    Raises:
        ValueError: unknown names, nothing to merge, a weight shared with another module, a base
            of another kind, a result that is not finite; the model is unchanged.
        RuntimeError: adapters are merged already.
    """
    layers = require_layers(model, "merge")
    require_unmerged(layers, "merge")
    if keep not in ("memory", "disk", None):
        raise ValueError(f"keep must be 'memory', 'disk' or None, found {keep!r}")
    names = active_adapters(model) if adapters is None else known_adapters(model, adapters, "merge")
    if not names:
        raise ValueError("merge() needs an adapter: none is active and none was named")
    problem = conflict(model, names)
    if problem:
        raise ValueError(problem)
    plan = {n: tuple(a for a in names if a in layer.adapters) for n, layer in layers.items()}
    if adapters is None:
        plan = {n: layer.active for n, layer in layers.items()}
    plan = {n: wanted for n, wanted in plan.items() if wanted}
    chosen = {n: layers[n] for n in plan}
    before = [n for n in all_copies(model) if in_place(model, n)]
    own = original_parameters(model)
    install(model, names)
    try:
        # What must not be written: weights that others read, and trained copies.
        apart = _kept_apart(model, plan, chosen, untie)
        disk = None
        if keep == "disk":
            disk = _DiskCopy({f"{n}.{key}": layer.base._parameters[key]
                              for n, layer in chosen.items() for key in _changed(layer, plan[n])
                              if (n, key) not in apart})  # fmt: skip
    except BaseException:
        install(model, before)
        raise
    with torch.no_grad():
        for name, layer in chosen.items():
            _merge_layer(name, layer, plan[name], keep, disk, apart, own)
    for name, layer in layers.items():
        if name not in chosen:  # the merged model is base + names: nothing else adds there either
            layer.merged, layer.original = names, {}


def _kept_apart(
    model: nn.Module, plan: dict[str, tuple[str, ...]], chosen: dict[str, LoRALayer], untie: bool
) -> set[tuple[str, str]]:
    """Check that everything can be merged; return the (layer, key) that need a new parameter."""
    apart = set()
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
        changed = _changed(layer, plan[name])
        apart |= {(name, key) for key in changed if id(layer.base._parameters[key]) in copied}
        if not all(t.isfinite().all() for t in _merged_tensors(layer, plan[name]).values()):
            raise ValueError(
                f"the merged weight of {name} must be finite, found NaN or Inf in "
                f"{layer.base.weight.dtype}; check the adapter, or merge into a wider dtype"
            )
    return apart


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
    originals: dict[str, dict[str, Tensor]] = {}
    for name, layer in merged.items():
        kept: Any = layer.original
        for key, value in kept.items():
            if not isinstance(value, tuple):
                originals.setdefault(name, {})[key] = value
                continue
            disk, entry = value
            if disk.file not in files:
                files[disk.file] = load_file(disk.file)
            originals.setdefault(name, {})[key] = files[disk.file][entry]
    with torch.no_grad():
        for name, layer in merged.items():
            for key, value in originals.get(name, {}).items():
                if isinstance(value, nn.Parameter):
                    layer.base._parameters[key] = value
                else:
                    layer.base._parameters[key].copy_(value)
            layer.merged, layer.original, layer.base_sample = (), None, None
    active = {name for layer in layers.values() for name in layer.active}
    install(model, [name for name in all_adapter_names(model) if name in active])
