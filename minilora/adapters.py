"""Whole-model verbs over the adapters that are there: activate, merge, unmerge, eject, summary."""

import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minilora.injection import places_of
from minilora.layers import LoRALinear, lora_layers, weight_sample


def require_layers(model: nn.Module, verb: str) -> dict[str, LoRALinear]:
    """Return the LoRA layers, or raise: a verb on a plain model would silently do nothing."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError(
            f"{verb}() needs a model with adapters, found none in {type(model).__name__}; call "
            f"minilora.inject or minilora.load first"
        )
    return layers


def adapter_names(model: nn.Module) -> list[str]:
    """Return the adapters' names in the order they were added."""
    names: dict[str, None] = {}
    for layer in lora_layers(model).values():
        names.update(dict.fromkeys(layer.adapters))
    return list(names)


def _known(model: nn.Module, names: object, verb: str) -> tuple[str, ...]:
    wanted = (names,) if isinstance(names, str) else names
    if not isinstance(wanted, Sequence) or not all(isinstance(name, str) for name in wanted):
        raise TypeError(
            f"{verb}() takes an adapter's name, a list of names or None, found {names!r}"
        )
    present = adapter_names(model)
    for name in wanted:
        if name not in present:
            raise ValueError(f"there is no adapter {name!r}; this model has: {', '.join(present)}")
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"each adapter may be named once, found {list(wanted)}")
    return tuple(wanted)


def _refuse_merged(layers: dict[str, LoRALinear], verb: str) -> None:
    merged = next((layer.merged for layer in layers.values() if layer.merged), None)
    if merged:
        raise RuntimeError(
            f"{verb}() needs unmerged weights, but {', '.join(merged)} is merged into the base; "
            f"call minilora.unmerge(model) first"
        )


