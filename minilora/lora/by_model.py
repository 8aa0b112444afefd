# ruff: noqa: D103
"""Questions to a model that a `Survey` answers, for callers that ask only one."""

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from minilora.lora import combination
from minilora.lora.adapter import LoRAAdapter
from minilora.lora.combination import ApproximatedLayer as LayerFit  # noqa: F401
from minilora.lora.combination import Approximation as Fit  # noqa: F401
from minilora.lora.combination import approximated as fitted  # noqa: F401
from minilora.lora.layer import LoRALayer
from minilora.lora.survey import Position, Survey


def plain_modules(model: nn.Module) -> dict[str, Any]:
    return Survey(model).modules


def parameter_places(model: nn.Module) -> dict[str, Position]:
    return Survey(model).parameters


def find_head(model: nn.Module) -> str | None:
    return Survey(model).head


def places_of(model: nn.Module, module: nn.Module) -> list[Position]:
    return Survey(model).positions(module)


def all_adapter_names(model: nn.Module) -> list[str]:
    return Survey(model).adapters


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    return Survey(model).active


def factors_of(model: nn.Module, adapter: str) -> dict[str, LoRAAdapter]:
    return Survey(model).factors(adapter)


def all_copies(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    return {adapter: copies.by_name for adapter, copies in Survey(model).copies.items()}


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


def install(model: nn.Module, adapters: Any) -> None:
    Survey(model).install(adapters)


def require_layers(model: nn.Module, verb: str) -> dict[str, LoRALayer]:
    return Survey(model).require_layers(verb)


def require_unmerged(layers: dict[str, LoRALayer], verb: str) -> None:
    merged = next((layer.merged for layer in layers.values() if layer.merged), None)
    if merged:
        raise RuntimeError(
            f"{verb}() needs unmerged weights, but {', '.join(merged)} is merged into the base; "
            f"call minilora.unmerge(model) first"
        )


def require_values(model: nn.Module, verb: str) -> None:
    Survey(model).require_values(verb)


def require_finite(model: nn.Module) -> None:
    Survey(model).require_finite()


def set_trainable(model: nn.Module, adapter: str, trainable: bool) -> None:
    Survey(model).set_trainable(adapter, trainable)


def check_new_name(model: nn.Module, name: object) -> str:
    return Survey(model).require_new_name(name)


def check_source(model: nn.Module, adapter: str, verb: str) -> None:
    combination.check_source(Survey(model), adapter, verb)


def add_frozen(model: nn.Module, adapter: str, new: Any) -> None:
    combination.add_frozen(Survey(model), adapter, new)


def taken_for_experts(model: nn.Module, modules: Any, names: list[str]) -> list[str]:
    from minilora.lora import bare_parameters

    return bare_parameters.taken_for_experts(Survey(model), names)


def in_place(model: nn.Module, adapter: str) -> bool:
    return adapter in Survey(model).in_place


def known_adapters(model: nn.Module, names: object, verb: str) -> tuple[str, ...]:
    return Survey(model).known(names, verb)


def require_compatible(model: nn.Module, names: Any) -> None:
    Survey(model).require_compatible(names)
