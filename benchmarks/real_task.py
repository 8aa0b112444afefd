"""Seconds and memory until a real task reaches the same held-out loss, ours and the peers'.

    PYTHONPATH=benchmarks python benchmarks/real_task.py [--task docstrings | documents]
        [--only NAME ...] [--seeds 3] [--steps 60] [--every 4] [--target LOSS] [--list]

SmolLM2-135M, LoRA r=8 on all linears but the head, AdamW at a constant rate.

- `docstrings`: the demo's data. 16 rows a step of 20 to 256 tokens, of which only the answer is
  learned (18 %).
- `documents`: Python's own documentation, 4 rows a step of 512 to 1024 tokens, all learned.

Every contender is a process of its own with the same ids and labels, r, alpha and rows a step, in
the dtype that is fast here. One of them works at a time: each makes a step in turn, so that a slow
minute of a shared machine hits all. The clock runs from the call that starts training, compiling
included, and stands still while others work and while the held-out loss is measured: every
`--every` steps a contender saves its adapter and one more process computes the loss of learned
tokens of 200 rows over the plain base. A run ends at the target; its time is interpolated between
two measurements. With the first seed each contender runs at three learning rates; with the other
seeds at its fastest one. Rows are added to benchmarks/results/real_task.csv, all measured losses to
real_task_losses.csv.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quantized_bases import load_demo
from train_providers import DTYPES, Provider, peft_model, plain_model
from train_step import commit, processor, save

import minilora
from minilora.loading.fetching import fetch
from minilora.loading.model import load_model
from minilora.planning.machines import forget_peak, peak_bytes

RESULTS = Path(__file__).parent / "results"
MODEL, R, ALPHA = "smollm2-135m", 8, 16
RATES = (5e-4, 1e-3, 2e-3)
PAD = 2  # <|im_end|>
COLUMNS = (
    "task", "contender", "seed", "lr", "target", "seconds", "steps", "s_a_step", "first_step",
    "peak_mb", "loss", "measured", "processor", "flags", "threads", "torch", "commit", "date",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What is learned: rows a step, rows held out, and the loss at which a run ends."""

    batch_size: int
    held_out: int
    target: float


TASKS = {"docstrings": Task(16, 200, 2.95), "documents": Task(4, 24, 2.40)}


@dataclass(frozen=True)
class Contender:
    """Whose code, and with what options."""

    code: str  # "peft" (transformers' Trainer) or "minilora"
    grouped: bool = False  # the Trainer's length grouping; fit always groups
    compiled: bool = False
    format: str | None = None  # of the base

    @property
    def name(self) -> str:
        code = "PEFT + Trainer" if self.code == "peft" else "minilora"
        parts = [code, self.format or ""]
        parts += ["grouped by length"] if self.grouped else []
        parts += ["compiled"] if self.compiled else []
        return ", ".join(part for part in parts if part)


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("peft"),
        Contender("peft", grouped=True),
        Contender("peft", compiled=True),
        Contender("minilora"),
        Contender("minilora", compiled=True),
        Contender("minilora", format="int8"),
        Contender("minilora", format="int8", compiled=True),
    )
}


# --- the data


def documents() -> list[tuple[str, str]]:
    """Return (name, text) of the topics of Python's documentation, long ones first to last name."""
    from pydoc_data.topics import topics

    return sorted(topics.items())


def rows_of(task: str, tokenizer: Any) -> tuple[list[Any], list[Any]]:
    """Return what is trained on and what is held out."""
    if task == "docstrings":
        demo = load_demo()
        parts = demo.split(demo.docstring_pairs())
        (train, _), _ = demo.rows(parts["train"], tokenizer)
        (valid, _), _ = demo.rows(parts["valid"], tokenizer, limit=TASKS[task].held_out)
        return train, valid
    found: dict[bool, list[Any]] = {False: [], True: []}
    for name, text in documents():
        ids = tokenizer.encode(text)
        pieces = [ids[start : start + 1024] for start in range(0, len(ids), 1024)]
        held_out = hashlib.sha256(name.encode()).digest()[0] % 8 == 0
        found[held_out] += [minilora.data.batches.Example(p, p) for p in pieces if len(p) >= 512]
    return found[False], found[True][: TASKS[task].held_out]


