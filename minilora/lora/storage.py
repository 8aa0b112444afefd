"""Bytes by component on shapes alone: what weights, scales and adapters take, allocated or not."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minilora.lora.layer import lora_layers
from minilora.lora.selection import matrix_shape, plain_modules, select_targets
from minilora.lora.wrappers import named_modules
from minilora.quantization import Quantization, QuantizedLinear, packed_format


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parameters and buffers, each tensor counted once.

    Attributes:
        codes: of quantized weights.
        scales: of quantized weights.
        linears: linear layers that are not quantized, their biases and those of quantized ones.
        embeddings: embeddings, and a head that shares its weight with one.
        other: norms and whatever else there is.
        adapters: factors, magnitudes, trained copies.
    """

    codes: int = 0
    scales: int = 0
    linears: int = 0
    embeddings: int = 0
    other: int = 0
    adapters: int = 0

    @property
    def base(self) -> int:
        """Everything but the adapters."""
        return self.total - self.adapters

    @property
    def total(self) -> int:
        """The sum."""
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {n / 1e6:,.1f}" for name, n in vars(self).items() if n)
        return f"{self.total / 1e6:,.1f} MB ({parts})"


def sizes(
    model: nn.Module,
    format: str | None = None,
    *,
    targets: object = "all-linear",
    exclude: object = (),
    layers: Iterable[int] | None = None,
    block_size: int = 64,
    double_quant: bool = True,
    dtype: torch.dtype | None = None,
) -> Sizes:
    """Count a model's bytes, as it is or as `minilora.quantize` would leave it.

    Args:
        model: any module, on the meta device too; not changed.
        format: as for `minilora.quantize`, or None to count what is there.
        targets: likewise.
        exclude: likewise.
        layers: likewise.
        block_size: likewise.
        double_quant: likewise.
        dtype: count floating-point parameters of the base as this; None as they are.

    Raises:
        ValueError: what `minilora.quantize` would refuse by shape.
    """
    found = dict.fromkeys(vars(Sizes()), 0)
    modules = plain_modules(model)
    chosen: dict[str, Quantization] = {}
    if format is not None:
        spec = Quantization(format, block_size, double_quant)
        chosen = dict.fromkeys(select_targets(model, targets, exclude, layers), spec)
        for name in chosen:
            reason = spec.problem(*matrix_shape(modules[name]))
            if reason is not None:
                raise ValueError(f"{name} {reason}")
    owners: dict[int, Any] = {id(m): name for name, m in modules.items()}
    inside = tuple(f"{n}.{part}." for n in lora_layers(model) for part in ("adapters", "held"))
    embedded = {id(m._parameters.get("weight")) for m in modules.values()
                if isinstance(m, nn.Embedding)}  # fmt: skip
    seen: set[int] = set()
    for fqn, module in named_modules(model):
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            asked = chosen.get(owners.get(id(module), ""))
            if name == "weight" and asked is not None:  # a head quantized apart is counted so
                for part, size in asked.nbytes(*matrix_shape(module)).items():
                    found["codes" if part == "codes" else "scales"] += size
                continue
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            cast = dtype is not None and tensor.is_floating_point()
            size = tensor.numel() * (dtype.itemsize if cast and dtype else tensor.element_size())
            if f"{fqn}.".startswith(inside):
                found["adapters"] += tensor.numel() * tensor.element_size()
            elif isinstance(module, QuantizedLinear) and name != "bias":
                found["codes" if name == "codes" else "scales"] += size
            elif name == "weight" and packed_format(module):
                found["codes"] += size  # its scales are no tensors of the module
            elif id(tensor) in embedded:
                found["embeddings"] += size
            else:
                linear = isinstance(module, (nn.Linear, QuantizedLinear))
                linear = linear or type(module).__name__ == "Conv1D"
                found["linears" if linear else "other"] += size
    return Sizes(**found)
