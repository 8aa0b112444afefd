"""Losses of 200 steps on the two real tasks, as `fit` computes by default and in plain float32.

    PYTHONPATH=benchmarks python benchmarks/equal_steps.py --task docstrings | documents
        [--steps 200] [--seeds 3] [--length 512] [--csv FILE]

The data are real_task.py's, in the same order with the same first factors for both ways; `fast` has
the dtype that this processor multiplies fastest and what `fit` then chooses, `float32` computes in
float32 throughout. To make it affordable a step has 4 docstrings or one piece of documentation of
at most `--length` tokens. Adds a row for each task, way and seed to
benchmarks/results/equal_steps.csv: the mean loss of the second half of the steps, and the loss of
48 held-out rows at the end; `distance` is the mean |difference| of a step's loss from float32's of
the same seed, relative to it, over the second half.
"""

import argparse
import csv
import dataclasses
import statistics
from pathlib import Path

import real_task
import torch
from train_step import commit, processor

import minilora
from minilora.loading.fetching import fetch
from minilora.loading.model import load_model

RESULTS = Path(__file__).parent / "results"
ROWS = {"docstrings": 4, "documents": 1}  # a step
LR = 1e-3


def run(
    task: str, dtype: torch.dtype, seed: int, options: argparse.Namespace
) -> tuple[list, float]:
    """Return the loss of every step, and the held-out loss after the last."""
    model, tokenizer = load_model(fetch(real_task.MODEL), dtype=dtype)
    train, valid = (
        [
            dataclasses.replace(
                row, input_ids=row.input_ids[: options.length], labels=row.labels[: options.length]
            )
            for row in some
        ]
        for some in real_task.rows_of(task, tokenizer)
    )
    torch.manual_seed(seed)
    minilora.inject(model, r=real_task.R, alpha=real_task.ALPHA)
    config = minilora.TrainConfig(
        lr=LR, batch_size=ROWS[task], max_steps=options.steps, schedule="constant", seed=seed,
        dtype="auto" if dtype != torch.float32 else "float32",
    )  # fmt: skip
    found = minilora.fit(model, train, valid[:48], config=config, quiet=True, plan=False)
    assert found.best is not None and found.best_step == options.steps
    return found.losses, found.best.loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=list(ROWS), required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--csv", type=Path, default=RESULTS / "equal_steps.csv")
    options = parser.parse_args()
    fast = minilora.hardware().dtype
    if fast == torch.float32:
        parser.error("float32 is what this processor multiplies fastest: nothing to compare")
    about = {
        "task": options.task, "rows": ROWS[options.task], "length": options.length, "lr": LR,
        "steps": options.steps, "processor": processor(),
        "flags": " ".join(minilora.hardware().flags), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "commit": commit(),
    }  # fmt: skip
    for seed in range(options.seeds):
        plain, held_out = run(options.task, torch.float32, seed, options)
        quick, held_out_fast = run(options.task, fast, seed, options)
        half = options.steps // 2
        for way, losses, after in (("float32", plain, held_out), ("fast", quick, held_out_fast)):
            apart = [abs(a - b) for a, b in zip(losses, plain, strict=True)][half:]
            row = about | {
                "way": way, "seed": seed, "second_half": f"{statistics.mean(losses[half:]):.4f}",
                "held_out": f"{after:.4f}",
                "distance": f"{statistics.mean(apart) / statistics.mean(plain[half:]):.5f}",
            }  # fmt: skip
            print(row, flush=True)
            new = not options.csv.exists()
            with open(options.csv, "a", newline="", encoding="utf-8") as opened:
                writer = csv.DictWriter(opened, row)
                if new:
                    writer.writeheader()
                writer.writerow(row)


if __name__ == "__main__":
    main()
