"""GEMMs over 4-bit weights for few rows: decoded on the chip, never written.

    Y = X Ŵᵀ + b + k · S Bᵀ          Ŵ as in decode.py

M rows, K in, N out, R rank; X `[M, K]`, S `[M, R]`, B `[N, R]`, Y `[M, N]`. What is computed is
Yᵀ = Ŵ Xᵀ: sm_90's tensor cores take the decoded weights from registers as their first operand
only, and the short side is then M.

| kernel      | program → tile                     | FLOPs       | bytes moved                     |
|-------------|------------------------------------|-------------|---------------------------------|
| `nf4_gemm`  | BLOCK_N × BLOCK_M of Yᵀ; loop on K | 2·M·N·(K+R) | NK/2 + NK/block + 2MK + 2MN + … |
| `int4_gemm` | the same, both halves of K at once | 2·M·N·(K+R) | NK/2 + NK/group + 2MK + 2MN + … |

A GEMM over M rows loads a decoded matrix, 2 bytes a weight after writing as many; these load half a
byte and decode anew for every BLOCK_M rows, so they pay while M is small: `tiles.FEW_ROWS`.
NF4 weights are rounded to X's dtype as decoded ones are. INT4's q · s is exact in every dtype; its
channel's scale multiplies the f32 sum. Accumulation is f32.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import look_up, nf4_codes, nf4_scale
from .launch import Launch, cdiv, precision
from .lora_forward import low_rank_branch
from .primitives import multiply
from .tiles import Tile


@triton.jit
def store_turned(
    acc, bias_ptr, s_ptr, b_ptr, y_ptr, offs_n, offs_m, M, N, scale, stride_bias,
    R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Add bias and branch to a tile `[BLOCK_N, BLOCK_M]` of Yᵀ; write it to Y (contiguous)."""
    acc += low_rank_branch(  # B Sᵀ: B in the place of S, both contiguous
        b_ptr, s_ptr, None, offs_n, offs_m, N, M, scale, 0, 1, 1, R,
        R, PRECISION, BLOCK_N, BLOCK_M, BLOCK_R,
    )  # fmt: skip
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=offs_n < N, other=0.0)
        acc += bias.to(tl.float32)[:, None]
    mask = (offs_n < N)[:, None] & (offs_m < M)[None, :]
    y_ptrs = y_ptr + offs_m[None, :] * N + offs_n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def nf4_gemm(
    x_ptr, words_ptr, absmax_ptr, absmax2_ptr, offset_ptr, code_ptr, table_ptr,
    bias_ptr, s_ptr, b_ptr, y_ptr,
    M, N, K, scale, stride_xm, stride_xk, stride_bias,
    R: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_M × BLOCK_N of Y; K is a multiple of BLOCK, SPAN = min(BLOCK, BLOCK_K)."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_j = tl.arange(0, BLOCK_K // 8).to(tl.int64)
    offs_b = tl.arange(0, BLOCK_K // SPAN).to(tl.int64)
    table = tl.load(table_ptr + tl.arange(0, 16))
    mask_n = offs_n[:, None] < N
    x_ptrs = x_ptr + offs_k[:, None] * stride_xk + offs_m[None, :] * stride_xm
    word_ptrs = words_ptr + offs_n[:, None] * (K // 8) + offs_j[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    step = tl.full((), BLOCK_K, tl.int64)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs, mask=(offs_k < K - k)[:, None] & (offs_m < M)[None, :], other=0.0)
        word = tl.load(word_ptrs, mask=mask_n & (offs_j < (K - k) // 8)[None, :], other=0)
        where = k + offs_b * SPAN
        blocks = offs_n[:, None] * (K // BLOCK) + (where // BLOCK)[None, :]
        scales = nf4_scale(
            absmax_ptr, absmax2_ptr, offset_ptr, code_ptr, blocks, mask_n & (where < K)[None, :]
        )
        w = look_up(table, nf4_codes(word)).reshape(BLOCK_N, BLOCK_K // SPAN, SPAN)
        w = w * scales[:, :, None]
        w = w.reshape(BLOCK_N, BLOCK_K).to(x.dtype)
        acc = multiply(w, x, acc, PRECISION)
        x_ptrs += step * stride_xk
        word_ptrs += step // 8
    store_turned(
        acc, bias_ptr, s_ptr, b_ptr, y_ptr, offs_n, offs_m, M, N, scale, stride_bias,
        R, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip


@triton.jit
def int4_gemm(
    x_ptr, packed_ptr, steps_ptr, channel_ptr, bias_ptr, s_ptr, b_ptr, y_ptr,
    M, N, half, scale, stride_xm, stride_xk, stride_bias,
    R: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_M × BLOCK_N of Y; half = K / 2, SPAN divides half, GROUP and BLOCK_K.

    A step loads BLOCK_K bytes of BLOCK_N rows: BLOCK_K columns of either half.
    """
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_b = tl.arange(0, BLOCK_K // SPAN).to(tl.int64) * SPAN
    mask_n = offs_n[:, None] < N
    x_ptrs = x_ptr + offs_k[:, None] * stride_xk + offs_m[None, :] * stride_xm
    packed_ptrs = packed_ptr + offs_n[:, None] * half + offs_k[None, :]
    steps = steps_ptr + offs_n[:, None] * (2 * half // GROUP)
    other = tl.full((), 1, tl.int64) * half
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    step = tl.full((), BLOCK_K, tl.int64)
    for k in range(0, half, BLOCK_K):
        mask_k = offs_k < half - k
        mask_x = mask_k[:, None] & (offs_m < M)[None, :]
        mask_s = mask_n & (offs_b < half - k)[None, :]
        byte = tl.load(packed_ptrs, mask=mask_n & mask_k[None, :], other=0).to(tl.int32)
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)
        s = tl.load(steps + ((k + offs_b) // GROUP)[None, :], mask=mask_s, other=0)
        acc = multiply(_int4_weight(byte & 15, s, x.dtype, SPAN), x, acc, PRECISION)
        x = tl.load(x_ptrs + other * stride_xk, mask=mask_x, other=0.0)
        s = tl.load(steps + ((k + half + offs_b) // GROUP)[None, :], mask=mask_s, other=0)
        acc = multiply(_int4_weight(byte >> 4, s, x.dtype, SPAN), x, acc, PRECISION)
        x_ptrs += step * stride_xk
        packed_ptrs += step
    channel = tl.load(channel_ptr + offs_n, mask=offs_n < N, other=0.0)
    acc = acc * channel[:, None]
    store_turned(
        acc, bias_ptr, s_ptr, b_ptr, y_ptr, offs_n, offs_m, M, N, scale, stride_bias,
        R, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip


@triton.jit
def _int4_weight(nibble, steps, dtype: tl.constexpr, SPAN: tl.constexpr):
    """Return q · s `[BLOCK_N, BLOCK_K]` in `dtype`, which holds its 253 values exactly."""
    BLOCK_N: tl.constexpr = nibble.shape[0]
    BLOCK_K: tl.constexpr = nibble.shape[1]
    q = (nibble - 8).reshape(BLOCK_N, BLOCK_K // SPAN, SPAN) * steps.to(tl.int32)[:, :, None]
    return q.reshape(BLOCK_N, BLOCK_K).to(tl.float32).to(dtype)


def launch_nf4_gemm(
    x: Tensor, packed: Tensor, absmax: Tensor, absmax2: Tensor | None, offset: Tensor | None,
    code: Tensor, table: Tensor, block: int, bias: Tensor | None, s: Tensor, b: Tensor,
    scale: float, y: Tensor, tile: Tile,
) -> Launch:  # fmt: skip
    """Fill `y [M, N]` with `x Ŵᵀ + bias + scale · s bᵀ`.

    x `[M, K]` of any strides, K a multiple of block; b `[N, R]`, s `[M, R]` and y are contiguous;
    the other operands as for `launch_decode_nf4`.
    """
    (M, K), (N, R) = x.shape, b.shape
    args = (
        x, packed.view(torch.int32), absmax, absmax2, offset, code, table, bias, s, b, y,
        M, N, K, scale, *x.stride(), 0 if bias is None else bias.stride(0),
    )  # fmt: skip
    constants = {"BLOCK": block, "SPAN": min(block, tile.k)}
    return _launch(nf4_gemm, args, constants, M, N, R, x, tile)


def launch_int4_gemm(
    x: Tensor, packed: Tensor, steps: Tensor, channel: Tensor, group: int, bias: Tensor | None,
    s: Tensor, b: Tensor, scale: float, y: Tensor, tile: Tile,
) -> Launch:  # fmt: skip
    """Fill `y [M, N]` from INT4; packed, steps and channel as for `launch_decode_int4`."""
    M, (N, R), half = x.shape[0], b.shape, packed.shape[1]
    args = (
        x, packed, steps, channel, bias, s, b, y, M, N, half, scale,
        *x.stride(), 0 if bias is None else bias.stride(0),
    )  # fmt: skip
    constants = {"GROUP": group, "SPAN": math.gcd(half, group, tile.k)}
    return _launch(int4_gemm, args, constants, M, N, R, x, tile)


def _launch(kernel, args, constants, M: int, N: int, R: int, x: Tensor, tile: Tile) -> Launch:
    constants = constants | {
        "R": R, "PRECISION": precision(x),
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "BLOCK_R": tile.r,
    }  # fmt: skip
    return Launch(kernel, (cdiv(N, tile.n), cdiv(M, tile.m)), args, constants, tile)