# --- a contender's process


class Pause:
    """Stop after each step until the driver says go on; count the seconds between."""

    def __init__(self, keep: Any):
        self.keep, self.step = keep, 0
        forget_peak()
        self.since = time.perf_counter()

    def __call__(self) -> None:
        self.step += 1
        seconds = time.perf_counter() - self.since
        print(json.dumps({"seconds": seconds, "peak": peak_bytes()}), flush=True)
        for line in sys.stdin:
            word = line.strip()
            if word == "go":
                break
            self.keep(word)
            print(json.dumps({"kept": word}), flush=True)
        else:
            os._exit(0)
        self.since = time.perf_counter()


def work(asked: dict[str, Any]) -> None:
    """Train one contender, pausing after every step."""
    torch.set_num_threads(asked["threads"])
    contender = Contender(**asked["contender"])
    dtype = "bf16" if minilora.hardware().dtype == torch.bfloat16 else "f32"
    _, tokenizer = load_model(fetch(MODEL))
    train, _ = rows_of(asked["task"], tokenizer)
    base = plain_model(MODEL, DTYPES[dtype])
    torch.manual_seed(asked["seed"])
    run = _minilora if contender.code == "minilora" else _trainer
    run(base, train, contender, dtype, asked)


def _minilora(base: Any, train: list, contender: Contender, _: str, asked: dict[str, Any]) -> None:
    if contender.format is not None:
        minilora.quantize(base, contender.format)
    minilora.inject(base, r=R, alpha=ALPHA)
    pause = Pause(partial(minilora.save, base))
    config = minilora.TrainConfig(
        lr=asked["lr"], batch_size=TASKS[asked["task"]].batch_size, max_steps=asked["steps"],
        schedule="constant", warmup=0.0, seed=asked["seed"],
        compile=contender.compiled,
    )  # fmt: skip

    class Told:
        @staticmethod
        def on_step(_: Any) -> None:
            pause()

    minilora.fit(base, train, config=config, callbacks=[Told()], quiet=True)


def _trainer(
    base: Any, train: list, contender: Contender, dtype: str, asked: dict[str, Any]
) -> None:
    """Train as transformers' documentation shows, on the same ids and labels."""
    import transformers

    model = peft_model(base, Provider("peft", dtype, r=R))
    del base
    rows = [{"input_ids": list(e.input_ids), "labels": list(e.labels)} for e in train]
    pause = Pause(model.save_pretrained)

    class Told(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            pause()

    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "use_cpu": True, "report_to": "none",
        "per_device_train_batch_size": TASKS[asked["task"]].batch_size,
        "learning_rate": asked["lr"], "max_steps": asked["steps"], "seed": asked["seed"],
        "lr_scheduler_type": "constant",
        "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True,
        "torch_compile": contender.compiled,
    }  # fmt: skip
    if contender.grouped:
        settings["train_sampling_strategy"] = "group_by_length"
    transformers.Trainer(
        model, transformers.TrainingArguments(**settings), train_dataset=rows,
        data_collator=_padded, callbacks=[Told()],
    ).train()  # fmt: skip


def _padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad on the right as DataCollatorForSeq2Seq does, which would want transformers' tokenizer."""
    length = max(len(row["input_ids"]) for row in rows)

    def column(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[key] + [fill] * (length - len(row[key])) for row in rows])

    mask = [[1] * len(r["input_ids"]) + [0] * (length - len(r["input_ids"])) for r in rows]
    return {
        "input_ids": column("input_ids", PAD), "labels": column("labels", -100),
        "attention_mask": torch.tensor(mask),
    }  # fmt: skip


