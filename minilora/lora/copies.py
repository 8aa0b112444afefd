"""Trained copies of base parameters: what `bias=` and `modules_to_save=` give an adapter.

The base's own parameter stays untouched. Activating an adapter puts its copy in the parameter's
place in the module, deactivating it puts the original back; so any module works, unwrapped. Copies
are kept in a child of the module whose parameters they stand for, or of the LoRA layer around it,
so that they move, save and copy with it: `lm_head.trained_copies.by_adapter.default.weight`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

CHILD = "trained_copies"


@dataclass(frozen=True)
class TrainedCopies:
    """One adapter's copies by the dotted name of the parameter, and the options that asked.

    `bias` and `modules_to_save` are those of `inject`.
    """

    by_name: dict[str, nn.Parameter]
    bias: str = "none"
    modules_to_save: list[str] = field(default_factory=list)


class _AdapterCopies(nn.Module):
    def __init__(self, asked: TrainedCopies):
        super().__init__()
        self.asked = (asked.bias, asked.modules_to_save)  # no name that a parameter may have


class KeptCopies(nn.Module):
    """The copies of one module's own parameters, by adapter, and the base's own."""

    def __init__(self) -> None:
        super().__init__()
        self.originals: Any = nn.Module()
        self.by_adapter: Any = nn.ModuleDict()

    def forward(self, x: Any) -> Any:
        """Return x: a Sequential calls all its children."""
        return x

    def add(
        self, owner: nn.Module, key: str, value: nn.Parameter, adapter: str, asked: TrainedCopies
    ) -> None:
        """Keep an adapter's copy of one of the owner's parameters."""
        self.originals._parameters.setdefault(key, owner._parameters[key])
        if adapter not in self.by_adapter:
            self.by_adapter[adapter] = _AdapterCopies(asked)
        self.by_adapter[adapter]._parameters[key] = value

    def install(self, owner: nn.Module, adapters: Iterable[str]) -> None:
        """Put the copies of these adapters in the owner's places, originals elsewhere."""
        owner._parameters.update(self.originals._parameters)
        for adapter in adapters:
            if adapter in self.by_adapter:
                owner._parameters.update(self.by_adapter[adapter]._parameters)


def is_copy(name: str) -> bool:
    """Return whether a dotted name is one under which a trained copy or its original is kept."""
    return f".{CHILD}." in f".{name}."
