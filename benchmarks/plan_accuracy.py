"""What `minilora plan` foretells against what training here really takes.

    python benchmarks/plan_accuracy.py [--budget 280] [--rows smollm2 nf4] [--memory] [--constants]

Each row is a real run of a few steps by `minilora.fit` in a process of its own, whose peak is the
kernel's (VmHWM) and whose seconds are the median after the first step. Planned before it: memory
on shapes, and time from repeated steps of 3 blocks. SmolLM2 is read from its file if that is in
the cache, the other models have random weights of their shape. A quantized base computes in what
is fastest on the machine. Rows that the table holds for this machine are not run again; `--rows`
takes those that hold all of these words, `--budget` starts no row after so many seconds.

Rows of several machines stand side by side, each with the commit it was measured at: one without
AMX gets shorter rows (`JUDGED_AVX2`), since bf16 is many times slower there than f32.
`--memory` leaves the time out: peaks may be measured on a busy machine, seconds may not. So `busy`
is the share of the processors that other work took, the larger of that while planning and while
running, and rows where it is above a tenth are measured again by the next call. Where nothing else
can be had, `--processor` counts the processor's seconds over the number of threads, of the plan's
steps and of the run's (set OMP_WAIT_POLICY=PASSIVE, so that waiting is not counted): it judges the
model of time, not the clock on the wall, and such rows say so.
`--constants` runs other rows than the ones judged and prints the values for
`minilora/planning/memory.py`.
"""

import argparse
import csv
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import minilora
from minilora.data.batches import Example
from minilora.loading.fetching import _SOURCES, cache_folder
from minilora.loading.model import load_model
from minilora.planning import machines
from minilora.planning import memory as constants
from minilora.planning.machines import (
    _others,
    _processor_seconds,
    calibrate,
    peak_bytes,
    process_bytes,
)
from minilora.planning.memory import MIB, count_memory, count_planned, grows
from minilora.planning.shapes import Settings, read_shape
from minilora.planning.timing import random_model, timed_step

