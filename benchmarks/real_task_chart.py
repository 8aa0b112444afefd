"""Draw seconds and memory of `real_task.py`'s rows: docs/real_task.png.

    python benchmarks/real_task_chart.py

Of each contender the rows on one processor: the median over seeds at the learning rate that
reached the loss first.
"""

import csv
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
CSV = HERE / "results" / "real_task.csv"
OUT = HERE.parent / "docs" / "real_task.png"
OURS, THEIRS = "#2a6f97", "#b0b7bf"


def rows(task: str, processor: str) -> dict[str, tuple[float, float]]:
    """Return seconds and megabytes of each contender, slowest first."""
    found: dict[str, dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    with open(CSV, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["task"] == task and row["processor"] == processor and row["seconds"]:
                found[row["contender"]][row["lr"]].append(row)
    result = {}
    for contender, rates in found.items():
        medians = [
            tuple(
                statistics.median(float(row[key]) for row in some) for key in ("seconds", "peak_mb")
            )
            for some in rates.values()
        ]
        result[contender] = min(medians)
    return dict(sorted(result.items(), key=lambda item: -item[1][0]))


def _median(rows: list[dict[str, str]], key: str) -> float:
    return statistics.median(float(row[key]) for row in rows)


def draw(found: dict[str, tuple[float, float]]) -> None:
    """Draw two bars for each contender."""
    names = list(found)
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.55 * len(names) + 1.0), sharey=True)
    for axis, part, title, unit in zip(
        axes, (0, 1), ("seconds of training", "peak memory"), ("{:.0f} s", "{:.1f} GB"), strict=True
    ):
        values = [found[name][part] / (1, 1000)[part] for name in names]
        colors = [OURS if name.startswith("minilora") else THEIRS for name in names]
        bars = axis.barh(names, values, color=colors)
        axis.bar_label(bars, [unit.format(value) for value in values], padding=3, fontsize=9)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlim(0, max(values) * 1.18)
        axis.xaxis.set_visible(False)
        axis.invert_yaxis()
        axis.spines[["top", "right", "bottom", "left"]].set_visible(False)
        axis.tick_params(length=0)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(OUT, dpi=160)


if __name__ == "__main__":
    draw(rows("docstrings", "Intel(R) Xeon(R) Processor family 6"))