def activate(
    model: nn.Module,
    adapters: str | Sequence[str] | None,
    *,
    trainable: str | Sequence[str] | None = None,
) -> None:
    """Choose which adapters add to the output; several sum, None leaves the base alone.

    Args:
        model: a model with adapters; changed in place.
        adapters: a name, several, or None for the base.
        trainable: when given, exactly these adapters require gradients afterwards (`[]`: none);
            None leaves every `requires_grad` as it is.

    Raises:
        ValueError: an unknown or repeated name, or a model without adapters.
        RuntimeError: adapters are merged.
    """
    layers = require_layers(model, "activate")
    names = () if adapters is None else _known(model, adapters, "activate")
    train = None if trainable is None else _known(model, trainable, "activate")
    _refuse_merged(layers, "activate")
    for layer in layers.values():
        layer.active = tuple(name for name in names if name in layer.adapters)
        if train is not None:
            for name, factors in layer.adapters.items():
                factors.requires_grad_(name in train)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the model is its base; afterwards the active adapters are back.

    Args:
        model: a model with adapters.

    Raises:
        ValueError: a model without adapters.
        RuntimeError: adapters are merged.
    """
    layers = require_layers(model, "disabled")
    _refuse_merged(layers, "disabled")
    before = {name: layer.active for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.active = ()
        yield
    finally:
        for name, layer in layers.items():
            layer.active = before[name]


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


def _merged_weight(layer: LoRALinear, names: tuple[str, ...]) -> Tensor:
    """W + Σ delta_weight, summed in f32 (f64) and rounded once to the storage dtype."""
    weight = layer.base.weight.detach()
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for name in names:
        factors: Any = layer.adapters[name]
        wide += factors.delta_weight().to(wide)
    return wide.to(weight.dtype)


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte and behind the last one."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size() if tensor.numel() else start


def _check_mergeable(model: nn.Module, layers: dict[str, LoRALinear]) -> None:
    for name, layer in layers.items():
        base = layer.base
        # Under weight_norm, spectral_norm and pruning `weight` is recomputed by a hook.
        weight = base._parameters.get("weight") if type(base) is nn.Linear else None
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise ValueError(
                f"merge() adds to the weight of a plain nn.Linear, but {name} wraps a "
                f"{type(base).__name__} whose weight is no plain parameter; leave that layer "
                f"unmerged or use a plain base"
            )
    spans = [
        (tensor.device, *_span(tensor), f"{name}.{key}")
        for name, module in model.named_modules()
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    ]
    for name, layer in layers.items():
        start, end = _span(layer.base.weight)
        others = [
            owner
            for device, first, last, owner in spans
            if device == layer.base.weight.device and first < end and start < last
            if owner != f"{name}.base.weight"
        ]
        if others:
            raise ValueError(
                f"merging into {name} would change {others[0]} too, because both share one "
                f"weight; untie them first (for example {name}.base.weight = "
                f"nn.Parameter({name}.base.weight.clone()))"
            )


def merge(
    model: nn.Module, adapters: str | Sequence[str] | None = None, *, keep: str | None = "memory"
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

    Raises:
        ValueError: unknown names, nothing to merge, a weight shared with another module, a base
            that is no plain nn.Linear, a result that is not finite; the model is unchanged.
        RuntimeError: adapters are merged already.
    """
    layers = require_layers(model, "merge")
    _refuse_merged(layers, "merge")
    if keep not in ("memory", "disk", None):
        raise ValueError(f"keep must be 'memory', 'disk' or None, found {keep!r}")
    names = None if adapters is None else _known(model, adapters, "merge")
    plan = {}
    for fqn, layer in layers.items():
        wanted = layer.active if names is None else tuple(n for n in names if n in layer.adapters)
        if wanted:
            plan[fqn] = wanted
    if not plan:
        raise ValueError("merge() needs an adapter: none is active and none was named")
    chosen = {fqn: layers[fqn] for fqn in plan}
    _check_mergeable(model, chosen)
    for fqn, layer in chosen.items():  # a first pass that changes nothing
        if not torch.isfinite(_merged_weight(layer, plan[fqn])).all():
            raise ValueError(
                f"the merged weight of {fqn} must be finite, found NaN or Inf in "
                f"{layer.base.weight.dtype}; check the adapter, or merge into a wider dtype"
            )
    disk = None
    if keep == "disk":
        disk = _DiskCopy({fqn: layer.base.weight for fqn, layer in chosen.items()})
    with torch.no_grad():
        for fqn, layer in chosen.items():
            weight = layer.base.weight
            layer.base_sample = weight_sample(fqn, weight)
            if keep == "memory":
                layer.original = weight.detach().clone()
            else:
                layer.original = None if disk is None else (disk, fqn)
            weight.copy_(_merged_weight(layer, plan[fqn]))
            layer.merged = plan[fqn]


def unmerge(model: nn.Module) -> None:
    """Restore the base weights to the very bits they had before `merge`.

    Args:
        model: a merged model; changed in place.

    Raises:
        ValueError: a model without adapters.
        RuntimeError: nothing is merged, or `merge(keep=None)` kept no original.
    """
    layers = require_layers(model, "unmerge")
    merged = {fqn: layer for fqn, layer in layers.items() if layer.merged}
    if not merged:
        raise RuntimeError("unmerge() needs merged weights, found none; call minilora.merge first")
    lost = next((fqn for fqn, layer in merged.items() if layer.original is None), None)
    if lost is not None:
        raise RuntimeError(
            f"unmerge() needs the original weights, but merge(keep=None) kept none (first: "
            f"{lost}); load the base again, or merge with keep='memory' or 'disk'"
        )
    files: dict[Path, dict[str, Tensor]] = {}
    originals: dict[str, Tensor] = {}
    for fqn, layer in merged.items():
        original: Any = layer.original
        if isinstance(original, tuple):
            disk, key = original
            if disk.file not in files:
                files[disk.file] = load_file(disk.file)
            original = files[disk.file][key]
        originals[fqn] = original
    with torch.no_grad():
        for fqn, layer in merged.items():
            layer.base.weight.copy_(originals[fqn])
            layer.merged, layer.original, layer.base_sample = (), None, None


