"""Llama-2-70B on 1 to 16 GPUs, on shapes alone: bytes of each rank by component.

    python benchmarks/llama_70b.py [--csv benchmarks/results/llama_70b.csv]

Nothing is loaded: the model is made on the meta device and counted by `minilora.planning`. FSDP2
over so many ranks, r = 16 on all linears but the head, one row of 2048 tokens on each rank, blocks
run again in the backward pass. "Fits" leaves a tenth of the GPU's memory free.
"""

import argparse
import csv
from pathlib import Path

import torch

from minilora.planning.memory import MARGIN, count_memory
from minilora.planning.shapes import Settings, read_shape

RANKS, GPUS = (1, 2, 4, 8, 16), (24, 48, 80)
PARTS = (
    "process", "base", "codes", "scales", "adapters", "gradients", "optimizer", "activations",
    "recomputed", "backward", "loss", "decoded", "gathered",
)  # fmt: skip


def row(ranks: int, format: str | None) -> dict[str, object]:
    settings = Settings(
        format=format, dtype=torch.bfloat16, r=16, batch_size=ranks, length=2048,
        checkpointing=True, ranks=ranks, parallel="fsdp" if ranks > 1 else None,
    )  # fmt: skip
    memory = count_memory(read_shape("llama-2-70b"), settings, gpu=True)
    found: dict[str, object] = {"base format": format or "bfloat16", "ranks": ranks}
    found |= {f"{name} bytes": getattr(memory, name) for name in PARTS}
    found["peak bytes"] = memory.peak
    for size in GPUS:
        found[f"fits {size} GB"] = memory.peak <= (1 - MARGIN) * size * 1e9
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    rows = [row(ranks, format) for format in (None, "nf4") for ranks in RANKS]
    print("| base | GPUs | base's part | adapter, gradients, moments | activations and gathered "
          "| peak | fits |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for found in rows:
        part = {name: found[f"{name} bytes"] / 1e9 for name in PARTS}
        base = part["base"] + part["codes"] + part["scales"]
        trained = part["adapters"] + part["gradients"] + part["optimizer"]
        peak = found["peak bytes"] / 1e9
        fits = [str(size) for size in GPUS if found[f"fits {size} GB"]]
        print(
            f"| {found['base format']} | {found['ranks']} | {base:.1f} | {trained:.2f} | "
            f"{peak - base - trained:.1f} | {peak:.1f} | "
            f"{f'{fits[0]} GB' if fits else 'none of these'} |"
        )
    if options.csv is not None:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
