"""Seconds and memory of one optimizer step of LoRA, ours and the peers', in interleaved rounds.

    PYTHONPATH=benchmarks python benchmarks/train_step.py [--model smollm2-135m] [--rows 4]
        [--tokens 256] [--r 8] [--targets all] [--only NAME ...] [--rounds 5] [--quick] [--list]

r=8 on all linears but the head, AdamW, every token learned. Each provider of `train_providers.py`
is a process of its own with two threads, and one of them works at a time: in every round each does
one step, so a slow minute of a shared machine hits all of them. As many as fit into memory run
together, `--anchor` with each group. Before the timing every provider makes ten steps of
`--checked-tokens` (128); where its loss at the first or the last is more than 2 % off the anchor's,
the row says "wrong" and has no time. The limit is what the step's matrix products take when each is
timed alone (in f32 where bf16 is slow), torch's own attention included. The peak is that of the
steps, what building the model took is handed back and forgotten first. Rows are added to
benchmarks/results/train_step.csv.
"""

import argparse
import csv
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from train_providers import DTYPES, LR, MODELS, Provider, build, providers, text_rows

import minilora
from minilora.kernels import is_slow
from minilora.lora import base_of, select_targets
from minilora.planning.machines import forget_peak, peak_bytes
from minilora.planning.shapes import read_shape

RESULTS = Path(__file__).parent / "results"
CHECKED_TOKENS, CHECKED_STEPS, TOLERANCE = 128, 10, 0.02
COLUMNS = (
    "model", "rows", "tokens", "r", "targets", "provider", "seconds", "fastest", "slowest",
    "rounds", "tokens_per_s", "to_peft_bf16", "to_peft_f32", "peak_mb", "loss_1", "loss_10",
    "verdict", "processor", "flags", "threads", "torch", "commit", "date",
)  # fmt: skip


def worker(task: dict[str, Any]) -> None:
    """Build one provider; answer each line read from standard input with one of JSON."""
    torch.set_num_threads(task["threads"])
    provider = Provider(**task["provider"])
    shape = (task["rows"], task["tokens"])
    with ExitStack() as stack:
        model, loss_of = build(task["model"], provider, stack)
        forget_peak()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR, fused=True) if trained else None

        def step(ids: torch.Tensor) -> float:
            loss = loss_of(ids)
            loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            return float(loss.detach())

        steps = CHECKED_STEPS if provider.adapters else 1
        checked = text_rows(task["model"], 1, task["checked"], steps)
        losses = [step(ids) for ids in checked]
        batches = text_rows(task["model"], *shape, 4)
        step(batches[0])  # compiles, and fills what is kept
        print(json.dumps({"losses": losses}), flush=True)
        for count, _ in enumerate(sys.stdin):
            start = time.perf_counter()
            step(batches[count % len(batches)])
            seconds = time.perf_counter() - start
            print(json.dumps({"seconds": seconds, "peak": peak_bytes()}), flush=True)


class Process:
    """One provider at work."""

    def __init__(self, provider: Provider, options: argparse.Namespace):
        task = {
            "provider": vars(provider), "model": options.model, "rows": options.rows,
            "tokens": options.tokens, "threads": options.threads,
            "checked": options.checked_tokens,
        }  # fmt: skip
        self.provider, self.seconds, self.peak = provider, [], 0
        self.running = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(task)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        )  # fmt: skip
        self.losses = self._answer()["losses"]

    def _answer(self) -> dict[str, Any]:
        assert self.running.stdout is not None
        line = self.running.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.provider.name} ended with {self.running.wait()}")
        return json.loads(line)

    def step(self) -> None:
        assert self.running.stdin is not None
        self.running.stdin.write("\n")
        self.running.stdin.flush()
        found = self._answer()
        self.seconds.append(found["seconds"])
        self.peak = found["peak"]

    def end(self) -> None:
        assert self.running.stdin is not None
        self.running.stdin.close()
        self.running.wait()


def best_of(function: Any, budget: float = 0.3) -> float:
    """Return the seconds of the fastest of some calls."""
    function()
    best, stop = float("inf"), time.perf_counter() + budget
    while time.perf_counter() < stop:
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def product(left: torch.Tensor, right: torch.Tensor) -> float:
    return best_of(functools.partial(torch.mm, left, right))