def eject(model: nn.Module) -> nn.Module:
    """Take every adapter off and give the plain model back, merged or not, in place.

    After `merge` the plain layers hold the merged weights, else the original ones. Parameters
    that required gradients before the first `inject` do so again.

    Args:
        model: a model with adapters; changed in place.

    Returns:
        The same model; its state dict has the keys it had before `inject`.

    Raises:
        ValueError: a model without adapters.
    """
    layers = require_layers(model, "eject")
    for layer in layers.values():
        for parent, child in places_of(model, layer):
            parent._modules[child] = layer.base
    for module in model.modules():  # `inject` may have been called on a part of the model
        trainable = set(module.__dict__.pop("_minilora_trainable", ()))
        for name, parameter in module.named_parameters() if trainable else ():
            if name in trainable:
                parameter.requires_grad_(True)
    return model


@dataclass(frozen=True)
class AdapterSummary:
    """One adapter in figures: ranks and scalings as `{value: layers}`."""

    name: str
    layers: int
    parameters: int
    trainable: int
    ranks: dict[int, int]
    scalings: dict[float, int]
    active: bool
    merged: bool


@dataclass(frozen=True)
class Summary:
    """What `minilora.summary` found; prints as a short table."""

    adapters: tuple[AdapterSummary, ...]
    parameters: int
    trainable: int
    bytes: int
    paths: dict[str, int]
    kept_bytes: int

    def __str__(self) -> str:
        share = 100 * self.trainable / max(1, self.parameters)
        lines = [
            f"{self.parameters:,} parameters ({self.bytes / 1e6:,.1f} MB), "
            f"{self.trainable:,} trainable ({share:.3f} %)"
        ]
        for a in self.adapters:
            ranks = ", ".join(f"r={r} on {n}" for r, n in a.ranks.items())
            scalings = "/".join(f"{s:g}" for s in a.scalings)
            state = [w for w, on in (("active", a.active), ("merged", a.merged)) if on]
            state.append("trainable" if a.trainable else "frozen")
            lines.append(
                f"adapter {a.name}: {ranks} layers, scaling {scalings}, {a.parameters:,} "
                f"parameters, {', '.join(state)}"
            )
        paths = ", ".join(f"{path} {n}" for path, n in self.paths.items())
        lines.append(f"path last used, by layers: {paths}")
        if self.kept_bytes:
            lines.append(f"originals kept in memory for unmerge: {self.kept_bytes / 1e6:,.1f} MB")
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Count what is there: parameters, adapters, what is active or merged, which path ran.

    Args:
        model: a model with adapters; not changed.

    Returns:
        A `Summary`; parameters in numbers, memory in bytes.

    Raises:
        ValueError: a model without adapters.
    """
    layers = require_layers(model, "summary")
    rows = []
    for name in adapter_names(model):
        mine = [layer for layer in layers.values() if name in layer.adapters]
        factors: list[Any] = [layer.adapters[name] for layer in mine]
        parameters = [p for f in factors for p in f.parameters()]
        rows.append(
            AdapterSummary(
                name,
                len(mine),
                sum(p.numel() for p in parameters),
                sum(p.numel() for p in parameters if p.requires_grad),
                dict(Counter(f.r for f in factors)),
                dict(Counter(f.scaling for f in factors)),
                any(name in layer.active for layer in mine),
                any(name in layer.merged for layer in mine),
            )
        )
    everything = list(model.parameters())
    kept = [layer.original for layer in layers.values() if isinstance(layer.original, Tensor)]
    return Summary(
        tuple(rows),
        sum(p.numel() for p in everything),
        sum(p.numel() for p in everything if p.requires_grad),
        sum(p.numel() * p.element_size() for p in everything),
        dict(Counter(layer.last_path or "not run yet" for layer in layers.values())),
        sum(t.numel() * t.element_size() for t in kept),
    )
