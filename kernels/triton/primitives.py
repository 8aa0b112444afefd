"""What the kernels share: one product, one dropout mask, one order of tiles.

The mask is a hash of (seed, row, column), so it is never stored: the forward, grad_X and grad_A
each make the same one again. `reference_mask` is its meaning in torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMN = tl.constexpr(0x9E3779B9)  # 2³² / golden ratio: neighbouring columns land far apart
_FIRST = tl.constexpr(0x85EBCA6B)  # the two multipliers of MurmurHash3's 32-bit finalizer
_SECOND = tl.constexpr(0xC2B2AE35)


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr):
    """Return `acc + a b` in f32. PRECISION "tf32" and "ieee" concern f32 operands alone.

    "widened" casts the operands to f32 first: Triton's interpreter multiplies the bit patterns of
    bfloat16 as if they were integers.
    """
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def round_to_int8(value):
    """Return f32 values in −128..127 as int8, rounded half to even.

    Adding 1.5 · 2²³ leaves no fraction bits, and the integer in the lowest byte.
    """
    return (value + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _finalize(h):
    h = (h ^ (h >> 16)) * _FIRST
    h = (h ^ (h >> 13)) * _SECOND
    return h ^ (h >> 16)


@triton.jit
def is_kept(seed, rows, columns, threshold):
    """Tell which elements dropout keeps: `hash >= threshold`, threshold = p · 2³¹.

    rows `[m, 1]`, columns `[1, n]`. A row gives two keys and an element costs ten integer
    operations; the second key keeps rows whose first keys lie close from being shifted copies.
    """
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    key = _finalize(rows.to(tl.uint32) ^ low)
    other = _finalize(key + high)
    h = (columns.to(tl.uint32) * _COLUMN) ^ key
    h = (h ^ (h >> 16)) * _FIRST
    h = h ^ other
    h = (h ^ (h >> 13)) * _SECOND
    h = h ^ (h >> 16)
    return (h >> 1).to(tl.int32) >= threshold


@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Order tiles in bands of GROUP_M rows, so that neighbours share columns of W in the cache."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    band = pid // (GROUP_M * tiles_n)
    rows = min(tiles_m - band * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return (band * GROUP_M + within % rows).to(tl.int64), (within // rows).to(tl.int64)


def threshold_of(p: float) -> int:
    """Return the integer that `is_kept` compares with."""
    return min(round(p * 2**31), 2**31 - 1)


def reference_mask(seed: Tensor, M: int, N: int, p: float) -> Tensor:
    """Return the bool mask `[M, N]` that the kernels apply: True = keep.

    Args:
        seed: int64 `[1]`.
        M: rows.
        N: columns.
        p: the probability to drop.
    """
    word = 0xFFFFFFFF

    def finalize(h: Tensor) -> Tensor:
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) & word
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) & word
        return h ^ (h >> 16)

    rows = torch.arange(M, device=seed.device)[:, None]
    columns = torch.arange(N, device=seed.device)[None, :]
    key = finalize(rows ^ (seed & word))
    other = finalize((key + ((seed >> 32) & word)) & word)
    h = ((columns * 0x9E3779B9) & word) ^ key
    h = (((h ^ (h >> 16)) * 0x85EBCA6B) & word) ^ other
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & word
    return (h ^ (h >> 16)) >> 1 >= threshold_of(p)
