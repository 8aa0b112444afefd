"""Memory used again: buffers for decoded weights, and what the C library does with freed blocks."""

import ctypes
import functools
import os
import sys
import threading
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.nn import Parameter

# OneDNN compiles a 16-bit product for each number of rows and keeps 1024 of them, some 0.6 MB each
# on a Xeon with AMX. A step takes some 30, of batches that differ in length others in each: so
# fewer are kept, unless the user has said how many. Read when the first one is compiled.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

_GPU_PANEL = 2**26  # 256 MB in f32; each further one costs launches
_local = threading.local()
_FAKE = torch._C._TorchDispatchModeKey.FAKE


def is_traced(x: Tensor) -> bool:
    """Return whether x has no values to read: torch.compile runs, or x is fake (planning)."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


def is_transformed(x: Tensor) -> bool:
    """Return whether vmap, forward derivatives or another transform of `torch.func` is at work."""
    return forward_ad._current_level >= 0 or is_functorch_wrapped_tensor(x)


def is_plain(x: Tensor) -> bool:
    """Return whether x is an ordinary tensor, and nothing traces, transforms or watches torch."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or type(x) not in (Tensor, Parameter)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        # in `torch.autograd.grad(…, is_grads_batched=True)`
        or torch._C._functorch.is_legacy_batchedtensor(x)
        or x.is_neg()
    )


def workspace(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised tensor of this shape; on a CPU a reused one.

    A reused one is valid until the next call with this dtype in this thread: fresh pages cost more
    than decoding into them, so one buffer a dtype, as large as the largest matrix asked for, stays
    behind. CUDA's caching allocator reuses memory by itself, and a traced graph plans its own.
    Where a gradient is recorded (second derivatives), the result is kept, so it is a new one.
    """
    if device.type != "cpu" or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return torch.empty(shape, dtype=dtype, device=device)
    return reused(shape.numel(), dtype, device).view(shape)


def reused(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised `[count]` on a CPU, from the same buffers as `workspace`'s."""
    if torch._C._get_dispatch_mode(_FAKE) is not None:  # nothing fake may stay behind
        return torch.empty(count, dtype=dtype, device=device)
    held: dict[torch.dtype, Tensor] = _local.__dict__.setdefault("held", {})
    if dtype not in held or held[dtype].numel() < count:
        with torch.inference_mode(False):  # else it could not be written to in training
            held[dtype] = torch.empty(count, dtype=dtype, device=device)
    return held[dtype][:count]


def fresh(y: Tensor) -> Tensor:
    """Return y; in a traced graph a copy, which Inductor leaves out again.

    For what an autograd Function returns: where Dynamo knows it as an intermediate too (changed in
    place, or handed on by a cast to its own dtype), torch 2.11 gives zero gradients.
    """
    return y.clone() if torch.compiler.is_compiling() else y


@functools.cache
def _placed(table: Tensor, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return table.to(device)


def placed(table: Tensor, device: torch.device) -> Tensor:
    """Return a constant of a module on a device, copied there once: each copy waits for the GPU."""
    if torch.compiler.is_compiling() or torch._C._get_dispatch_mode(_FAKE) is not None:
        return table.to(device)  # nothing fake may stay behind
    return _placed(table, device)


def panel(weights: int, device: torch.device) -> int:
    """Return how many weights to decode at a time: on a CPU so few that its cache holds them."""
    return weights if device.type == "cpu" else _GPU_PANEL


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of settings in glibc's malloc.h


def _of_libc(name: str) -> Any:
    """Return a function of glibc, None elsewhere (musl has neither of those used here)."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next step, once for the process.

    By default it hands every block above 32 MB back to the kernel and has the pages cleared again
    at the next use, in every step. Before version 2.35 it can't be told to keep those, and refuses
    a threshold above 32 MB; smaller blocks are kept then. Elsewhere nothing is done.
    """
    mallopt = _of_libc("mallopt")
    if mallopt is None:
        return
    if mallopt(_MMAP_THRESHOLD, 2**30) or mallopt(_MMAP_THRESHOLD, 2**25):
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)  # alone it would freeze the threshold where it is


@functools.cache
def hand_back_large_blocks() -> None:
    """Let glibc hand blocks above 1 MB back to the kernel as they are freed, from now on.

    Under FSDP2 each block of the model is gathered into new tensors that are freed after it; gloo's
    threads would each keep theirs in a heap of its own (benchmarks/NOTES.md).
    """
    mallopt = _of_libc("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 2**20)


def hand_back_freed_memory() -> None:
    """Give the kernel what glibc has kept so far, where there is glibc."""
    trim = _of_libc("malloc_trim")
    if trim is not None:
        trim(0)
