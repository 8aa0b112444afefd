"""Machines to plan for: this one, measured in a few seconds, and others by their datasheets.

A new one is an entry of `DEVICES`.
"""

import functools
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minilora.kernels import hardware, integer_way, is_slow, resolve_device
from minilora.planning.shapes import nearest

HERE = "here"
GIB = 2**30
# How much larger a share of a GPU's peak compiled steps reach: 0.59 and 0.60 for 0.41 and 0.36 on
# an H200, in 8B and 3B models (docs/gpu.md).
_COMPILED = 1.5
# What a process holds once it has trained a model of no size: Python, torch, its libraries and
# threads (Linux, torch 2.13 for CPUs). Used where the machine itself is not measured.
PROCESS = 410 * 2**20


@dataclass(frozen=True)
class Calibration:
    """Measured figures of this machine."""

    memory: int  # bytes a process may use: the smaller of what is free and a container's limit
    rates: dict[str, float]  # FLOP/s of a large product by dtype name; of int8 operations
    bandwidth: float  # bytes/s of a copy, read and written
    integer: str | None  # how INT8 and INT4 are multiplied as integers here, see `integer_way`
    process: int  # bytes of a process that trained a model of no size
    busy: float = 0.0  # share of the processor that other work took meanwhile, if that is known


@functools.cache
def calibrate() -> Calibration:
    """Measure this machine, once per process, in about five seconds."""
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
    free = _entry("/proc/meminfo", "MemAvailable:")
    if not free and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4
    for names in (  # of version 2 and 1; what files keep cached counts as used there, and is free
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat",
         "total_inactive_file"),
    ):  # fmt: skip
        limit, used, stat = (Path("/sys/fs/cgroup") / name for name in names[:3])
        if limit.exists() and limit.read_text().strip().isdigit():
            cached = _entry(str(stat), f"{names[3]} ", 1)
            left = max(0, int(limit.read_text()) - int(used.read_text()) + cached)
            free = min(free, left) if free else left
    return free


def _entry(file: str, name: str, unit: int = 1024) -> int:
    """Return an entry of a file of the kernel's in bytes, 0 where there is none."""
    lines = Path(file).read_text().splitlines() if Path(file).exists() else []
    return next((int(line.split()[1]) * unit for line in lines if line.startswith(name)), 0)


def _bandwidth() -> float:
    """Bytes/s of the best of a few copies of 256 MB, larger than any cache."""
    source = torch.ones(2**26, dtype=torch.float32)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(4):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


_TINY = """
import minilora
from minilora.models import LlamaConfig
from minilora.planning.machines import peak_bytes
from minilora.planning.shapes import Settings, Shape
from minilora.planning.timing import random_model
model = random_model(Shape("", LlamaConfig(64, 64, 64, 2, 2, 1, 32, 64), ""), Settings(r=4))
rows = [{"input_ids": [1] * 32, "labels": [1] * 32}] * 4
minilora.fit(model, rows, config=minilora.TrainConfig(max_steps=2, batch_size=2), quiet=True)
print(peak_bytes())
"""


