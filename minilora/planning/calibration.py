"""What this machine is and does, measured in a few seconds: memory, rates, and a process."""

import functools
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from minilora.kernels import (
    hardware,
    integer_way,
    is_slow,
)
from minilora.planning import constants


@dataclass(frozen=True)
class Calibration:
    """Measured figures of this machine.

    Attributes:
        memory: bytes a process may use: the smaller of what is free and a container's limit.
        rates: FLOP/s of a large product by dtype name; `int8` in operations.
        bandwidth: bytes/s of a copy, read and written.
        integer: how INT8 and INT4 are multiplied as integers here, see `integer_way`.
        process: bytes of a process that trained a model of no size.
        busy: share of the processor that other work took meanwhile; 0 where that is not known.
    """

    memory: int
    rates: dict[str, float]
    bandwidth: float
    integer: str | None
    process: int
    busy: float = 0.0


@functools.cache
def calibrate() -> Calibration:
    """Measure this machine once per process, in about five seconds."""
    before = _processor_seconds()
    found = hardware()
    rates = {n: getattr(found, n) * 1e9 for n in ("float32", "bfloat16", "int8")}
    rates["float16"] = rates["bfloat16"]
    if is_slow(torch.bfloat16):  # linears multiply it in float32
        rates["bfloat16"] = rates["float32"]
    bandwidth, process = _bandwidth(), process_bytes()
    busy = _others(before, _processor_seconds())
    return Calibration(free_memory(), rates, bandwidth, integer_way(), process, busy)


def _processor_seconds() -> tuple[float, float, float]:
    """Seconds of all processors: in all, at work, and at work for this process and its children."""
    lines = Path("/proc/stat").read_text().splitlines() if Path("/proc/stat").exists() else [""]
    ticks = [int(n) for n in lines[0].split()[1:9]] or [0] * 8  # user to steal
    idle, own = ticks[3] + ticks[4], os.times()
    each = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 1.0
    mine = own.user + own.system + own.children_user + own.children_system
    return sum(ticks) * each, (sum(ticks) - idle) * each, mine


def _others(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    """Return the share of the processors' time between two readings that went to other work."""
    total, work, mine = (b - a for a, b in zip(before, after, strict=True))
    return min(1.0, max(0.0, work - mine) / total) if total > 0 else 0.0


def free_memory() -> int:
    """Return the bytes a process may still use, a container's limit included."""
    free = 0
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and limit.read_text().strip().isdigit():
        left = int(limit.read_text()) - int(used.read_text())
        free = min(free, left) if free else left
    return free


def _bandwidth() -> float:
    """Bytes/s of the best of a few copies of 256 MB, larger than any cache."""
    source = torch.ones(2**26)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(4):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


_TINY = """
import minilora, torch
from minilora.models import Llama, LlamaConfig
from minilora.planning.calibration import peak_bytes
model = Llama(LlamaConfig(64, 64, 64, 2, 2, 1, 32, 64), device="meta", dtype=torch.bfloat16)
model = minilora.inject(model.to_empty(device="cpu"), r=4)
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.02)
rows = [{"input_ids": [1] * 32, "labels": [1] * 32}] * 4
minilora.fit(model, rows, config=minilora.TrainConfig(max_steps=2, batch_size=2), quiet=True)
print(peak_bytes())
"""


def isolated(code: str) -> list[str]:
    """Return the command that runs code isolated: nothing comes from the current folder.

    What this process imports from elsewhere (a user's site-packages, `PYTHONPATH`) is found too.
    """
    here = Path.cwd()
    known = [str(Path(folder).resolve()) for folder in sys.path if folder]
    known = [folder for folder in known if Path(folder) != here]
    home = str(Path(__file__).resolve().parents[2])  # of minilora, which has been imported from it
    start = f"import sys; sys.path += {[*known, home]!r}\n"
    return [sys.executable, "-I", "-c", start + code]


@functools.cache
def process_bytes() -> int:
    """Measure in a process of its own what training takes beside its tensors."""
    try:
        done = subprocess.run(
            isolated(_TINY), capture_output=True, text=True, check=True, timeout=120
        )
        return int(done.stdout.split()[-1]) or constants.PROCESS
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return constants.PROCESS


def resident() -> int:
    """Return the bytes this process holds now, 0 where that is not known."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    for line in status.read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def peak_bytes() -> int:
    """Return the most memory this process has held, in bytes; 0 where that is not known."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def forget_peak() -> bool:
    """Begin to measure the peak anew, where the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


__all__ = [
    "Calibration", "calibrate", "forget_peak", "free_memory", "isolated", "peak_bytes",
    "process_bytes", "resident",
]  # fmt: skip
