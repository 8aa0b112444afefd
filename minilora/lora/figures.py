"""What is on a model, in figures."""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from minilora.lora.bare_parameters import unreached, weight_count
from minilora.lora.base import is_linear
from minilora.lora.survey import Survey


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
