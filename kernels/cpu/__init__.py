"""Products in C for few rows on a CPU, compiled when first needed; torch computes them without.

`rows.c` is built by the C compiler there is (`CC`, else cc, gcc or clang; under half a second) into
the cache folder, under a name that holds its source's hash. It is linked to no OpenMP of its own:
the symbols are those of the runtime that torch has loaded, and with it torch's threads.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cache import cache_folder

_SOURCE = Path(__file__).with_name("rows.c")
_FLAGS = ("-O3", "-fPIC", "-fopenmp")


def compiler() -> list[str] | None:
    """Return the command of the C compiler, or None where there is none."""
    asked = shlex.split(os.environ.get("CC", ""))
    for command in [asked] if asked else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    return None


def build(folder: Path, flags: Sequence[str] = ()) -> Path | None:
    """Return the compiled library in `folder`, made unless it is there; None where that fails."""
    command = compiler()
    if command is None:
        return None
    key = hashlib.sha256(_SOURCE.read_bytes() + repr([command, *_FLAGS, *flags]).encode())
    library = folder / f"rows-{key.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            made = Path(place) / "rows.o", Path(place) / "rows.so"
            for step in (
                [*command, *_FLAGS, *flags, "-c", str(_SOURCE), "-o", str(made[0])],
                [*command, "-shared", str(made[0]), "-o", str(made[1])],
            ):
                subprocess.run(step, check=True, capture_output=True, timeout=60)
            made[1].replace(library)  # whole or not at all, whoever else builds it
    except (OSError, subprocess.SubprocessError):
        return None
    return library


def load(library: Path | None) -> ctypes.CDLL | None:
    """Open a library that `build` made; None where there is none or it can't be opened."""
    if library is None:
        return None
    try:
        opened = ctypes.CDLL(str(library))
    except OSError:
        return None
    for name, tensors, sizes in (("minilora_int8_rows", 4, 3), ("minilora_int4_rows", 5, 4)):
        function = getattr(opened, name)
        function.argtypes = [ctypes.c_void_p] * tensors + [ctypes.c_long] * sizes
        function.restype = None
    return opened


@functools.cache
def native() -> ctypes.CDLL | None:
    """Return this process's library, built if need be, or None where nothing can be compiled."""
    return load(build(cache_folder() / "kernels"))


def run(function: Callable[..., None], x: Tensor, *weight: Tensor, group: int = 0) -> Tensor:
    """Call one of the C functions; operands as for `int8_rows` and `int4_rows`."""
    x, weight = x.contiguous(), tuple(part.contiguous() for part in weight)
    y = x.new_empty(len(x), len(weight[0]))
    pointers = (tensor.data_ptr() for tensor in (x, *weight, y))
    function(*pointers, *y.shape, x.shape[1], *((group,) if group else ()))
    return y


def _int8_rows(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    library = native()
    if library is None:
        return torch.mm(x, codes.to(torch.float32).t()).mul_(scales)
    return run(library.minilora_int8_rows, x, codes, scales)


def _int4_rows(x: Tensor, packed: Tensor, steps: Tensor, scales: Tensor, group: int) -> Tensor:
    library = native()
    if library is None:
        q = torch.cat([packed & 15, packed >> 4], dim=1).to(torch.float32) - 8
        weight = q.mul_(steps.repeat_interleave(group, dim=1))
        return torch.mm(x, weight.t()).mul_(scales)
    return run(library.minilora_int4_rows, x, packed, steps, scales, group=group)


def _shape(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty(len(x), len(codes))


_ops = torch.library.Library("minilora", "FRAGMENT")
# Not a second time: transformers, run in the repository's root, imports this folder as `kernels`.
if not hasattr(torch.ops.minilora, "int8_rows"):
    for schema, function in (
        ("int8_rows(Tensor x, Tensor codes, Tensor scales) -> Tensor", _int8_rows),
        ("int4_rows(Tensor x, Tensor packed, Tensor steps, Tensor scales, int group) -> Tensor",
         _int4_rows),
    ):  # fmt: skip
        name = schema.partition("(")[0]
        _ops.define(schema)
        _ops.impl(name, function, "CPU")
        torch.library.register_fake(f"minilora::{name}", _shape, lib=_ops)


def int8_rows(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Return `x · diag(scales) codesᵀ`, for few rows; not differentiable, works under compile.

    Args:
        x: f32 `[M, K]`.
        codes: int8 `[N, K]`.
        scales: f32 `[N]`.

    Returns:
        f32 `[M, N]`; each row depends on that row of x alone.
    """
    return torch.ops.minilora.int8_rows(x, codes, scales)


def int4_rows(x: Tensor, packed: Tensor, steps: Tensor, scales: Tensor, group: int) -> Tensor:
    """Return `x Wᵀ` for INT4 storage, otherwise like `int8_rows`.

    Args:
        x: f32 `[M, K]`.
        packed: uint8 `[N, K/2]`, column j low, column j + K/2 high, each q + 8.
        steps: uint8 `[N, K/group]`.
        scales: f32 `[N]`.
        group: weights of a row that share a step.
    """
    return torch.ops.minilora.int4_rows(x, packed, steps, scales, group)