def limit(model: str, rows: int, tokens: int, compute: str, r: int) -> dict[str, float]:
    """Return the seconds of a step's products, each timed alone, by kind; all linears adapted."""
    dtype, M = DTYPES[compute], rows * tokens
    config = read_shape(model).config
    empty = read_shape(model).empty()
    modules = dict(empty.named_modules())
    shapes = Counter(base_of(modules[name]).shape for name in select_targets(empty))
    vocabulary, width = base_of(empty.lm_head).shape
    found = {"base": 0.0, "low rank": 0.0, "head": 0.0, "attention": 0.0}

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype)

    for (N, K), count in shapes.items():
        x, g, w = drawn(M, K), drawn(M, N), drawn(N, K)
        a, b, s = drawn(r, K), drawn(N, r), drawn(M, r)
        skinny = ((x, a.t()), (s, b.t()), (g, b), (s, a), (s.t(), x), (g.t(), s))
        found["base"] += count * (product(x, w.t()) + product(g, w))
        found["low rank"] += count * sum(product(*pair) for pair in skinny)
    h, w = drawn(min(M, 256), width), drawn(vocabulary, width)
    z = drawn(min(M, 256), vocabulary)
    found["head"] = (product(h, w.t()) + product(z, w)) * M / len(h)
    heads, D = config.num_attention_heads, config.head_dim
    kv = getattr(config, "num_key_value_heads", heads)
    q = drawn(rows, heads, tokens, D).requires_grad_()
    k, v = (drawn(rows, kv, tokens, D).requires_grad_() for _ in range(2))

    def attention() -> None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, (q, k, v), out)

    found["attention"] = config.num_hidden_layers * best_of(attention)
    return found


def verdict(losses: list[float], reference: list[float] | None) -> str:
    if reference is None or len(losses) < CHECKED_STEPS:
        return ""
    pairs = [(losses[i], reference[i]) for i in (0, -1)]
    return "wrong" if any(abs(a - b) > TOLERANCE * b for a, b in pairs) else "right"


def row(process: Process, options: argparse.Namespace, reference: Any) -> dict[str, object]:
    found = verdict(process.losses, reference)
    seconds = statistics.median(process.seconds) if process.seconds else 0.0
    times = {
        "seconds": f"{seconds:.3f}", "fastest": f"{min(process.seconds):.3f}",
        "slowest": f"{max(process.seconds):.3f}", "rounds": len(process.seconds),
        "tokens_per_s": f"{options.rows * options.tokens / seconds:.1f}",
    }  # fmt: skip
    first, last = (f"{process.losses[i]:.4f}" for i in (0, -1))
    return {
        "provider": process.provider.name, **({} if found == "wrong" else times),
        "peak_mb": round(process.peak / 1e6), "loss_1": first,
        "loss_10": last if len(process.losses) == CHECKED_STEPS else "", "verdict": found,
    }  # fmt: skip


def processor() -> str:
    """Return the processor's name and family: clouds call several generations by one name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    family = [line.split(":")[1].strip() for line in lines if line.startswith("cpu family")]
    return " family ".join([minilora.hardware().name, *family[:1]])


def commit() -> str:
    """Return the commit's short name; "-dirty" if anything but the results has changed since."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    name = git("describe", "--always", "--exclude=*").stdout.strip()
    changed = git("diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)benchmarks/results")
    return name + ("-dirty" if changed.returncode else "")


