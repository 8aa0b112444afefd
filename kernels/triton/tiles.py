"""Which tile a kernel uses: pure functions of shape, dtype and architecture, nothing timed here.

A traced M may be symbolic: it is only compared, so that a graph serves a range of batches.
Every tile that can be returned is compiled ahead of time for sm_80 and sm_90 by benchmarks/aot.py
(no local memory, at most 255 registers, shared memory under the limit below) for widths that 16
divides and groups of 64; at odd widths 128 × 256 × 64 spills. Registers and instruction counts are
in benchmarks/results/aot.csv, what was rejected in benchmarks/NOTES.md. In exact f32 a tile reduces
at most 32 at a time: it adds them in order (see `multiply`), so more would be less exact.
"""

import functools
from typing import NamedTuple

import torch

# Bytes of shared memory one program may use (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability": 163, 99, 227 and 99 KiB).
SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448, 120: 101_376}
_FILLED = 256  # programs that fill a GPU: about two for each of 108 to 132 multiprocessors


class Tile(NamedTuple):
    """A kernel's block sizes and launch options; sizes a kernel lacks are 0."""

    m: int
    n: int
    k: int
    r: int
    warps: int = 4
    stages: int = 3
    group_m: int = 8


@functools.cache
def nearest(arch: int) -> int:
    """Return the known architecture whose tiles `arch` takes, e.g. 86 → 89, 100 → 90."""
    return min(SHARED_MEMORY, key=lambda known: (abs(known - arch), known))


def padded(r: int) -> int:
    """Return the power of two that holds a rank, at least 16 (what `tl.dot` multiplies)."""
    return max(16, 1 << (r - 1).bit_length())


