"""Report what the demo's adapter changed in the model, and whether it matters, as one page.

    python examples/explain.py [--adapter out/demo] [--against out/demo-2] [--out out/explain]

Run `make demo` first. The held-out data are the demo's test functions, the training data a part of
its training functions, and this project's README stands for text outside the task.
"""

import argparse
import csv
import runpy
import sys
import time
from pathlib import Path

import torch

import minilora
from minilora.loading.model import load_model

HERE = Path(__file__).resolve().parent
WORDS = ["return", "self", "raise"]


def some(examples, count):
    """Pick `count` examples, evenly."""
    count = min(count, len(examples))
    return [examples[i * len(examples) // count] for i in range(count)]


def windows(text, tokenizer, length):
    """Cut a text into examples of `length` tokens."""
    ids = tokenizer.encode(text)
    return [{"input_ids": ids[i : i + length]} for i in range(0, len(ids) - length, length)]


def write_table(file, found) -> None:
    """Write what was measured, one row each, beside the conditions it was measured under."""
    here = [minilora.hardware().name, torch.get_num_threads(), torch.__version__]
    here.append(str(minilora.hardware().dtype).removeprefix("torch."))
    rows = [
        [what, m.before, m.after, m.change, m.error, m.examples, m.tokens]
        for what, m in (("held out", found.behaviour.loss), ("training", found.gap.train),
                        ("outside the task", found.forgetting))
    ]  # fmt: skip
    cut, loss = found.behaviour.truncated, found.behaviour.loss
    if cut is not None:
        what = (
            f"held out at the suggested ranks ({sum(v.suggested_r for v in found.layers)} in all)"
        )
        rows.append([what, loss.before, cut, cut - loss.before, None, loss.examples, loss.tokens])
    for a in found.behaviour.ablations:
        full, base = a.without - a.rise, a.alone + a.gain
        rows += [
            [f"without {a.part}", full, a.without, a.rise, a.rise_error, *found.behaviour.ablated],
            [f"{a.part} alone", base, a.alone, -a.gain, a.gain_error, *found.behaviour.ablated],
        ]
    head = ["what", "loss before", "loss after", "change", "standard error", "examples", "tokens"]
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["processor", "threads", "torch", "dtype", *head])
        for row in rows:
            cells = [f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row]
            writer.writerow([*here, *cells])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", type=Path, default=Path("out/demo"))
    parser.add_argument("--against", type=Path, help="another run's adapter, to compare with")
    parser.add_argument("--out", type=Path, default=Path("out/explain"))
    parser.add_argument("--examples", type=int, default=150, help="of each kind of data")
    parser.add_argument("--ablate", type=int, default=40, help="examples to ablate on")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the numbers as a table")
    options = parser.parse_args()
    if not (options.adapter / "adapter_config.json").is_file():
        sys.exit(f"no adapter in {options.adapter}: run `make demo` first, or name one")
    began = time.perf_counter()
    demo = runpy.run_path(str(HERE / "demo.py"))
    model, tokenizer = load_model("smollm2-135m", dtype=minilora.hardware().dtype)
    minilora.load(model, options.adapter, "demo")
    if options.against is not None:
        minilora.load(model, options.against, "other")
    parts = demo["split"](demo["docstring_pairs"]())
    data = {}
    for name in ("train", "test"):
        records = demo["rows"](some(parts[name], options.examples), tokenizer)[1]
        data[name] = minilora.read_data(records, tokenizer, max_length=demo["MAX_TOKENS"])[0]
    prose = (HERE.parent / "README.md").read_text(encoding="utf-8")
    found = minilora.explain(
        model,
        "demo",
        data=data["test"],
        train=data["train"],
        outside=some(windows(prose, tokenizer, 128), options.examples),
        against=None if options.against is None else "other",
        words=WORDS,
        tokenizer=tokenizer,
        ablate_examples=options.ablate,
        batch_size=16,
        progress=sys.stderr.isatty(),
    )
    print(found)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.csv is not None:
        write_table(options.csv, found)
    found.to_json(options.out / "report.json")
    print(f"page: {found.to_html(options.out / 'report.html')} "
          f"({(time.perf_counter() - began) / 60:.1f} minutes)")  # fmt: skip


if __name__ == "__main__":
    main()
