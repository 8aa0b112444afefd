"""Time and memory of a training step against length, rank and which layers are adapted.

    PYTHONPATH=benchmarks python benchmarks/train_curves.py [--draw] [--rounds 3]

SmolLM2-135M, one row, in f32: PEFT eager and minilora compiled, by `train_step.py` at each setting,
its rows added to benchmarks/results/train_step.csv; then docs/train_curves.png is drawn from that
file, and alone with `--draw`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from train_chart import at, newest
from train_step import RESULTS

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "train_curves.png"
NAMES = ("peft f32", "minilora f32 compiled")
LENGTHS, RANKS = (128, 256, 512, 1024), (2, 8, 32, 128)
MIDDLE = (256, 8, "all")  # tokens, r, targets: what the other two stay at
PANELS = {
    "tokens": [(tokens, *MIDDLE[1:]) for tokens in LENGTHS],
    "rank r": [(MIDDLE[0], r, MIDDLE[2]) for r in RANKS],
    "adapted linears": [(*MIDDLE[:2], targets) for targets in ("attention", "all")],
}


def measure(rounds: int) -> None:
    for tokens, r, targets in dict.fromkeys(s for panel in PANELS.values() for s in panel):
        subprocess.run(
            [sys.executable, str(Path(__file__).with_name("train_step.py")), "--rows", "1",
             "--tokens", str(tokens), "--r", str(r), "--targets", targets, "--anchor", NAMES[0],
             "--only", *NAMES, "--rounds", str(rounds)],
            check=True,
        )  # fmt: skip


def draw(file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_setting = {}
    for setting in (s for panel in PANELS.values() for s in panel):
        rows = at(file, "smollm2-135m", 1, *setting)
        by_setting[setting] = {row["provider"]: row for row in newest(rows) if row["seconds"]}
    processors = {by_setting[s].get(n, {}).get("processor") for s in by_setting for n in NAMES}
    if len(processors) != 1 or None in processors:
        raise SystemExit(
            f"train_step.csv must have both rows of every setting from one processor, found "
            f"{processors}; run this without --draw"
        )
    figure, axes = pyplot.subplots(2, 3, figsize=(10, 5.6), sharex="col")
    for column, (title, settings) in zip(axes.T, PANELS.items(), strict=True):
        labels = [str(s[("tokens", "rank r", "adapted linears").index(title)]) for s in settings]
        for name, color in zip(NAMES, ("#c9713b", "#2a6f97"), strict=True):
            rows = [by_setting[s][name] for s in settings]
            for axis, unit, values in (
                (column[0], "seconds a step", [float(row["seconds"]) for row in rows]),
                (column[1], "peak memory, MB", [float(row["peak_mb"]) for row in rows]),
            ):
                axis.plot(labels, values, "o-", color=color, label=name)
                axis.set_ylabel(unit)
                axis.set_ylim(0, 1.06 * axis.dataLim.ymax)
                axis.spines[["top", "right"]].set_visible(False)
        column[1].set_xlabel(title)
    axes[0][0].legend(frameon=False, fontsize=8)
    last = at(file, "smollm2-135m", 1, *MIDDLE)[-1]
    figure.suptitle(
        f"smollm2-135m, one row; where not varied 256 tokens, r=8, all linears\n"
        f"{last['processor']} ({last['flags']}), {last['threads']} threads, torch {last['torch']}",
        fontsize=10, x=0.01, ha="left",
    )  # fmt: skip
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draw", action="store_true", help="only draw what was measured")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not options.draw:
        measure(options.rounds)
    draw(RESULTS / "train_step.csv")


if __name__ == "__main__":
    main()
