"""Parameters that are no layer's weight, such as stacked experts: no adapter goes on those."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from minilora.lora.base import view
from minilora.lora.survey import Survey

_WORTH_A_LINE, WORTH_A_WARNING = 0.01, 0.1  # shares of a model's parameters
# Linears that PEFT 0.21, in a model with stacked experts, takes for the experts' own.
_LIKE_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj")


def bare_parameters(survey: Survey) -> dict[str, nn.Parameter]:
    """Return the parameters of 2 or more dimensions that no adapter can reach, by dotted name."""
    takes = {base.module for base in survey.bases.values() if base.problem() is None}
    reached = {p for module in takes for p in module._parameters.values()}
    every = {name: position.value for name, position in survey.parameters.items()}
    return {n: p for n, p in every.items() if not (p in reached or is_lazy(p) or p.ndim < 2)}


def weight_count(module: Any) -> int:
    """Return the number of a module's own weights, as many as a packed one stands for."""
    own = {n: p for n, p in module._parameters.items() if not (p is None or is_lazy(p))}
    base = view(module)
    if base is None or not (base.is_quantized or base.packed):
        return sum(p.numel() for p in own.values())
    bias = 0 if module.bias is None else module.bias.numel()
    return module.in_features * module.out_features + bias


def unreached(survey: Survey) -> tuple[float, str]:
    """Return which share of the weights no adapter can reach, and a sentence ("" below 1 %)."""
    bare = bare_parameters(survey)
    count = sum(p.numel() for p in set(bare.values()))
    owners = {owner._parameters[key]: owner for owner, key in survey.parameters.values()}
    total = sum(map(weight_count, set(owners.values())))
    share = count / max(1, total)
    if share < _WORTH_A_LINE:
        return share, ""
    name, largest = max(bare.items(), key=lambda item: item[1].numel())
    return share, (
        f"no adapter reaches {share:.0%} of the parameters: {len(bare)} are the weight of no "
        f"linear, embedding or 2-D convolution (largest: {name}, {list(largest.shape)})"
    )


def bare_match(matches: Callable[[str], object], survey: Survey) -> str | None:
    """Say so where a pattern means such parameters, or a module that holds them; else None.

    A layer of torch's that takes no adapter (Conv1d and the like) is no such module.
    """
    bare, hits = bare_parameters(survey), []
    for name in bare:
        owner = survey.parameters[name].owner
        of_torch = type(owner).__module__.startswith("torch.nn.")
        if matches(name) or (matches(name.rpartition(".")[0]) and not of_torch):
            hits.append((name, type(owner).__name__))
    if not hits:
        return None
    name, owner_type = hits[0]
    return (
        f"means {len(hits)} parameters that are no layer's weight (first: {name}, "
        f"{list(bare[name].shape)}, of a {owner_type}), and adapters go on layers only; leave it "
        f"out, or train a whole copy of the module with modules_to_save"
    )


def taken_for_experts(survey: Survey, names: list[str]) -> list[str]:
    """Return which of these layers PEFT 0.21 would look for among the model's stacked experts.

    When it loads an adapter for a model of transformers whose experts became one parameter,
    `target_modules` of these names are taken for the experts (huggingface/peft,
    `utils/transformers_weight_conversion.py`), and what lies elsewhere under such a name (shared
    experts, dense blocks) is dropped.
    """
    stacked = any(n.endswith(".experts.gate_up_proj") for n in bare_parameters(survey))
    if not stacked or not hasattr(getattr(survey.root, "config", None), "model_type"):
        return []
    return [name for name in names if name.rpartition(".")[2] in _LIKE_EXPERTS]