def run_apart(code: str, timeout: float, given: bytes = b"") -> Any:
    """Run code in a process of its own; return the JSON that it prints last, None if it fails.

    Nothing comes from the current folder. What this process imports from elsewhere (a user's
    site-packages, `PYTHONPATH`) is found too.
    """
    here = Path.cwd()
    known = [str(Path(folder).resolve()) for folder in sys.path if folder]
    known = [folder for folder in known if Path(folder) != here]
    home = str(Path(__file__).resolve().parents[2])  # of minilora, which has been imported from it
    start = f"import sys; sys.path += {[*known, home]!r}\n"
    command = [sys.executable, "-I", "-c", start + code]
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, check=True, timeout=timeout
        )
        return json.loads(done.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


@functools.cache
def process_bytes() -> int:
    """Measure in a process of its own what training takes beside its tensors."""
    return run_apart(_TINY, 120) or PROCESS


def resident() -> int:
    """Return the bytes this process holds now, 0 where that is not known."""
    return _entry("/proc/self/status", "VmRSS:")


def peak_bytes() -> int:
    """Return the most memory this process has held, in bytes; 0 where that is not known."""
    return _entry("/proc/self/status", "VmHWM:")


def forget_peak() -> bool:
    """Begin to measure the peak anew, where the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Device:
    """A machine to plan for."""

    name: str  # as the user calls it
    what: str  # in full
    gpu: bool  # whether the memory is a GPU's
    count: int  # of GPUs, or 1
    memory: int  # usable bytes of each
    tflops: dict[str, float]  # dense peak by dtype name, of each, without sparsity
    bandwidth: float  # GB/s of each
    efficiency: float  # share of peak FLOPs that LoRA training is taken to reach (an assumption)
    moving: float  # share of the bandwidth
    source: str  # of the figures
    link: float = 0.0  # GB/s at which one can fetch from the others, 0 where there are none

    @property
    def local(self) -> bool:
        """Whether it is of the machine at hand: its CPU or a GPU."""
        return self.name == HERE or self.name.startswith("cuda")

    def share(self, compile: bool = False) -> float:
        """Share of peak that products reach."""
        return self.efficiency * (_COMPILED if compile and self.gpu else 1.0)

    def rate(self, dtype: torch.dtype, compile: bool = False) -> float:
        """FLOP/s of one, at that share."""
        return self.tflops[str(dtype).removeprefix("torch.")] * 1e12 * self.share(compile)


def _gpu(name, what, count, gib, half, full, bandwidth, source, link=0.0) -> Device:
    rates = {"bfloat16": half, "float16": half, "float32": full}
    memory = int(gib * GIB)
    return Device(name, what, True, count, memory, rates, bandwidth, 0.4, 0.7, source, link)


_A100 = (79.1, 312.0, 19.5, 2039.0)
DEVICES = {
    one.name: one
    for one in (
        _gpu(
            "rtx-4090", "NVIDIA GeForce RTX 4090, 24 GB", 1, 23.5, 165.2, 82.6, 1008.0,
            "NVIDIA Ada GPU architecture whitepaper, appendix A (bf16 with f32 accumulation)",
        ),
        _gpu(
            "a100-80gb", "NVIDIA A100 80 GB SXM", 1, *_A100,
            "NVIDIA A100 Tensor Core GPU datasheet",
        ),
        _gpu(
            "h100-80gb", "NVIDIA H100 80 GB SXM", 1, 79.1, 989.4, 66.9, 3350.0,
            "NVIDIA H100 Tensor Core GPU datasheet (dense: half of the figures with sparsity)",
        ),
        _gpu(
            "h200", "NVIDIA H200 141 GB SXM", 1, 139.8, 989.4, 66.9, 4800.0,
            "NVIDIA H200 Tensor Core GPU datasheet (dense: half of the figures with sparsity)",
        ),
        _gpu(
            "8xa100-80gb", "a node of 8 NVIDIA A100 80 GB SXM", 8, *_A100,
            "NVIDIA A100 Tensor Core GPU datasheet (NVLink: 300 GB/s each way)", 300.0,
        ),
        Device(
            "epyc-7763", "AMD EPYC 7763, 64 cores, 256 GB", False, 1, 240 * GIB,
            # 64 cores · 2.45 GHz · 32 f32 FLOPs a cycle (AVX2); bf16 is multiplied in f32.
            {"float32": 5.0, "bfloat16": 5.0, "float16": 1.25}, 204.8, 0.5, 0.6,
            "AMD EPYC 7003 series datasheet (base clock, 8 channels of DDR4-3200); bf16, which it "
            "has no instructions for, multiplied in f32",
        ),
    )
}  # fmt: skip


def this_machine(here: Calibration) -> Device:
    """Describe the machine at hand as a device."""
    tflops = {name: rate / 1e12 for name, rate in here.rates.items()}
    bandwidth = here.bandwidth / 1e9
    return Device(
        HERE, hardware().name, False, 1, here.memory, tflops, bandwidth, 1.0, 1.0, "measured"
    )


def this_gpu(name: str) -> Device:
    """Describe a GPU of the machine at hand, `"cuda"` or `"cuda:N"`: measured in a second.

    Real steps are taken to reach half of the rate of large products.
    """
    found, place = hardware(name), resolve_device(name)
    memory = torch.cuda.mem_get_info(place)[0] + torch.cuda.memory_reserved(place)
    names = "float32", "bfloat16", "float16"
    tflops = {key: (getattr(found, key) or found.float32) / 1e3 for key in names}
    return Device(
        name, found.name, True, torch.cuda.device_count(), memory, tflops, found.bandwidth,
        0.5, 0.7, "rates measured here",
    )  # fmt: skip


def called(name: str) -> str:
    """Return a device's name as it stands in a sentence."""
    return "this machine" if name == HERE else name


def name_of(name: str) -> str:
    """Return what a device is called: this CPU `"here"`, a GPU of this machine `"cuda…"`."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else HERE
    if name in (HERE, "cpu"):
        return HERE
    return name if str(name).startswith("cuda") else device(name).name


def device(name: str) -> Device:
    """Return a named device, or raise with the nearest names."""
    if not isinstance(name, str) or name.lower() not in DEVICES:
        raise ValueError(
            f"device must be 'auto', 'cpu', 'cuda' or one of {', '.join(DEVICES)}, found {name!r}; "
            f"{nearest(str(name), DEVICES)}"
        )
    return DEVICES[name.lower()]
