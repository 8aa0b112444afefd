"""The forward kernels: a skinny product, and a GEMM that starts from the branch.

    S = c · (X ∘ D) Aᵀ                        `shrink`          D: the dropout mask
    Y = X W + b + c · (S B) ∘ D               `low_rank_gemm`   forward: W is Wᵀ, B is Bᵀ, no mask

M rows (tokens), K the reduced width, N the output width, R rank; X `[M, K]`, A `[R, K]`, D of the
shape it multiplies, W `[K, N]`, b `[N]`, S `[M, R]`, B `[R, N]`, Y `[M, N]`. Every operand has two
strides, so a transposed weight is a view. The same GEMM is the input gradient: X is grad_out, W is
W, S is grad_S, B is A, and D masks the branch.

| kernel          | program → tile                      | FLOPs         | reads and writes   |
|-----------------|-------------------------------------|---------------|--------------------|
| `shrink`        | BLOCK_M rows of S, all R; loop on K | 2·M·K·R       | MK + MR + RK        |
| `low_rank_gemm` | BLOCK_M × BLOCK_N of Y; loop on K   | 2·M·N·(K + R) | MK + KN + (M+N)R + MN |

X is read once by `shrink`; Y is written once and never read; the mask is hashed,
not read. Accumulation is f32 throughout; S is rounded once to X's dtype.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..dropout import threshold_of
from .launch import Launch, cdiv, precision, span_of
from .primitives import is_kept, multiply, row_keys, tile_of
from .tiles import Tile, padded


@triton.jit
def shrink(
    x_ptr, a_ptr, seed_ptr, s_ptr,
    M, K, scale, threshold, span,
    stride_xm, stride_xk, stride_ar, stride_ak,
    R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_M rows of S `[M, R]` (contiguous)."""
    pid_m = tl.program_id(0).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m = offs_m[:, None] < M
    mask_r = offs_r[None, :] < R
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    a_ptrs = a_ptr + offs_k[:, None] * stride_ak + offs_r[None, :] * stride_ar
    step = tl.full((), BLOCK_K, tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if seed_ptr is not None:
        key, other = row_keys(seed_ptr, offs_m[:, None], M, span)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m & mask_k[None, :], other=0.0)
        a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r, other=0.0)
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


