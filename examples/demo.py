"""Teach a real language model on a laptop to write docstrings, in about three minutes.

    python examples/demo.py [--out out/demo] [--minutes 3] [--csv runs.csv]

The data is this Python's own standard library: the source of a function without its docstring is
the prompt, the docstring's first paragraph is what to write. The base is stored, and the steps are
computed, in the way that is fastest on this processor. Memory and time are planned before the first
step, and measured after the last. Every other number printed is measured in this run: held-out
perplexity with its standard error and three docstrings before and after, the same after reloading
the adapter in a fresh process, and what merging it changes. With --csv they are also added to a
table.
"""

import argparse
import csv
import math
import subprocess
import sys
import time
from pathlib import Path

import torch

import minilora
from minilora.data import as_examples, docstring_pairs, split
from minilora.files import ticking
from minilora.loading.fetching import fetch
from minilora.loading.model import load_model
from minilora.report.tokens import Measured, measured
from minilora.running import token_losses

MAX_TOKENS = 256
TEST, VALID, AGAIN = 128, 32, 32  # examples measured on, during the run, and once more at the end
COMPILE_PAYS = 5.0  # minutes; chosen: in 3 compiling was not repaid (benchmarks/NOTES.md)
INT8_PAYS = 1.5  # times the rate of floats from which on INT8 is faster in a compiled step


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


def fastest_way(minutes: float) -> tuple[str | None, bool, str]:
    """Return the base's format, whether to compile, and why, by the rates measured here."""
    here = minilora.hardware()
    name = str(here.dtype).removeprefix("torch.")
    floats = {"float32": here.float32, "bfloat16": here.bfloat16}.get(name, here.float16)
    compiled = minutes >= COMPILE_PAYS
    integer = compiled and here.int8 >= INT8_PAYS * floats  # eager steps are slower over codes
    products = f"int8 products make {here.int8:.0f} GFLOP/s here, {name} ones {floats:.0f}"
    steps = "compiled, which the faster steps repay" if compiled else "not compiled"
    way = f"the base in {'INT8' if integer else name} ({products}), steps {steps}"
    return ("int8" if integer else None), compiled, way


