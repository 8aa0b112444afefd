"""Preference training on a real task: docstrings against the base's own answers.

    PYTHONPATH=benchmarks python benchmarks/preference.py [--loss dpo ...] [--train 96]
        [--held-out 80] [--epochs 1] [--lr 1e-4] [--folder FOLDER]
    PYTHONPATH=benchmarks python benchmarks/preference.py --sharing

SmolLM2-135M-Instruct is asked what a function of Python's standard library does. The chosen answer
is the function's docstring, the rejected one what the model writes itself, greedily. Held-out pairs
are of other modules. A pair is right where the chosen answer has the higher reward; intervals are
Wilson's for the accuracy, and 10,000 bootstrap samples of the pairs for the loss. Rows are added to
benchmarks/results/preference.csv; the pairs stay in FOLDER, for `minilora train --loss dpo`.

`--sharing` times steps with a prompt computed once for both answers, and once for each, taking
turns on the same batches.
"""

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from train_step import commit, processor, save

import minilora
from minilora.data import Pair, pad
from minilora.data.docstrings import docstring_rows
from minilora.loading.fetching import fetch
from minilora.loading.model import load_model
from minilora.lora import inference
from minilora.running import KINDS, Preference

RESULTS = Path(__file__).parent / "results" / "preference.csv"
MODEL, R, ALPHA, LONGEST = "smollm2-135m", 8, 16, 192
COLUMNS = (
    "loss", "beta", "lr", "epochs", "steps", "pairs", "held_out", "accuracy", "accuracy_low",
    "accuracy_high", "loss_before", "loss_after", "loss_low", "loss_high", "margin", "minutes",
    "processor", "threads", "torch", "commit", "date",
)  # fmt: skip


# --- the pairs


def questions(part: str, count: int, tokenizer) -> list[dict]:
    """Draw questions whose text is short enough."""
    rows = list(docstring_rows(part))
    random.Random(0).shuffle(rows)
    short = (r for r in rows if len(tokenizer.encode(r["question"] + r["answer"])) < LONGEST)
    return [row for row, _ in zip(short, range(count), strict=False)]


def write_pairs(file: Path, part: str, count: int, model, tokenizer) -> list[dict]:
    """Let the base answer; keep what differs from the docstring."""
    if file.exists():
        return [json.loads(line) for line in file.read_text().splitlines()]
    rows = questions(part, count, tokenizer)
    rows.sort(key=lambda row: len(row["question"]))
    pairs = []
    for start in range(0, len(rows), 16):
        some = rows[start : start + 16]
        asked = [row["question"] for row in some]
        texts = minilora.generate(model, asked, tokenizer=tokenizer, chat=True, max_new_tokens=40)
        for row, text in zip(some, texts, strict=True):
            pair = {"question": row["question"], "chosen": row["answer"], "rejected": text.strip()}
            if pair["rejected"] and pair["rejected"] != pair["chosen"]:
                pairs.append(pair)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return pairs


# --- what held-out pairs say


def scores(model, pairs: list[Pair], loss: Preference) -> tuple[list[float], list[float]]:
    """Return loss and margin pair by pair; the margin of kto from z, on the wanted side."""
    order = sorted(pairs, key=lambda pair: len(pair.input_ids))
    batches = [pad(order[i : i + 8]) for i in range(0, len(order), 8)]
    loss.prepare(model, batches)
    losses, margins = [], []
    with inference(model):
        for batch in batches:
            found = loss.scores(model, batch)
            sign = torch.where(batch.wanted == 0, -1.0, 1.0)
            losses += found.losses.tolist()
            margins += (sign * (found.first - found.second)).tolist()
    return losses, margins