def judge(task: str) -> None:
    """Answer each folder on standard input with the held-out loss of its adapter."""
    model, tokenizer = load_model(fetch(MODEL), dtype=minilora.hardware().dtype)
    _, valid = rows_of(task, tokenizer)
    before = minilora.evaluate(model, valid, batch_size=16)
    print(json.dumps({"loss": before.loss, "tokens": before.tokens}), flush=True)
    for line in sys.stdin:
        minilora.load(model, line.strip())
        loss = minilora.evaluate(model, valid, batch_size=16).loss
        minilora.eject(model)
        print(json.dumps({"loss": loss}), flush=True)


# --- the driver


class Process:
    """A process of this file that answers lines."""

    def __init__(self, *words: str):
        self.running = subprocess.Popen(
            [sys.executable, __file__, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        assert self.running.stdout is not None
        for line in self.running.stdout:
            if line.startswith("{"):  # libraries print there too
                return json.loads(line)
        raise RuntimeError(f"{self.running.args[2:]} ended with {self.running.wait()}")  # type: ignore[index]

    def say(self, line: str) -> None:
        assert self.running.stdin is not None
        self.running.stdin.write(line + "\n")
        self.running.stdin.flush()

    def end(self) -> None:
        self.running.kill()
        self.running.wait()


class Trial:
    """One contender with one seed and rate, and what was measured of it."""

    def __init__(self, contender: Contender, lr: float, seed: int, options: argparse.Namespace):
        self.contender, self.lr, self.seed = contender, lr, seed
        self.asked = {
            "contender": vars(contender), "lr": lr, "seed": seed, "task": options.task,
            "steps": options.steps, "threads": options.threads,
        }  # fmt: skip
        self.seconds: list[float] = []
        self.losses: list[tuple[int, float, float]] = []  # steps, seconds so far, loss
        self.peak = 0
        self.process: Process | None = None

    def step(self) -> None:
        if self.process is None:
            self.process = Process("--work", json.dumps(self.asked))
        else:
            self.process.say("go")
        found = self.process.answer()
        self.seconds.append(found["seconds"])
        self.peak = max(self.peak, found["peak"])

    def measure(self, judge: Process) -> float:
        assert self.process is not None
        with tempfile.TemporaryDirectory() as folder:
            self.process.say(folder + "/adapter")
            self.process.answer()
            judge.say(folder + "/adapter")
            loss = float(judge.answer()["loss"])
        self.losses.append((len(self.seconds), sum(self.seconds), loss))
        return loss

    def end(self) -> None:
        if self.process is not None:
            self.process.end()

    def at(self, target: float, before: float) -> tuple[float, float]:
        """Return (seconds, steps) at the target, between the measurements around it; inf, inf."""
        last = (0, 0.0, before)
        for found in self.losses:
            if found[2] <= target:
                share = (last[2] - target) / (last[2] - found[2])
                return tuple(
                    a + share * (b - a) for a, b in zip(last[1::-1], found[1::-1], strict=True)
                )  # type: ignore[return-value]
            last = found
        return math.inf, math.inf


def run(trials: list[Trial], judge: Process, target: float, options: argparse.Namespace) -> None:
    """Step the trials in turn until each is at the target or out of steps."""
    going = list(trials)
    for step in range(1, options.steps + 1):
        for trial in list(going):
            trial.step()
            if step % options.every and step < options.steps:
                continue
            loss = trial.measure(judge)
            print(f"  {trial.contender.name}, lr {trial.lr:g}, seed {trial.seed}: step {step}, "
                  f"{sum(trial.seconds):.1f} s, loss {loss:.4f}", flush=True)  # fmt: skip
            if loss <= target or step == options.steps:
                trial.end()
                going.remove(trial)
        if not going:
            return


def row(trial: Trial, target: float, before: float) -> dict[str, object]:
    seconds, steps = trial.at(target, before)
    reached = math.isfinite(seconds)
    return {
        "contender": trial.contender.name, "seed": trial.seed, "lr": f"{trial.lr:g}",
        "target": f"{target:g}", "seconds": f"{seconds:.2f}" if reached else "",
        "steps": f"{steps:.2f}" if reached else "",
        "s_a_step": f"{statistics.mean(trial.seconds[1:]):.4f}",
        "first_step": f"{trial.seconds[0]:.2f}", "peak_mb": round(trial.peak / 1e6),
        "loss": f"{trial.losses[-1][2]:.4f}", "measured": len(trial.seconds),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Return medians over seeds of each contender at the rate that was fastest for it."""
    lines = ["| contender | lr | seconds to the target | × the first row | s a step | peak, MB |"]
    lines += ["|---|---|---|---|---|---|"]
    first = None
    for name in dict.fromkeys(found["contender"] for found in rows):
        mine = [found for found in rows if found["contender"] == name]
        rates = [found["lr"] for found in mine]
        lr = max(set(rates), key=rates.count)
        mine = [found for found in mine if found["lr"] == lr]
        times = sorted(float(found["seconds"] or "inf") for found in mine)
        middle = statistics.median(times)
        first = first or middle
        pace = statistics.median(float(found["s_a_step"]) for found in mine)
        peak = max(found["peak_mb"] for found in mine)
        lines.append(
            f"| {name} | {lr} | {middle:.1f} ({times[0]:.1f}–{times[-1]:.1f}) | "
            f"{first / middle:.2f} | {pace:.2f} | {peak} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=list(TASKS), default="docstrings")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--steps", type=int, default=60, help="at most")
    parser.add_argument("--every", type=int, default=4, help="steps between two measurements")
    parser.add_argument("--target", type=float, help="held-out loss at which a run ends")
    parser.add_argument("--group", type=int, default=4, help="processes at a time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--csv", type=Path, default=RESULTS / "real_task.csv")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--judge", choices=list(TASKS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work)
        return
    if options.judge:
        judge(options.judge)
        return
    if options.list:
        print("\n".join(CONTENDERS))
        return
    if unknown := set(options.only or ()) - set(CONTENDERS):
        parser.error(f"unknown contenders: {', '.join(sorted(unknown))}; --list names all")
    chosen = [CONTENDERS[name] for name in options.only or CONTENDERS]
    target = options.target or TASKS[options.task].target
    found = minilora.hardware()
    common = {
        "task": options.task, "processor": processor(), "flags": " ".join(found.flags),
        "threads": options.threads, "torch": torch.__version__, "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    print(f"{options.task}: {found}", flush=True)
    judging = Process("--judge", options.task)
    before = judging.answer()
    print(f"held-out loss {before['loss']:.4f} over {before['tokens']} tokens, target {target}")
    best: dict[Contender, float] = {}
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        trials = [
            Trial(contender, lr, seed, options)
            for lr in options.rates
            for contender in chosen
            if seed == 0 or lr == best[contender]
        ]
        for start in range(0, len(trials), options.group):
            group = trials[start : start + options.group]
            run(group, judging, target, options)
            mine = [common | row(trial, target, before["loss"]) for trial in group]
            save(mine, options.csv, COLUMNS)
            save(
                [
                    {"task": options.task, "contender": t.contender.name, "seed": t.seed,
                     "lr": t.lr, "steps": steps, "seconds": f"{seconds:.2f}", "loss": f"{loss:.4f}",
                     "commit": common["commit"], "processor": common["processor"]}
                    for t in group for steps, seconds, loss in t.losses
                ],
                options.csv.with_name(options.csv.stem + "_losses.csv"),
                ("task", "contender", "seed", "lr", "steps", "seconds", "loss", "commit",
                 "processor"),
            )  # fmt: skip
            rows += mine
        if seed == 0:
            for contender in chosen:
                own = [trial for trial in trials if trial.contender == contender]
                best[contender] = min(own, key=lambda t: t.at(target, before["loss"])).lr
    judging.end()
    print(table(rows))


if __name__ == "__main__":
    main()