def evenly(items: list, count: int) -> list:
    """Pick so many, evenly."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def samples(model, tokenizer, records) -> list[str]:
    with ticking("writing three docstrings"):
        texts = minilora.generate(
            model,
            [r["prompt"] for r in records],
            tokenizer=tokenizer,
            max_new_tokens=40,
            stop=("\n\n",),
        )
    return [" ".join(text.split()) for text in texts]


def losses(model, test) -> list[torch.Tensor]:
    """Return the loss of every learned token, by example."""
    return token_losses(model, as_examples(test), batch_size=16, progress=True)


def base(format: str | None, dtype: torch.dtype):
    with ticking("loading the model"):
        return load_model(fetch("smollm2-135m"), format, dtype=dtype)


def test_set(tokenizer) -> tuple[list, list]:
    """Return examples of modules that are not trained on, and their records."""
    (test, _), records = rows(split(docstring_pairs("test"))["test"], tokenizer)
    return evenly(test, TEST), evenly(records, TEST)


def reload_and_evaluate(out: Path, way: str) -> None:
    """Run in a fresh process: the base from its file, the adapter from its, the same examples."""
    dtype, _, format = way.partition("-")
    model, tokenizer = base(format or None, getattr(torch, dtype))
    minilora.load(model, out)
    test, _ = test_set(tokenizer)
    say(minilora.evaluate(model, test[:AGAIN], batch_size=16, progress=True).perplexity.hex())


def reloaded_perplexity(out: Path, format: str | None, dtype: torch.dtype) -> float:
    """Ask a fresh process for the same number."""
    way = f"{str(dtype).removeprefix('torch.')}-{format or ''}"
    command = [sys.executable, __file__, "--out", str(out), "--reload", way]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float.fromhex(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--minutes", type=float, default=3.0, help="training time (default 3)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="add the numbers as a row")
    parser.add_argument("--reload", metavar="WAY", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reload:
        reload_and_evaluate(options.out, options.reload)
        return
    out, began = fresh(options.out), time.perf_counter()
    say(f"hardware: {minilora.hardware()}")
    dtype = minilora.hardware().dtype
    format, compiled, way = fastest_way(options.minutes)
    say(f"fastest:  {way}")
    model, tokenizer = base(format, dtype)
    with ticking("reading the standard library"):
        parts = split(docstring_pairs())
        (train, report), _ = rows(parts["train"], tokenizer)
        (valid, _), _ = rows(parts["valid"], tokenizer)
        test, test_records = test_set(tokenizer)
    valid = evenly(valid, VALID)
    say(f"data: {report}")
    say(f"      {len(valid)} validation and {len(test)} test examples from other modules")

    shown = [test_records[i * len(test_records) // 3 + 2] for i in range(3)]
    texts_before = samples(model, tokenizer, shown)
    before = losses(model, test)
    start = measured(before, before)
    say(f"test before: perplexity {math.exp(start.before):.2f} over {start.tokens} tokens")

    torch.manual_seed(0)
    minilora.inject(model)
    config = minilora.TrainConfig(
        batch_size=16, max_minutes=options.minutes, eval_batch_size=16,
        compile="auto" if compiled else False,
    )  # fmt: skip
    result = minilora.fit(model, train, valid, config=config, out=out, plan=True)
    found = measured(before, losses(model, test))
    say(f"test after:  perplexity {math.exp(found.after):.2f}; the loss per token changed by "
        f"{found.change:+.3f} ± {found.error:.3f} nats")  # fmt: skip
    say(f"perplexity {math.exp(found.before):.2f} -> {math.exp(found.after):.2f} in {result.steps} "
        f"steps, {result.minutes:.1f} minutes")  # fmt: skip
    for record, old, new in zip(shown, texts_before, samples(model, tokenizer, shown), strict=True):
        say()
        say("\n".join(record["prompt"].splitlines()[:6]) + "\n    ...")
        say(f"  written by people: {record['completion'].strip()}")
        say(f"  before:            {old}")
        say(f"  after:             {new}")

    say()
    here = minilora.evaluate(model, test[:AGAIN], batch_size=16, progress=True).perplexity
    reloaded = reloaded_perplexity(out, format, dtype)
    same = "the same to the last bit" if reloaded == here else "DIFFERENT"
    say(f"reloaded in a fresh process: perplexity of {AGAIN} examples {reloaded:.6f}, {same}")
    error = merged_difference(out, tokenizer, shown)
    minutes = (time.perf_counter() - began) / 60
    say(f"adapter, metrics and loss curve: {out}/  (total {minutes:.1f} minutes)")
    say_what_next(out)
    if options.csv:
        add_row(options.csv, table_row(dtype, format, config, result, found, reloaded == here,
                                       error, minutes))  # fmt: skip
    if reloaded != here or found.change >= 0:
        sys.exit("the demo did not do what it says")


def say_what_next(out: Path) -> None:
    command = Path(sys.executable).parent / "minilora"
    if command.is_relative_to(Path.cwd()):
        command = command.relative_to(Path.cwd())
    say(f"""
What to type next:
  make explain                                       # what the adapter changed, as a page
  {command} chat smollm2-135m                        # talk to the model
  {command} train smollm2-135m --data YOURS.jsonl --hold-out 5% --minutes 3 --out out/mine
  {command} chat out/mine                            # talk to yours; /base: what the model said
  {command} export out/mine --gguf mine.gguf         # for llama.cpp and Ollama""")


def table_row(
    dtype, format, config, result, found: Measured, same: bool, error: float, minutes: float
) -> dict[str, object]:
    """Put what was measured beside the conditions it was measured under."""
    return {
        "processor": minilora.hardware().name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "base": format or "plain",
        "compiled": result.compiling > 0,
        "steps": result.steps,
        "batch_size": config.batch_size,
        "minutes": f"{result.minutes:.2f}",
        "test_tokens": found.tokens,
        "perplexity_before": f"{math.exp(found.before):.4f}",
        "perplexity_after": f"{math.exp(found.after):.4f}",
        "change_error": f"{found.error:.4f}",
        "reload_bit_equal": same,
        "merge_error_float32": f"{error:.2e}",
        "total_minutes": f"{minutes:.2f}",
    }


def merged_difference(out: Path, tokenizer, records) -> float:
    """Print and return what merging changes in the logits: rounding only, and unmerge undoes it."""
    model, _ = base(None, torch.float32)
    minilora.load(model, out)
    model.eval()
    ids = torch.tensor([tokenizer.encode(records[0]["prompt"])])
    with torch.no_grad():
        apart = model(ids).double()
        minilora.merge(model)
        together = model(ids).double()
        minilora.unmerge(model)
        again = model(ids).double()
    error = float((together - apart).abs().max() / apart.abs().max())
    exact = "restores the very bits" if torch.equal(again, apart) else "DOES NOT RESTORE"
    say(f"merged in float32: logits differ by {error:.1e} relative; unmerge {exact}")
    if error > 1e-5:
        sys.exit(f"merging in float32 changed the logits by {error:.1e}, more than 1e-5")
    return error


if __name__ == "__main__":
    main()
