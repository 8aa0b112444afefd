"""Stored weights to whole matrices in a reused workspace: NF4, INT4, INT8, and codes turned over.

    w_i = table[q_i] · absmax[i // block]           `decode_nf4`    absmax: f32, or 8-bit codes
    absmax = offset + code[a] · absmax2[i // block // 256]          (double quantization, folded in)
    w_nk = q_nk · s_{n, k // group} · channel_n     `decode_int4`   without channel: int8 codes
    w_nk = codes_nk · scale_n                       `decode_int8`   without scale: codes, turned

N out, K in; layouts as in kernels/nf4.py and int4.py: NF4 is one line of N·K weights, two a
byte, the earlier one in the high nibble; INT4's byte j of a row holds columns j (low nibble) and
j + K/2.

| kernel            | program → tile                                | bytes moved, a weight |
|-------------------|-----------------------------------------------|-----------------------|
| `decode_nf4`      | SCALES blocks of weights                      | 0.5 + 1/block, 2      |
| `decode_int4`     | BLOCK_N rows × RUNS runs of 16 bytes, both halves | 0.5 + 1/group, 2 (1) |
| `decode_int8`     | BLOCK_N × BLOCK_K                             | 1, 2 (1)              |

A thread loads 16 bytes = 32 weights at once. Weights are f32 products, rounded once to out's dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv
from .primitives import round_to_int8
from .tiles import Tile

RUN = 16  # bytes a thread loads at once; two runs of 16 columns of an INT4 row share their step


@triton.jit
def nf4_scale(absmax_ptr, absmax2_ptr, offset_ptr, code_ptr, block, mask):
    """Return the f32 scales of these blocks; absmax is f32, or codes that are looked up."""
    scale = tl.load(absmax_ptr + block, mask=mask, other=0)
    if absmax2_ptr is not None:
        second = tl.load(absmax2_ptr + block // 256, mask=mask, other=0.0)
        scale = tl.load(code_ptr + scale.to(tl.int32)) * second + tl.load(offset_ptr)
    return scale


@triton.jit
def look_up(table, index):
    """Return `table[index]` for a table `[16]` and int32 indices of any shape."""
    size: tl.constexpr = index.numel
    return tl.gather(table, index.reshape(size), 0).reshape(index.shape)


@triton.jit
def nf4_codes(word):
    """Return the 8 codes of each int32 of 4 bytes, in the order of their weights, as a last axis.

    Byte b of a word holds weight 2b in its high nibble and 2b + 1 in its low one; `tl.join` makes
    the first of nested joins the slowest axis.
    """
    high = tl.join(tl.join(word >> 4, word >> 20), tl.join(word >> 12, word >> 28))
    low = tl.join(tl.join(word, word >> 16), tl.join(word >> 8, word >> 24))
    return tl.join(high, low) & 15


@triton.jit
def decode_nf4(
    words_ptr, absmax_ptr, absmax2_ptr, offset_ptr, code_ptr, table_ptr, out_ptr,
    length, words,
    BLOCK: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Write SCALES · BLOCK weights of out `[length]`."""
    block = tl.program_id(0).to(tl.int64) * SCALES + tl.arange(0, SCALES)
    scale = nf4_scale(absmax_ptr, absmax2_ptr, offset_ptr, code_ptr, block, block * BLOCK < length)
    table = tl.load(table_ptr + tl.arange(0, 16))
    at = block[:, None] * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]
    codes = nf4_codes(tl.load(words_ptr + at, mask=at < words, other=0))
    value = look_up(table, codes).reshape(SCALES, BLOCK) * scale[:, None]
    offs = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + offs, value.to(out_ptr.dtype.element_ty), mask=offs < length)


@triton.jit
def _nibble(word, SHIFT: tl.constexpr, scale):
    """Return (u − 8) · scale in f32 for the nibble u that lies SHIFT bits up, by one FMA."""
    value = (word & (15 << SHIFT)).to(tl.float32)
    return value * (scale * (1.0 / (1 << SHIFT))) - 8.0 * scale


@triton.jit
def int4_half(word, scale, SIDE: tl.constexpr):
    """Return the weights `[…, 4, 2, 2]` of one half of each int32 `[…, 4]`, in their order."""
    upper = word >> 16
    first = tl.join(_nibble(word, 4 * SIDE, scale), _nibble(upper, 4 * SIDE, scale))
    second = tl.join(_nibble(word, 4 * SIDE + 8, scale), _nibble(upper, 4 * SIDE + 8, scale))
    return tl.join(first, second)


