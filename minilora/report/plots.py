"""The kinds of plots, as SVG text for a page: written by hand, without script or network.

Colours are CSS variables of the page (`--accent`, `--warm`, …), so that light and dark both read.
Every plot has a title and a description for readers who don't see it.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

EARLY, LATE = (31, 119, 200), (222, 120, 32)  # of lines, from the first block to the last


def svg(width: float, height: float, title: str, about: str, body: Sequence[str]) -> str:
    """Frame a drawing; `about` says in words what can be seen."""
    inside = "".join(body)
    key = hashlib.sha256(f"{title}{about}{inside}".encode()).hexdigest()[:10]  # one page, one text
    return (
        f'<svg role="img" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'aria-labelledby="t{key} d{key}"><title id="t{key}">{escape(title)}</title>'
        f'<desc id="d{key}">{escape(about)}</desc>{inside}</svg>'
    )


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    """Write words; `anchor` is start, middle or end."""
    where = f'x="{x:.1f}" y="{y:.1f}"'
    return f'<text {where} text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> str:
    """Draw a line of a CSS class."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def short(value: float) -> str:
    """Write an axis label."""
    return f"{value:.3g}"


def scale(
    marks: Iterable[float], y: Callable, left: float, right: float, label: Callable = short
) -> list[str]:
    """Draw a horizontal line for each mark, its value at the left."""
    parts: list[str] = []
    for mark in marks:
        parts += [line(left, y(mark), right, y(mark), "axis" if mark == 0 else "grid"),
                  text(left - 6, y(mark) + 4, label(mark), "end", "small")]  # fmt: skip
    return parts


