"""Trained copies of base parameters: what `bias=` and `modules_to_save=` give an adapter.

The base's own parameter stays untouched. Activating an adapter puts its copy in the parameter's
place in the module, deactivating it puts the original back; so any module works, unwrapped.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from minilora.lora_layer import lora_layers

ORIGINAL = "<base>"  # the key of what the copies replaced; no adapter can have this name


class TrainedCopies(nn.Module):
    """The copies of one adapter, or the originals they replaced, by dotted parameter name.

    `bias` and `modules` are the options of `inject` that asked for them.
    """

    def __init__(
        self, values: Mapping[str, nn.Parameter], bias: str = "none", modules: Iterable[str] = ()
    ):
        super().__init__()
        self.bias, self.modules_to_save = bias, list(modules)
        self.names = list(values)
        self.values = nn.ParameterList(values.values())

    def items(self) -> dict[str, nn.Parameter]:
        """Return the parameters by their dotted name in the plain model."""
        return dict(zip(self.names, self.values, strict=True))


def _held(model: nn.Module) -> Any:
    """Return the container of all copies by adapter, originals under `ORIGINAL`, or {}."""
    return getattr(model, "_minilora_copies", {})


def _places(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return the module and attribute that hold each copied parameter."""
    return getattr(model, "_minilora_places", {})


def all_copies(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Return every adapter's copies by adapter name."""
    return {name: c.items() for name, c in _held(model).items() if name != ORIGINAL}


def asked_copies(model: nn.Module, adapter: str) -> tuple[str, list[str]]:
    """Return the `bias` and `modules_to_save` that an adapter was made with."""
    held = _held(model)
    return (held[adapter].bias, held[adapter].modules_to_save) if adapter in held else ("none", [])


def copies_of(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Return one adapter's copies by the dotted parameter name of the plain model."""
    return all_copies(model).get(adapter, {})


def original_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the base's own parameters that have copies, by dotted name."""
    held = _held(model)
    return held[ORIGINAL].items() if held else {}


def original_of(model: nn.Module, name: str, places: Mapping) -> nn.Parameter:
    """Return the base's own parameter of a dotted name, whether a copy is in its place or not."""
    module, key = places[name]
    return original_parameters(model).get(name, module._parameters[key])


def all_adapter_names(model: nn.Module) -> list[str]:
    """Return the adapters' names in the order they were added, copies' owners included."""
    names: dict[str, None] = {}
    for layer in lora_layers(model).values():
        names.update(dict.fromkeys(layer.adapters))
    names.update(dict.fromkeys(all_copies(model)))
    return list(names)


def add_copies(
    model: nn.Module, adapter: str, copies: TrainedCopies | None, places: Mapping
) -> None:
    """Register an adapter's copies; `places[name]` is the module and attribute that hold one."""
    if copies is None:
        return
    values = copies.items()
    if not hasattr(model, "_minilora_copies"):
        model._minilora_copies = nn.ModuleDict({ORIGINAL: TrainedCopies({})})
        model._minilora_places = {}  # type: ignore[assignment]
    held = _held(model)
    originals = held[ORIGINAL].items()
    for name in values:
        if name not in originals:
            module, key = places[name]
            originals[name] = module._parameters[key]
            _places(model)[name] = (module, key)
    held[ORIGINAL] = TrainedCopies(originals)
    held[adapter] = copies


def install(model: nn.Module, active: Iterable[str]) -> None:
    """Put the copies of the active adapters in their places, originals elsewhere."""
    chosen = original_parameters(model)
    for name in active:
        chosen = chosen | copies_of(model, name)
    for name, parameter in chosen.items():
        module, key = _places(model)[name]
        module._parameters[key] = parameter


def in_place(model: nn.Module, adapter: str) -> bool:
    """Tell whether an adapter's copies are where the model computes with them."""
    places = _places(model)
    return any(
        places[name][0]._parameters[places[name][1]] is parameter
        for name, parameter in copies_of(model, adapter).items()
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
    """Forget an adapter's copies (None: all); the last one takes the bookkeeping along."""
    held = _held(model)
    if not held:
        return
    if adapter in held:
        del held[adapter]
    if adapter is None or len(held) == 1:
        del model._minilora_copies, model._minilora_places


def rename_copies(model: nn.Module, adapter: str, new: str) -> None:
    """Give an adapter's copies another owner's name."""
    held = _held(model)
    if adapter in held:
        held[new] = held.pop(adapter)
