"""What the kernels share: one product, one dropout mask, one order of tiles.

The mask is a hash of (seed, row, column), so it is never stored: the forward, grad_X and grad_A
each make the same one again. `hashed_mask` of kernels/dropout.py says what it
means.
"""

import triton
import triton.language as tl

_COLUMN = tl.constexpr(0x9E3779B9)  # 2³² / golden ratio: neighbouring columns land far apart
_FIRST = tl.constexpr(0x85EBCA6B)  # the two multipliers of MurmurHash3's 32-bit finalizer
_SECOND = tl.constexpr(0xC2B2AE35)


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr):
    """Return `acc + a b` in f32. PRECISION "tf32" and "ieee" concern f32 operands alone.

    "widened" casts the operands to f32 first: Triton's interpreter multiplies the bit patterns of
    bfloat16 as if they were integers. Exact f32 has no tensor cores: an FMA for each k, in order.
    Begun at acc, every one of them would round at acc's magnitude, and the error grow with K.
    """
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    if a.dtype == tl.float32 and PRECISION == "ieee":
        # Not `acc + tl.dot(a, b)`: Triton turns that into a product that begins at acc.
        return tl.fma(tl.dot(a, b, input_precision=PRECISION), 1.0, acc)
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
def row_keys(seed_ptr, rows, M, span):
    """Return two keys for each of rows `[m, 1]`, of which every `span` share a seed.

    The second keeps rows whose first keys lie close from being shifted copies.
    """
    row = rows.to(tl.int32)  # a division of int64 is a function of its own on a GPU
    seed = tl.load(seed_ptr + row // span, mask=row < M, other=0)
    key = _finalize((row % span).to(tl.uint32) ^ seed.to(tl.uint32))
    return key, _finalize(key + (seed >> 32).to(tl.uint32))


@triton.jit
def is_kept(key, other, columns, threshold):
    """Return which elements dropout keeps: `hash >= threshold`, threshold = p · 2³¹.

    key and other `[m, 1]` from `row_keys`, columns `[1, n]`: ten integer operations an element.
    """
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