RESULTS = Path(__file__).parent / "results"
SMOL, TINY = "smollm2-135m", "tinyllama-1.1b"
# model, format or dtype, rows, length, checkpointing
JUDGED = [
    ("gpt2", "float32", 2, 256, 0), ("gpt2", "float32", 4, 512, 1), ("gpt2", "bfloat16", 8, 128, 0),
    ("gpt2", "bfloat16", 2, 1024, 1), ("gpt2", "int8", 4, 256, 0), ("gpt2", "int8", 8, 256, 1),
    ("gpt2", "nf4", 4, 512, 0), ("gpt2", "nf4", 2, 256, 1), ("gpt2", "bfloat16", 16, 128, 0),
    (SMOL, "float32", 2, 256, 0), (SMOL, "float32", 4, 256, 1), (SMOL, "bfloat16", 8, 128, 0),
    (SMOL, "bfloat16", 8, 256, 0), (SMOL, "bfloat16", 4, 512, 1), (SMOL, "int8", 4, 256, 0),
    (SMOL, "int8", 2, 512, 1), (SMOL, "nf4", 4, 256, 0), (SMOL, "nf4", 8, 256, 1),
    (SMOL, "bfloat16", 1, 1024, 0), (SMOL, "bfloat16", 2, 128, 0),
    (TINY, "float32", 1, 256, 0), (TINY, "float32", 1, 256, 1), (TINY, "bfloat16", 2, 256, 0),
    (TINY, "bfloat16", 2, 512, 1), (TINY, "bfloat16", 4, 128, 0), (TINY, "int8", 1, 512, 0),
    (TINY, "int8", 2, 512, 1), (TINY, "nf4", 1, 256, 0), (TINY, "nf4", 2, 256, 1),
    (TINY, "nf4", 1, 512, 0),
]  # fmt: skip
JUDGED_AVX2 = [
    ("gpt2", "float32", 2, 256, 0), ("gpt2", "float32", 4, 256, 1), ("gpt2", "float32", 8, 128, 0),
    ("gpt2", "float32", 1, 512, 0), ("gpt2", "int8", 4, 256, 0), ("gpt2", "int8", 8, 128, 1),
    ("gpt2", "nf4", 4, 128, 0), ("gpt2", "nf4", 2, 256, 1), ("gpt2", "bfloat16", 1, 128, 0),
    (SMOL, "float32", 2, 256, 0), (SMOL, "float32", 4, 256, 1), (SMOL, "float32", 8, 128, 0),
    (SMOL, "float32", 2, 512, 1), (SMOL, "int8", 4, 128, 0), (SMOL, "int8", 2, 256, 1),
    (SMOL, "nf4", 4, 256, 0), (SMOL, "nf4", 8, 128, 1), (SMOL, "bfloat16", 1, 128, 0),
    (SMOL, "bfloat16", 1, 128, 1),
    (TINY, "float32", 1, 128, 0), (TINY, "float32", 2, 128, 1), (TINY, "float32", 1, 256, 0),
    (TINY, "int8", 1, 128, 0), (TINY, "int8", 1, 256, 1), (TINY, "nf4", 1, 128, 0),
    (TINY, "nf4", 1, 256, 1), (TINY, "nf4", 2, 128, 0),
]  # fmt: skip
FITTED_AVX2 = [
    ("gpt2", "float32", 4, 128, 0), ("gpt2", "float32", 2, 512, 1), ("gpt2", "nf4", 8, 128, 0),
    ("gpt2", "int8", 2, 256, 1), ("gpt2", "bfloat16", 1, 64, 0), (SMOL, "float32", 4, 128, 0),
    (SMOL, "float32", 2, 256, 1), (SMOL, "float32", 1, 512, 0), (SMOL, "int8", 8, 128, 1),
    (SMOL, "nf4", 2, 256, 0), (SMOL, "bfloat16", 1, 64, 1), (TINY, "float32", 1, 64, 0),
    (TINY, "float32", 1, 128, 1), (TINY, "int8", 1, 256, 0), (TINY, "nf4", 2, 128, 1),
    (TINY, "nf4", 1, 64, 0),
]  # fmt: skip
FITTED = [
    ("gpt2", "bfloat16", 4, 256, 0), ("gpt2", "float32", 4, 256, 0), ("gpt2", "float32", 4, 256, 1),
    ("gpt2", "nf4", 8, 256, 0), ("gpt2", "int8", 2, 512, 1), (SMOL, "bfloat16", 4, 256, 0),
    (SMOL, "float32", 4, 256, 0), (SMOL, "bfloat16", 1, 512, 0), (SMOL, "int8", 8, 128, 1),
    (SMOL, "nf4", 1, 512, 1), (TINY, "bfloat16", 1, 512, 0), (TINY, "bfloat16", 1, 512, 1),
    (TINY, "int8", 1, 256, 0), (TINY, "nf4", 1, 256, 1), (SMOL, "float32", 2, 256, 1),
    (SMOL, "float32", 2, 512, 1),
]  # fmt: skip
BUSY = 0.1  # share of other work above which a time is measured again
COLUMNS = (
    "machine", "model", "weights", "base", "computes", "batch", "length", "checkpointing",
    "planned_mb", "measured_mb", "memory_error", "planned_s", "measured_s", "time_error", "busy",
    "clock", "threads", "torch", "commit",
)  # fmt: skip


def settings_of(row) -> Settings:
    _, base, rows, length, checkpointing = row
    quantized = base in ("int8", "nf4", "int4")
    dtype = minilora.hardware().dtype if quantized else getattr(torch, base)
    return Settings(
        base if quantized else None,
        dtype,
        batch_size=rows,
        length=length,
        checkpointing=bool(checkpointing),
    )


def machine() -> str:
    found = minilora.hardware()
    widest = next((w for f, w in (("amx_bf16", "AMX"), ("avx512f", "AVX-512"), ("avx2", "AVX2"))
                   if f in found.flags), "no vectors known")  # fmt: skip
    return f"{found.name}, {widest}"


def commit() -> str:
    command = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def cached_file() -> bool:
    return (cache_folder() / _SOURCES[SMOL].name).exists()


