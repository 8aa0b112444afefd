"""INT8 kernels: rows quantized beside the skinny product, and an integer GEMM that adds the branch.

    t = max|X ∘ c| / 127      P = round(X ∘ c / t)      S = k · (X ∘ D) Aᵀ    `quantize_shrink`
    Y = t ∘ (P Q) ∘ w + b + k · (S B) ∘ D                                     `int8_gemm`

M rows (tokens), K the reduced width, N the output width, R rank; X `[M, K]`, c f32 `[K]` or none,
P int8 `[M, K]` in −127..127, t f32 `[M]`, A `[R, K]`, S `[M, R]`; Q int8 `[K, N]`, w f32 `[N]` or
none, B `[R, N]`, D the dropout mask. Forward: W ≈ diag(w) Qᵀ and c is none. Input gradient: X is
grad_out, whose columns the weight's scales c multiply before its rows are quantized; w is none.

| kernel            | program → tile                    | operations        | bytes moved         |
|-------------------|-----------------------------------|-------------------|---------------------|
| `quantize_shrink` | BLOCK_M rows of P, S; loop on K   | 2·MKR             | 3·MK + 2·(M+K)R     |
| `int8_gemm`       | BLOCK_M × BLOCK_N of Y; loop on K | 2·MNK int8, 2·MNR | MK + KN + 2·MN + …   |

A row's scale is known only at its end, so `quantize_shrink` loads its rows a second time, 16 of
them just after the first: from the L2 cache, not from memory (holding 16 rows of 4096 values in
registers spilled 432 bytes). Integer sums are exact in int32 while K < 2³¹ / 127²; all else is f32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout import threshold_of
from .launch import Launch, cdiv, precision, span_of
from .lora_forward import low_rank_branch, low_rank_product
from .primitives import is_kept, multiply, round_to_int8, row_keys, tile_of
from .tiles import Tile, padded


@triton.jit
def _scaled(x, c_ptr, offs_k, mask_k):
    """Return X ∘ c in f32."""
    value = x.to(tl.float32)
    if c_ptr is not None:
        value = value * tl.load(c_ptr + offs_k, mask=mask_k, other=0.0)[None, :]
    return value


@triton.jit
def quantize_shrink(
    x_ptr, c_ptr, a_ptr, seed_ptr, p_ptr, t_ptr, s_ptr,
    M, K, scale, threshold, span,
    stride_xm, stride_xk, stride_ar, stride_ak,
    R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_M rows of P `[M, K]`, t `[M]` and S `[M, R]` (all contiguous)."""
    pid_m = tl.program_id(0).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m = offs_m[:, None] < M
    mask_r = offs_r[None, :] < R
    x_rows = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    x_ptrs = x_rows
    a_ptrs = a_ptr + offs_k[:, None] * stride_ak + offs_r[None, :] * stride_ar
    step = tl.full((), BLOCK_K, tl.int64)
    largest = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if seed_ptr is not None:
        key, other = row_keys(seed_ptr, offs_m[:, None], M, span)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m & mask_k[None, :], other=0.0)
        a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r, other=0.0)
        value = _scaled(x, c_ptr, k + offs_k, mask_k)
        unordered = value != value  # noqa: PLR0124 (only NaN is; it has to show)
        size = tl.where(unordered, float("inf"), tl.abs(value))
        largest = tl.maximum(largest, tl.max(size, axis=1))
        if seed_ptr is not None:
            keep = is_kept(key, other, (k + offs_k)[None, :], threshold)
            x = tl.where(keep, x, 0.0).to(x.dtype)
        acc = multiply(x, a, acc, PRECISION)
        x_ptrs += step * stride_xk
        a_ptrs += step * stride_ak
    s_ptrs = s_ptr + offs_m[:, None] * R + offs_r[None, :]
    tl.store(
        s_ptrs, (acc * tl.cast(scale, tl.float32)).to(s_ptr.dtype.element_ty), mask=mask_m & mask_r
    )

    # The bound keeps a row of subnormals from a scale of 0; a row of zeros has scale 1.
    t = tl.where(largest == 0.0, 1.0, tl.maximum(largest / 127.0, 1e-37))
    tl.store(t_ptr + offs_m, t, mask=offs_m < M)
    inverse = (1.0 / t)[:, None]
    x_ptrs = x_rows
    p_ptrs = p_ptr + offs_m[:, None] * K + offs_k[None, :]
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m & mask_k[None, :], other=0.0)
        value = _scaled(x, c_ptr, k + offs_k, mask_k) * inverse
        codes = round_to_int8(tl.minimum(tl.maximum(value, -127.0), 127.0))
        tl.store(p_ptrs, codes, mask=mask_m & mask_k[None, :])
        x_ptrs += step * stride_xk
        p_ptrs += step


