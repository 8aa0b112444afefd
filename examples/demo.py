"""Teach a real language model on a laptop to write docstrings, in about three minutes.

    python examples/demo.py [--out out/demo] [--minutes 3] [--csv runs.csv]

The data is this Python's own standard library: the source of a function without its docstring is
the prompt, the docstring's first paragraph is what to write. Memory and time are planned before
the first step, and measured after the last. Every other number printed is measured in this run:
held-out perplexity and three docstrings before and after, the same after reloading the adapter in a
fresh process, and what merging it changes. With --csv they are also added to a table.
"""

import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path

import torch

import minilora
from minilora.data import docstring_pairs, split
from minilora.loading.fetching import fetch
from minilora.loading.model import load_model
from minilora.models import Llama

MAX_TOKENS = 256


def rows(records, tokenizer, limit=None):
    """Encode pairs; prompts are cut so that the docstring always fits."""
    short = []
    for record in records:
        room = MAX_TOKENS - len(tokenizer.encode(record["completion"])) - 1
        if len(tokenizer.encode(record["prompt"])) <= room:
            short.append(record)
    return minilora.read_data(short[:limit], tokenizer, max_length=MAX_TOKENS), short


def say(line: str = "") -> None:
    print(line, flush=True)


def fresh(folder: Path) -> Path:
    """Return the folder, with a number behind it if it holds something: no run is overwritten."""
    found, number = folder, 1
    while found.exists() and (not found.is_dir() or any(found.iterdir())):
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")
    return found


def add_row(file: Path, row: dict[str, object]) -> None:
    """Append a row to a table, under a header if the table is new."""
    new = not file.exists() or file.stat().st_size == 0
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def samples(model, tokenizer, records) -> list[str]:
    texts = minilora.generate(
        model,
        [r["prompt"] for r in records],
        tokenizer=tokenizer,
        max_new_tokens=40,
        stop=("\n\n",),
    )
    return [" ".join(text.split()) for text in texts]


def reload_and_evaluate(out: Path, dtype: str) -> None:
    """Run in a fresh process: the base from its file, the adapter from its, the same test set."""
    model, tokenizer = load_model("smollm2-135m", dtype=getattr(torch, dtype))
    minilora.load(model, out)
    (test, _), _ = rows(split(docstring_pairs())["test"], tokenizer)
    say(minilora.evaluate(model, test, batch_size=16).perplexity.hex())


def reloaded_perplexity(out: Path, dtype: torch.dtype) -> float:
    """Ask a fresh process for the same number."""
    name = str(dtype).removeprefix("torch.")
    command = [sys.executable, __file__, "--out", str(out), "--reload", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float.fromhex(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--minutes", type=float, default=3.0, help="training time (default 3)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="add the numbers as a row")
    parser.add_argument("--reload", metavar="DTYPE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reload:
        reload_and_evaluate(options.out, options.reload)
        return
    out, began = fresh(options.out), time.perf_counter()
    say(f"hardware: {minilora.hardware()}")
    dtype = minilora.hardware().dtype
    model, tokenizer = load_model(fetch("smollm2-135m"), dtype=dtype)
    parts = split(docstring_pairs())
    (train, report), _ = rows(parts["train"], tokenizer)
    (valid, _), _ = rows(parts["valid"], tokenizer, limit=200)
    (test, _), test_records = rows(parts["test"], tokenizer)
    say(f"data: {report}")
    say(f"      {len(valid)} validation and {len(test)} test examples from other modules")

    shown = [test_records[i * len(test_records) // 3 + 7] for i in range(3)]
    texts_before = samples(model, tokenizer, shown)
    before = minilora.evaluate(model, test, batch_size=16)
    say(f"test before: {before}")

    torch.manual_seed(0)
    minilora.inject(model, r=8, alpha=16)
    config = minilora.TrainConfig(
        lr=1e-3, batch_size=16, max_minutes=options.minutes, eval_every=100, eval_batch_size=16
    )
    result = minilora.fit(model, train, valid, config=config, out=out, plan=True)
    after = minilora.evaluate(model, test, batch_size=16)
    say(f"test after:  {after}")
    say(f"perplexity {before.perplexity:.2f} -> {after.perplexity:.2f} in {result.steps} steps, "
        f"{result.minutes:.1f} minutes")  # fmt: skip
    for record, old, new in zip(shown, texts_before, samples(model, tokenizer, shown), strict=True):
        say()
        say("\n".join(record["prompt"].splitlines()[:6]) + "\n    ...")
        say(f"  written by people: {record['completion'].strip()}")
        say(f"  before:            {old}")
        say(f"  after:             {new}")

    say()
    reloaded = reloaded_perplexity(out, dtype)
    same = "the same to the last bit" if reloaded == after.perplexity else "DIFFERENT"
    say(f"reloaded in a fresh process: perplexity {reloaded:.6f}, {same}")
    errors = merged_difference(out, model, tokenizer, shown, dtype)
    minutes = (time.perf_counter() - began) / 60
    say(f"adapter, metrics and loss curve: {out}/  (total {minutes:.1f} minutes)")
    if options.csv:
        row = table_row(dtype, config, result, before, after, reloaded, errors, minutes)
        add_row(options.csv, row)
    if reloaded != after.perplexity or after.perplexity >= before.perplexity:
        sys.exit("the demo did not do what it says")


def table_row(dtype, config, result, before, after, reloaded, errors, minutes) -> dict[str, object]:
    """Put what was measured beside the conditions it was measured under."""
    return {
        "processor": minilora.hardware().name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "steps": result.steps,
        "batch_size": config.batch_size,
        "minutes": f"{result.minutes:.2f}",
        "test_tokens": after.tokens,
        "perplexity_before": f"{before.perplexity:.4f}",
        "perplexity_after": f"{after.perplexity:.4f}",
        "reload_bit_equal": reloaded == after.perplexity,
        "merge_error_float32": f"{errors[0]:.2e}",
        "merge_error_dtype": f"{errors[1]:.2e}",
        "total_minutes": f"{minutes:.2f}",
    }


def merged_difference(out, model: Llama, tokenizer, records, dtype: torch.dtype) -> list[float]:
    """Print and return what merging changes in the logits, in float32 and in the model's dtype.

    It is rounding only, and unmerge takes it back.
    """
    errors = []
    wide, _ = load_model("smollm2-135m", dtype=torch.float32)
    minilora.load(wide, out)
    for one, name in ((wide, torch.float32), (model, dtype)):
        one.eval()
        ids = torch.tensor([tokenizer.encode(records[0]["prompt"])])
        with torch.no_grad():
            apart = one(ids).double()
            minilora.merge(one)
            together = one(ids).double()
            minilora.unmerge(one)
            again = one(ids).double()
        error = float((together - apart).abs().max() / apart.abs().max())
        errors.append(error)
        exact = "restores the very bits" if torch.equal(again, apart) else "DOES NOT RESTORE"
        say(f"merged, {str(name).removeprefix('torch.')}: logits differ by {error:.1e} relative; "
            f"unmerge {exact}")  # fmt: skip
        if name == torch.float32 and error > 1e-5:
            sys.exit(f"merging in float32 changed the logits by {error:.1e}, more than 1e-5")
    return errors


if __name__ == "__main__":
    main()
