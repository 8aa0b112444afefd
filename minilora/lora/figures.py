"""What is on a model, in figures: adapters, parameters, and bytes on shapes alone."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minilora.lora.base import Base, is_linear
from minilora.lora.selection import select_targets, unreached, weight_count
from minilora.lora.survey import Survey
from minilora.lora.wrappers import joined
from minilora.quantization import Quantization


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

    def __str__(self) -> str:
        ranks = ", ".join(f"r={r} on {n}" for r, n in self.ranks.items())
        scalings = "/".join(f"{s:g}" for s in self.scalings)
        state = [w for w, on in (("active", self.active), ("merged", self.merged)) if on]
        state.append("trainable" if self.trainable else "frozen")
        return (
            f"adapter {self.name}: {ranks} layers, scaling {scalings}, {self.parameters:,} "
            f"parameters, {', '.join(state)}"
        )


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

    @property
    def base(self) -> int:
        """Parameters of the model without its adapters."""
        return self.parameters - sum(adapter.parameters for adapter in self.adapters)

    def __str__(self) -> str:
        share = 100 * self.trainable / max(1, self.parameters)
        paths = ", ".join(f"{path} {n}" for path, n in self.paths.items())
        lines = [
            f"{self.parameters:,} parameters ({self.bytes / 1e6:,.1f} MB), "
            f"{self.trainable:,} trainable ({share:.3f} %)",
            *map(str, self.adapters),
            f"path last used, by layers: {paths}",
        ]
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
    survey = Survey(model)
    layers = survey.require_layers("summary").values()
    rows = []
    for name in survey.adapters:
        factors = survey.factors(name).values()
        parameters = [p for f in factors for p in f.parameters()]
        parameters += survey.copies_of(name).values()
        rows.append(
            AdapterSummary(
                name,
                len(factors),
                sum(p.numel() for p in parameters),
                sum(p.numel() for p in parameters if p.requires_grad),
                dict(Counter(f.r for f in factors)),
                dict(Counter(f.scaling for f in factors)),
                name in survey.active,
                any(name in layer.merged for layer in survey.with_adapter(name).values()),
            )
        )
    everything = list(model.parameters())
    packed = {m for m in survey.modules.values() if is_linear(m)}
    hidden = sum(weight_count(m) - sum(p.numel() for p in m.parameters(False)) for m in packed)
    there = set(everything)
    kept = [tensor for layer in layers for tensor in layer.kept() if tensor not in there]
    return Summary(
        tuple(rows),
        sum(p.numel() for p in everything) + hidden,
        sum(p.numel() for p in everything if p.requires_grad),
        sum(p.numel() * p.element_size() for p in everything),
        dict(Counter(layer.last_path or "not run yet" for layer in layers)),
        sum(t.numel() * t.element_size() for t in kept),
        *unreached(survey),
    )


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
        targets, exclude, layers, block_size, double_quant: as for `minilora.quantize`.
        dtype: count floating-point parameters of the base as this; None as they are.

    Raises:
        ValueError: what `minilora.quantize` would refuse by shape.
    """
    found = dict.fromkeys(vars(Sizes()), 0)
    survey = Survey(model)
    chosen: dict[str, dict[str, int]] = {}  # the bytes of a layer's codes and scales
    if format is not None:
        spec = Quantization(format, block_size, double_quant)
        for name in select_targets(survey, targets, exclude, layers):
            shape = survey.bases[name].shape
            reason = spec.problem(*shape)
            if reason is not None:
                raise ValueError(f"{name} {reason}")
            chosen[name] = spec.nbytes(*shape)
    tables = [f"{n}.weight" for n, base in survey.bases.items() if base.family == "embedding"]
    embedded = {survey.original(name) for name in tables if name in survey.parameters}
    seen: set[Any] = set()
    replaced: set[Any] = set()
    for fqn, module in survey.everything.items():
        for key, held in [*module._parameters.items(), *module._buffers.items()]:
            name = joined(fqn, key)
            tensor: Any = survey.original(name) if name in survey.parameters else held
            if tensor is None:
                continue
            if key == "weight" and fqn in chosen:  # a head quantized apart is counted so
                for part, size in chosen[fqn].items():
                    found["codes" if part == "codes" else "scales"] += size
                replaced.add(tensor)
                continue
            if tensor in seen:
                continue
            seen.add(tensor)
            cast = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            component = _component(survey.bases.get(fqn), key, tensor in embedded)
            found[component] += tensor.numel() * cast.itemsize
    for tensor in {*model.parameters(), *model.buffers()} - seen - replaced:
        found["adapters"] += tensor.numel() * tensor.element_size()
    return Sizes(**found)


def _component(base: Base | None, key: str, embedded: bool) -> str:
    """Return which of `Sizes` one of a module's tensors counts to."""
    if base is not None and base.is_quantized and key != "bias":
        return "codes" if key == "codes" else "scales"
    if base is not None and base.packed and key == "weight":
        return "codes"  # its scales are no tensors of the module
    if embedded:
        return "embeddings"
    return "linears" if base is not None and base.family == "linear" else "other"