def labels(names: Sequence[str], x: Callable[[int], float], y: float) -> list[str]:
    """Write names at positions 0, 1, …; every second one where there are many."""
    step = 1 if len(names) <= 16 else 2
    return [text(x(i), y, names[i], "middle", "small") for i in range(0, len(names), step)]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return round numbers from low to high, about as many as wanted."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / wanted))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= wanted)
    return [
        i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def heat_map(
    title: str,
    columns: Sequence[str],
    rows: Sequence[str],
    values: Mapping[tuple[str, str], float],
    label: Callable[[float], str],
    numbers: bool = False,
    top: float = 0.0,
    cap: bool = False,
) -> str:
    """Draw a value per row and column, darker for more; cells without one stay empty.

    `values` are at least 0, by (row, column); infinite ones count as the largest. `label` writes
    one; `numbers` is whether into its cell. `top` is the value of the darkest cell, where none is
    above it; 0: the largest there is. With `cap` a few cells far above the others are outlined, and
    do not set the scale.
    """
    left, cell = 12 + 7.2 * max(map(len, rows)), max(17.0, min(40.0, 760 / len(columns)))
    tall = 24.0
    known = [v for v in values.values() if math.isfinite(v)]
    largest = max([top, *known]) or 1.0
    top = (cap and known and _without_outliers(known)) or largest  # 0 where most are
    loud = {place for place, value in values.items() if cap and value > top}
    body = labels(columns, lambda j: left + (j + 0.5) * cell, 13)
    body.append(text(left - 8, 13, "block", "end", "small"))
    for i, row in enumerate(rows):
        y = 20 + i * tall
        body.append(text(left - 8, y + tall / 2 + 4, row, "end"))
        for j, column in enumerate(columns):
            value = values.get((row, column))
            if value is None:
                continue
            shade = 0.06 + (0.5 if numbers else 0.94) * min(1.0, value / top)
            body.append(
                f'<rect x="{left + j * cell + 1:.1f}" y="{y + 1:.1f}" width="{cell - 2:.1f}" '
                f'height="{tall - 2:.1f}" rx="3" class="cell{" above" * ((row, column) in loud)}" '
                f'fill-opacity="{shade:.3f}"><title>'
                f"{escape(f'{row}, {column}: {label(value)}')}</title></rect>"
            )
            if numbers:
                where = (left + (j + 0.5) * cell, y + tall / 2 + 4)
                body.append(text(*where, label(value), "middle", "number"))
    bottom = 20 + len(rows) * tall
    if not numbers:
        for k in range(40):
            body.append(
                f'<rect x="{left + 4 * k:.1f}" y="{bottom + 12:.1f}" width="4" height="9" '
                f'class="cell" fill-opacity="{0.06 + 0.94 * k / 39:.3f}"/>'
            )
        legend = f"0 to {label(top)}"
        if loud:
            legend += f"; outlined: {len(loud)} above, up to {label(max(values.values()))}"
        body.append(text(left + 168, bottom + 21, legend, kind="small"))
    most = max(values, key=lambda key: values[key], default=None)
    about = "no values"
    if most is not None:
        about = (
            f"{len(rows)} kinds of modules by {len(columns)} blocks; the largest is "
            f"{label(values[most])} at {most[0]}, {most[1]}"
        )
    width = left + max(len(columns) * cell + 8, 440 if loud else 300)
    return svg(width, bottom + (6 if numbers else 28), title, about, body)


def _without_outliers(values: Sequence[float]) -> float:
    """Return the largest value, or where a few are far above, the one that nine tenths reach."""
    ordered = sorted(values)
    most = ordered[math.ceil(0.9 * len(ordered)) - 1]
    return ordered[-1] if ordered[-1] <= 2 * most else most


def blend(share: float) -> str:
    """Return a colour between the first block's and the last one's."""
    mixed = (round(a + (b - a) * share) for a, b in zip(EARLY, LATE, strict=True))
    return "rgb({},{},{})".format(*mixed)


def spectra(title: str, series: Sequence[tuple[str, float, Sequence[float]]]) -> str:
    """Draw singular values on a logarithmic axis, one line per layer.

    A layer has a name, a depth from 0 (first block) to 1 (last), and its values; zeros end a line.
    """
    width, height, left, low = 228.0, 196.0, 56.0, 26.0
    found = [v for _, _, values in series for v in values if v > 0]
    if not found:
        return svg(width, 40, title, "all are 0", [text(8, 24, f"{title}: ΔW = 0")])
    bottom, top = math.log10(min(found)), math.log10(max(found))
    bottom = max(bottom, top - 4)  # four decades
    top, bottom = top + 0.05, bottom - 0.05
    most = max(len(values) for _, _, values in series)

    def x(i: int) -> float:
        return left + (width - left - 12) * (i / max(1, most - 1))

    def y(value: float) -> float:
        share = (top - math.log10(value)) / (top - bottom)
        return low + (height - low - 44) * min(1.0, share)

    body = [text(left, 14, title, kind="strong")]
    marks = [m * 10.0**e for e in range(-12, 9) for m in (1, 2, 5)]
    marks = [m for m in marks if bottom <= math.log10(m) <= top]
    marks = marks if len(marks) <= 6 else [m for m in marks if f"{m:e}"[0] == "1"]
    body += scale(marks, y, left, width - 12)
    for i in range(0, most, 1 if most <= 10 else math.ceil(most / 8)):
        body.append(text(x(i), height - 26, str(i + 1), "middle", "small"))
    middle = (low + height - 44) / 2
    body += [
        text((left + width - 12) / 2, height - 8, "direction", "middle", "small"),
        f'<text transform="translate(12 {middle:.1f}) rotate(-90)" text-anchor="middle" '
        f'class="small">σ</text>',
    ]
    for name, depth, values in series:
        points = [(x(i), y(v)) for i, v in enumerate(values) if v > 0]
        joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        tip = f"<title>{escape(name)}</title>"
        body.append(
            f'<polyline points="{joined}" class="curve" stroke="{blend(depth)}">{tip}</polyline>'
        )
        if len(points) == 1:
            body.append(f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3" '
                        f'fill="{blend(depth)}">{tip}</circle>')  # fmt: skip
    about = (
        f"singular values of {len(series)} layers, the largest from "
        f"{short(min(v[0] for *_, v in series))} to {short(max(v[0] for *_, v in series))}"
    )
    return svg(width, height, title, about, body)


def bars(
    title: str,
    names: Sequence[str],
    values: Sequence[float],
    errors: Sequence[float],
    kind: str = "accent",
    wide: float = 560.0,
) -> str:
    """Draw nats per token, a bar per name with its standard error; below 0 they hang down.

    An infinite error is not drawn: it is not known.
    """
    height, left, low = 210.0, 54.0, 28.0
    longest = max(map(len, names))
    step = (wide - left - 8) / len(names)
    turned = longest * 7 > step and longest > 3
    foot = 14 + (6.3 * longest * 0.75 if turned else 8)
    drawn = [e if math.isfinite(e) else 0.0 for e in errors]
    ends = [v + s * e for v, e in zip(values, drawn, strict=True) for s in (-1, 1)]
    bottom, top = min(0.0, *ends), max(0.0, *ends)
    top, bottom = (top, bottom) if top > bottom else (1.0, 0.0)

    def y(value: float) -> float:
        return low + (height - low - foot) * (top - value) / (top - bottom)

    def x_of(i: int) -> float:
        return left + (i + 0.5) * step

    body = [text(left, 14, title, kind="strong"), *scale(ticks(bottom, top), y, left, wide - 8)]
    body.append(text(wide - 8, 14, "nats per token", "end", "small"))
    for i, (name, value, error) in enumerate(zip(names, values, errors, strict=True)):
        x, width = x_of(i), max(2.0, min(36.0, 0.66 * step))
        upper, lower = y(max(0.0, value)), y(min(0.0, value))
        said = escape(f"{name}: {value:+.4f}" + f" ± {error:.4f}" * math.isfinite(error))
        body.append(
            f'<rect x="{x - width / 2:.1f}" y="{upper:.1f}" width="{width:.1f}" '
            f'height="{max(0.8, lower - upper):.1f}" class="{kind}"><title>{said}</title></rect>'
        )
        body.append(line(x, y(value - drawn[i]), x, y(value + drawn[i]), "error"))
        if turned:
            at = f"{x + 4:.1f} {height - foot + 14:.1f}"
            body.append(
                f'<text transform="translate({at}) rotate(-40)" text-anchor="end" class="small">'
                f"{escape(name)}</text>"
            )
    body += [] if turned else labels(names, x_of, height - foot + 16)
    most = max(range(len(values)), key=lambda i: values[i])
    about = f"{len(names)} bars; the largest is {names[most]} with {values[most]:+.4f}"
    return svg(wide, height, title, about, body)


def _across(
    values: Sequence[float], left: float, wide: float, floor: float
) -> tuple[Callable[[float], float], list[str]]:
    """Return where values lie from left to right, and vertical lines with numbers at `floor`."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) if high > low else 1.0
    low, high = low - margin, high + margin

    def x(value: float) -> float:
        return left + (wide - 2 * left) * (value - low) / (high - low)

    lines: list[str] = []
    for mark in ticks(low, high, 6):
        lines += [line(x(mark), 8, x(mark), floor, "axis" if abs(mark) < 1e-12 else "grid"),
                  text(x(mark), floor + 16, short(mark), "middle", "small")]  # fmt: skip
    return x, lines


def arrows(title: str, rows: Sequence[tuple[str, float, float, str]]) -> str:
    """Draw a loss before and after as an arrow per row, below what to write of it."""
    left, wide, step = 12.0, 560.0, 46.0
    floor = 14 + step * len(rows)
    x, body = _across([value for _, a, b, _ in rows for value in (a, b)], left, wide, floor)
    body.append(text(wide / 2, floor + 34, "nats per token", "middle", "small"))
    for i, (name, before, after, words) in enumerate(rows):
        y = 8 + step * (i + 0.72)
        tip = x(after)
        kind, back = ("better", tip + 9) if after <= before else ("worse", tip - 9)
        body += [
            text(left, y - 13, f"{name}: {words}" if words else name),
            f'<circle cx="{x(before):.1f}" cy="{y:.1f}" r="4" class="{kind} hollow"/>',
            line(x(before), y, tip, y, f"{kind} thick"),
            f'<path d="M{tip:.1f} {y:.1f} L{back:.1f} {y - 5:.1f} L{back:.1f} {y + 5:.1f} Z" '
            f'class="{kind}"/>',
        ]
    about = "; ".join(f"{name}: {short(a)} to {short(b)}" for name, a, b, _ in rows)
    return svg(wide, floor + 42, title, about, body)


def two_lines(
    title: str,
    before: Sequence[float],
    after: Sequence[float],
    even: Sequence[float],
    label: Callable,
) -> str:
    """Draw a share per layer without (hollow) and with the adapter (filled), and an even share."""
    wide, height, left, low = 720.0, 200.0, 54.0, 14.0
    top = 1.08 * max(*before, *after, *even)
    count = len(before)

    def x(i: int) -> float:
        return left + (wide - left - 90) * (i / max(1, count - 1))

    def y(value: float) -> float:
        return low + (height - low - 30) * (1 - value / top)

    body = scale(ticks(0, top), y, left, wide - 90, label)
    body.append(text(wide - 84, y(even[-1]) + 4, "even", kind="small"))
    for values, kind in ((even, "dashed"), (before, "muted-line"), (after, "accent-line")):
        path = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(values))
        body.append(f'<polyline points="{path}" class="curve {kind}"/>')
    for values, kind in ((before, "muted"), (after, "accent")):
        for i, value in enumerate(values):
            said = f"layer {i}: {label(before[i])} → {label(after[i])}"
            body.append(f'<circle cx="{x(i):.1f}" cy="{y(value):.1f}" r="3" class="{kind}"><title>'
                        f"{escape(said)}</title></circle>")  # fmt: skip
    body += labels([str(i) for i in range(count)], x, height - 12)
    body.append(text(wide - 84, height - 12, "layer", kind="small"))
    means = [sum(side) / count for side in (before, after)]
    about = (
        f"mean over {count} layers {label(means[0])} without, {label(means[1])} with the adapter"
    )
    return svg(wide, height, title, about, body)


def intervals(title: str, rows: Sequence[tuple[str, float, float, float, str, bool]]) -> str:
    """Draw a value with its interval per row about a line at 0.

    A row is a name, the value, the ends of its interval, words, and whether it is clear.
    """
    wide, left, step = 620.0, 16.0, 58.0
    floor = 14 + step * len(rows)
    ends = [0.0, *(end for _, _, low, high, *_ in rows for end in (low, high))]
    x, body = _across(ends, left, wide, floor)
    for i, (name, value, start, end, words, clear) in enumerate(rows):
        y = 8 + step * i + 38
        kind = "axis" if not clear else "better" if value < 0 else "worse"
        body += [
            text(left, y - 20, f"{name}: {words}", kind="strong"),
            line(x(start), y, x(end), y, f"{kind} thick"),
            *(line(x(at), y - 5, x(at), y + 5, kind) for at in (start, end)),
            f'<circle cx="{x(value):.1f}" cy="{y:.1f}" r="4.5" '
            f'class="{"muted" if kind == "axis" else kind}"/>',
        ]
    body.append(text(wide / 2, floor + 34, "nats per token", "middle", "small"))
    about = "; ".join(f"{name}: {short(a)} to {short(b)}" for name, _, a, b, *_ in rows)
    return svg(wide, floor + 42, title, about, body)
