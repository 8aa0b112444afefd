"""The chunked cross-entropy of the head against the two matrix products it can't do without.

    python benchmarks/loss.py [--rows 1024] [--hidden 576] [--vocabulary 49152] [--rounds 7]

Providers: the two products chunk by chunk, minilora's loss eager and compiled, and torch's own
`F.cross_entropy` on whole logits, as transformers has it: forward and gradient of the hidden
states, in interleaved rounds. Writes benchmarks/results/loss.csv.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import minilora
from minilora.kernels import linear_cross_entropy

RESULTS = Path(__file__).parent / "results"
CHUNK = 256


def bare(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    logits = torch.empty(CHUNK, len(weight), dtype=hidden.dtype)
    for rows in hidden.split(CHUNK):
        torch.mm(rows, weight.t(), out=logits[: len(rows)])
        torch.mm(logits[: len(rows)], weight)


def ours(fused: bool):
    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
        leaf = hidden.requires_grad_()
        torch.autograd.grad(linear_cross_entropy(leaf, weight, labels, fused=fused), leaf)

    return run


def whole(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    leaf = hidden.requires_grad_()
    logits = F.linear(leaf, weight).float()
    torch.autograd.grad(F.cross_entropy(logits, labels), leaf)


PROVIDERS = {
    "two bare products": bare,
    "minilora": ours(False),
    "minilora compiled": ours(True),
    "torch on whole logits": whole,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--csv", type=Path, default=RESULTS / "loss.csv")
    options = parser.parse_args()
    rows = []
    for name in options.dtypes:
        torch.manual_seed(0)
        dtype = getattr(torch, name)
        inputs = (
            torch.randn(options.rows, options.hidden).to(dtype),
            (0.05 * torch.randn(options.vocabulary, options.hidden)).to(dtype),
            torch.randint(options.vocabulary, (options.rows,)),
        )
        seconds: dict[str, list[float]] = {provider: [] for provider in PROVIDERS}
        for number in range(options.rounds + 1):
            for provider, function in PROVIDERS.items():
                start = time.perf_counter()
                function(*(t.detach() for t in inputs))
                if number:  # the first round compiles
                    seconds[provider].append(time.perf_counter() - start)
        least = statistics.median(seconds["two bare products"])
        for provider, found in seconds.items():
            median = statistics.median(found)
            rows.append(
                {
                    "provider": provider, "dtype": name, "rows": options.rows,
                    "hidden": options.hidden, "vocabulary": options.vocabulary,
                    "seconds": f"{median:.4f}", "fastest": f"{min(found):.4f}",
                    "slowest": f"{max(found):.4f}", "to_bare": f"{median / least:.3f}",
                    "processor": minilora.hardware().name,
                    "flags": " ".join(minilora.hardware().flags),
                    "threads": torch.get_num_threads(), "torch": torch.__version__,
                }
            )  # fmt: skip
            print(f"{provider}, {name}: {median:.4f} s, {median / least:.3f} × the bare products")
    new = not options.csv.exists()
    with open(options.csv, "a", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
