"""Products of few rows, 4-bit weights for many, and products of bytes, in C on a CPU.

Where nothing can be compiled (`library.py`) torch computes the same; the products of bytes alone
have no other form and say whether they are there (`has_blocks`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..workspace import reused
from .library import native

_PANEL = 2**20  # weights decoded at a time where nothing is compiled


def run(function: Callable[..., None], x: Tensor, *weight: Tensor, group: int = 0) -> Tensor:
    """Call one of the C functions; operands as for `int8_rows` and `int4_rows`, checked before."""
    x, weight = x.contiguous(), tuple(part.contiguous() for part in weight)
    y = x.new_empty(len(x), len(weight[0]))
    pointers = (tensor.data_ptr() for tensor in (x, *weight, y))
    function(*pointers, *y.shape, x.shape[1], *((group,) if group else ()))
    return y


def run_blocks(
    library: Any, x: Tensor, parts: Sequence[Tensor], y: Tensor, across: bool, *group: int
) -> Tensor:
    """Fill y `[M, L]` by `minilora_int8_blocks`, or `_int4_` with a group; all checked before."""
    (M, J), L = x.shape, y.shape[1]
    x, parts = x.contiguous(), [part.contiguous() for part in parts]
    if not y.numel() or not J:
        return y.zero_()
    work = reused(library.minilora_blocks_bytes(M, J, L, bool(group)), torch.uint8, x.device)
    pointers = [tensor.data_ptr() for tensor in (x, *parts, y, work)]
    name = "int4_blocks" if group else "int8_blocks"
    getattr(library, f"minilora_{name}")(*pointers, M, J, L, across, *group)
    return y


@functools.cache
def has_blocks() -> bool:
    """Return whether products of bytes can run here: a compiler, and a processor with AVX2."""
    library = native()
    return library is not None and bool(library.minilora_has_blocks())


def _require_blocks(across: bool | None) -> None:
    if across is not None and not has_blocks():
        raise RuntimeError(
            "products of bytes need a processor with AVX2 and a C compiler, and one is missing "
            "here; install a compiler (or set CC), or dequantize"
        )


def check(op: str, **operands: tuple[Tensor, torch.dtype, tuple[int, ...]]) -> None:
    """Raise unless the operands fit: C reads what it is told, wherever that is."""
    for name, (tensor, dtype, shape) in operands.items():
        if tensor.dtype != dtype or tensor.shape != shape:
            kind = TypeError if tensor.dtype != dtype else ValueError
            raise kind(
                f"{op} takes {name} in {dtype} {list(shape)}, found {tensor.dtype} "
                f"{list(tensor.shape)}; pass operands of one layer"
            )


def _check_groups(op: str, K: int, group: int) -> None:
    if group < 1 or K % group:  # C would read steps that are not there
        raise ValueError(
            f"{op} takes groups that divide the {K} inputs, found groups of {group}; pass theirs"
        )


def _int8(op: str, x: Tensor, codes: Tensor, scales: Tensor, across: bool | None = None) -> Tensor:
    """Check INT8's operands, for blocks with `across`; return an empty y."""
    _require_blocks(across)
    N, K = codes.shape[0], codes.shape[-1]
    J, L = (N, K) if across else (K, N)
    M, f32 = x.shape[0], torch.float32
    check(op, codes=(codes, torch.int8, (N, K)), x=(x, f32, (M, J)), scales=(scales, f32, (N,)))
    return x.new_empty(M, L)


