"""What `minilora.explain` found, as an object, a terminal table and JSON."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from minilora.files import write
from minilora.lora import Approximation
from minilora.report.ablation import Ablation
from minilora.report.attention import Attention
from minilora.report.spectra import LayerReport, truncation_error
from minilora.report.subspace import Comparison, rank_pattern
from minilora.report.tokens import Gap, Measured, ShownExample, TokenEffect
from minilora.running import FEWEST, TOO_FEW

ROWS = 12  # of a table in the terminal


@dataclass(frozen=True)
class CopyReport:
    """A trained copy of a base parameter: the norms of what it changes, and of the original."""

    name: str
    norm: float
    weight_norm: float


@dataclass(frozen=True)
class Behaviour:
    """What the adapter does to held-out data."""

    loss: Measured  # before and after, per token
    truncated: float | None  # cut to the suggested ranks, None where it can't be cut
    better: float  # the share of tokens whose loss fell
    helped: tuple[TokenEffect, ...]  # the tokens whose loss fell most
    hurt: tuple[TokenEffect, ...]
    examples: tuple[ShownExample, ...]  # a few, token by token
    ablations: tuple[Ablation, ...]  # the whole adapter first; empty when they were not asked for
    ablated: tuple[int, int]  # over how many examples and tokens they were measured
    attention: Attention | None
    token_losses: tuple[list[Tensor], list[Tensor]] = field(repr=False, compare=False)

    @property
    def few_ablated(self) -> bool:
        """Whether the ablations are over too few examples for standard errors."""
        return self.ablated[0] < FEWEST


@dataclass(frozen=True)
class Explanation:
    """What an adapter changed, where, and whether it matters; prints as tables.

    Attributes:
        adapter: its name.
        keep: the share of each layer's energy that the suggested ranks keep.
        layers: one report per layer.
        copies: trained copies (`bias=`, `modules_to_save=`), beside the layers.
        truncation: the adapter cut to the suggested ranks, as measured on the stored factors; None
            for adapters that are more than products B A.
        comparison: with `against`.
        behaviour: with `data`.
        gap: with `train` too.
        forgetting: with `outside`: loss on text outside the task.
        about: what was measured, on what and when, by what it is called: adapter, base, data, date.
    """

    adapter: str
    keep: float
    layers: tuple[LayerReport, ...]
    copies: tuple[CopyReport, ...]
    truncation: Approximation | None
    comparison: Comparison | None
    behaviour: Behaviour | None
    gap: Gap | None
    forgetting: Measured | None
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def suggestion(self) -> tuple[int, dict[str, int]]:
        """r and rank_pattern for `minilora.inject` with the suggested rank on every layer."""
        return rank_pattern({layer.name: layer.suggested_r for layer in self.layers})

    @property
    def predicted_error(self) -> float:
        """Relative error of the truncated adapter over all layers, from the spectra."""
        lost = kept = 0.0
        for layer in self.layers:
            whole = math.fsum(s * s for s in layer.singular_values)
            lost += whole * truncation_error(layer.singular_values, layer.suggested_r) ** 2
            kept += whole
        return math.sqrt(lost / kept) if kept else 0.0

    @property
    def ranks(self) -> tuple[int, int]:
        """The sum of the ranks, and of the suggested ones."""
        return sum(v.r for v in self.layers), sum(v.suggested_r for v in self.layers)

    @property
    def intruders(self) -> tuple[int, int, int] | None:
        """Intruder dimensions, layers that have some, layers compared; None without any."""
        known = [v.intruders for v in self.layers if v.intruders is not None]
        return (sum(known), sum(map(bool, known)), len(known)) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the tensors as plain values, infinities as null."""
        found = _plain(self)
        del found["truncation"]
        return found | {
            "suggestion": dict(zip(("r", "rank_pattern"), self.suggestion, strict=True)),
            "predicted_error": _plain(self.predicted_error),
            "truncation_error": None if self.truncation is None else _plain(self.truncation.error),
        }

    def to_json(self, file: str | Path) -> Path:
        """Write `to_dict` to a file."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        return write(file, text + "\n")

    def to_html(self, file: str | Path) -> Path:
        """Write one page with plots that needs nothing beside it: no script, no network."""
        from minilora.report.page import page

        return write(file, page(self))

    def __str__(self) -> str:
        return "\n".join(_text(self))


_DERIVED = {  # what else is written of an object
    LayerReport: ("relative", "spectral_norm", "effective_rank", "energy", "intruders"),
    Measured: ("clear",),
    Gap: ("overfitted", "verdict"),
}


def _plain(value: Any) -> Any:
    """Make JSON's types of objects, tuples, mappings and floats that are not finite."""
    if is_dataclass(value):
        names = [one.name for one in fields(value) if one.repr]
        return {name: _plain(getattr(value, name))
                for name in (*names, *_DERIVED.get(type(value), ()))}  # fmt: skip
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out cells in columns, the first left, the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    aligns = "<" + ">" * (len(header) - 1)
    return [
        "  ".join(f"{c:{a}{w}}" for c, a, w in zip(row, aligns, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]


def percent(share: float | None) -> str:
    """Write a share as a percentage of three digits."""
    if share is None:
        return "–"
    return f"{100 * share:,.0f} %" if 10 <= share < math.inf else f"{100 * share:.3g} %"


def median_energy(layers: Sequence[LayerReport]) -> list[float]:
    """Return the share of ‖ΔW‖² kept at rank 1 to 8, its median over layers."""
    count = min(8, max(len(layer.energy) for layer in layers))
    return [
        statistics.median(v.energy[min(k, len(v.energy) - 1)] for v in layers) for k in range(count)
    ]


def layer_row(layer: LayerReport) -> list[str]:
    """Return a layer's cells, as text."""
    return [
        layer.name, str(layer.r), f"{layer.norm:.3g}", percent(layer.relative),
        f"{layer.spectral_norm:.3g}", f"{layer.effective_rank:.1f}", str(layer.suggested_r),
        percent(layer.truncation_error), percent(layer.overlap_out), percent(layer.overlap_in),
        "–" if layer.intruders is None else str(layer.intruders),
    ]  # fmt: skip


LAYER_HEADER = (
    "module", "r", "‖ΔW‖", "‖ΔW‖/‖W‖", "σ₁", "eff. rank", "suggested r", "error", "in W's outputs",
    "in W's inputs", "intruders",
)  # fmt: skip


def measured_line(what: str, loss: Measured) -> str:
    """Write a loss before and after with its uncertainty."""
    return (
        f"{what}: loss {loss.before:.4f} → {loss.after:.4f} "
        f"({signed(loss.change, loss.error, loss.few)}) over {loss.tokens} tokens{loss.caveat}"
    )


def verdicts(explained: Explanation) -> list[str]:
    """Put into words what the figures mean, as far as they are there."""
    lines = []
    top = max(explained.layers, key=lambda layer: layer.relative)
    middle = statistics.median(layer.relative for layer in explained.layers)
    lines.append(
        f"{len(explained.layers)} layers changed by {percent(middle)} of their norm (median), most "
        f"{top.name} ({percent(top.relative)})"
    )
    if explained.intruders is not None:
        lines.append("intruder dimensions: {}, in {} of {} layers".format(*explained.intruders))
    cut = "ranks {} → {} in all keep {} of every layer's energy; error {}"
    lines.append(
        cut.format(*explained.ranks, percent(explained.keep), percent(explained.predicted_error))
    )
    shares = ", ".join(percent(share) for share in median_energy(explained.layers))
    lines.append(f"energy that the median layer keeps at rank 1, 2, …: {shares}")
    if explained.copies:
        lines.append(f"and trained copies of {len(explained.copies)} base parameters")
    behaviour = explained.behaviour
    if behaviour is not None:
        lines.append(measured_line("held-out data", behaviour.loss))
        if behaviour.truncated is not None:
            lines.append(f"held-out loss at the suggested ranks: {behaviour.truncated:.4f}")
        lines.append(f"{percent(behaviour.better)} of the tokens got likelier")
    if explained.gap is not None:
        gap = explained.gap
        lines.append(
            f"{gap.verdict}: the gap to the training loss changed by "
            f"{signed(gap.growth, gap.error, gap.few)}; training data gained "
            f"{-gap.train.change:.4f}"
        )
    if explained.forgetting is not None:
        lost = explained.forgetting
        word = "can't tell" if not lost.clear else "forgot" if lost.change > 0 else "gained"
        lines.append(measured_line(f"outside the task ({word})", lost))
    if behaviour is not None and behaviour.attention is not None:
        a = behaviour.attention
        before, after, even = (sum(side) / len(side) for side in (a.before, a.after, a.even))
        lines.append(
            f"attention on {', '.join(a.words)}: {percent(before)} → {percent(after)} "
            f"(even: {percent(even)})"
        )
    return lines


def signed(value: float, error: float, few: bool, digits: int = 4) -> str:
    """Write a change, with its standard error unless the examples are few."""
    return f"{value:+.{digits}f}" + ("" if few else f" ± {error:.{digits}f}")


def _text(explained: Explanation) -> list[str]:
    layers = sorted(explained.layers, key=lambda v: -v.relative)[:ROWS]
    lines = [
        "; ".join(f"{what} {said}" for what, said in explained.about.items())
        or f"adapter {explained.adapter}",
        "",
        *table(LAYER_HEADER, [layer_row(v) for v in layers]),
    ]
    if len(explained.layers) > ROWS:
        lines.append(f"… the {ROWS} most changed of {len(explained.layers)} layers")
    behaviour = explained.behaviour
    if behaviour is not None and behaviour.ablations:
        few = behaviour.few_ablated
        rows = [
            [a.part, str(a.layers), signed(a.rise, a.rise_error, few),
             signed(a.gain, a.gain_error, few)]
            for by in ("all", "kind", "block")
            for a in sorted(
                (a for a in behaviour.ablations if a.by == by), key=lambda a: -a.gain
            )[:ROWS]
        ]  # fmt: skip
        lines += ["", *table(("ablation", "layers", "loss rises without", "gain alone"), rows)]
        if few:
            lines.append(f"over {behaviour.ablated[0]} examples: {TOO_FEW}")
    if behaviour is not None:
        for what, some in (("helped most", behaviour.helped), ("hurt most", behaviour.hurt)):
            cells = [
                [repr(t.token), f"{t.total:+.1f} in {t.times}", f"{t.before:.2f} → {t.after:.2f}",
                 repr(t.context[-40:])]
                for t in some[:ROWS]
            ]  # fmt: skip
            lines += ["", *table((what, "nats in all", "most changed", "after"), cells)]
    if explained.comparison is not None:
        first, second = explained.comparison.adapters
        cells = [[v.name, f"{v.cosine:+.3f}", f"{v.shared:.3f}"] for v in
                 sorted(explained.comparison.layers, key=lambda v: v.shared)[:ROWS]]  # fmt: skip
        lines += ["", *table((f"{first} / {second}", "cosine", "shared"), cells)]
    r, pattern = explained.suggestion
    lines += ["", *verdicts(explained), ""]
    if not pattern:
        return [*lines, f"suggested: r={r} on every layer"]
    others = "1 layer" if len(pattern) == 1 else f"{len(pattern)} patterns of layers"
    lines.append(
        f"suggested: r={r}, and another rank for {others} (--html and --json list them; --truncate "
        "FOLDER writes the adapter so)"
    )
    return lines
