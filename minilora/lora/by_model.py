# ruff: noqa: D103
"""Questions to a model that a `Survey` answers, for callers that ask only one."""

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from minilora.lora.adapter import LoRAAdapter
from minilora.lora.layer import LoRALayer
from minilora.lora.survey import Position, Survey


def plain_modules(model: nn.Module) -> dict[str, Any]:
    return Survey(model).modules


def parameter_places(model: nn.Module) -> dict[str, Position]:
    return Survey(model).parameters


def find_head(model: nn.Module) -> str | None:
    return Survey(model).head


def all_adapter_names(model: nn.Module) -> list[str]:
    return Survey(model).adapters


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    return Survey(model).active


def factors_of(model: nn.Module, adapter: str) -> dict[str, LoRAAdapter]:
    return Survey(model).factors(adapter)


def copies_of(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    return Survey(model).copies_of(adapter)


def asked_copies(model: nn.Module, adapter: str) -> tuple[str, list[str]]:
    copies = Survey(model).copies.get(adapter)
    return ("none", []) if copies is None else (copies.bias, copies.modules_to_save)


def original_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return Survey(model).originals


def original_of(model: nn.Module, name: str, places: Any) -> nn.Parameter:
    return Survey(model).original(name)


def originals_in_place(model: nn.Module) -> AbstractContextManager[None]:
    return Survey(model).originals_in_place()


def require_layers(model: nn.Module, verb: str) -> dict[str, LoRALayer]:
    return Survey(model).require_layers(verb)


def require_values(model: nn.Module, verb: str) -> None:
    Survey(model).require_values(verb)


def set_trainable(model: nn.Module, adapter: str, trainable: bool) -> None:
    Survey(model).set_trainable(adapter, trainable)