def _int4(
    op: str, x: Tensor, packed: Tensor, steps: Tensor, scales: Tensor, group: int,
    across: bool | None = None,
) -> Tensor:  # fmt: skip
    """Check INT4's operands, for blocks with `across`; return an empty y."""
    _require_blocks(across)
    N, K = packed.shape[0], 2 * packed.shape[-1]
    J, L = (N, K) if across else (K, N)
    M, f32 = x.shape[0], torch.float32
    check(op, x=(x, f32, (M, J)))
    _check_groups(op, K, group)
    check(
        op,
        codes=(packed, torch.uint8, (N, K // 2)),
        steps=(steps, torch.uint8, (N, K // group)),
        scales=(scales, f32, (N,)),
    )
    return x.new_empty(M, L)


def _in_torch(x: Tensor, scales: Tensor, decode: Callable[[slice], Tensor]) -> Tensor:
    """Multiply row by row, so that none depends on the others; W decoded in panels."""
    y = x.new_empty(len(x), len(scales))
    step = max(1, _PANEL // max(1, x.shape[1]))
    for start in range(0, len(scales), step):
        panel = decode(slice(start, start + step))
        for m, row in enumerate(x):
            y[m, start : start + step] = panel.mv(row)
    return y.mul_(scales)


_ops = torch.library.Library("minilora", "FRAGMENT")


def operator(shape: Callable[..., Any], writes: Sequence[str] = ()) -> Callable[[Any], Any]:
    """Make a function torch.ops.minilora's, opaque to compilers, which are told what it returns."""

    def register(function: Any) -> Any:
        name = function.__name__
        # Not twice: transformers, run in the repository's root, imports this folder as `kernels`.
        if not hasattr(torch.ops.minilora, name):
            _ops.define(name + torch.library.infer_schema(function, mutates_args=writes))
            _ops.impl(name, function, "CPU")
            torch.library.register_fake(f"minilora::{name}", shape, lib=_ops)
        return getattr(torch.ops.minilora, name)

    return register


@operator(functools.partial(_int8, "int8_rows"))
def int8_rows(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Return `x · diag(scales) codesᵀ`, for few rows; not differentiable, works under compile.

    Args:
        x: f32 `[M, K]`.
        codes: int8 `[N, K]`.
        scales: f32 `[N]`.

    Returns:
        f32 `[M, N]`; each row depends on that row of x alone.

    Raises:
        TypeError: another dtype.
        ValueError: another shape.
    """
    _int8("int8_rows", x, codes, scales)
    library = native()
    if library is None:
        return _in_torch(x, scales, lambda rows: codes[rows].to(torch.float32))
    return run(library.minilora_int8_rows, x, codes, scales)


@operator(functools.partial(_int4, "int4_rows"))
def int4_rows(x: Tensor, packed: Tensor, steps: Tensor, scales: Tensor, group: int) -> Tensor:
    """Return `x Wᵀ` for INT4 storage, otherwise like `int8_rows`.

    Args:
        x: f32 `[M, K]`.
        packed: uint8 `[N, K/2]`, column j low, column j + K/2 high, each q + 8.
        steps: uint8 `[N, K/group]`.
        scales: f32 `[N]`.
        group: weights of a row that share a step.
    """
    _int4("int4_rows", x, packed, steps, scales, group)
    library = native()
    if library is not None:
        return run(library.minilora_int4_rows, x, packed, steps, scales, group=group)

    def decode(rows: slice) -> Tensor:
        q = torch.cat([packed[rows] & 15, packed[rows] >> 4], dim=1).to(torch.float32) - 8
        return q.mul_(steps[rows].repeat_interleave(group, dim=1))

    return _in_torch(x, scales, decode)


@operator(functools.partial(_int8, "int8_blocks"))
def int8_blocks(x: Tensor, codes: Tensor, scales: Tensor, across: bool) -> Tensor:
    """Return `x Wᵀ`, or `x W` with `across`, W = diag(scales) codes, where `has_blocks`.

    Rows of x (of `x · scales` with `across`) are rounded to 7 bits in blocks of 64 columns, each
    with a scale of its own: off by at most half a step, which is the block's largest magnitude
    (or 1e-35) over 63 – more where codes are so large that 16-bit sums would not hold, see
    `blocks.c`. Not differentiable; works under compile.

    Args:
        x: f32 `[M, K]`, with `across` `[M, N]`.
        codes: int8 `[N, K]` in −127..127.
        scales: f32 `[N]`.
        across: which way.

    Returns:
        f32 `[M, N]`, with `across` `[M, K]`; each row depends on that row of x alone, and is NaN
        where it was not finite.

    Raises:
        RuntimeError: not `has_blocks`.
        TypeError: another dtype.
        ValueError: another shape.
    """
    y = _int8("int8_blocks", x, codes, scales, across)
    return run_blocks(native(), x, (codes, scales), y, across)


@operator(functools.partial(_int4, "int4_blocks"))
def int4_blocks(
    x: Tensor, packed: Tensor, steps: Tensor, scales: Tensor, group: int, across: bool
) -> Tensor:
    """Return the same for INT4 storage, its operands as for `int4_rows`."""
    y = _int4("int4_blocks", x, packed, steps, scales, group, across)
    return run_blocks(native(), x, (packed, steps, scales), y, across, group)


def can_decode(out: Tensor) -> bool:
    """Return whether `nf4_weights` and `int4_weights` can write `out` here."""
    return out.device.type == "cpu" and native() is not None


def _decode(op: str, out: Tensor, parts: Sequence[Tensor], *sizes: int) -> None:
    if not out.is_contiguous():
        raise ValueError(f"{op} takes out without gaps, found strides {list(out.stride())}")
    library: Any = native()
    parts = [part.contiguous() for part in parts]
    getattr(library, f"minilora_{op}")(*(t.data_ptr() for t in (*parts, out)), *sizes)


@operator(lambda *_: None, writes=("out",))
def nf4_weights(packed: Tensor, absmax: Tensor, pairs: Tensor, block: int, out: Tensor) -> None:
    """Decode NF4 into `out`, where `can_decode`.

    Args:
        packed: uint8 `[⌈n/2⌉]`.
        absmax: f32 `[⌈n/block⌉]`.
        pairs: f32 `[256, 2]`, the two weights of each byte.
        block: even.
        out: f32 `[n]`, dense; written.

    Raises:
        TypeError: operands of another dtype.
        ValueError: operands of another size or layout.
    """
    n, f32 = out.numel(), torch.float32
    if block < 2 or block % 2:
        raise ValueError(f"nf4_weights takes even blocks, found blocks of {block}; pass theirs")
    check(
        "nf4_weights",
        codes=(packed, torch.uint8, (-(-n // 2),)),
        scales=(absmax, f32, (-(-n // block),)),
        pairs=(pairs, f32, (256, 2)),
        out=(out, f32, (n,)),
    )
    _decode("nf4_weights", out, (packed, absmax, pairs), n, block)


@operator(lambda *_: None, writes=("out",))
def int4_weights(packed: Tensor, steps: Tensor, group: int, out: Tensor) -> None:
    """Decode INT4 into `out` but for the channels' scales, where `can_decode`.

    Args:
        packed: uint8 `[N, K/2]`, as for `int4_rows`.
        steps: uint8 `[N, K/group]`.
        group: weights of a row that share a step.
        out: f32 `[N, K]`, dense; written.

    Raises:
        TypeError: operands of another dtype.
        ValueError: operands of another shape or layout.
    """
    N, K = packed.shape[0], 2 * packed.shape[-1]
    _check_groups("int4_weights", K, group)
    check(
        "int4_weights",
        codes=(packed, torch.uint8, (N, K // 2)),
        steps=(steps, torch.uint8, (N, K // group)),
        out=(out, torch.float32, (N, K)),
    )
    _decode("int4_weights", out, (packed, steps), N, K, group)
