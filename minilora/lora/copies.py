"""Trained copies of base parameters: what `bias=` and `modules_to_save=` give an adapter.

The base's own parameter stays untouched. Activating an adapter puts its copy in the parameter's
place in the module, deactivating it puts the original back; so any module works, unwrapped. The
copies are kept in a LoRA layer of their adapter, so that they move, save and copy with the model.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from minilora.lora.layer import LoRALayer, lora_layers
from minilora.lora.threads import claimed

Place = tuple[nn.Module, str]  # a module, and a parameter's attribute in it


class TrainedCopies(nn.Module):
    """The copies of one adapter by dotted parameter name, with what they stand for.

    Args:
        values: the copies.
        bias, modules: the options of `inject` that asked for them.
    """

    def __init__(
        self, values: Mapping[str, nn.Parameter], bias: str = "none", modules: Iterable[str] = ()
    ):
        super().__init__()
        self.bias, self.modules_to_save = bias, list(modules)
        self.names = list(values)
        self.values = nn.ParameterList(values.values())
        self.originals = nn.ParameterList()  # the base's own, in the same order
        self.places: list[Place] = []

    def settle(self, places: Mapping[str, Place], own: Mapping[str, nn.Parameter]) -> None:
        """Note where each copied parameter belongs, and the base's own."""
        self.places = [places[name] for name in self.names]
        found = [own.get(n, m._parameters[k]) for n, (m, k) in self._by_name()]
        self.originals = nn.ParameterList(found)

    def _by_name(self) -> list[tuple[str, Place]]:
        return list(zip(self.names, self.places, strict=True))

    def items(self) -> dict[str, nn.Parameter]:
        """Return the copies by their dotted name in the plain model."""
        return dict(zip(self.names, self.values, strict=True))

    def originals_by_name(self) -> dict[str, nn.Parameter]:
        """Return the base's own parameters by the same names."""
        return dict(zip(self.names, self.originals, strict=True))

    def put(self, values: Iterable[nn.Parameter]) -> None:
        """Put these into the places."""
        for (module, key), value in zip(self.places, values, strict=True):
            module._parameters[key] = value


def _holders(model: nn.Module) -> dict[str, TrainedCopies]:
    """Return every adapter's container."""
    found: dict[str, Any] = {}
    for layer in lora_layers(model).values():
        found.update(layer.held.items())
    return found


def all_copies(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Return every adapter's copies by adapter name."""
    return {adapter: held.items() for adapter, held in _holders(model).items()}


def asked_copies(model: nn.Module, adapter: str) -> tuple[str, list[str]]:
    """Return the `bias` and `modules_to_save` that an adapter was made with."""
    held = _holders(model).get(adapter)
    return ("none", []) if held is None else (held.bias, held.modules_to_save)


def copies_of(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Return one adapter's copies by the dotted parameter name of the plain model."""
    return all_copies(model).get(adapter, {})


def original_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the base's own parameters that have copies, by dotted name."""
    found: dict[str, nn.Parameter] = {}
    for held in _holders(model).values():
        found.update(held.originals_by_name())
    return found


def original_of(model: nn.Module, name: str, places: Mapping[str, Place]) -> nn.Parameter:
    """Return the base's own parameter of a dotted name, whether a copy is in its place or not."""
    module, key = places[name]
    own = module._parameters[key]
    assert own is not None  # places list parameters that are there
    return original_parameters(model).get(name, own)


def all_adapter_names(model: nn.Module) -> list[str]:
    """Return the adapters' names in the order they were added."""
    names: dict[str, None] = {}
    for layer in lora_layers(model).values():
        names.update(dict.fromkeys(layer.adapters))
    return list(names)


def add_copies(
    model: nn.Module, adapter: str, copies: TrainedCopies | None, places: Mapping[str, Place]
) -> None:
    """Keep an adapter's copies; `places[name]` is the module and attribute that hold one."""
    if copies is not None:
        copies.settle(places, original_parameters(model))
        _last_layer(model, adapter).held[adapter] = copies


def _last_layer(model: nn.Module, adapter: str) -> LoRALayer:
    return [layer for layer in lora_layers(model).values() if adapter in layer.adapters][-1]


def install(model: nn.Module, active: Iterable[str]) -> None:
    """Put the copies of the active adapters in their places, originals elsewhere."""
    holders = _holders(model)
    for held in holders.values():
        held.put(held.originals)
    for name in active:
        if name in holders:
            holders[name].put(holders[name].values)


@contextmanager
def originals_in_place(model: nn.Module) -> Iterator[None]:
    """Within the block every parameter is the base's own, afterwards copies are back."""
    before = [adapter for adapter in _holders(model) if in_place(model, adapter)]
    with claimed(lora_layers(model).values() if before else ()):
        install(model, ())
        try:
            yield
        finally:
            install(model, before)


def in_place(model: nn.Module, adapter: str) -> bool:
    """Tell whether an adapter's copies are where the model computes with them."""
    held = _holders(model).get(adapter)
    return held is not None and any(
        module._parameters[key] is value
        for (module, key), value in zip(held.places, held.values, strict=True)
    )


def conflict(model: nn.Module, active: Iterable[str]) -> str | None:
    """Say which adapters can't be active together because both bring a copy of one parameter."""
    owner: dict[str, str] = {}
    for adapter in active:
        for name in copies_of(model, adapter):
            if name in owner:
                return (
                    f"{owner[name]!r} and {adapter!r} each bring a trained copy of {name}; copies "
                    f"can't be summed, so activate one of them at a time"
                )
            owner[name] = adapter
    return None


def remove_copies(model: nn.Module, adapter: str | None = None) -> None:
    """Forget an adapter's copies (None: all)."""
    for layer in lora_layers(model).values():
        for name in [n for n in layer.held if adapter in (None, n)]:
            del layer.held[name]


def rename_copies(model: nn.Module, adapter: str, new: str) -> None:
    """Give an adapter's copies another owner's name."""
    for layer in lora_layers(model).values():
        if adapter in layer.held:
            layer.held[new] = layer.held.pop(adapter)
