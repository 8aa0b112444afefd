"""What computing the first tokens of all rows once saves: steps alternating with and without.

    PYTHONPATH=benchmarks python benchmarks/shared_prefix.py [--rows 16] [--batches 6] [--rounds 5]
        [--words 0 15 60 240]

SmolLM2-135M with r = 8 on all linears over the demo's docstrings (at most 256 tokens beside the
system prompt), in the dtype that this processor multiplies fastest. `words` is how many words of a
system prompt stand before each row. A step is forward and backward pass of one batch, not split.
Each is computed as `pad` made it and as a copy that does not know what its rows share. Adds a row
for each length of the prompt to results/shared_prefix.csv: medians over all batches and rounds, the
ratio of each pair's seconds, and the largest difference of the two losses.
"""

import argparse
import dataclasses
import itertools
import statistics
import time
from pathlib import Path

import torch
from train_step import commit, processor, save

import minilora
from minilora.data import Batches, read_data
from minilora.kernels import keep_freed_memory
from minilora.loading.fetching import fetch
from minilora.loading.model import load_model
from minilora.running import token_loss

RESULTS = Path(__file__).parent / "results" / "shared_prefix.csv"
PROMPT = "You write the docstring of a Python function for a library that values plain words."


def seconds(model: torch.nn.Module, batch: minilora.data.Batch) -> tuple[float, float]:
    """Return how long forward and backward pass take, and the loss."""
    begin = time.perf_counter()
    total, tokens = token_loss(model, batch)
    total.backward()
    took = time.perf_counter() - begin
    model.zero_grad()
    return took, float(total.detach()) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--words", type=int, nargs="+", default=[0, 15, 60, 240])
    options = parser.parse_args()
    keep_freed_memory()
    dtype = minilora.hardware().dtype
    model, tokenizer = load_model(fetch("smollm2-135m"), dtype=dtype)
    minilora.inject(model, r=8)
    model.train()
    for count in options.words:
        words = (PROMPT.split() * (count // 15 + 1))[:count]
        system = {"system": " ".join(words)} if words else {}
        rows, _ = read_data("@docstrings", tokenizer, max_length=256 + 2 * count, **system)
        loader = Batches(rows[:400], batch_size=options.rows)
        batches = list(itertools.islice(loader, options.batches))
        assert all(batch.shared for batch in batches)
        found: dict[bool, list[float]] = {True: [], False: []}
        apart = 0.0
        for turn in range(-1, options.rounds):
            for batch in batches:
                losses = {}
                for once in (False, True):
                    # A copy does not know what its rows share.
                    same = batch if once else dataclasses.replace(batch)
                    took, losses[once] = seconds(model, same)
                    if turn >= 0:  # the first only warms up
                        found[once].append(took)
                apart = max(apart, abs(losses[True] - losses[False]))
        sizes = [batch.input_ids.shape for batch in batches]
        tokens = sum(size.numel() for size in sizes)
        saved = sum(batch.shared * (len(batch) - 1) for batch in batches)
        ratios = [a / b for a, b in zip(found[False], found[True], strict=True)]
        row = {
            "rows": options.rows, "words": count, "shared": min(batch.shared for batch in batches),
            "tokens": tokens // len(batches) // options.rows,
            "computed": f"{1 - saved / tokens:.3f}",
            "apart_s": f"{statistics.median(found[False]):.3f}",
            "once_s": f"{statistics.median(found[True]):.3f}",
            "times": f"{statistics.median(ratios):.3f}",
            "low": f"{statistics.quantiles(ratios, n=4)[0]:.3f}",
            "high": f"{statistics.quantiles(ratios, n=4)[2]:.3f}",
            "loss_apart": f"{apart:.5f}", "dtype": str(dtype).removeprefix("torch."),
            "processor": processor(), "flags": " ".join(minilora.hardware().flags),
            "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit(),
        }  # fmt: skip
        print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        save([row], RESULTS, tuple(row))


if __name__ == "__main__":
    main()
