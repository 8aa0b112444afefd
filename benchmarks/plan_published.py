"""Peaks that others published for training on GPUs, beside what `minilora plan` gives.

    python benchmarks/plan_published.py

The plan is of minilora's own code under the stated batch, length, rank, optimizer and
checkpointing; theirs is another program, so a miss is the sum of both differences. `MEASURED` rows
were measured by their authors and are judged (goal: 15 %). `MINIMA` are round figures of what a
card must have, with nothing stated: they are only consistent with the plan at one short row, or
not. Figures are quoted from their sources' tables and were not checked against them here. Writes
benchmarks/results/plan_published.csv.
"""

import csv
from pathlib import Path

import torch

from minilora.planning.memory import count_memory
from minilora.planning.shapes import Settings, read_shape

FILE = Path(__file__).parent / "results" / "plan_published.csv"
GIB = 2**30
TORCHTUNE = "torchtune README, single-device recipes: r=8 on all linears, bf16 AdamW"
FACTORY = (
    "LlamaFactory, arXiv:2403.13372, training-efficiency table: r=128 on all linears, 8-bit AdamW"
)
_TUNE = {"r": 8, "adapter_dtype": torch.bfloat16, "checkpointing": True}
_FACTORY = {"r": 128, "adapter_dtype": torch.bfloat16, "moment_bytes": 1, "checkpointing": True}
# source, model, format, rows, length, options, published, unit
MEASURED = [
    (TORCHTUNE, "llama-3-8b", None, 2, 2048, _TUNE, 16.2, GIB),
    (TORCHTUNE, "llama-3-8b", "nf4", 2, 2048, _TUNE, 7.4, GIB),
    (FACTORY, "llama-2-7b", None, 1, 512, _FACTORY, 16.32, 1e9),
    (FACTORY, "llama-2-7b", "nf4", 1, 512, _FACTORY, 7.52, 1e9),
    (FACTORY, "llama-2-13b", None, 1, 512, _FACTORY, 30.09, 1e9),
    (FACTORY, "llama-2-13b", "nf4", 1, 512, _FACTORY, 12.61, 1e9),
]
CARDS = "LLaMA-Factory README, hardware requirements (estimated)"
# source, model, format, GB of the card
MINIMA = [
    ("often quoted: 8B in 6 GB", "llama-3-8b", "nf4", 6),
    (CARDS, "llama-2-7b", None, 16),
    (CARDS, "llama-2-7b", "int8", 10),
    (CARDS, "llama-2-7b", "nf4", 6),
    (CARDS, "llama-2-13b", None, 32),
    (CARDS, "llama-2-13b", "int8", 20),
    (CARDS, "llama-2-13b", "nf4", 12),
    (CARDS, "llama-2-70b", None, 160),
    (CARDS, "llama-2-70b", "int8", 80),
    (CARDS, "llama-2-70b", "nf4", 48),
]


def main() -> None:
    rows = []
    for source, model, format, batch, length, options, published, unit in MEASURED:
        settings = Settings(format, batch_size=batch, length=length, **options)
        peak = count_memory(read_shape(model), settings, gpu=True, process=0).peak / unit
        miss = peak / published - 1
        verdict = "within 15 %" if abs(miss) <= 0.15 else "missed"
        figures = (f"{published:g}", f"{peak:.2f}", "GiB" if unit == GIB else "GB", f"{miss:+.3f}")
        rows.append((source, model, format or "bfloat16", batch, length, *figures, verdict))
    for source, model, format, card in MINIMA:
        settings = Settings(format, batch_size=1, length=256, checkpointing=True)
        peak = count_memory(read_shape(model), settings, gpu=True).peak / 1e9
        verdict = "consistent" if peak <= card else "not consistent"
        figures = (str(card), f"{peak:.2f}", "GB", "")
        rows.append((source, model, format or "bfloat16", 1, 256, *figures, verdict))
    head = ("source", "model", "base", "batch", "length", "published", "planned", "unit", "miss",
            "verdict")  # fmt: skip
    with open(FILE, "w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([head, *rows])
    for row in rows:
        print(" | ".join(map(str, row[1:])))


if __name__ == "__main__":
    main()