@triton.jit
def low_rank_product(
    acc, s_ptr, b_ptr, offs_m, offs_n, M, N, stride_br, stride_bn,
    R: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Return a tile of `acc + S B` in f32; S `[M, R]` is contiguous."""
    mask_m = offs_m[:, None] < M
    mask_n = offs_n[None, :] < N
    # Exact f32 loops: its FMAs over a long rank spill if unrolled. Others are unrolled (width = one
    # step), so that their loads need not wait for each other.
    exact: tl.constexpr = s_ptr.dtype.element_ty == tl.float32 and PRECISION == "ieee"
    width: tl.constexpr = R if exact else BLOCK_R
    for start in tl.static_range(0, R, width):
        for r in tl.range(start, start + width, BLOCK_R, num_stages=1):
            offs_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
            s_ptrs = s_ptr + offs_m[:, None] * R + offs_r[None, :]
            b_ptrs = b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn
            s = tl.load(s_ptrs, mask=mask_m & (offs_r[None, :] < R), other=0.0)
            b = tl.load(b_ptrs, mask=(offs_r[:, None] < R) & mask_n, other=0.0)
            acc = multiply(s, b, acc, PRECISION)
    return acc


@triton.jit
def low_rank_branch(
    s_ptr, b_ptr, seed_ptr, offs_m, offs_n, M, N, scale, threshold, span, stride_br, stride_bn,
    R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Return a tile of `c · (S B) ∘ D` in f32: what every GEMM here starts from or adds."""
    # Where the keys are formed decides what spills: sm_90's widest tile if they come late, f32's
    # many steps over a long rank if they are held through them.
    if seed_ptr is not None and BLOCK_N > 128:
        key, other = row_keys(seed_ptr, offs_m[:, None], M, span)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = low_rank_product(
        acc, s_ptr, b_ptr, offs_m, offs_n, M, N, stride_br, stride_bn, R, PRECISION, BLOCK_R
    )
    acc = acc * tl.cast(scale, tl.float32)  # Inductor passes numbers in f64
    if seed_ptr is not None:
        if BLOCK_N <= 128:
            key, other = row_keys(seed_ptr, offs_m[:, None], M, span)
        keep = is_kept(key, other, offs_n[None, :], threshold)
        acc = tl.where(keep, acc, 0.0)
    return acc


@triton.jit
def low_rank_gemm(
    x_ptr, w_ptr, bias_ptr, s_ptr, b_ptr, seed_ptr, y_ptr,
    M, N, K, scale, threshold, span,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_bias, stride_br, stride_bn,
    R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """Write a BLOCK_M × BLOCK_N tile of Y `[M, N]` (contiguous); S is contiguous too."""
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m = offs_m[:, None] < M
    mask_n = offs_n[None, :] < N

    # The branch first: its scale and mask are applied to the accumulator the GEMM goes on with. In
    # f32 last, after the bias: begun at the branch's size, each step along K would round at it.
    if x_ptr.dtype.element_ty == tl.float32:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    else:
        acc = low_rank_branch(
            s_ptr, b_ptr, seed_ptr, offs_m, offs_n, M, N, scale, threshold, span, stride_br,
            stride_bn, R, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = w_ptr + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
    step = tl.full((), BLOCK_K, tl.int64)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n, other=0.0)
        acc = multiply(x, w, acc, PRECISION)
        x_ptrs += step * stride_xk
        w_ptrs += step * stride_wk
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=offs_n < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if x_ptr.dtype.element_ty == tl.float32:
        acc += low_rank_branch(
            s_ptr, b_ptr, seed_ptr, offs_m, offs_n, M, N, scale, threshold, span, stride_br,
            stride_bn, R, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m & mask_n)


def launch_shrink(
    x: Tensor, A: Tensor, seed: Tensor | None, p: float, s: Tensor, scale: float, tile: Tile
) -> Launch:  # fmt: skip
    """Fill `s [M, R]` with `scale / (1 − p) · (x ∘ D) Aᵀ`; x `[M, K]`, A `[R, K]`, any strides."""
    (M, K), R = x.shape, A.shape[0]
    p = p if seed is not None else 0.0
    args = (
        x, A, seed, s, M, K, scale / (1 - p), threshold_of(p), span_of(seed, M),
        *x.stride(), *A.stride(),
    )  # fmt: skip
    constants = {
        "R": R, "PRECISION": precision(x),
        "BLOCK_M": tile.m, "BLOCK_K": tile.k, "BLOCK_R": padded(R),
    }  # fmt: skip
    return Launch(shrink, (cdiv(M, tile.m),), args, constants, tile)


def launch_gemm(
    x: Tensor, w: Tensor, bias: Tensor | None, s: Tensor, b: Tensor, scale: float,
    seed: Tensor | None, p: float, y: Tensor, tile: Tile,
) -> Launch:  # fmt: skip
    """Fill `y [M, N]` with `x w + bias + scale / (1 − p) · (s b) ∘ D`.

    x `[M, K]`, w `[K, N]` and b `[R, N]` of any strides; s `[M, R]` and y are contiguous.
    """
    (M, K), N, R = x.shape, w.shape[1], b.shape[0]
    p = p if seed is not None else 0.0
    args = (
        x, w, bias, s, b, seed, y, M, N, K, scale / (1 - p), threshold_of(p), span_of(seed, M),
        *x.stride(), *w.stride(), 0 if bias is None else bias.stride(0), *b.stride(),
    )  # fmt: skip
    constants = {
        "R": R, "PRECISION": precision(x), "BLOCK_M": tile.m, "BLOCK_N": tile.n,
        "BLOCK_K": tile.k, "BLOCK_R": tile.r, "GROUP_M": tile.group_m,
    }  # fmt: skip
    grid = (cdiv(M, tile.m) * cdiv(N, tile.n),)
    return Launch(low_rank_gemm, grid, args, constants, tile)