def child(row, steps: int) -> None:
    """Train a few steps; print the peak and the seconds of each."""
    settings, shape = settings_of(row), read_shape(row[0])
    if row[0] == SMOL and cached_file():
        if settings.format:
            model, _ = load_model(SMOL, settings.format, dtype=settings.dtype)
        else:
            model, _ = load_model(SMOL, dtype=settings.dtype)
        minilora.inject(model, settings.r)
    else:
        model = random_model(shape, settings)
    size, seconds, worked = settings.batch_size * settings.length, [], [processor()]
    generator = torch.Generator().manual_seed(0)
    drawn = (steps * settings.batch_size, settings.length)
    ids = torch.randint(0, shape.config.vocab_size, drawn, generator=generator).tolist()

    class Clock:
        def on_step(self, found):
            learned = size - settings.batch_size  # a row's first token is not
            seconds.append(learned / found["tokens_per_s"])
            worked.append(processor())

    config = minilora.TrainConfig(
        batch_size=settings.batch_size,
        max_steps=steps,
        lr=1e-4,
        checkpointing=settings.checkpointing,
        dtype="float32" if settings.dtype == torch.float32 else "auto",
    )
    rows = [Example(one, one) for one in ids]
    minilora.fit(model, rows, config=config, quiet=True, callbacks=[Clock()])
    worked = [after - before for before, after in itertools.pairwise(worked)]
    print(json.dumps({"peak": peak_bytes(), "seconds": seconds, "worked": worked}))


def processor() -> float:
    return time.process_time() / torch.get_num_threads()