@triton.jit
def int8_gemm(
    p_ptr, t_ptr, q_ptr, w_ptr, bias_ptr, s_ptr, b_ptr, seed_ptr, y_ptr,
    M, N, K, scale, threshold, span,
    stride_qk, stride_qn, stride_bias, stride_br, stride_bn,
    R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """Write a BLOCK_M × BLOCK_N tile of Y `[M, N]`; P, t, w, S and Y are contiguous."""
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m = offs_m[:, None] < M
    mask_n = offs_n[None, :] < N
    p_ptrs = p_ptr + offs_m[:, None] * K + offs_k[None, :]
    q_ptrs = q_ptr + offs_k[:, None] * stride_qk + offs_n[None, :] * stride_qn
    step = tl.full((), BLOCK_K, tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        p = tl.load(p_ptrs, mask=mask_m & mask_k[None, :], other=0)
        q = tl.load(q_ptrs, mask=mask_k[:, None] & mask_n, other=0)
        acc = tl.dot(p, q, acc, out_dtype=tl.int32)
        p_ptrs += step
        q_ptrs += step * stride_qk
    t = tl.load(t_ptr + offs_m, mask=offs_m < M, other=0.0)
    if seed_ptr is None:
        # Divided by the scale that multiplies the sum: the branch then needs no second accumulator,
        # which would spill (sm_90, 128 × 256: 680 bytes of stack).
        t = t / tl.cast(scale, tl.float32)
    y = acc.to(tl.float32) * t[:, None]
    if w_ptr is not None:
        y = y * tl.load(w_ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]
    if seed_ptr is None:
        y = tl.cast(scale, tl.float32) * low_rank_product(
            y, s_ptr, b_ptr, offs_m, offs_n, M, N, stride_br, stride_bn, R, PRECISION, BLOCK_R
        )
    else:
        y += low_rank_branch(
            s_ptr, b_ptr, seed_ptr, offs_m, offs_n, M, N, scale, threshold, span,
            stride_br, stride_bn, R, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=offs_n < N, other=0.0)
        y += bias.to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_m & mask_n)


def launch_quantize(
    x: Tensor, c: Tensor | None, A: Tensor, seed: Tensor | None, p: float, codes: Tensor,
    t: Tensor, s: Tensor, scale: float, tile: Tile,
) -> Launch:  # fmt: skip
    """Fill codes int8 `[M, K]` and t f32 `[M]` from x ∘ c, and s `[M, R]` as `launch_shrink` does.

    x `[M, K]` and A `[R, K]` of any strides; c f32 `[K]` or None; codes, t and s are contiguous.
    """
    (M, K), R = x.shape, A.shape[0]
    p = p if seed is not None else 0.0
    args = (
        x, c, A, seed, codes, t, s, M, K, scale / (1 - p), threshold_of(p), span_of(seed, M),
        *x.stride(), *A.stride(),
    )  # fmt: skip
    constants = {
        "R": R, "PRECISION": precision(x),
        "BLOCK_M": tile.m, "BLOCK_K": tile.k, "BLOCK_R": padded(R),
    }  # fmt: skip
    return Launch(quantize_shrink, (cdiv(M, tile.m),), args, constants, tile)


def launch_int8_gemm(
    codes: Tensor, t: Tensor, q: Tensor, w: Tensor | None, bias: Tensor | None, s: Tensor,
    b: Tensor, scale: float, seed: Tensor | None, p: float, y: Tensor, tile: Tile,
) -> Launch:  # fmt: skip
    """Fill `y [M, N]` with `t ∘ (codes q) ∘ w + bias + scale / (1 − p) · (s b) ∘ D`.

    codes int8 `[M, K]`, t f32 `[M]`, w f32 `[N]` or None, s `[M, R]` and y are contiguous; q int8
    `[K, N]` and b `[R, N]` of any strides.
    """
    (M, K), N, R = codes.shape, q.shape[1], b.shape[0]
    p = p if seed is not None else 0.0
    if scale == 0:  # the kernel divides by it
        s, scale = torch.zeros_like(s), 1.0
    args = (
        codes, t, q, w, bias, s, b, seed, y, M, N, K, scale / (1 - p), threshold_of(p),
        span_of(seed, M), *q.stride(), 0 if bias is None else bias.stride(0), *b.stride(),
    )  # fmt: skip
    constants = {
        "R": R, "PRECISION": precision(s), "BLOCK_M": tile.m, "BLOCK_N": tile.n,
        "BLOCK_K": tile.k, "BLOCK_R": tile.r, "GROUP_M": tile.group_m,
    }  # fmt: skip
    grid = (cdiv(M, tile.m) * cdiv(N, tile.n),)
    return Launch(int8_gemm, grid, args, constants, tile)