def wilson(right: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share: Wilson 1927."""
    z, p = 1.959964, right / count
    middle, half = (
        p + z * z / (2 * count),
        z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)),
    )
    return (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)


def bootstrap(values: list[float]) -> tuple[float, float]:
    """Return the 95 % interval of a mean."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, len(values), (10_000, len(values)), generator=generator)
    means = torch.tensor(values)[drawn].mean(1).sort().values
    return float(means[250]), float(means[9749])


def run(kind: str, model, train: list, held: list, options) -> dict:
    """Train one adapter; return its row."""
    loss = Preference(kind, beta=options.beta)
    torch.manual_seed(0)
    minilora.inject(model, r=R, alpha=ALPHA)
    before, _ = scores(model, held, loss)
    config = minilora.TrainConfig(
        loss=kind, beta=options.beta, lr=options.lr, epochs=options.epochs, batch_size=8,
    )  # fmt: skip
    result = minilora.fit(model, train, config=config)
    losses, margins = scores(model, held, loss)
    minilora.eject(model)
    right = sum((m > 0) + (m == 0) / 2 for m in margins)
    accuracy, interval = wilson(right, len(margins)), bootstrap(losses)
    return {
        "loss": kind, "beta": loss.beta, "lr": options.lr, "epochs": options.epochs,
        "steps": result.steps, "pairs": len(train), "held_out": len(held),
        "accuracy": round(right / len(margins), 4),
        "accuracy_low": round(accuracy[0], 4), "accuracy_high": round(accuracy[1], 4),
        "loss_before": round(statistics.fmean(before), 4),
        "loss_after": round(statistics.fmean(losses), 4), "loss_low": round(interval[0], 4),
        "loss_high": round(interval[1], 4), "margin": round(statistics.fmean(margins), 3),
        "minutes": round(result.minutes, 1), "processor": processor(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def labelled(pairs: list[dict]) -> list[dict]:
    """Return rows for kto: one answer of each pair, in turns the chosen and the rejected one."""
    names = ("chosen", "rejected")
    return [
        {
            "prompt": [{"role": "user", "content": pair["question"]}],
            "completion": pair[names[i % 2]],
            "label": i % 2 == 0,
        }
        for i, pair in enumerate(pairs)
    ]


# --- what sharing prompts brings


def sharing(model, pairs: list[Pair], rounds: int = 2) -> None:
    """Time forward and backward passes of the same batches both ways, in turns."""
    minilora.inject(model, r=R, alpha=ALPHA)
    loss = Preference("orpo")  # the same passes without a reference
    batches = [pad(pairs[i : i + 8]) for i in range(0, 24, 8)]
    took: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds + 1):
        for shared in (True, False):
            place = "minilora.running.log_probs.shares_prompts"
            with mock.patch(place, lambda model, batch, shared=shared: shared):
                begin = time.perf_counter()
                for batch in batches:
                    total, _ = loss(model, batch)
                    total.backward()
                took[shared].append(time.perf_counter() - begin)
    one, two = (statistics.median(took[shared][1:]) for shared in (True, False))
    tokens = [sum(len(p.input_ids) for p in pairs[:24]), sum(
        2 * p.lengths[0] + sum(p.lengths[1:]) for p in pairs[:24]
    )]  # fmt: skip
    print(f"one row a pair {one:.2f} s ({tokens[0]} tokens), two rows {two:.2f} s ({tokens[1]})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--loss", nargs="+", choices=list(KINDS), default=["dpo"])
    parser.add_argument("--beta", type=float)
    parser.add_argument("--train", type=int, default=96)
    parser.add_argument("--held-out", type=int, default=80)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--sharing", action="store_true")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    model, tokenizer = load_model(fetch(MODEL), dtype=minilora.hardware().dtype)
    begin = time.perf_counter()
    records = [
        write_pairs(folder / f"{part}.jsonl", part, count, model, tokenizer)
        for part, count in (("train", options.train), ("test", options.held_out))
    ]
    print(f"pairs in {folder}: {(time.perf_counter() - begin) / 60:.1f} minutes", flush=True)
    if options.sharing:
        sharing(model, minilora.read_data(records[0], tokenizer, max_length=384)[0])
        return
    for kind in options.loss:
        rows = [labelled(some) if kind == "kto" else some for some in records]
        train, held = (minilora.read_data(some, tokenizer, max_length=384)[0] for some in rows)
        row = run(kind, model, train, held, options)
        print(row, flush=True)
        save([row], RESULTS, COLUMNS)


if __name__ == "__main__":
    main()
