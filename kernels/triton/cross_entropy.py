"""The passes of `linear_cross_entropy` over the logits, as one kernel.

    z = y, or c · tanh(y / c) with a cap c     m = max_v z_v     s = Σ_v exp(z_v − m)
    loss = log s − (z_label − m)               y ← (exp(z − m) − s·onehot(label)) · dz/dy

Y `[M, V]` logits, overwritten; M programs, one a row. V is walked twice: first every lane keeps its
largest z and a sum relative to it, at one exponential an element; then the row is read again from
its end, which the L2 cache holds longest, and written. So 3·M·V elements are moved, fewer of them
from memory. In float16, whose range the products that follow would leave, the row is divided by s
and 1 is written as its sum. Everything is computed in f32, so the label's entry, p − 1, does not
cancel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .tiles import Tile, exponents_tile

_LEAST = tl.constexpr(-3.4028234663852886e38)  # of f32; −∞ − (−∞) would be NaN in masked lanes


@triton.jit
def tanh(x):
    """Return tanh of f32 x, within 8 eps of itself.

    Triton has none that its interpreter runs too (libdevice's is an empty stub there). With
    u = exp(−2|x|) it is (1 − u) / (1 + u), where 1 − u cancels for small x: there its series.
    """
    size = tl.abs(x)
    u = tl.exp(-2.0 * size)
    q = x * x
    series = 1.0 - q * (1 / 3 - q * (2 / 15 - q * (17 / 315 - q * (62 / 2835))))
    t = tl.where(size < 0.25, size * series, (1.0 - u) / (1.0 + u))
    return tl.where(x < 0.0, -t, t)


@triton.jit
def exponents(
    y_ptr, labels_ptr, sums_ptr, losses_ptr,
    V, cap, inverse,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Overwrite a row of Y `[M, V]`; write its sum and loss. All tensors are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    y_ptr += row * V
    label = tl.load(labels_ptr + row).to(tl.int32)
    picked = tl.load(y_ptr + label).to(tl.float32)
    if cap is not None:
        picked = cap * tanh(picked * inverse)
    offs = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), _LEAST, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        mask = start + offs < V
        z = tl.load(y_ptr + start + offs, mask=mask, other=float("-inf")).to(tl.float32)
        if cap is not None:
            z = tl.where(mask, cap * tanh(z * inverse), float("-inf"))
        above = z - largest
        e = tl.exp(-tl.abs(above))  # of the smaller one: the larger one's is 1
        sums = tl.where(above > 0.0, sums * e + 1.0, sums + e)
        largest = tl.maximum(largest, z)
    m = tl.max(largest, 0)
    s = tl.sum(sums * tl.exp(largest - m), 0)
    tl.store(losses_ptr + row, tl.log(s) - (picked - m))
    divided: tl.constexpr = y_ptr.dtype.element_ty == tl.float16
    tl.store(sums_ptr + row, 1.0 if divided else s)

    blocks = tl.cdiv(V, BLOCK)
    for i in range(0, blocks):
        columns = (blocks - 1 - i) * BLOCK + offs
        mask = columns < V
        y = tl.load(y_ptr + columns, mask=mask, other=float("-inf")).to(tl.float32)
        z = y
        if cap is not None:
            t = tanh(y * inverse)
            z = cap * t
        e = tl.exp(z - m)
        e = tl.where(columns == label, e - s, e)
        if cap is not None:
            e *= 1.0 - t * t
        if divided:
            e = e * (1.0 / s)
        tl.store(y_ptr + columns, e.to(y_ptr.dtype.element_ty), mask=mask)


def launch_exponents(
    logits: Tensor, labels: Tensor, cap: float | None, sums: Tensor, losses: Tensor,
    tile: Tile,
) -> Launch:  # fmt: skip
    """Turn `logits [M, V]` into `e − s·onehot`, fill f32 sums and losses `[M, 1]`.

    labels: int64 `[M]` in `[0, V)`. All are contiguous.
    """
    M, V = logits.shape
    factors = (None, None) if cap is None else (float(cap), 1.0 / cap)
    args = (logits, labels, sums, losses, V, *factors)
    return Launch(exponents, (M,), args, {"BLOCK": tile.n}, tile)


def exponents_by_rows(logits: Tensor, labels: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """Turn logits `[M, V]` in place into `e − s·onehot`; return s and the losses, f32 `[M, 1]`."""
    sums = logits.new_empty((len(logits), 1), dtype=torch.float32)
    losses = torch.empty_like(sums)
    tile = exponents_tile(cap is not None)
    launch_exponents(logits, labels.contiguous(), cap, sums, losses, tile).run()
    return sums, losses
