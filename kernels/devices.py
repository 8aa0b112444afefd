"""Devices by name, and what one that lacks memory says. MPS (Apple's GPUs) is untested."""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch._subclasses import FakeTensor

DEVICES = "'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'"


def resolve_device(device: torch.device | str = "auto") -> torch.device:
    """Return the device that a name means, once it is known to be there.

    Args:
        device: `"auto"` is CUDA where it is there, else MPS, else the CPU. CUDA without a number
            is the current device; under torchrun each process takes that of its `LOCAL_RANK`.

    Raises:
        ValueError: no such name or number.
        RuntimeError: there is no such device on this machine.
    """
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be {DEVICES}, found {device!r}") from None
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise RuntimeError("device 'mps' needs Apple's GPU and a torch that can use it, found none")
    return _cuda(found) if found.type == "cuda" else found


def _cuda(device: torch.device) -> torch.device:
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"device '{device}' needs a GPU that torch can use, found none; use 'cpu', or install "
            f"torch for CUDA and its driver"
        )
    count, index = torch.cuda.device_count(), device.index
    if index is None:
        rank = os.environ.get("LOCAL_RANK", "")
        index = int(rank) if rank.isdecimal() else torch.cuda.current_device()
    if index >= count:
        raise ValueError(
            f"device 'cuda:{index}' must be one of the {count} GPUs here, numbered from 0; under "
            f"torchrun each process takes one: start no more than {count} on a machine"
        )
    return torch.device("cuda", index)


_counting: list[str] = []  # devices, within `as_on_gpu`


def counts_for_gpu() -> bool:
    """Return whether fake tensors stand for those of a GPU."""
    return bool(_counting)


def on_cpu(tensor: torch.Tensor) -> bool:
    """Return whether a tensor takes the code paths of a CPU."""
    if _counting and (torch.compiler.is_compiling() or isinstance(tensor, FakeTensor)):
        return False
    return tensor.device.type == "cpu"


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """Let fake tensors of the CPU take the code paths of a GPU, to count what is kept there.

    What another thread compiles for a CPU meanwhile takes them too.
    """
    _counting.append("cuda")
    try:
        yield
    finally:
        _counting.pop()


def out_of_memory(error: BaseException) -> str | None:
    """Return the device whose memory an error says is used up: `"cuda"`, `"cpu"`, or None."""
    if isinstance(error, torch.OutOfMemoryError) or "MPS backend out of memory" in str(error):
        return "mps" if "MPS" in str(error) else "cuda"
    # "can't allocate memory", or "not enough memory" on Windows
    cpu = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
    return "cpu" if cpu else None
