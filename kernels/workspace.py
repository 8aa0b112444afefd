"""Reused buffers for decoded weights: a matrix is decoded, multiplied and forgotten."""

import threading

import torch
from torch import Tensor

_local = threading.local()


def workspace(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised tensor of this shape; on a CPU it is lent.

    A lent one is valid until the next call with this dtype in this thread: fresh pages cost more
    than decoding into them, so one buffer a dtype, as large as the largest matrix asked for, stays
    behind. CUDA's caching allocator reuses memory by itself, and a traced graph plans its own.
    """
    if device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=device)
    held: dict[torch.dtype, Tensor] = _local.__dict__.setdefault("held", {})
    if dtype not in held or held[dtype].numel() < shape.numel():
        held[dtype] = torch.empty(shape.numel(), dtype=dtype)
    return held[dtype][: shape.numel()].view(shape)
