"""What this machine multiplies fast: instruction-set flags and a sub-second matmul probe.

A list of flags alone misleads: without AVX-512-BF16 or AMX, bf16 matmuls run several times slower
than f32 although every one of them is supported. So the default dtype follows a measurement.
"""

import functools
import hashlib
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .cpu import has_blocks, int8_blocks
from .devices import DEVICES, on_cpu, resolve_device

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")
INT8_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8")  # of which one makes `_int_mm` fast


@dataclass(frozen=True)
class Hardware:
    """What was found; rates are of one matmul, in GFLOP/s.

    On a CPU it is `[512, 1024] · [1024, 1024]`, on a GPU 4096 in each dimension. `dtype` is the
    fastest training dtype: what `dtype="auto"` resolves to. `int8` is the rate of `torch._int_mm`,
    of `int8_blocks` where `integer_way` says so. A rate is 0.0 where that can't run. `bandwidth` is
    of a copy, read and written, in GB/s, and `memory` in bytes: those of a GPU, else 0.
    """

    device: str
    name: str
    threads: int
    flags: tuple[str, ...]
    float32: float
    bfloat16: float
    int8: float
    dtype: torch.dtype
    float16: float = 0.0
    bandwidth: float = 0.0
    memory: int = 0

    def __str__(self) -> str:
        rates = f"f32 {self.float32:.0f}, bf16 {self.bfloat16:.0f}, int8 {self.int8:.0f} GFLOP/s"
        flags = " ".join(self.flags) or "no flags known"
        size = f"{self.memory / 1e9:.1f} GB" if self.memory else f"{self.threads} threads"
        return (
            f"{self.name} ({self.device}, {size}; {flags}); {rates}; "
            f"dtype auto = {str(self.dtype).removeprefix('torch.')}"
        )


