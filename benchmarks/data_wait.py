"""How much of the training time goes into waiting for data, on the demo's task.

    python benchmarks/data_wait.py [--steps 8] [--csv benchmarks/results/data_wait.csv]

The demo's model, rows and batch size: examples in memory, packed, and streamed (tokenized in the
background as they are needed; its first window is read before the first step).
"""

import argparse
import csv
import importlib.util
from pathlib import Path

import torch

import minilora
from minilora.data import Stream, pack
from minilora.loading.fetching import fetch
from minilora.loading.model import load_model

ROOT = Path(__file__).resolve().parents[1]


def demo():
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    task, hardware = demo(), minilora.hardware()
    model, tokenizer = load_model(fetch("smollm2-135m"), dtype=hardware.dtype)
    (examples, _), records = task.rows(task.split(task.docstring_pairs())["train"], tokenizer)
    minilora.inject(model, r=8, alpha=16)

    def encode(record):
        found, _ = minilora.read_data([record], tokenizer, max_length=task.MAX_TOKENS)
        return found[0] if found else None

    ways = {
        "in memory": examples,
        "packed": pack(examples, task.MAX_TOKENS),
        "streamed": Stream(records, encode),
        "streamed, window of 64": Stream(records, encode, window=64),
    }
    rows = []
    for name, data in ways.items():
        config = minilora.TrainConfig(max_steps=options.steps, batch_size=16, lr=1e-3)
        result = minilora.fit(model, data, config=config, quiet=True)
        rows.append(
            {
                "processor": hardware.name,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "dtype": str(hardware.dtype).removeprefix("torch."),
                "data": name,
                "steps": result.steps,
                "batch_size": 16,
                "seconds": round(60 * result.minutes, 1),
                "tokens": result.tokens,
                "data_wait_percent": round(100 * result.data_wait, 3),
            }
        )
        print(rows[-1], flush=True)
    if options.csv is not None:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
