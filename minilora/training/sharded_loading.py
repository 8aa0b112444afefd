"""Read a model so that no process ever holds all of it: shapes first, then one tensor at a time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minilora.lora import FROM_WEIGHT, LoRAAdapter, LoRALayer, lora_layers, weight_sample
from minilora.quantization import QuantizedLinear, weight_values
from minilora.training.ranks import Ranks, shard


def sharded(
    ranks: Ranks, inject: Callable[[nn.Module], Any]
) -> Callable[[nn.Module], Callable[[str, Any], None]]:
    """Return the `prepare` of `load_model` and `load_quantized` that loads for FSDP2.

    The model of shapes alone gets its adapters and is sharded; then every rank keeps its part of
    each tensor as it is read, of a quantized layer its part of codes and scales. The factors start
    as in one process with the same random state.

    Args:
        ranks: of kind `"fsdp"`.
        inject: puts the adapters on a model.

    Raises:
        ValueError: (from what is returned) adapters whose start depends on the base's weights.
    """

    def prepare(model: nn.Module) -> Callable[[str, Any], None]:
        inject(model)
        layers = lora_layers(model)
        for fqn, layer in layers.items():
            _check(fqn, layer)
        shard(model)
        model.to_empty(device=ranks.device)
        model.tie_weights()  # type: ignore[operator]
        for layer in layers.values():
            for factors in layer.adapters.values():
                _draw(layer, factors, ranks)
        places = {name.replace(".base.", "."): p for name, p in model.named_parameters()}

        def put(fqn: str, value: Tensor | nn.Module) -> None:
            name = fqn.removesuffix(".weight")
            if isinstance(value, QuantizedLinear):
                for part, tensor in value.named_parameters():
                    ranks.put(places[f"{name}.{part}"], tensor)
                value = weight_values(value)
            else:
                ranks.put(places[fqn], value)  # type: ignore[arg-type]
            if name in layers:  # the whole weight is not at hand later
                layers[name].base_sample = weight_sample(name, value)  # type: ignore[arg-type]

        return put

    return prepare


def _check(fqn: str, layer: LoRALayer) -> None:
    for factors in layer.adapters.values():
        found: Any = factors
        if FROM_WEIGHT.fullmatch(found.init) or found.magnitude is not None:
            raise ValueError(
                f"parallel='fsdp' reads the base in parts, so an adapter can't start from its "
                f"weights, found init={found.init!r}{' and dora' * (found.magnitude is not None)} "
                f"on {fqn}; use --init kaiming without --dora, or --parallel ddp"
            )


def _draw(layer: LoRALayer, factors: Any, ranks: Ranks) -> None:
    """Start an adapter's sharded factors as a process alone would."""
    fresh = LoRAAdapter(
        layer.in_features,
        layer.out_features,
        r=factors.r,
        alpha=factors.alpha,
        init=factors.init,
        lora_bias=factors.lora_bias is not None,
        dtype=factors.lora_A.dtype,
        **layer._shape(),
    )
    with torch.no_grad():
        for name, value in fresh.named_parameters():
            ranks.put(factors.get_parameter(name), value)
