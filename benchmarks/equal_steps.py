"""Losses of 200 steps on the two real tasks, as `fit` computes by default and in plain float32.

    PYTHONPATH=benchmarks python benchmarks/equal_steps.py --task docstrings | documents
        [--steps 200] [--seeds 3] [--length 512]
    PYTHONPATH=benchmarks python benchmarks/equal_steps.py --draw

The data are real_task.py's, in the same order with the same first factors for both ways; `fast` has
the dtype that this processor multiplies fastest and what `fit` then chooses, `float32` computes in
float32 throughout. To make it affordable a step has 4 docstrings or one piece of documentation of
at most `--length` tokens. Adds a row for each task, way and seed to
benchmarks/results/equal_steps.csv: the mean loss of the second half of the steps, and the loss of
48 held-out rows at the end; `distance` is the mean |difference| of a step's loss from float32's of
the same seed, relative to it, over the second half. Every step's loss goes into
equal_steps_losses.csv, of which `--draw` makes docs/equal_steps.png: means of 20 steps, and of
every step the two ways' difference.
"""

import argparse
import csv
import dataclasses
import statistics
from pathlib import Path

import numpy as np
import real_task
import torch
from train_step import commit, processor, save

import minilora
from minilora.loading.fetching import fetch
from minilora.loading.model import load_model

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "equal_steps.png"
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


def draw() -> None:
    """Draw the newest curves of each task and seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with open(RESULTS / "equal_steps_losses.csv", newline="", encoding="utf-8") as opened:
        curves = {
            (row["task"], row["seed"], row["way"]): np.array(row["losses"].split(), dtype=float)
            for row in csv.DictReader(opened)
        }
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 5), sharex=True, height_ratios=(2, 1))
    for task, (above, below) in zip(ROWS, axes.T, strict=True):
        for seed in sorted({seed for name, seed, _ in curves if name == task}):
            plain, fast = (curves[task, seed, way] for way in ("float32", "fast"))
            for losses, color, style in ((plain, "#c9713b", "-"), (fast, "#2a6f97", ":")):
                smooth = np.convolve(losses, np.ones(20) / 20, "valid")
                above.plot(np.arange(20, len(losses) + 1), smooth, style, color=color, lw=1.4)
            below.plot(100 * (fast / plain - 1), color="#2a6f97", lw=0.6)
        above.set_title(f"{task}, {ROWS[task]} a step, three seeds", fontsize=11, loc="left")
        below.set_xlabel("step")
        below.set_ylim(-2, 2)
    axes[0, 0].set_ylabel("loss, mean of 20 steps")
    axes[1, 0].set_ylabel("apart, % of each loss")
    lines = [pyplot.Line2D([], [], color=c, ls=s) for c, s in (("#c9713b", "-"), ("#2a6f97", ":"))]
    axes[0, 0].legend(lines, ("float32", "default"), frameon=False)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=list(ROWS), default="docstrings")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    if options.draw:
        draw()
        return
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
            save([row], RESULTS / "equal_steps.csv", tuple(row))
            curve = {key: row[key] for key in ("task", "seed", "way", "commit")}
            curve["losses"] = " ".join(f"{loss:.4f}" for loss in losses)
            save([curve], RESULTS / "equal_steps_losses.csv", tuple(curve))


if __name__ == "__main__":
    main()
