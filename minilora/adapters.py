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

from minilora.copies import (
    all_adapter_names,
    all_copies,
    conflict,
    copies_of,
    in_place,
    install,
    original_parameters,
    remove_copies,
    rename_copies,
)
from minilora.injection import check_adapter_name, places_of
from minilora.layers import LoRAConv2d, LoRAEmbedding, LoRALinear, is_conv1d
from minilora.lora_layer import LoRALayer, lora_layers, weight_sample


def require_layers(model: nn.Module, verb: str) -> dict[str, LoRALayer]:
    """Return the LoRA layers, or raise: a verb on a plain model would silently do nothing."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError(
            f"{verb}() needs a model with adapters, found none in {type(model).__name__}; call "
            f"minilora.inject or minilora.load first"
        )
    return layers


def _known(model: nn.Module, names: object, verb: str) -> tuple[str, ...]:
    wanted = (names,) if isinstance(names, str) else names
    if not isinstance(wanted, Sequence) or not all(isinstance(name, str) for name in wanted):
        raise TypeError(
            f"{verb}() takes an adapter's name, a list of names or None, found {names!r}"
        )
    present = all_adapter_names(model)
    for name in wanted:
        if name not in present:
            raise ValueError(f"there is no adapter {name!r}; this model has: {', '.join(present)}")
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"each adapter may be named once, found {list(wanted)}")
    return tuple(wanted)


def _one(model: nn.Module, name: object, verb: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{verb}() takes one adapter's name, found {name!r}")
    return _known(model, name, verb)[0]


def require_unmerged(layers: dict[str, LoRALayer], verb: str) -> None:
    """Raise while adapters are merged: the verb would act beside them."""
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
    require_unmerged(layers, "activate")
    problem = conflict(model, names)
    if problem:
        raise ValueError(problem)
    for fqn, layer in layers.items():
        room, used = layer.slot_room(), layer.ranks(names)
        if room is not None and used > room:
            raise ValueError(
                f"active adapters must fit the slots of prepare_switching (max_r={room}), found "
                f"ranks {used} on {fqn}; prepare larger slots"
            )
    for layer in layers.values():
        layer.activate(names)
    install(model, names)
    for name in all_adapter_names(model) if train is not None else ():
        set_trainable(model, name, train is not None and name in train)


def set_trainable(model: nn.Module, adapter: str, trainable: bool) -> None:
    """Set `requires_grad` of all that belongs to an adapter, and of nothing else."""
    for layer in lora_layers(model).values():
        if adapter in layer.adapters:
            layer.adapters[adapter].requires_grad_(trainable)
    for parameter in copies_of(model, adapter).values():
        parameter.requires_grad_(trainable)


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Return the adapters that are active somewhere, or whose copies are in place."""
    names = {name for layer in lora_layers(model).values() for name in layer.active}
    names |= {name for name in all_copies(model) if in_place(model, name)}
    return tuple(name for name in all_adapter_names(model) if name in names)


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
    require_unmerged(layers, "disabled")
    before = {name: layer.active for name, layer in layers.items()}
    names = active_adapters(model)
    try:
        for layer in layers.values():
            layer.activate(())
        install(model, ())
        yield
    finally:
        for name, layer in layers.items():
            layer.activate(before[name])
        install(model, names)


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
    names = active_adapters(model) if adapters is None else _known(model, adapters, "merge")
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


def delete(model: nn.Module, adapter: str) -> None:
    """Take one adapter off; a layer that held only this one becomes plain again.

    Args:
        model: a model with adapters; changed in place.
        adapter: its name. If it was active, the others that were stay so.

    Raises:
        ValueError: an unknown name, or a model without adapters.
        RuntimeError: adapters are merged.
    """
    layers = require_layers(model, "delete")
    adapter = _one(model, adapter, "delete")
    require_unmerged(layers, "delete")
    if all_adapter_names(model) == [adapter]:
        eject(model)
        return
    names = tuple(name for name in active_adapters(model) if name != adapter)
    for layer in layers.values():
        if adapter in layer.adapters:
            del layer.adapters[adapter]
        layer.activate([name for name in layer.active if name != adapter])
    install(model, names)
    remove_copies(model, adapter)
    for layer in layers.values():
        if not layer.adapters:
            _put_back(model, layer)


def rename(model: nn.Module, adapter: str, new: str) -> None:
    """Give an adapter another name; its place in the order of the active ones stays.

    Args:
        model: a model with adapters; changed in place.
        adapter: its name now.
        new: the name to give it.

    Raises:
        ValueError: an unknown name, or a new one that is in use or can't be a name.
        RuntimeError: adapters are merged.
    """
    layers = require_layers(model, "rename")
    adapter = _one(model, adapter, "rename")
    require_unmerged(layers, "rename")
    check_adapter_name(new)
    if new in all_adapter_names(model):
        raise ValueError(f"the model already has an adapter {new!r}; choose another name")
    for layer in layers.values():
        if adapter in layer.adapters:
            held = {new if n == adapter else n: f for n, f in layer.adapters.items()}
            layer.adapters.clear()
            layer.adapters.update(held)
        layer.active = tuple(new if n == adapter else n for n in layer.active)
    rename_copies(model, adapter, new)


def _put_back(model: nn.Module, layer: LoRALayer) -> None:
    for parent, child in places_of(model, layer):
        parent._modules[child] = layer.base


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
    if not any(layer.merged for layer in layers.values()):
        install(model, ())
    for copies in all_copies(model).values():  # one that a merge left in place is plain now
        for parameter in copies.values():
            parameter.requires_grad_(False)
    remove_copies(model)
    for layer in layers.values():
        _put_back(model, layer)
    for module in model.modules():  # `inject` may have been called on a part of the model
        trainable = set(module.__dict__.pop("_minilora_trainable", ()))
        for name, parameter in module.named_parameters(remove_duplicate=False):
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
    for name in all_adapter_names(model):
        mine = [layer for layer in layers.values() if name in layer.adapters]
        factors: list[Any] = [layer.adapters[name] for layer in mine]
        parameters = [p for f in factors for p in f.parameters()]
        parameters += copies_of(model, name).values()
        rows.append(
            AdapterSummary(
                name,
                len(mine),
                sum(p.numel() for p in parameters),
                sum(p.numel() for p in parameters if p.requires_grad),
                dict(Counter(f.r for f in factors)),
                dict(Counter(f.scaling for f in factors)),
                name in active_adapters(model),
                any(name in layer.merged for layer in mine),
            )
        )
    everything = list(model.parameters())
    kept = [
        value
        for layer in layers.values()
        for value in (layer.original or {}).values()  # type: ignore[attr-defined]
        if type(value) is Tensor
    ]
    return Summary(
        tuple(rows),
        sum(p.numel() for p in everything),
        sum(p.numel() for p in everything if p.requires_grad),
        sum(p.numel() * p.element_size() for p in everything),
        dict(Counter(layer.last_path or "not run yet" for layer in layers.values())),
        sum(t.numel() * t.element_size() for t in kept),
    )