@triton.jit
def decode_int4(
    words_ptr, steps_ptr, channel_ptr, out_ptr,
    N, half, stride_on, stride_ok,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Write both halves of RUNS · 16 bytes of BLOCK_N rows of out `[N, 2 · half]`."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    run = tl.program_id(1).to(tl.int64) * RUNS + tl.arange(0, RUNS)
    rows, runs = offs_n[:, None, None], run[None, :, None]
    mask = (offs_n < N)[:, None] & (run * 16 < half)[None, :]
    whole = mask[:, :, None]
    words = words_ptr + rows * (half // 4) + runs * 4 + tl.arange(0, 4)[None, None, :]
    word = tl.load(words, mask=whole, other=0)
    out_ptrs = out_ptr + rows * stride_on + (runs * 16 + tl.arange(0, 16)) * stride_ok
    steps = steps_ptr + offs_n[:, None] * (2 * half // GROUP)
    channel = 1.0
    if channel_ptr is not None:
        channel = tl.load(channel_ptr + offs_n, mask=offs_n < N, other=0.0)[:, None]
    for side in tl.static_range(2):
        step = tl.load(steps + (run * 16 + side * half)[None, :] // GROUP, mask=mask, other=0)
        scale = step.to(tl.float32) * channel
        value = int4_half(word, scale[:, :, None], side).reshape(BLOCK_N, RUNS, 16)
        if channel_ptr is None:
            value = round_to_int8(value)
        tl.store(out_ptrs + side * half * stride_ok, value.to(out_ptr.dtype.element_ty), mask=whole)


@triton.jit
def decode_int8(
    codes_ptr, scale_ptr, out_ptr, N, K, stride_on, stride_ok,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_N × BLOCK_K of out `[N, K]`, any strides: codes (contiguous), scaled or not."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    value = tl.load(codes_ptr + offs_n[:, None] * K + offs_k[None, :], mask=mask, other=0)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + offs_n, mask=offs_n < N, other=0.0)
        value = value.to(tl.float32) * scale[:, None]
    out_ptrs = out_ptr + offs_n[:, None] * stride_on + offs_k[None, :] * stride_ok
    tl.store(out_ptrs, value.to(out_ptr.dtype.element_ty), mask=mask)


def launch_decode_nf4(
    packed: Tensor, absmax: Tensor, absmax2: Tensor | None, offset: Tensor | None, code: Tensor,
    table: Tensor, block: int, out: Tensor, tile: Tile,
) -> Launch:  # fmt: skip
    """Fill `out [N, K]` (contiguous) from NF4 codes; tile.n counts blocks.

    packed uint8 `[⌈N·K / 2⌉]`; absmax f32 `[blocks]`, or uint8 with absmax2 f32 `[⌈blocks / 256⌉]`
    and offset f32 `[1]`; code f32 `[256]`, table f32 `[16]`.
    """
    constants = {"BLOCK": block, "SCALES": tile.n}
    words = packed.view(torch.int32)
    args = (words, absmax, absmax2, offset, code, table, out, out.numel(), len(words))
    return Launch(decode_nf4, (cdiv(out.numel(), tile.n * block),), args, constants, tile)


def launch_decode_int4(
    packed: Tensor, steps: Tensor, channel: Tensor | None, group: int, out: Tensor, tile: Tile
) -> Launch:
    """Fill `out [N, K]`, any strides, from INT4 codes: weights, or int8 codes without channel.

    packed uint8 `[N, K/2]`, steps uint8 `[N, K/group]`, channel f32 `[N]`; tile.k counts bytes.
    """
    N, half = packed.shape
    args = (packed.view(torch.int32), steps, channel, out, N, half, *out.stride())
    constants = {"GROUP": group, "BLOCK_N": tile.n, "RUNS": tile.k // RUN}
    return Launch(decode_int4, (cdiv(N, tile.n), cdiv(half, tile.k)), args, constants, tile)


def launch_decode_int8(codes: Tensor, scale: Tensor | None, out: Tensor, tile: Tile) -> Launch:
    """Fill `out [N, K]`, any strides, with int8 codes `[N, K]`, times scale f32 `[N]` if given."""
    N, K = codes.shape
    constants = {"BLOCK_N": tile.n, "BLOCK_K": tile.k}
    args = (codes, scale, out, N, K, *out.stride())
    return Launch(decode_int8, (cdiv(N, tile.n), cdiv(K, tile.k)), args, constants, tile)
