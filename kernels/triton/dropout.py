"""Dropout in one pass: its mask is hashed while x is on the chip, and kept nowhere.

    out = x ∘ D                               `drop`          D: the dropout mask

M rows, N columns; x and out `[M, N]`, contiguous. An element of e bytes moves 2·e. With a stored
mask it would be 1 + (2·e + 1), and 2·e + 1 for each further product with the mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout import threshold_of
from .launch import Launch, cdiv, span_of
from .primitives import is_kept, row_keys
from .tiles import Tile, drop_tile


@triton.jit
def drop(
    x_ptr, seed_ptr, out_ptr,
    M, N, threshold, span,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write a BLOCK_M × BLOCK_N tile of out."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (offs_m < M) & (offs_n < N)
    x = tl.load(x_ptr + offs_m * N + offs_n, mask=mask, other=0.0)
    key, other = row_keys(seed_ptr, offs_m, M, span)
    keep = is_kept(key, other, offs_n, threshold)
    tl.store(out_ptr + offs_m * N + offs_n, tl.where(keep, x, 0.0).to(x.dtype), mask=mask)


def launch_drop(x: Tensor, seeds: Tensor, p: float, out: Tensor, tile: Tile) -> Launch:
    """Fill `out [..., N]` with `x ∘ D`; seeds int64 `[S]`, one for each M / S rows."""
    N = x.shape[-1]
    M = x.numel() // max(1, N)
    args = (x, seeds, out, M, N, threshold_of(p), span_of(seeds, M))
    constants = {"BLOCK_M": tile.m, "BLOCK_N": tile.n}
    return Launch(drop, (cdiv(M, tile.m), cdiv(N, tile.n)), args, constants, tile)


def hashed_drop(x: Tensor, seeds: Tensor, p: float) -> Tensor:
    """Return `x ∘ D` for x `[..., N]`, whose leading dimensions count rows of D."""
    x = x.contiguous()
    out = torch.empty_like(x)
    launch_drop(x, seeds, p, out, drop_tile(x.shape[-1])).run()
    return out
