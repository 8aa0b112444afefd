"""An explanation as one HTML page: plots, tables and text, nothing loaded from anywhere.

A new section, with its chart, is a function here and its position in `page`. A figure that an
`Explanation` does not hold yet is a field of `LayerReport` (`spectra.py`) or of `Behaviour`.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from minilora.report.ablation import Ablation
from minilora.report.attention import Attention
from minilora.report.elements import boxes, details, document, escaped, figure, section, table
from minilora.report.explanation import (
    LAYER_HEADER,
    Behaviour,
    Explanation,
    layer_row,
    median_energy,
    percent,
    signed,
    verdicts,
)
from minilora.report.plots import arrows, bars, heat_map, spectra, two_lines
from minilora.report.spectra import DIRECTIONS, SIMILAR, LayerReport
from minilora.report.subspace import Comparison
from minilora.report.tokens import Measured, ShownExample, TokenEffect
from minilora.running import TOO_FEW

STRONG = 3.0  # nats at which a token has its full colour


def page(explained: Explanation) -> str:
    """Return the whole page; it holds no script and its policy forbids loading anything."""
    name = explained.about.get("adapter", explained.adapter)
    parts = [
        f"<h1>What adapter {escaped(name)} changed</h1>", *_about(explained),
        _subtitle(explained.layers), _cards(explained), *_losses(explained),
        *_size(explained.layers), *_spectra(explained.layers), *_ranks(explained),
        *_intruders(explained.layers),
    ]  # fmt: skip
    if explained.behaviour is not None:
        parts += _ablations(explained.behaviour)
        parts += _tokens(explained.behaviour)
        if explained.behaviour.attention is not None:
            parts += _attention(explained.behaviour.attention)
    if explained.comparison is not None:
        parts += _comparison(explained.comparison, explained.layers)
    parts += _tables(explained)
    return document(f"Adapter {name}", parts)


def _about(explained: Explanation) -> list[str]:
    said = [(what, told) for what, told in explained.about.items() if what != "adapter"]
    inside = "".join(f"<dt>{escaped(what)}</dt><dd>{escaped(told)}</dd>" for what, told in said)
    return [f'<dl class="about">{inside}</dl>'] if said else []


def _subtitle(layers: Sequence[LayerReport]) -> str:
    ranks = sorted({layer.r for layer in layers})
    r = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    many = "1 layer" if len(layers) == 1 else f"{len(layers)} layers"
    return (
        f"<p>{many} of {r}; W is a layer's weight in the base, ΔW what the adapter adds to it.</p>"
    )


def _cards(explained: Explanation) -> str:
    cards: list[tuple[str, str, bool]] = []
    behaviour, gap, lost = explained.behaviour, explained.gap, explained.forgetting
    if behaviour is not None:
        loss = behaviour.loss
        words = (
            f"held-out loss, nats per token (change {_signed(loss)}); "
            f"{percent(behaviour.better)} of {loss.tokens} tokens got likelier{loss.caveat}"
        )
        cards.append(
            (f"{loss.before:.3f} → {loss.after:.3f}", words, loss.clear and loss.change > 0)
        )
    if gap is not None:
        words = (
            f"the gap to the training loss changed by {signed(gap.growth, gap.error, gap.few, 3)}; "
            f"training data gained {-gap.train.change:.3f}"
        )
        cards.append((gap.verdict, words, gap.overfitted))
    if lost is not None:
        words = f"loss on text outside the task ({_signed(lost)}){lost.caveat}"
        forgot = lost.clear and lost.change > 0
        cards.append((f"{lost.before:.3f} → {lost.after:.3f}", words, forgot))
    shares = [layer.relative for layer in explained.layers]
    words = (
        f"of its weight's norm: what the median of {len(shares)} layers changed by; at most "
        f"{percent(max(shares))}"
    )
    cards.append((percent(statistics.median(shares)), words, False))
    words = f"ranks in all that keep {percent(explained.keep)} of every layer's energy"
    if behaviour is not None and behaviour.truncated is not None:
        words += f"; held-out loss so truncated {behaviour.truncated:.3f}"
    cards.append(("{} → {}".format(*explained.ranks), words, False))
    if explained.intruders is not None:
        count, some, compared = explained.intruders
        words = f"intruder dimensions, in {some} of {compared} layers"
        cards.append((str(count), words, count > 0))
    return boxes(cards)


def _signed(loss: Measured) -> str:
    return signed(loss.change, loss.error, loss.few, 3)


def _losses(explained: Explanation) -> list[str]:
    rows = {
        "held out": explained.behaviour and explained.behaviour.loss,
        "training": explained.gap and explained.gap.train,
        "outside the task": explained.forgetting,
    }
    cells = [
        (
            name,
            m.before,
            m.after,
            f"{m.before:.3f} → {m.after:.3f}" + f" ± {m.error:.3f}" * (not m.few),
        )
        for name, m in rows.items()
        if m
    ]
    if not cells:
        return []
    title = "Loss without and with the adapter"
    about = "Nats per token, from the base (circle) to the adapter (arrow head). Lower is better."
    return [section(title, about), figure(arrows(title, cells))]


def _map(
    title: str, layers: Sequence[LayerReport], values: Sequence[float],
    label: Callable[[float], str], **options: Any,
) -> str:  # fmt: skip
    """Draw a value per layer, by kind of module (rows) and block (columns)."""
    blocks = [str(b) for b in sorted({v.block for v in layers if v.block is not None})]
    columns = blocks + ["–"] * any(v.block is None for v in layers)
    cells = [(v.kind, "–" if v.block is None else str(v.block)) for v in layers]
    rows = list(dict.fromkeys(v.kind for v in layers))
    cell_values = dict(zip(cells, values, strict=True))
    return figure(heat_map(title, columns, rows, cell_values, label, **options))


def _size(layers: Sequence[LayerReport]) -> list[str]:
    about = (
        "Norm of ΔW as a share of its weight's norm, by kind of module (rows) and block (columns). "
        "Where a few layers changed far more than most, they are outlined and the colours are the "
        "others'."
    )
    shares = [v.relative for v in layers]
    drawn = _map("Size of the change", layers, shares, percent, cap=True)
    return [section("Where it changed the model", about), drawn]


def _spectra(layers: Sequence[LayerReport]) -> list[str]:
    kinds: dict[str, list[LayerReport]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, []).append(layer)
    blocks = [v.block for v in layers if v.block is not None]
    last = max(blocks, default=0) or 1
    drawn = "".join(
        spectra(kind, [(v.name, (v.block or 0) / last, v.singular_values) for v in inside])
        for kind, inside in kinds.items()
    )
    return [
        section("Singular values of the change", "One line per layer: σ of ΔW's directions, the "
                 "largest first, on a logarithmic axis. A steep line needs few ranks, a flat one "
                 "uses all it was given."),
        f'<p>first block <span class="scale"></span> last block</p><div class="row">{drawn}</div>',
    ]  # fmt: skip


def _ranks(explained: Explanation) -> list[str]:
    r, pattern = explained.suggestion
    lines = "".join(f"    {key!r}: {value},\n" for key, value in pattern.items())
    call = f"minilora.inject(model, r={r}, rank_pattern={{\n{lines}}})"
    error = (
        "" if explained.truncation is None else f", measured {percent(explained.truncation.error)}"
    )
    shares = ", ".join(map(percent, median_energy(explained.layers)))
    about = (
        f"The smallest rank that keeps {percent(explained.keep)} of ‖ΔW‖² on each layer. Cut to "
        f"these, the whole adapter is off by {percent(explained.predicted_error)} (predicted"
        f"{error}). The median layer keeps {shares} at rank 1, 2, …"
    )
    suggested = [v.suggested_r for v in explained.layers]
    drawn = _map("Suggested rank", explained.layers, suggested, lambda v: f"{v:.0f}", numbers=True)
    return [
        section("Ranks it needs", about),
        drawn,
        details("To paste", f"<pre>{escaped(call)}</pre>"),
    ]


def _intruders(layers: Sequence[LayerReport]) -> list[str]:
    known = [v for v in layers if v.similarities is not None]
    if not known:
        return []
    values = [1 - min(v.similarities or (1.0,)) for v in known]
    new = sum(v.intruders or 0 for v in known)
    about = (
        f"For the first {DIRECTIONS} singular vectors of W + ΔW: 1 − the cosine to the most "
        f"similar one of W's own, the largest of each layer. Above {1 - SIMILAR:g} it counts as an "
        f"intruder dimension; here are {new}."
    )
    drawn = _map("Novelty of directions", known, values, lambda v: f"{v:.2f}", top=1 - SIMILAR)
    return [section("Directions the base did not have", about), drawn]


def _ablations(behaviour: Behaviour) -> list[str]:
    if not behaviour.ablations:
        return []
    (examples, tokens), few = behaviour.ablated, behaviour.few_ablated
    drawn = ""
    for by, what in (("kind", "kinds of modules"), ("block", "blocks")):
        some: list[Ablation] = [a for a in behaviour.ablations if a.by == by]
        names = [a.part.removeprefix("block ") for a in some]
        for series, kind, title in (
            ("gain", "accent", f"{what}: gain of one alone"),
            ("rise", "warm", f"{what}: rise without it"),
        ):
            values = [getattr(a, series) for a in some]
            errors = [math.inf if few else getattr(a, f"{series}_error") for a in some]
            drawn += figure(bars(title, names, values, errors, kind, wide=470))
    about = (
        f"Nats per token over {examples} examples ({tokens} tokens)"
        f"{f': {TOO_FEW}' if few else ', with standard errors'}. Left: "
        f"how far the loss falls with this part of the adapter only. Right: how far it rises when "
        f"only this part is left out; below 0 the rest does better without it."
    )
    return [section("Which parts matter", about), f'<div class="halves">{drawn}</div>']


def _effect_rows(effects: Sequence[TokenEffect]) -> list[list[str]]:
    return [
        [repr(t.token)[1:-1].replace(" ", "␣"), f"{t.total:+.1f}",
         str(t.times), f"{t.before:.2f} → {t.after:.2f}",
         t.context[-44:].replace("\n", "⏎")]
        for t in effects
    ]  # fmt: skip


def _spans(example: ShownExample) -> str:
    spans = []
    for token, before, after in zip(example.tokens, example.before, example.after, strict=True):
        if before is None or after is None:
            spans.append(escaped(token))
            continue
        change = after - before
        share = min(1.0, abs(change) / STRONG)
        colour = "--accent" if change < 0 else "--warm"
        kind = ' class="lost"' if change > 0.5 else ""
        spans.append(
            f'<span{kind} title="{before:.2f} → {after:.2f}" style="background: color-mix(in srgb, '
            f'var({colour}) {55 * share:.0f}%, transparent)">{escaped(token)}</span>'
        )
    return f'<pre class="told">{"".join(spans)}</pre>'


def _tokens(behaviour: Behaviour) -> list[str]:
    about = (
        "Change of the loss of each learned token: blue where the adapter made it likelier, orange "
        f"and underlined where less likely, in full from {STRONG:g} nats. Other text was given."
    )
    header = ("token", "nats in all", "times", "most changed", "after")
    tables = "".join(
        f"<div><h3>{what}</h3>{table(header, _effect_rows(some), words=4)}</div>"
        for what, some in (("Helped most", behaviour.helped), ("Hurt most", behaviour.hurt))
    )
    return [
        section("Token by token", about), *map(_spans, behaviour.examples),
        f'<div class="halves">{tables}</div>',
    ]  # fmt: skip


def _attention(attention: Attention) -> list[str]:
    fewest, most = min(attention.queries), max(attention.queries)
    queries = str(most) if fewest == most else f"{fewest} to {most}"  # where windows differ
    about = (
        f"Share of the attention that falls on {', '.join(attention.words)} "
        f"({attention.tokens} tokens), per layer, over {queries} tokens that see one: "
        f"grey without, blue with the adapter; dashed if every visible token got as much."
    )
    drawn = two_lines(
        "Attention on chosen words", attention.before, attention.after, attention.even, percent
    )
    return [section("Attention on chosen words", about), figure(drawn)]


def _comparison(comparison: Comparison, layers: Sequence[LayerReport]) -> list[str]:
    first, second = comparison.adapters
    known = {v.name: v for v in layers}
    here = [c for c in comparison.layers if c.name in known]
    about = (
        f"How much of the same subspaces {first} and {second} use: the mean of cos² over the "
        f"principal angles of their outputs and inputs, 1 for the same, 0 for orthogonal ones."
    )
    for name, alone in ((first, comparison.only_first), (second, comparison.only_second)):
        if alone:
            about += f" Layers that only {name} changes: {len(alone)}."
    parts = [section(f"{first} and {second}", about)]
    if here:
        shared, layers = [c.shared for c in here], [known[c.name] for c in here]
        parts.append(_map("Shared subspaces", layers, shared, lambda v: f"{v:.2f}"))
        cells = [
            [c.name, f"{c.cosine:+.3f}", f"{c.shared:.3f}",
             *(" ".join(f"{a:.0f}°" for a in angles) for angles in (c.angles_out, c.angles_in))]
            for c in here
        ]  # fmt: skip
        header = ("module", "cosine", "shared", "angles of outputs", "angles of inputs")
        parts.append(details("Angles", table(header, cells)))
    return parts


def _tables(explained: Explanation) -> list[str]:
    said = "".join(f"<li>{escaped(line)}</li>" for line in verdicts(explained))
    parts = [
        f"<h2>In words and figures</h2><ul>{said}</ul>",
        details(f"All {len(explained.layers)} layers",
                 table(LAYER_HEADER, map(layer_row, explained.layers))),
    ]  # fmt: skip
    if explained.copies:
        cells = [[c.name, f"{c.norm:.3g}", f"{c.weight_norm:.3g}"] for c in explained.copies]
        header = ("parameter", "norm of the change", "norm")
        parts.append(details("Trained copies of base parameters", table(header, cells)))
    behaviour = explained.behaviour
    if behaviour is not None and behaviour.ablations:
        few = behaviour.few_ablated
        cells = [
            [a.part, str(a.layers), f"{a.without:.4f}", signed(a.rise, a.rise_error, few),
             f"{a.alone:.4f}", signed(a.gain, a.gain_error, few)]
            for a in behaviour.ablations
        ]  # fmt: skip
        heads = ("part", "layers", "loss without it", "rise", "loss of it alone", "gain")
        parts.append(details("All ablations", table(heads, cells)))
    return parts