def rows_for(M: int, most: int) -> int:
    """Return the most rows a program can own, 16 to `most`, with the GPU still filled."""
    rows = most
    while rows > 16 and -(-M // rows) < _FILLED // 2:
        rows //= 2
    return rows


def _fills(M: int, N: int) -> bool:
    """Return whether tiles of 128 × 256 fill a GPU."""
    return -(-M // 128) * -(-N // 256) >= _FILLED // 2


def gemm_tile(M: int, N: int, R: int, dtype: torch.dtype, arch: int, precision: str) -> Tile:
    """Choose for `low_rank_gemm`: Y `[M, N]`, rank R."""
    known, r = nearest(arch), min(padded(R), 32)
    if dtype == torch.float32:
        wide = precision == "tf32" and M > 64
        return Tile(128, 128, 32, 16, 8, 3) if wide and known in (80, 90) else Tile(64, 64, 16, 16)
    if M <= 64:
        return Tile(64, 64, 64, r, 4, 4)
    if -(-M // 128) * -(-N // 128) < _FILLED // 2:
        return Tile(64, 128, 64, r, 4, 3)
    if known != 90:
        return Tile(128, 128, 32, r, 8, 4)
    return Tile(128, 256 if _fills(M, N) else 128, 64, r, 8, 3)


def shrink_tile(M: int, R: int, dtype: torch.dtype, arch: int, precision: str) -> Tile:
    """Choose for `shrink`: M rows, the whole rank."""
    r = padded(R)
    if dtype == torch.float32 and precision != "tf32":
        return Tile(rows_for(M, 32), 0, 16, r, 8 if r > 32 else 4, 3 if r > 128 else 5)
    if dtype == torch.float32:
        k = 64 if r <= 32 else 32
        return Tile(rows_for(M, 32), 0, k, r, 8 if 32 < r <= 128 else 4, 2 if r > 128 else 3)
    warps, stages = 8 if r > 64 else 4, 2 if r > 128 else 3
    return Tile(rows_for(M, 64), 0, 128 if r <= 32 else 64, r, warps, stages)


def expand_tile(R: int, dtype: torch.dtype, arch: int) -> Tile | None:
    """Choose for `expand_grad`, or None where two passes over grad_out are better.

    A program writes R f32 for each column of grad_out, read once more by the sum: 8·R / m bytes an
    element of grad_out, against 2 for reading it a second time. So r ≤ m / 4. In tf32, sm_80 can't
    feed both products from one asynchronous copy. In exact f32 the m rows are one sum in order, and
    of 32 rows the partial sums are no fewer bytes than a second reading.
    """
    r = padded(R)
    return None if r > 32 or dtype == torch.float32 else Tile(128, 64, 0, r, 8, 3)


def tall_tile(R: int, dtype: torch.dtype, arch: int) -> Tile:
    """Choose for `tall_product`; a rank over `r` takes several programs."""
    r = padded(R)
    if dtype == torch.float32:
        return Tile(32, 0, 64, min(r, 32), 8, 3)
    return Tile(64, 0, 128, min(r, 64), 4 if r == 16 else 8, 3)


def splits_for(programs: int, steps: int, most: int = 8) -> int:
    """Return how many pieces to cut `steps` loop steps into, so that a small grid fills the GPU."""
    wanted = max(1, _FILLED // 2 // max(1, programs))
    return max(1, min(wanted, most, steps))


def quantize_tile(R: int, dtype: torch.dtype, arch: int, precision: str) -> Tile:
    """Choose for `quantize_shrink`: few rows, so that they are still cached the second time."""
    r = padded(R)
    stages = 3 if r <= 64 else 2
    if dtype == torch.float32 and precision != "tf32":
        return Tile(16, 0, 32, r, 8 if r > 32 else 4, stages)
    k = 256 if r <= 32 else 128 if r <= 64 else 64
    k = k // 2 if dtype == torch.float32 else k
    return Tile(16, 0, k, r, 8 if r > 128 else 4, stages)


def int8_tile(M: int, N: int, R: int, dtype: torch.dtype, arch: int, masked: bool) -> Tile:
    """Choose for `int8_gemm`: Y `[M, N]` of this dtype, rank R, the branch masked or not."""
    known, r = nearest(arch), min(padded(R), 32) if dtype != torch.float32 else 16
    if M <= 64 or dtype == torch.float32:
        return Tile(64, 64, 128, r, 4, 4)
    if -(-M // 128) * -(-N // 128) < _FILLED // 2:
        return Tile(64, 128, 128, r, 4, 3)
    if known != 90:  # a long branch leaves no register for a second 16 of its rank
        return Tile(128, 128, 64, 16 if R > 64 else r, 8, 4)
    return Tile(128, 256 if _fills(M, N) and not masked else 128, 128, r, 8, 3)


def nf4_tile(block: int) -> Tile:
    """Choose for `decode_nf4`: 16384 weights, 128 a thread, as n blocks of this size."""
    return Tile(0, 16384 // block, 0, 0, 4, 1)


def int4_tile(half: int, turned: bool) -> Tile:
    """Choose for `decode_int4`: 8192 bytes, as k of a row of `half` bytes and n rows.

    A thread's bytes lie in one row, so that its addresses differ by constants (5.9 instructions a
    weight on sm_80 against 6.6 for 16 rows); where the result is turned they have to span rows.
    """
    k = 128 if turned else min(2048, max(128, 1 << (half - 1).bit_length()))
    return Tile(0, 8192 // k, k, 0, 4, 1)


def exponents_tile(capped: bool) -> Tile:
    """Choose for `exponents`: n logits of a row at a time.

    A cap's arithmetic takes 79 registers a thread with 8 warps, and 39 with 16.
    """
    return Tile(0, 4096, 0, 0, 16 if capped else 8, 1)


def drop_tile(N: int) -> Tile:
    """Choose for `drop`: 16 elements a thread, of one row where that fills all threads."""
    n = 2048 if N % 2048 == 0 else 512
    return Tile(2048 // n, n, 0, 0, 4, 1)


CODES_TILE = Tile(0, 64, 128, 0, 4, 1)  # of `decode_int8`: n × k codes
# From how many rows on it pays to turn int8 codes over for the input gradient: `int8_gemm` loads
# codes along the reduced width only when they lie so, else in narrower copies with permutations.
TURNED_ROWS = 256
