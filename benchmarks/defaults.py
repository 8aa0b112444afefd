"""Learning rate, scaling, batch and epochs on four small tasks, by held-out loss: the defaults.

    python benchmarks/defaults.py [--base bf16|int8] [--only grid,epochs,...] [--tasks ...]
        [--rates ...] [--seconds 2700]

Tasks, all made by a seed from this Python's own standard library and small tables:

    chat      280 questions in many words with one of eight answers (a help desk)
    extract   240 or 1,000 signatures of functions, and their parts as JSON
    style     40 sentences of docstrings, and the same as headlines
    code      240 or 3,900 heads of short functions, and their bodies
    questions 40 questions and answers of a repair café (examples/questions.csv); held out are the
              same answers to questions in other words (examples/questions-test.csv)

The base is the real SmolLM2-135M, plain or in INT8, as no second real model was at hand. A row says
loss before and after on at most 64 held-out rows, and the share of their answers that greedy
decoding would write whole; `whole_learned` is that share of the rows that were learned. Rows are
added to benchmarks/results/defaults.csv; what stands there already is not run again.
"""

import argparse
import ast
import csv
import functools
import json
import random
import sysconfig
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import minilora
from minilora.data import Batch

CSV = Path(__file__).parent / "results" / "defaults.csv"
EXAMPLES = Path(__file__).parents[1] / "examples"
HELD_OUT = 64
PARTS = "questions,grid,edge,scaling,epochs,seeds,batch,warmup,rank,large"
MAX_LENGTH = 128
SKIP = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo"}

DESK = {
    "reset my password": "Open Settings, choose Security, and press Reset password.",
    "cancel my order": "Orders can be cancelled within one hour, under Orders and then Cancel.",
    "track my parcel": "The tracking number is in your e-mail; enter it at the Parcels page.",
    "get a refund": "Refunds take five working days once we have the goods back.",
    "change my address": "Addresses are changed under Profile; parcels on their way keep theirs.",
    "speak to a person": "Call 0800 100 200 on weekdays from nine to five.",
    "download an invoice": "Invoices lie under Orders, behind the button with three dots.",
    "close my account": "Write to goodbye@example.org; we close it within a day.",
}
OPENINGS = (
    "How do I {}?", "I want to {}.", "Can you help me {}?", "Where can I {}?",
    "I need to {} today.", "Is there a way to {}?", "What must I do to {}?", "Please let me {}.",
    "Why can't I {}?",
    "Tell me how to {}.",
)  # fmt: skip
GREETINGS = ("", "Hello! ", "Hi there, ", "Good morning. ", "Sorry to bother you. ", "Quick one: ")
ENDINGS = ("", " Thanks!", " It is urgent.", " I tried it twice already.", " Kind regards, Ada")