def measure(row, steps: int, clock: str) -> tuple[int, float]:
    command = [sys.executable, __file__, "--child", json.dumps(row), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        sys.exit(f"{row}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found["peak"], statistics.median(found[clock][1:])


def run(row, timed: bool = True, wall: bool = True) -> dict[str, object]:
    settings, shape = settings_of(row), read_shape(row[0])
    planned = count_memory(
        shape, settings, integer=calibrate().integer, process=process_bytes()
    ).peak
    marks = [_processor_seconds()]
    clock = time.perf_counter if wall else processor
    planned_s = timed_step(shape, settings, clock).seconds if timed else 0.0
    marks.append(_processor_seconds())
    steps = 4 if timed and wall else 2 if row[0] == TINY else 3
    peak, seconds = measure(row, steps, "seconds" if wall else "worked")
    marks.append(_processor_seconds())
    busy = max(_others(*marks[:2]), _others(*marks[1:]))
    file = row[0] == SMOL and cached_file()
    times = ("",) * 5
    if timed:
        error = planned_s / seconds - 1
        times = (f"{planned_s:.3f}", f"{seconds:.3f}", f"{error:+.4f}")
        times += (f"{busy:.2f}", "wall" if wall else "processor")
    return dict(
        zip(
            COLUMNS,
            (
                machine(), row[0], "file" if file else "random", row[1],
                str(settings.dtype).removeprefix("torch."), row[2], row[3], row[4],
                f"{planned / 1e6:.0f}", f"{peak / 1e6:.0f}", f"{planned / peak - 1:+.4f}", *times,
                torch.get_num_threads(), torch.__version__, commit(),
            ),
            strict=True,
        )
    )  # fmt: skip


def key(row: dict) -> tuple:
    names = ("machine", "model", "base", "batch", "length", "checkpointing")
    return tuple(str(row[name]) for name in names)


def read(file: Path) -> dict[tuple, dict]:
    if not file.exists():
        return {}
    with open(file, newline="", encoding="utf-8") as opened:
        return {key(row): row for row in csv.DictReader(opened)}


def write(file: Path, rows: list[dict]) -> None:
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def fit_constants(rows: list[dict]) -> None:
    """Print the heap's numbers, by least squares on relative errors."""
    sides, wants = [], []
    for row in rows:
        settings, shape = settings_of(setting(row)), read_shape(row["model"])
        found = count_memory(shape, settings, integer=calibrate().integer, process=process_bytes())
        weight = 1e9 / (float(row["measured_mb"]) * 1e6)
        counted = count_planned(shape, settings)
        each = found.recomputed * counted.blocks * grows(counted, settings)
        terms = (MIB, found.activations, found.recomputed, each)
        sides.append([term * weight / 1e9 for term in terms])
        rest = float(row["measured_mb"]) * 1e6 - (found.peak - found.heap)
        wants.append([rest * weight / 1e9])
    solved = torch.linalg.lstsq(
        torch.tensor(sides, dtype=torch.float64), torch.tensor(wants, dtype=torch.float64)
    ).solution.flatten()
    print(f"PROCESS = {process_bytes() / MIB:.0f} * MIB    # now {machines.PROCESS / MIB:.0f} MIB")
    names = ("HEAP_FIXED", "HEAP_SHARE", "HEAP_RECOMPUTED", "HEAP_EACH_F32")
    for name, value, unit in zip(names, solved.tolist(), (" * MIB", "", "", ""), strict=True):
        print(f"{name} = {value:.2f}{unit}    # now {getattr(constants, name):.10g}")


def replan(row: dict) -> None:
    """Plan a row's memory again, as the model may have changed since this machine measured it."""
    settings, shape = settings_of(setting(row)), read_shape(row["model"])
    integer = calibrate().integer
    planned = count_memory(shape, settings, integer=integer, process=process_bytes()).peak / 1e6
    row["planned_mb"] = f"{planned:.0f}"
    row["memory_error"] = f"{planned / float(row['measured_mb']) - 1:+.4f}"


def setting(row: dict) -> tuple:
    """Return what was run from a row of the table."""
    sizes = (int(row[name]) for name in ("batch", "length", "checkpointing"))
    return (row["model"], row["base"], *sizes)


def counts(row: dict) -> bool:
    """Tell whether a row has a time that other work did not spoil."""
    quiet = row["clock"] == "processor" or float(row["busy"] or 0) <= BUSY
    return bool(row["time_error"]) and quiet


def summary(name: str, rows: list[dict]) -> None:
    memory = [float(row["memory_error"]) for row in rows]
    print(f"{name}, {len(rows)} rows: memory within 10 % in {sum(abs(e) <= 0.1 for e in memory)}, "
          f"at worst {min(memory):+.1%} and {max(memory):+.1%}")  # fmt: skip
    for clock in ("wall", "processor"):
        timed = [row for row in rows if counts(row) and row["clock"] == clock]
        seconds = [float(row["time_error"]) for row in timed]
        if seconds:
            print(f"{name}, {len(seconds)} rows: {clock} time within 25 % in "
                  f"{sum(abs(e) <= 0.25 for e in seconds)}, at worst {min(seconds):+.1%} and "
                  f"{max(seconds):+.1%}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--budget", type=float, default=1e9, help="start no row after (seconds)")
    parser.add_argument("--rows", nargs="+", default=(), metavar="WORD", help="only those with all")
    parser.add_argument("--memory", action="store_true", help="measure no time")
    parser.add_argument("--processor", action="store_true", help="count the processor's seconds")
    parser.add_argument("--constants", action="store_true", help="run the rows constants are from")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(json.loads(options.child[0]), int(options.child[1]))
        return
    here = machine()
    if here.endswith("AMX"):
        wanted = FITTED if options.constants else JUDGED
    else:
        wanted = FITTED_AVX2 if options.constants else JUDGED_AVX2
    name = "plan_constants.csv" if options.constants else "plan_accuracy.csv"
    file = options.csv or RESULTS / name
    began, rows = time.perf_counter(), read(file)
    for row in wanted:
        words = (row[0], row[1], f"{row[2]}x{row[3]}", "again" if row[4] else "once")
        before = rows.get((here, *map(str, row)))
        done = before is not None and (options.memory or counts(before))
        if done or not all(any(word in one for one in words) for word in options.rows):
            continue
        if time.perf_counter() - began > options.budget:
            break
        found = run(row, not options.memory, not options.processor)
        rows[key(found)] = found
        write(file, list(rows.values()))
        print(", ".join(f"{k} {v}" for k, v in list(found.items())[1:15]), flush=True)
    mine = [one for one in rows.values() if one["machine"] == here]
    for one in mine:
        replan(one)
    write(file, list(rows.values()))
    for each in dict.fromkeys(one["machine"] for one in rows.values()):
        summary(each, [one for one in rows.values() if one["machine"] == each])
    if options.constants:
        fit_constants(mine)


if __name__ == "__main__":
    main()
