"""A tuning against the full grid it stands for: held-out loss and time, on two tasks.

    PYTHONPATH=benchmarks python benchmarks/tune.py [--task docstrings topics] [--steps 40]
        [--held 32] [--keep FOLDER]

SmolLM2-135M, r=8, rows of at most 64 tokens by eight, six rates. `docstrings` is the demo's task: a
function's source is given, its docstring is learned. `topics` is plain text, windows of Python's
own language reference (`pydoc_data.topics`). The grid is six whole runs of `fit`, one after
another, in the same process and on the same batches; the tuning comes first. Writes a row for each
rate, and one for each task's tuning, to benchmarks/results/tune.csv, and the charts beside it.
"""

import argparse
import csv
import hashlib
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from train_step import commit, processor

import minilora
from minilora.data import docstring_pairs, split

RESULTS = Path(__file__).parent / "results"
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
ADAPTER = {"r": 8, "alpha": 16}
LONGEST = 64


def docstrings(tokenizer):
    """Short functions, whole modules held out."""
    parts = split(docstring_pairs())
    found = []
    for name in ("train", "valid"):
        encoded, _ = minilora.read_data(parts[name], tokenizer, max_length=512)
        rows = [one for one in encoded if len(one.input_ids) <= LONGEST]
        found.append(sorted(rows, key=lambda one: hashlib.sha256(str(one).encode()).digest()))
    return found


def topics(tokenizer):
    """Windows of Python's language reference, whole topics held out."""
    from pydoc_data.topics import topics as texts

    parts = [[], []]
    for name, text in sorted(texts.items()):
        ids = tokenizer.encode(text)
        windows = [ids[i : i + LONGEST] for i in range(0, len(ids) - LONGEST, LONGEST)]
        held = hashlib.sha256(name.encode()).digest()[0] % 8 == 0
        parts[held] += [{"input_ids": w, "labels": w} for w in windows]
    return [sorted(some, key=lambda w: hashlib.sha256(str(w).encode()).digest()) for some in parts]


def once(file, work):
    """Return what work measured, with its seconds; read it where that was done before."""
    if not file.exists():
        wall, used = time.perf_counter(), time.process_time()
        found = work()
        found |= {"wall": time.perf_counter() - wall, "used": time.process_time() - used}
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


def measure(task, rows, held, model, config, work):
    """Tune, then run the grid; return the table's rows."""

    def tune():
        resume = (work / "tuned" / "tune.json").exists()
        found = minilora.tune(
            model, rows, held, work / "tuned", rates=RATES, adapters=[ADAPTER], config=config,
            resume=resume,
        )  # fmt: skip
        if found.stopped != "finished" or resume:
            raise SystemExit(f"{task}: the tuning was stopped; remove {work}, and start anew")
        print(found, flush=True)
        minilora.eject(model)
        found.to_json(work / "found.json")
        return {"chosen": found.chosen.lr}

    def run(rate):
        torch.manual_seed(config.seed)
        minilora.inject(model, **ADAPTER)
        result = minilora.fit(
            model, rows, held, config=replace(config, lr=rate), out=work / f"grid-{rate:g}",
            quiet=True,
        )  # fmt: skip
        minilora.eject(model)
        if result.stopped != "finished":  # by Ctrl-C or SIGTERM: its figures are of a part
            raise SystemExit(f"{task}: the run at {rate:g} was stopped")
        print(f"{task}: whole run at {rate:g}: {result.best.loss:.4f}", flush=True)
        return {"loss": result.best.loss}

    clock = once(work / "tuning.json", tune)
    found = json.loads((work / "found.json").read_text())
    grid = {rate: once(work / f"grid-{rate:g}.json", lambda r=rate: run(r)) for rate in RATES}
    shutil.copy(work / "tuned" / "tune.png", RESULTS / f"tune_{task}.png")
    same = {
        "task": task, "steps of a run": found["steps"], "held-out tokens": found["tokens"],
        "processor": processor(), "flags": " ".join(minilora.hardware().flags),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    table = []
    for trial in found["trials"]:
        compared = [f"{step}:{loss:.4f}" for step, loss in trial["losses"].items()]
        left = "chosen" if trial["left"] is None else trial["left"].partition(" (")[0]
        table.append(same | {
            "lr": f"{trial['lr']:g}", "whole run": f"{grid[trial['lr']]['loss']:.4f}",
            "tuning": " ".join(compared), "left": left})  # fmt: skip
    best, tuned = min(one["loss"] for one in grid.values()), found["result"]["best"]["loss"]
    wall, used = (sum(one[key] for one in grid.values()) for key in ("wall", "used"))
    table.append(same | {
        "lr": f"{found['chosen']['lr']:g}", "whole run": f"{best:.4f}", "tuning": f"{tuned:.4f}",
        "left": "best of each", "before": f"{found['before']:.4f}",
        "above the best": f"{tuned / best - 1:.2%}", "grid seconds": f"{wall:.1f}",
        "tuning seconds": f"{clock['wall']:.1f}", "share": f"{clock['wall'] / wall:.3f}",
        "share of processor time": f"{clock['used'] / used:.3f}",
    })  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", nargs="+", default=["docstrings", "topics"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--held", type=int, default=32)
    parser.add_argument("--keep", help="folder for the runs, else removed; what is there is kept")
    options = parser.parse_args()
    model, tokenizer = minilora.load_model("smollm2-135m", dtype="auto")
    config = minilora.TrainConfig(max_steps=options.steps, batch_size=8)
    table = []
    for task in options.task:
        train, valid = globals()[task](tokenizer)
        rows, held = train[: 8 * options.steps], valid[: options.held]
        if len(rows) < 8 * options.steps or len(held) < options.held:
            raise SystemExit(f"{task} has {len(train)} rows to train on and {len(valid)} held out")
        torch.manual_seed(0)
        minilora.inject(model, **ADAPTER)  # what the first steps prepare is neither's
        minilora.fit(model, rows[:16], config=replace(config, max_steps=2), quiet=True)
        minilora.eject(model)
        with tempfile.TemporaryDirectory() as work:
            kept = Path(options.keep or work) / task
            kept.mkdir(parents=True, exist_ok=True)
            table += measure(task, rows, held, model, config, kept)
        with open(RESULTS / "tune.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, table[-1] | {}, restval="")
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
