"""Products of few rows, 4-bit weights for many, and products of bytes, in C on a CPU.

Where nothing can be compiled (`library.py`) torch computes the same; the products of bytes alone
have no other form and say whether they are there (`has_blocks`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..workspace import lent
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
    work = lent(library.minilora_blocks_bytes(M, J, L, bool(group)), torch.uint8, x.device)
    pointers = [tensor.data_ptr() for tensor in (x, *parts, y, work)]
    name = "int4_blocks" if group else "int8_blocks"
    getattr(library, f"minilora_{name}")(*pointers, M, J, L, across, *group)
    return y


@functools.cache
def has_blocks() -> bool:
    """Return whether products of bytes can run here: a compiler, and a processor with AVX2."""
    library = native()
    return library is not None and bool(library.minilora_has_blocks())


def _require_blocks() -> None:
    if not has_blocks():
        raise RuntimeError(
            "products of bytes need a processor with AVX2 and a C compiler, and one is missing "
            "here; install a compiler (or set CC), or dequantize"
        )


def _check(op: str, **operands: tuple[Tensor, torch.dtype, tuple[int, ...]]) -> None:
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


def _int8(op: str, x: Tensor, codes: Tensor, scales: Tensor, across: bool = False) -> Tensor:
    """Check INT8's operands; return an empty y."""
    N, K = codes.shape[0], codes.shape[-1]
    J, L = (N, K) if across else (K, N)
    M, f32 = x.shape[0], torch.float32
    _check(op, codes=(codes, torch.int8, (N, K)), x=(x, f32, (M, J)), scales=(scales, f32, (N,)))
    return x.new_empty(M, L)