def conditions(options: argparse.Namespace) -> dict[str, object]:
    found = minilora.hardware()
    return {
        "model": options.model, "rows": options.rows, "tokens": options.tokens,
        "r": options.r, "targets": options.targets, "processor": processor(),
        "flags": " ".join(found.flags), "threads": options.threads, "torch": torch.__version__,
        "commit": commit(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def timed(chosen: list[Provider], anchor: Provider, options: argparse.Namespace) -> list[dict]:
    """Run the providers group by group, the anchor with each; return their rows."""
    rows, reference = [], None
    alone = [p for p in chosen if p != anchor]
    groups = [alone[i : i + options.group] for i in range(0, len(alone), options.group)] or [[]]
    first = Process(anchor, options)
    reference = first.losses
    for number, group in enumerate(groups):
        processes = []
        for provider in group:
            print(f"  starting {provider.name}", flush=True)
            processes.append(Process(provider, options))
        print(f"  timing {len(processes) + 1} providers", flush=True)
        for _ in range(options.rounds):
            for process in [first, *processes]:
                process.step()
        anchored = statistics.median(first.seconds[-options.rounds :])
        for process in processes:
            rows.append(row(process, options, reference) | {"anchor": anchored})
            print(
                f"  {process.provider.name}: {rows[-1].get('seconds', 'wrong')} s, anchor "
                f"{anchored:.3f} s, {rows[-1]['peak_mb']} MB, loss {rows[-1]['loss_10']}",
                flush=True,
            )
            process.end()
        print(f"  group {number + 1} of {len(groups)} done", flush=True)
    rows.insert(0, row(first, options, reference) | {"anchor": statistics.median(first.seconds)})
    first.end()
    return rows


def save(rows: list[dict], file: Path, columns: Sequence[str] = COLUMNS) -> None:
    new = not file.exists()
    with open(file, "a", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def ratios(rows: list[dict]) -> None:
    """Write how many times a row is faster than PEFT, eager, in either dtype.

    Against the anchor of its own rounds where that is such a PEFT: hours apart a shared machine may
    be another one.
    """
    anchor, by_name = rows[0]["provider"], {found["provider"]: found for found in rows}
    for found in rows:
        beside = found.pop("anchor", None)
        for column in ("bf16", "f32"):
            name = f"peft {column}"
            theirs = beside if name == anchor else by_name.get(name, {}).get("seconds")
            theirs = theirs or by_name.get(name, {}).get("seconds")
            if theirs and found.get("seconds"):
                found[f"to_peft_{column}"] = f"{float(theirs) / float(found['seconds']):.2f}"


def table(rows: list[dict]) -> str:
    lines = [
        "| provider | s a step | tokens/s | × PEFT bf16 | × PEFT f32 | peak, MB | loss at 10 |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for found in rows:
        cells = ("provider", "seconds", "tokens_per_s", "to_peft_bf16", "to_peft_f32", "peak_mb",
                 "loss_10")  # fmt: skip
        lines.append("| " + " | ".join(str(found.get(cell, "")) for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--targets", choices=("all", "attention"), default="all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checked-tokens", type=int, default=CHECKED_TOKENS)
    parser.add_argument("--group", type=int, default=5, help="processes beside the anchor")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=None, metavar="NAME")
    parser.add_argument("--anchor", default=None, help="default: peft in this machine's dtype")
    parser.add_argument("--quick", action="store_true", help="1 × 256 tokens, the main rows")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--csv", type=Path, default=RESULTS / "train_step.csv")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    every = {
        name: replace(provider, r=options.r, targets=options.targets)
        for name, provider in providers().items()
    }
    if options.list:
        print("\n".join(every))
        return
    fast = "bf16" if minilora.hardware().dtype == torch.bfloat16 else "f32"
    if options.quick:
        options.rows, options.rounds, options.csv = 1, min(options.rounds, 3), None
        options.only = options.only or [
            f"peft {fast} compiled", f"peft nf4 {fast}", f"minilora {fast}",
            f"minilora {fast} compiled", f"minilora int8 {fast} compiled",
            f"minilora nf4 {fast} compiled",
        ]  # fmt: skip
    anchor = every[options.anchor or f"peft {fast}"]
    unknown = set(options.only or ()) - set(every)
    if unknown:
        parser.error(f"unknown providers: {', '.join(sorted(unknown))}; --list names all")
    chosen = [every[name] for name in options.only or every]
    common = conditions(options)
    print(f"{options.model}, {options.rows} × {options.tokens} tokens; {minilora.hardware()}")
    print("  timing the limit", flush=True)
    setting = (options.model, options.rows, options.tokens)
    # Where bf16 is slow our own code multiplies in f32, and torch's products alone take minutes.
    slow = is_slow(torch.bfloat16)
    dtypes = sorted({"f32" if slow else provider.compute for provider in [*chosen, anchor]})
    parts = {dtype: limit(*setting, dtype, options.r) for dtype in dtypes}
    print(f"  limit done: {parts}", flush=True)
    rows = timed(chosen, anchor, options)
    for dtype, found in parts.items():
        text = ", ".join(f"{kind} {seconds:.3f}" for kind, seconds in found.items())
        seconds = sum(found.values())
        rate = f"{options.rows * options.tokens / seconds:.1f}"
        rows.append({"provider": f"limit {dtype}", "seconds": f"{seconds:.3f}",
                     "tokens_per_s": rate, "verdict": text})  # fmt: skip
    ratios(rows)
    print(table(rows))
    if options.csv is not None:
        save([common | found for found in rows], options.csv)


if __name__ == "__main__":
    main()