def _rate(multiply, left: torch.Tensor, right: torch.Tensor) -> float:
    """GFLOP/s of one product: the best of a few runs, since a busy machine only slows one."""
    multiply(left, right)  # the first call picks and packs a kernel
    best = float("inf")
    stop = time.perf_counter() + 0.1
    while time.perf_counter() < stop:
        start = time.perf_counter()
        multiply(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * left.shape[0] * left.shape[1] * right.shape[1] / best / 1e9


@functools.cache
def instruction_set() -> str:
    """Name what code that is compiled here may use; the same name means the same instructions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    parts = platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability(), flags
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _cpu_name_and_flags() -> tuple[str, tuple[str, ...]]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine(), ()
    name, flags = platform.machine(), set[str]()
    for line in info.read_text(errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() == "flags":
            flags.update(value.split())
            break
    return name, tuple(flag for flag in _FLAGS if flag in flags)


@functools.cache
def int8_is_exact() -> bool:
    """Return whether `torch._int_mm` on this CPU gives the integers it should.

    Without VNNI its sums of two products saturate at 16 bits (seen with torch 2.13 under an AVX2
    limit: 127·127·512 comes out wrong), so no figure of speed makes it usable there.
    """
    left = torch.full((16, 64), 127, dtype=torch.int8)
    try:
        both = torch._int_mm(left, left.t()), torch._int_mm(left, -left.t())
    except RuntimeError:  # not built for this platform
        return False
    want = 127 * 127 * 64
    return bool((both[0] == want).all() and (both[1] == -want).all())


@functools.cache
def integer_way() -> str | None:
    """Return how this CPU multiplies integers faster than floats: `"int8"`, `"blocks"` or None.

    The first is `torch._int_mm`, the second `int8_blocks`. Not by the rates measured: on a busy
    machine they vary from process to process, and a resumed run has to multiply as the run before.
    """
    _, flags = _cpu_name_and_flags()
    if int8_is_exact() and any(flag in flags for flag in INT8_FLAGS):
        return "int8"
    return "blocks" if has_blocks() else None


@functools.cache
def hardware(device: str = "cpu") -> Hardware:
    """Probe the device once per process and say which dtype trains fastest on it.

    Args:
        device: `"cpu"` (about 0.3 s), `"cuda"`, `"cuda:1"` (about a second) or `"mps"`; `"auto"`
            as for `load_model`.

    Returns:
        The cached `Hardware`.

    Raises:
        ValueError: another device.
        RuntimeError: a device that is not there.
    """
    found = resolve_device(device)
    if found.type in ("cuda", "mps"):
        return _gpu(found)
    if found.type != "cpu":
        raise ValueError(f"hardware() knows {DEVICES}, found {device!r}")
    name, flags = _cpu_name_and_flags()
    wide: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
    left, right = torch.ones(512, 1024, **wide), torch.ones(1024, 1024, **wide)
    float32 = _rate(torch.mm, left, right)
    bfloat16 = _rate(torch.mm, left.bfloat16(), right.bfloat16())
    codes = right.to(torch.int8)
    try:
        if integer_way() == "blocks":
            ones = torch.ones(len(codes), **wide)
            int8 = _rate(lambda x, w: int8_blocks(x, w, ones, False), left, codes)
        else:
            int8 = _rate(torch._int_mm, left.to(torch.int8), codes)
    except RuntimeError:  # not built for this platform
        int8 = 0.0
    # A quarter more speed has to show before half the mantissa is given up.
    dtype = torch.bfloat16 if bfloat16 > 1.25 * float32 else torch.float32
    return Hardware("cpu", name, torch.get_num_threads(), flags, float32, bfloat16, int8, dtype)


def fastest_dtype(device: torch.device) -> torch.dtype:
    """Return what `dtype="auto"` means on a device.

    CUDA: bfloat16 from compute capability 8.0 on, else float16. MPS: float32.
    """
    if device.type == "cuda":
        wide = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if wide else torch.float16
    return torch.float32 if device.type == "mps" else hardware().dtype


_GPU_SIZE = 4096


@functools.cache
def _gpu(device: torch.device) -> Hardware:
    """Probe a GPU: a product in each dtype, and a copy."""
    cuda = device.type == "cuda"

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize(device)
        else:
            torch.mps.synchronize()

    def rate(dtype: torch.dtype, product: Callable[..., Any] = torch.mm) -> float:
        def multiply(left: torch.Tensor, right: torch.Tensor) -> None:
            product(left, right)
            wait()

        try:
            matrix = torch.ones(_GPU_SIZE, _GPU_SIZE, device=device, dtype=dtype)
            return _rate(multiply, matrix, matrix.t())
        except RuntimeError:  # not built for this device, or its memory is full
            return 0.0

    def copy(left: torch.Tensor, right: torch.Tensor) -> None:
        left.clone()
        wait()

    matrix = torch.ones(_GPU_SIZE, _GPU_SIZE, dtype=torch.float32, device=device)
    seconds = 2 * _GPU_SIZE**3 / (_rate(copy, matrix, matrix) * 1e9)
    flags, name, memory = (), "Apple GPU", 0
    if cuda:
        found = torch.cuda.get_device_properties(device)
        flags, name, memory = (f"sm_{found.major}{found.minor}",), found.name, found.total_memory
    else:
        memory = torch.mps.recommended_max_memory()
    return Hardware(
        str(device), name, torch.get_num_threads(), flags, rate(torch.float32),
        rate(torch.bfloat16), rate(torch.int8, torch._int_mm), fastest_dtype(device),
        rate(torch.float16), 2 * matrix.nbytes / seconds / 1e9, memory,
    )  # fmt: skip


def is_slow(dtype: torch.dtype) -> bool:
    """Return whether this CPU multiplies `dtype` at under a quarter of float32's rate (bf16 alone).

    Without AVX-512 torch multiplies bf16 at 1 to 10 GFLOP/s where f32 reaches 66. With it, and
    without its instructions for bf16, at 38 where f32 reaches 98 (under oneDNN's limit to that), so
    that the quarter lies between.
    """
    if dtype != torch.bfloat16:
        return False
    found = hardware()
    return found.float32 > 4 * found.bfloat16


# What torch.compiler.assume_constant_result sets, which would import all of Dynamo, and triton.
is_slow._dynamo_marked_constant = True  # type: ignore[attr-defined]


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """Return what products of x `[M, ...]` should run in: f32 where x's dtype is slow here.

    A single row stays as it is: its product costs what reading the weight costs.
    """
    narrow = on_cpu(x) and x.dtype == torch.bfloat16
    return torch.float32 if narrow and len(x) > 1 and is_slow(x.dtype) else x.dtype
