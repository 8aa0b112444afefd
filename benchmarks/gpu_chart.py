"""Draw tokens per second and memory of whole models on the H200, from gpu.csv: docs/gpu.png.

    PYTHONPATH=benchmarks python benchmarks/gpu_chart.py

The letters are large enough for a telephone's 360 points.
"""

from pathlib import Path

import matplotlib
from csv_tables import Row
from tables_gpu import H200, steps

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OUT = Path(__file__).resolve().parents[1] / "docs" / "gpu.png"
OURS, THEIRS = "#2a6f97", "#b0b7bf"
MODELS = {
    "llama-3.1-8b": "Llama-3.1-8B: all linears, 2 × 4096 tokens",
    "llama-3.2-3b": "Llama-3.2-3B: q and v, 4 × 768 tokens",
}
PROGRAMS = {
    "PEFT, eager": ("peft", "False"),
    "minilora, eager": ("minilora", "False"),
    "minilora, compiled": ("minilora", "True"),
}


def _row(model: str, program: str, compiled: str) -> Row:
    """Return the row of a program in bf16."""
    return next(row for row in steps(H200) if row["what"] == f"{model}, {program}"
                and row["compiled"] == compiled and not row["format"])  # fmt: skip


def draw() -> None:
    """Draw a line of two panels for each model, in each a bar for each program."""
    figure, grid = plt.subplots(len(MODELS), 2, figsize=(4.6, 4.6))
    for axes, (model, title) in zip(grid, MODELS.items(), strict=True):
        rows = [_row(model, *program) for program in PROGRAMS.values()]
        for axis, key, head, unit in zip(
            axes, ("tokens_s", "peak_gb"), ("tokens a second", "peak memory"),
            ("{:,.0f}", "{:.3g} GB"), strict=True,
        ):  # fmt: skip
            values = [float(row[key]) for row in rows]
            colors = [OURS if name.startswith("minilora") else THEIRS for name in PROGRAMS]
            axis.barh(range(len(values)), values, 0.5, color=colors)
            for i, (name, value) in enumerate(zip(PROGRAMS, values, strict=True)):
                text = unit.format(value)
                axis.text(value + 0.02 * max(values), i, text, va="center", fontsize=11)
                if key == "tokens_s":
                    axis.text(0, i - 0.33, name, fontsize=11)
            if key == "tokens_s":
                named = axis.text(0, -1.55, title, fontsize=11, fontweight="bold")
                named.set_in_layout(False)  # it reaches into the next panel
            axis.text(0, -0.95, head, fontsize=11)
            axis.set_xlim(0, max(values) * 1.5)
            axis.set_ylim(len(values) - 0.6, -1.7)
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(OUT, dpi=150)


if __name__ == "__main__":
    draw()
