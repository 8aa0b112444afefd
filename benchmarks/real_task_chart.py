"""Draw seconds and memory of `real_task.py`'s newest rows on one machine: docs/real_task.png.

    PYTHONPATH=benchmarks python benchmarks/real_task_chart.py

Of each contender its fastest learning rate; bars are medians over seeds, lines on them reach from
the best seed to the worst. The letters are large enough for a telephone's 360 points.
"""

import statistics
from pathlib import Path

import matplotlib
from csv_tables import Row
from tables_training import CHARTED, fastest, real_task_rows

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OUT = Path(__file__).resolve().parents[1] / "docs" / "real_task.png"
OURS, THEIRS = "#2a6f97", "#b0b7bf"


def _values(rows: list[Row], key: str) -> tuple[float, float, float]:
    """Return median, least and largest."""
    values = [float(row[key]) for row in rows]
    return statistics.median(values), min(values), max(values)


def draw(found: dict[str, list[Row]]) -> None:
    """Draw two bars for each contender."""
    names = list(found)
    figure, axes = plt.subplots(1, 2, figsize=(4.6, 0.66 * len(names) + 0.5), sharey=True)
    for axis, key, scale, title, unit in zip(
        axes, ("seconds", "peak_mb"), (1, 1000), ("seconds of training", "peak memory"),
        ("{:.0f} s", "{:.1f} GB"), strict=True,
    ):  # fmt: skip
        three = [[value / scale for value in _values(found[name], key)] for name in names]
        middle = [value[0] for value in three]
        errors = [[m - low for m, low, _ in three], [high - m for m, _, high in three]]
        colors = [OURS if name.startswith("minilora") else THEIRS for name in names]
        rows = range(len(names))
        axis.barh(rows, middle, 0.5, color=colors, xerr=errors, ecolor="#444444", capsize=3)
        longest = max(high for _, _, high in three)
        for i, (m, _, high) in enumerate(three):
            axis.text(high + 0.02 * longest, i, unit.format(m), va="center", fontsize=11)
            if key == "seconds":
                axis.text(0, i - 0.33, names[i], fontsize=11)
        axis.set_title(title, fontsize=11, loc="left", fontweight="bold")
        axis.set_xlim(0, longest * 1.4)
        axis.xaxis.set_visible(False)
        axis.yaxis.set_visible(False)
        axis.set_ylim(-0.75, len(names) - 0.6)
        axis.spines[["top", "right", "bottom", "left"]].set_visible(False)
        axis.tick_params(length=0)
        axis.patch.set_visible(False)  # a long name reaches into the next panel
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(OUT, dpi=150)


if __name__ == "__main__":
    draw(fastest(real_task_rows(CHARTED)))
