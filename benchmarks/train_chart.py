"""Draw tokens per second of `train_step.py`'s rows, and print them as a table.

    PYTHONPATH=benchmarks python benchmarks/train_chart.py [--model smollm2-135m]
        [--rows 4] [--tokens 256] [--commit NAME ...]

Reads benchmarks/results/train_step.csv, writes docs/train_step.png. Of the rows measured on the
processor of the last one, of those at the commits named if any are, the newest of each provider
counts.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from train_step import RESULTS, table

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "train_step.png"


def at(
    file: Path,
    model: str,
    rows: int,
    tokens: int,
    r: int = 8,
    targets: str = "all",
    commits: Sequence[str] = (),
) -> list[dict[str, str]]:
    """Return the rows at one setting that were measured on the processor of the last of them."""
    setting = (model, str(rows), str(tokens), str(r), targets)
    with open(file, newline="", encoding="utf-8") as opened:
        found = [
            row
            for row in csv.DictReader(opened)
            if tuple(row[key] for key in ("model", "rows", "tokens", "r", "targets")) == setting
            and (not commits or row["commit"] in commits)
        ]
    return [row for row in found if row["processor"] == found[-1]["processor"]]


def newest(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the newest row of each provider, fastest first, limits last."""
    found = {row["provider"]: row for row in rows}
    return sorted(
        found.values(),
        key=lambda row: (row["provider"].startswith("limit"), -float(row["tokens_per_s"] or 0)),
    )


def draw(rows: list[dict[str, str]], title: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["tokens_per_s"]][::-1]
    figure, axes = pyplot.subplots(figsize=(9, 0.3 * len(rows) + 1.3))
    colors = {"minilora": "#2a6f97", "peft": "#c9713b", "limit": "#999999"}
    speeds = [float(row["tokens_per_s"]) for row in rows]
    names = [row["provider"] for row in rows]
    bars = axes.barh(names, speeds, color=[colors[name.split()[0]] for name in names])
    axes.bar_label(bars, labels=[f"{speed:.0f}" for speed in speeds], padding=3, fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("tokens per second, one optimizer step")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--commit", nargs="+", default=[], metavar="NAME")
    options = parser.parse_args()
    setting = (options.model, options.rows, options.tokens)
    rows = newest(at(RESULTS / "train_step.csv", *setting, commits=options.commit))
    if not rows:
        parser.error(
            "train_step.csv has no rows of that setting and commit; run benchmarks/train_step.py"
        )
    first = rows[0]
    title = (
        f"{options.model}, {options.rows} × {options.tokens} tokens, r=8 on all linears\n"
        f"{first['processor']} ({first['flags']}), {first['threads']} threads, "
        f"torch {first['torch']}"
    )
    draw(rows, title, PICTURE)
    print(table(rows))


if __name__ == "__main__":
    main()
