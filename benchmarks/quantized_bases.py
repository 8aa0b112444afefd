"""The demo's task over each storage of the base: held-out perplexity before and after tuning.

    python benchmarks/quantized_bases.py [--steps 52] [--batch-size 8] [--only int8 nf4 ...]

Every run has the same seed, data, order and number of steps; only the base differs. A row is added
to benchmarks/results/quantized_bases.csv. The weights of SmolLM2 come from a file that is itself
4-bit (Q4_1, blocks of 32), so the table shows what a format costs a user of this file, and can't
rank 4-bit formats: `benchmarks/formats.py` does, on full-precision weights.
"""

import argparse
import importlib.util
import time
from pathlib import Path

import torch

import minilora
from minilora.loading.fetching import fetch
from minilora.loading.model import load_model

ROOT = Path(__file__).resolve().parents[1]
INT8 = {"compute": "int8", "grad_compute": "int8"}
DEQUANTIZE = {"compute": "dequantize", "grad_compute": "dequantize"}
BASES: dict[str, dict | None] = {
    "plain": None,
    "int8": {"format": "int8", **INT8},
    "int8, 16 outlier channels": {"format": "int8", "outliers": 16, **INT8},
    "int8, input gradient dequantized": {
        "format": "int8", "compute": "int8", "grad_compute": "dequantize",
    },
    "int8, dequantized": {"format": "int8", **DEQUANTIZE},
    "nf4": {"format": "nf4"},
    "int4, groups of 32": {"format": "int4", "block_size": 32, **INT8},
    "int4, groups of 32, 16 outlier channels": {
        "format": "int4", "block_size": 32, "outliers": 16, **INT8,
    },
    "int4, groups of 32, dequantized": {"format": "int4", "block_size": 32, **DEQUANTIZE},
}  # fmt: skip


def load_demo():
    """Import examples/demo.py, which is a script beside the package."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    return demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=52)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=list(BASES), default=list(BASES))
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks/results/quantized_bases.csv")
    options = parser.parse_args()
    demo = load_demo()
    parts = demo.split(demo.docstring_pairs())
    for name in options.only:
        model, tokenizer = load_model(fetch("smollm2-135m"))
        (train, _), _ = demo.rows(parts["train"], tokenizer)
        (test, _), _ = demo.rows(parts["test"], tokenizer)
        settings = BASES[name]
        if settings:
            minilora.quantize(model, **settings)
        weights = sum(p.nbytes for p in model.parameters())
        before = minilora.evaluate(model, test, batch_size=16)
        torch.manual_seed(0)
        minilora.inject(model, r=8, alpha=16)
        config = minilora.TrainConfig(
            lr=1e-3, batch_size=options.batch_size, max_steps=options.steps
        )
        began = time.perf_counter()
        minilora.fit(model, train, config=config)
        minutes = (time.perf_counter() - began) / 60
        after = minilora.evaluate(model, test, batch_size=16)
        row = {
            "base": name,
            "weights_mb": f"{weights / 1e6:.1f}",
            "perplexity_before": f"{before.perplexity:.3f}",
            "perplexity_after": f"{after.perplexity:.3f}",
            "minutes": f"{minutes:.2f}",
            "steps": options.steps,
            "batch_size": options.batch_size,
            "test_tokens": after.tokens,
            "processor": minilora.hardware().name,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        print(", ".join(f"{key} {value}" for key, value in list(row.items())[:5]), flush=True)
        demo.add_row(options.csv, row)


if __name__ == "__main__":
    main()
