"""Whole-model verbs over the adapters that are there: activate, delete, rename, eject, summary."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from minilora.lora.bare_parameters import unreached, weight_count
from minilora.lora.copies import (
    all_adapter_names,
    all_copies,
    conflict,
    copies_of,
    in_place,
    install,
    remove_copies,
    rename_copies,
)
from minilora.lora.injection import check_adapter_name, places_of
from minilora.lora.layer import LoRALayer, lora_layers
from minilora.lora.selection import plain_modules
from minilora.lora.threads import claimed
from minilora.lora.wrappers import named_modules, named_parameters, unwrapped
from minilora.quantization import QuantizedLinear, is_finite


def require_layers(model: nn.Module, verb: str) -> dict[str, LoRALayer]:
    """Return the LoRA layers, or raise: a verb on a plain model would silently do nothing."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError(
            f"{verb}() needs a model with adapters, found none in {type(model).__name__}; call "
            f"minilora.inject or minilora.load first"
        )
    return layers


def known_adapters(model: nn.Module, names: object, verb: str) -> tuple[str, ...]:
    """Return the adapters named, each one of the model's and named once, else raise."""
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
    return known_adapters(model, name, verb)[0]


def require_unmerged(layers: dict[str, LoRALayer], verb: str) -> None:
    """Raise while adapters are merged: the verb would act beside them."""
    merged = next((layer.merged for layer in layers.values() if layer.merged), None)
    if merged:
        raise RuntimeError(
            f"{verb}() needs unmerged weights, but {', '.join(merged)} is merged into the base; "
            f"call minilora.unmerge(model) first"
        )


def require_values(model: nn.Module, verb: str) -> None:
    """Raise unless every parameter has values: none is on the meta device."""
    for name, parameter in named_parameters(model):
        if parameter.is_meta:
            raise ValueError(
                f"{verb}() needs a model with weights, found {name} on the meta device; load the "
                f"model first"
            )


def require_finite(model: nn.Module) -> None:
    """Raise where an adapter in use holds NaN or Inf, which attention may swallow unseen."""
    for fqn, layer in lora_layers(model).items():
        used = [name for name in (*layer.active, *(layer.rows or ())) if name]
        for adapter in dict.fromkeys(used):
            held = layer.adapters[adapter] if adapter in layer.adapters else nn.Module()
            for part, value in held.named_parameters():
                if not hasattr(value, "full_tensor") and not is_finite(value):  # or it is a shard
                    raise ValueError(
                        f"adapter {adapter!r} must be finite, found NaN or Inf in {part} of {fqn}; "
                        f"load or train it anew"
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
    names = () if adapters is None else known_adapters(model, adapters, "activate")
    train = None if trainable is None else known_adapters(model, trainable, "activate")
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

    The model serves one thread meanwhile: what others ask of it raises.

    Args:
        model: a model with adapters.

    Raises:
        ValueError: a model without adapters.
        RuntimeError: adapters are merged, or another thread is within `disabled` or `mixed`.
    """
    layers = require_layers(model, "disabled")
    require_unmerged(layers, "disabled")
    with claimed(layers.values()):
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


def _require_outside(layers: dict[str, LoRALayer], verb: str) -> None:
    """Raise within `disabled` and `mixed`, which know adapters by their names."""
    if any(layer.thread is not None for layer in layers.values()):
        raise RuntimeError(
            f"{verb}() must be called outside of disabled() and mixed(), which would no longer "
            f"find the adapter; end the block first"
        )


def delete(model: nn.Module, adapter: str) -> None:
    """Take one adapter off; a layer that held only this one becomes plain again.

    Args:
        model: a model with adapters; changed in place.
        adapter: its name. If it was active, the others that were stay so.

    Raises:
        ValueError: an unknown name, or a model without adapters.
        RuntimeError: adapters are merged, or a block of `disabled` or `mixed` is open.
    """
    layers = require_layers(model, "delete")
    adapter = _one(model, adapter, "delete")
    require_unmerged(layers, "delete")
    _require_outside(layers, "delete")
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
        RuntimeError: adapters are merged, or a block of `disabled` or `mixed` is open.
    """
    layers = require_layers(model, "rename")
    adapter = _one(model, adapter, "rename")
    require_unmerged(layers, "rename")
    _require_outside(layers, "rename")
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


def _say_untied(model: Any) -> None:
    """Make a config of transformers say so when a merge has given the head its own weight.

    Programs that read the folder would else take the embedding for the head.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(type(config), "get_text_config"):
        return
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if None not in ends and ends[0].weight is not ends[1].weight:
        for one in (config, config.get_text_config()):
            if getattr(one, "tie_word_embeddings", False):
                one.tie_word_embeddings = False


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
    _say_untied(unwrapped(model))
    for _, module in named_modules(model):  # `inject` may have been called on a part of the model
        trainable = set(module.__dict__.pop("_minilora_trainable", ()))
        module.__dict__.pop("save_pretrained", None)  # transformers' own again
        for name, parameter in named_parameters(module) if trainable else ():
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
    unreached: float = 0.0
    note: str = ""

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
        lines += [self.note] if self.note else []
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
    packed = [m for m in model.modules() if isinstance(m, (QuantizedLinear, nn.Linear))]
    hidden = sum(weight_count(m) - sum(p.numel() for p in m.parameters(False)) for m in packed)
    kept = [
        value
        for layer in layers.values()
        for value in (layer.original or {}).values()  # type: ignore[attr-defined]
        if type(value) is Tensor
    ]
    for layer in layers.values():
        base = (layer.original or {}).get("base")  # type: ignore[attr-defined]
        kept += list(base.parameters()) if isinstance(base, nn.Module) else []
    return Summary(
        tuple(rows),
        sum(p.numel() for p in everything) + hidden,
        sum(p.numel() for p in everything if p.requires_grad),
        sum(p.numel() * p.element_size() for p in everything),
        dict(Counter(layer.last_path or "not run yet" for layer in layers.values())),
        sum(t.numel() * t.element_size() for t in kept),
        *unreached({"": model, **plain_modules(model)}),
    )
