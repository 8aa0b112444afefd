"""A comparison of adapters as one HTML page: verdicts, intervals, answers and examples."""

from collections.abc import Iterable, Sequence

from minilora.report.comparing import AdapterComparison, ShownChange
from minilora.report.elements import boxes, document, escaped, figure, section, table
from minilora.report.plots import intervals
from minilora.running import Difference


def comparing_page(compared: AdapterComparison) -> str:
    """Return the whole page; it holds no script and its policy forbids loading anything."""
    one, names = compared.differences[0], list(compared.losses)
    parts = [
        f"<h1>{escaped(', '.join(names))}: which is better?</h1>",
        f"<p>Measured on the same {one.examples} held-out examples, {one.tokens} learned tokens. "
        f"Intervals are of 95 %, from drawing examples anew.</p>",
        boxes(_cards(compared)), *_losses(compared),
        *_intervals("Difference of the held-out loss", compared.differences + compared.among,
                    "Nats per learned token. Left of 0 the one named last is better; an interval "
                    "across 0 can't tell."),
        *_intervals("Outside the task", compared.outside,
                    "The same on text outside the task: right of 0 something was forgotten."),
        *_gaps(compared), *_answers(compared), *_examples(compared),
    ]  # fmt: skip
    return document(f"{', '.join(names)}: which is better?", parts)


def _cards(compared: AdapterComparison) -> Iterable[tuple[str, str, bool]]:
    for each in compared.differences:
        found = f"{each.change:+.4f} nats a token ({each.low:+.4f} to {each.high:+.4f})"
        if each.clear:
            better, worse = (each.first, each.second)[:: 1 if each.change > 0 else -1]
            yield f"{better} is better", f"than {worse}: {found}", each.change > 0
        else:
            title = "can't tell"
            yield title, f"{each.verdict.removeprefix(title).strip()}: {found}", False
    for each in compared.outside:
        if each.clear and each.change > 0:
            words = f"outside the task {each.second} lost this much a token"
            yield f"{each.change:+.4f}", words, True


def _losses(compared: AdapterComparison) -> list[str]:
    rows = [(name, f"{loss:.4f}") for name, loss in compared.losses.items()]
    about = "Mean over all learned tokens, in nats. Lower is better."
    return [section("Held-out loss", about), table(("contender", "loss"), rows)]


def _intervals(title: str, differences: Sequence[Difference], about: str) -> list[str]:
    if not differences:
        return []
    drawn = intervals(
        title,
        [(f"{d.first} → {d.second}", d.change, d.low, d.high, f"{d.change:+.4f}", d.clear)
         for d in differences],
    )  # fmt: skip
    rows = [
        (f"{d.first} → {d.second}", f"{d.change:+.4f}", f"{d.low:+.4f}", f"{d.high:+.4f}",
         str(d.examples), str(d.tokens), "yes" if d.clear else "no",
         "" if d.more is None else f"{d.more:,}")
        for d in differences
    ]  # fmt: skip
    header = ("", "change", "low", "high", "examples", "tokens", "clear", "examples missing")
    return [section(title, about), figure(drawn), table(header, rows)]


def _gaps(compared: AdapterComparison) -> list[str]:
    if not compared.gaps:
        return []
    about = (
        "Of what was gained on training data: nats per token that held-out data did not gain. "
        "Right of 0 the adapter has learned some of its data by heart."
    )
    rows = [
        (name, gap.change, gap.low, gap.high, f"{gap.change:+.4f}{gap.caveat}", gap.clear)
        for name, gap in compared.gaps.items()
    ]
    return [section("Over-fitting", about), figure(intervals("Over-fitting", rows))]


def _answers(compared: AdapterComparison) -> list[str]:
    if not compared.right:
        return []
    number = compared.differences[0].examples
    about = f"Each contender wrote an answer to {number} questions, greedily."
    rows = [
        (name, str(right), f"{right / number:.1%}", f"{compared.lengths[name]:.1f}",
         str(compared.cut[name]))
        for name, right in compared.right.items()
    ]  # fmt: skip
    header = ("contender", "right", "share", "tokens of an answer", "cut off")
    said = "".join(f"<li>{escaped(each)}</li>" for each in compared.answers)
    return [section("Answers", about), table(header, rows), f"<ul>{said}</ul>"]


def _examples(compared: AdapterComparison) -> list[str]:
    names = list(compared.losses)
    about = (
        f"The examples whose loss changed most from {names[0]} to {names[-1]}, in nats per token: "
        f"a little of what was given, and of what is to be written."
    )
    halves = "".join(
        f"<div><h3>{title}</h3>{''.join(map(_shown, some)) or '<p>none</p>'}</div>"
        for title, some in (("Worst regressions", compared.lost), ("Best gains", compared.gained))
    )
    return [section("Examples", about), f'<div class="halves">{halves}</div>']


def _shown(each: ShownChange) -> str:
    answers = "".join(
        f'<p>{escaped(name)} wrote</p><pre class="told">{escaped(text)}</pre>'
        for name, text in each.answers.items()
    )
    return (
        f"<p>example {each.example}: {each.change:+.3f} a token</p>"
        f'<pre class="told">{escaped(each.text)}</pre>{answers}'
    )
