"""Parameters that are no layer's weight, such as stacked experts: no adapter goes on those."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from minilora.lora.kinds import layer_class, unsupported
from minilora.quantization import QuantizedLinear, packed_format

_WORTH_A_LINE, WORTH_A_WARNING = 0.01, 0.1  # shares of a model's parameters
# Linears that PEFT 0.21, in a model with stacked experts, takes for the experts' own.
_LIKE_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj")


def bare_parameters(modules: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """Return the parameters of 2 or more dimensions that no adapter can reach, by dotted name.

    `modules` are all modules of the plain model, by dotted name.
    """
    found, reached = {}, set()
    for name, module in modules.items():
        takes = layer_class(module) is not None and unsupported(module) is None
        for key, parameter in module._parameters.items():
            if takes:
                reached.add(id(parameter))
            elif not (parameter is None or is_lazy(parameter)) and parameter.ndim > 1:
                found[f"{name}.{key}" if name else key] = parameter
    return {name: p for name, p in found.items() if id(p) not in reached}


def weight_count(module: Any) -> int:
    """Return the number of a module's own weights, as many as a packed one stands for."""
    own = {n: p for n, p in module._parameters.items() if not (p is None or is_lazy(p))}
    quantized = isinstance(module, QuantizedLinear)
    if not quantized and not (isinstance(module, nn.Linear) and packed_format(module)):
        return sum(p.numel() for p in own.values())
    bias = 0 if module.bias is None else module.bias.numel()
    return module.in_features * module.out_features + bias


def unreached(modules: Mapping[str, Any]) -> tuple[float, str]:
    """Return which share of the weights no adapter can reach, and a sentence ("" below 1 %)."""
    bare = bare_parameters(modules)
    count = sum({id(p): p.numel() for p in bare.values()}.values())
    holders = {id(p): m for m in modules.values() for p in m._parameters.values() if p is not None}
    total = sum(weight_count(m) for m in {id(m): m for m in holders.values()}.values())
    share = count / max(1, total)
    if share < _WORTH_A_LINE:
        return share, ""
    name, largest = max(bare.items(), key=lambda item: item[1].numel())
    return share, (
        f"no adapter reaches {share:.0%} of the parameters: {len(bare)} are the weight of no "
        f"linear, embedding or 2-D convolution (largest: {name}, {list(largest.shape)})"
    )


def bare_match(matches: Callable[[str], object], modules: Mapping[str, Any]) -> str | None:
    """Say so where a pattern means such parameters, or a module that holds them; else None.

    A layer of torch's that takes no adapter (Conv1d and the like) is no such module.
    """
    bare = bare_parameters(modules)
    holders = {n: n.rpartition(".")[0] for n in bare}
    of_torch = {n for n, m in modules.items() if type(m).__module__.startswith("torch.nn.")}
    hits = [n for n, m in holders.items() if matches(n) or (matches(m) and m not in of_torch)]
    if not hits:
        return None
    name = hits[0]
    holder = type(modules[holders[name]]).__name__
    return (
        f"means {len(hits)} parameters that are no layer's weight (first: {name}, "
        f"{list(bare[name].shape)}, of a {holder}), and adapters go on layers only; leave it out, "
        f"or train a whole copy of the module with modules_to_save"
    )


def taken_for_experts(model: nn.Module, modules: Mapping[str, Any], names: list[str]) -> list[str]:
    """Return which of these layers PEFT 0.21 would look for among the model's stacked experts.

    When it loads an adapter for a model of transformers whose experts became one parameter,
    `target_modules` of these names are taken for the experts (huggingface/peft,
    `utils/transformers_weight_conversion.py`), and what lies elsewhere under such a name (shared
    experts, dense blocks) is dropped.
    """
    stacked = any(n.endswith(".experts.gate_up_proj") for n in bare_parameters(modules))
    if not stacked or not hasattr(getattr(model, "config", None), "model_type"):
        return []
    return [name for name in names if name.rpartition(".")[2] in _LIKE_EXPERTS]