def _int4(
    op: str, x: Tensor, packed: Tensor, steps: Tensor, scales: Tensor, group: int,
    across: bool = False,
) -> Tensor:  # fmt: skip
    """Check INT4's operands; return an empty y."""
    N, K = packed.shape[0], 2 * packed.shape[-1]
    J, L = (N, K) if across else (K, N)
    M, f32 = x.shape[0], torch.float32
    _check(op, x=(x, f32, (M, J)))
    _check_groups(op, K, group)
    _check(
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


def _int8_rows(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    _int8("int8_rows", x, codes, scales)
    library = native()
    if library is None:
        return _in_torch(x, scales, lambda rows: codes[rows].to(torch.float32))
    return run(library.minilora_int8_rows, x, codes, scales)


def _int4_rows(x: Tensor, packed: Tensor, steps: Tensor, scales: Tensor, group: int) -> Tensor:
    _int4("int4_rows", x, packed, steps, scales, group)
    library = native()
    if library is not None:
        return run(library.minilora_int4_rows, x, packed, steps, scales, group=group)

    def decode(rows: slice) -> Tensor:
        q = torch.cat([packed[rows] & 15, packed[rows] >> 4], dim=1).to(torch.float32) - 8
        return q.mul_(steps[rows].repeat_interleave(group, dim=1))

    return _in_torch(x, scales, decode)


def _int8_blocks_shape(x: Tensor, codes: Tensor, scales: Tensor, across: bool) -> Tensor:
    _require_blocks()
    return _int8("int8_blocks", x, codes, scales, across)


def _int8_blocks(x: Tensor, codes: Tensor, scales: Tensor, across: bool) -> Tensor:
    y = _int8_blocks_shape(x, codes, scales, across)
    return run_blocks(native(), x, (codes, scales), y, across)


def _int4_blocks_shape(
    x: Tensor, packed: Tensor, steps: Tensor, scales: Tensor, group: int, across: bool
) -> Tensor:
    _require_blocks()
    return _int4("int4_blocks", x, packed, steps, scales, group, across)


def _int4_blocks(
    x: Tensor, packed: Tensor, steps: Tensor, scales: Tensor, group: int, across: bool
) -> Tensor:
    y = _int4_blocks_shape(x, packed, steps, scales, group, across)
    return run_blocks(native(), x, (packed, steps, scales), y, across, group)


def _decode(op: str, out: Tensor, parts: Sequence[Tensor], *sizes: int) -> None:
    if not out.is_contiguous():
        raise ValueError(f"{op} takes out without gaps, found strides {list(out.stride())}")
    library: Any = native()
    parts = [part.contiguous() for part in parts]
    getattr(library, f"minilora_{op}")(*(t.data_ptr() for t in (*parts, out)), *sizes)


def _nf4_weights(packed: Tensor, absmax: Tensor, pairs: Tensor, block: int, out: Tensor) -> None:
    n, f32 = out.numel(), torch.float32
    if block < 2 or block % 2:
        raise ValueError(f"nf4_weights takes even blocks, found blocks of {block}; pass theirs")
    _check(
        "nf4_weights",
        codes=(packed, torch.uint8, (-(-n // 2),)),
        scales=(absmax, f32, (-(-n // block),)),
        pairs=(pairs, f32, (256, 2)),
        out=(out, f32, (n,)),
    )
    _decode("nf4_weights", out, (packed, absmax, pairs), n, block)


def _int4_weights(packed: Tensor, steps: Tensor, group: int, out: Tensor) -> None:
    N, K = packed.shape[0], 2 * packed.shape[-1]
    _check_groups("int4_weights", K, group)
    _check(
        "int4_weights",
        codes=(packed, torch.uint8, (N, K // 2)),
        steps=(steps, torch.uint8, (N, K // group)),
        out=(out, torch.float32, (N, K)),
    )
    _decode("int4_weights", out, (packed, steps), N, K, group)


_ops = torch.library.Library("minilora", "FRAGMENT")
# Not a second time: transformers, run in the repository's root, imports this folder as `kernels`.
if not hasattr(torch.ops.minilora, "int8_rows"):
    made: tuple[tuple[str, Any, Any], ...] = (
        ("int8_rows(Tensor x, Tensor codes, Tensor scales) -> Tensor", _int8_rows,
         functools.partial(_int8, "int8_rows")),
        ("int4_rows(Tensor x, Tensor packed, Tensor steps, Tensor scales, int group) -> Tensor",
         _int4_rows, functools.partial(_int4, "int4_rows")),
        ("nf4_weights(Tensor packed, Tensor absmax, Tensor pairs, int block, Tensor(a!) out) -> ()",
         _nf4_weights, lambda *_: None),
        ("int4_weights(Tensor packed, Tensor steps, int group, Tensor(a!) out) -> ()",
         _int4_weights, lambda *_: None),
        ("int8_blocks(Tensor x, Tensor codes, Tensor scales, bool across) -> Tensor",
         _int8_blocks, _int8_blocks_shape),
        ("int4_blocks(Tensor x, Tensor packed, Tensor steps, Tensor scales, int group, bool across)"
         " -> Tensor", _int4_blocks, _int4_blocks_shape),
    )  # fmt: skip
    for schema, function, shape in made:
        name = schema.partition("(")[0]
        _ops.define(schema)
        _ops.impl(name, function, "CPU")
        torch.library.register_fake(f"minilora::{name}", shape, lib=_ops)


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
    return torch.ops.minilora.int8_blocks(x, codes, scales, across)


def int4_blocks(
    x: Tensor, packed: Tensor, steps: Tensor, scales: Tensor, group: int, across: bool
) -> Tensor:
    """Return the same for INT4 storage, its operands as for `int4_rows`."""
    return torch.ops.minilora.int4_blocks(x, packed, steps, scales, group, across)


def can_decode(out: Tensor) -> bool:
    """Return whether `nf4_weights` and `int4_weights` can write `out` here."""
    return out.device.type == "cpu" and native() is not None


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
    torch.ops.minilora.nf4_weights(packed, absmax, pairs, block, out)


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
    torch.ops.minilora.int4_weights(packed, steps, group, out)