def functions() -> Iterator[ast.FunctionDef]:
    """Yield the functions of the standard library, in one order."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if SKIP.intersection(file.relative_to(root).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in old modules
                tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def chat() -> list[dict]:
    return [
        {"messages": [
            {"role": "user", "content": greeting + opening.format(wish) + ending},
            {"role": "assistant", "content": answer},
        ]}
        for wish, answer in DESK.items()
        for opening in OPENINGS for greeting in GREETINGS for ending in ENDINGS
    ]  # fmt: skip


def head(node: ast.FunctionDef) -> str:
    return f"def {node.name}({ast.unparse(node.args)}):"


@functools.cache
def tables() -> dict[str, list[dict]]:
    """Return the records of the three tasks that are made of the standard library, in one pass."""
    found: dict[str, dict[str, dict]] = {"extract": {}, "style": {}, "code": {}}
    for node in functions():
        start, docstring = head(node), ast.get_docstring(node) or ""
        names = [one.arg for one in node.args.args if one.arg not in ("self", "cls")]
        if 1 <= len(names) <= 4 and not node.name.startswith("_"):
            parts = {"name": node.name, "arguments": names, "defaults": len(node.args.defaults)}
            row = {"prompt": start + "\n", "completion": json.dumps(parts)}
            found["extract"][start] = row
        sentence = " ".join(docstring.split("\n\n")[0].split())
        if 30 <= len(sentence) <= 80 and sentence.endswith(".") and "`" not in sentence:
            title = f"PYTHON DAILY: {sentence[:-1].title()}!"
            row = {"prompt": f"Make this a headline: {sentence}\n", "completion": title}
            found["style"][sentence] = row
        if not docstring and len(node.body) <= 3:
            body = ast.unparse(node).partition(":\n")[2]
            if body and len(start) + len(body) <= 160:
                found["code"][start + body] = {"prompt": start + "\n", "completion": body}
    return {"chat": chat()} | {task: list(rows.values()) for task, rows in found.items()}


def data(task: str, tokenizer, rows: int) -> tuple[list, list]:
    """Return examples to learn from and held-out ones: the same ones for every number of rows."""
    if task == "questions":
        cut: list[Any] = [EXAMPLES / "questions.csv", EXAMPLES / "questions-test.csv"]
    else:
        records = list(tables()[task])
        random.Random(0).shuffle(records)
        cut = [records[HELD_OUT : HELD_OUT + rows], records[:HELD_OUT]]
        if len(cut[0]) < rows:
            raise SystemExit(f"{task} has {len(cut[0])} rows, {rows} are wanted")
    learned, held_out = (minilora.read_data(c, tokenizer, max_length=MAX_LENGTH)[0] for c in cut)
    return learned, held_out


class Judge:
    """The loss of batches, and beside it how many answers greedy decoding would write whole."""

    def __init__(self) -> None:
        self.right = self.rows = 0

    def __call__(self, model, batch: Batch):
        logits = model(batch.input_ids)[:, :-1].float()
        labels = batch.labels[:, 1:]
        hits = (logits.argmax(-1) == labels) | (labels == -100)
        self.right += int(hits.all(1).sum())
        self.rows += len(labels)
        total = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="sum"
        )
        return total, batch.tokens


def judge(model, held_out) -> tuple[float, float]:
    found = Judge()
    loss = minilora.evaluate(model, held_out, batch_size=32, loss=found).loss
    return loss, found.right / found.rows


def run(model, tokenizer, settings: dict, known: dict) -> dict:
    """Train once; return the row of the table. `known` is what was judged before training."""
    learned, held_out = data(settings["task"], tokenizer, settings["rows"])
    if settings["task"] not in known:
        known[settings["task"]] = judge(model, held_out)
    before, right = known[settings["task"]]
    torch.manual_seed(settings["seed"])
    minilora.inject(model, r=settings["r"], alpha=settings["scaling"] * settings["r"])
    began = time.perf_counter()
    config = minilora.TrainConfig(
        lr=settings["lr"], batch_size=settings["batch_size"], epochs=settings["epochs"],
        warmup=settings["warmup"], seed=settings["seed"], compile=settings["compile"],
    )  # fmt: skip
    result = minilora.fit(model, learned, config=config, quiet=True)
    after, right_after = judge(model, held_out)
    _, learned_whole = judge(model, learned[:HELD_OUT])
    minilora.eject(model)
    return settings | {
        "steps": result.steps, "train_last": f"{sum(result.losses[-5:]) / 5:.4f}",
        "before": f"{before:.4f}", "after": f"{after:.4f}",
        "whole_before": f"{right:.3f}", "whole_after": f"{right_after:.3f}",
        "seconds": f"{time.perf_counter() - began:.1f}", "whole_learned": f"{learned_whole:.3f}",
    }  # fmt: skip


def wanted(part: str, base: str) -> Iterator[dict]:
    """Yield the runs of a part: what differs from scaling 1, batch 8, one epoch."""
    usual = {"base": base, "r": 8, "scaling": 1, "batch_size": 8, "warmup": 0.05, "seed": 0}
    tasks = {"chat": (280, 1), "code": (240, 1), "extract": (240, 1), "style": (40, 4)}
    if part == "questions":  # as long as the defaults make a run, and longer
        for epochs, lr in [(10, 2e-3), (10, 5e-4), (10, 1e-3), (10, 4e-3), (20, 2e-3), (20, 4e-3)]:
            yield usual | {"task": "questions", "rows": 40, "epochs": epochs, "lr": lr}
    if part == "grid":
        for lr in (5e-4, 4e-3, 2e-3):
            for task, (rows, epochs) in tasks.items():
                yield usual | {"task": task, "rows": rows, "epochs": epochs, "lr": lr}
    if part == "edge":  # where runs begin to fail
        for lr in (8e-3, 1.6e-2):
            for task, (rows, epochs) in tasks.items():
                yield usual | {"task": task, "rows": rows, "epochs": epochs, "lr": lr}
    if part == "scaling":
        for scaling, lr in [(2, 1e-3), (1, 1e-3)]:
            for task, (rows, epochs) in tasks.items():
                yield usual | {"task": task, "rows": rows, "epochs": epochs, "scaling": scaling,
                               "lr": lr}  # fmt: skip
    if part == "coarse":  # the second base
        for task, (rows, epochs) in tasks.items():
            for lr in (5e-4, 1e-3, 2e-3):
                yield usual | {"task": task, "rows": rows, "epochs": epochs, "lr": lr}
    if part == "epochs":
        for task, rows, epochs in [("style", 40, 1), ("style", 40, 10), ("style", 40, 20),
                                   ("chat", 280, 3), ("extract", 240, 3),
                                   ("code", 240, 3)]:  # fmt: skip
            for lr in (1e-3, 2e-3):
                yield usual | {"task": task, "rows": rows, "epochs": epochs, "lr": lr}
    if part == "batch":
        for task, rows, epochs, batch in [
            ("style", 40, 10, 4),
            ("style", 40, 10, 16),
            ("extract", 240, 1, 4),
            ("extract", 240, 1, 16),
        ]:
            yield usual | {"task": task, "rows": rows, "epochs": epochs, "lr": 2e-3,
                           "batch_size": batch}  # fmt: skip
    if part == "warmup":
        for task, warmup in [("style", 0.0), ("style", 0.2), ("extract", 0.0), ("extract", 0.2)]:
            rows, epochs = tasks[task]
            yield usual | {"task": task, "rows": rows, "epochs": epochs, "lr": 2e-3,
                           "warmup": warmup}  # fmt: skip
    if part == "rank":
        for lr in (5e-4, 1e-3, 2e-3):
            yield usual | {"task": "extract", "rows": 240, "epochs": 1, "lr": lr, "r": 32}
    if part == "large":
        for lr in (2e-3, 1e-3, 4e-3):
            for task, rows in [("extract", 1000), ("code", 3900)]:
                yield usual | {"task": task, "rows": rows, "epochs": 1, "lr": lr}
    if part == "seeds":
        for task, rows, epochs in [("style", 40, 10), ("code", 240, 1), ("extract", 240, 1),
                                   ("chat", 280, 1)]:  # fmt: skip
            for seed in (1, 2):
                yield usual | {"task": task, "rows": rows, "epochs": epochs, "lr": 2e-3,
                               "seed": seed}  # fmt: skip


def key(row: dict) -> tuple:
    names = ("base", "task", "rows", "r", "scaling", "lr", "batch_size", "epochs", "warmup", "seed")
    return tuple(row[n] if n in ("base", "task") else float(row[n]) for n in names)


def done() -> set[tuple]:
    """Return the keys of the rows that stand in the table."""
    if not CSV.exists():
        return set()
    with open(CSV, encoding="utf-8") as opened:
        return {key(row) for row in csv.DictReader(opened)}


def add(row: dict) -> None:
    new = not CSV.exists()
    with open(CSV, "a", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", choices=("bf16", "f32", "int8"), default="bf16")
    parser.add_argument("--only", default=PARTS)
    parser.add_argument("--tasks", nargs="+", help="of these alone")
    parser.add_argument("--rates", nargs="+", type=float, help="of these alone")
    parser.add_argument("--seconds", type=float, default=2700)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    dtype = torch.float32 if options.base == "f32" else torch.bfloat16
    format = "int8" if options.base == "int8" else None
    model, tokenizer = minilora.load_model("smollm2-135m", format, dtype=dtype)
    beside = {"compile": options.compile, "processor": minilora.hardware().name,
              "torch": torch.__version__}  # fmt: skip
    began, known = time.perf_counter(), {}
    for part in options.only.split(","):
        for settings in wanted(part, options.base):
            if options.tasks and settings["task"] not in options.tasks:
                continue
            if options.rates and settings["lr"] not in options.rates:
                continue
            if key(settings) in done() or time.perf_counter() - began > options.seconds:
                continue
            row = {"part": part} | run(model, tokenizer, settings | beside, known)
            add(row)
            print(*(f"{k}={row[k]}" for k in ("part", "task", "rows", "epochs", "steps", "scaling",
                    "lr", "before", "after", "whole_after", "whole_learned", "seconds")),
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
