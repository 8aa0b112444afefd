"""The backward kernels: two gradients from one pass over grad_out, and sums without atomics.

    grad_S = c · G B      P[i] = S[i]ᵀ G[i]      `expand_grad`    i: a block of BLOCK_M rows
    P[i] = U[i]ᵀ (X[i] ∘ D[i])                  `tall_product`   i: a slice of the rows
    out = c · Σᵢ P[i]                            `sum_partials`

M rows (tokens), N out, R rank, K the width of X; G `[M, N]` grad_out, B `[N, R]`, S `[M, R]`,
P f32 `[blocks, R, N]`; U `[M, R]`, X `[M, K]`, D the dropout mask, P f32 `[slices, R, K]`.
The input gradient is `low_rank_gemm` of lora_forward.py.

| kernel         | program → tile                          | FLOPs      | elements moved        |
|----------------|-----------------------------------------|------------|-----------------------|
| `expand_grad`  | BLOCK_M rows of grad_S, P[i]; loop on N | 4·M·N·R    | MN + NR·M/BLOCK_M f32 |
| `tall_product` | BLOCK_K × R of P[i]; loop on rows       | 2·M·K·R    | MK + slices·KR f32    |
| `sum_partials` | BLOCK of out; loop on i, in order       | blocks·N·R | blocks·NR f32 + NR    |

Each element of G is loaded once by `expand_grad`: while a tile of it is on the chip it feeds both
products. Few rows leave the grid too small for a GPU; then N is cut into `splits` pieces, and
grad_S comes as f32 partial sums too. Partial sums are added in one fixed order, so results repeat
bit for bit. Accumulation is f32; grad_S is rounded once to G's dtype.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..dropout import threshold_of
from .launch import Launch, cdiv, precision, span_of
from .primitives import is_kept, multiply, row_keys
from .tiles import Tile


@triton.jit
def expand_grad(
    g_ptr, b_ptr, s_ptr, grad_s_ptr, partial_ptr,
    M, N, columns, scale,
    stride_gm, stride_gn, stride_bn, stride_br,
    R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_M rows of grad_S `[splits, M, R]` and `columns` columns of P[i] `[R, N]`.

    S, grad_S and P are contiguous; `columns` is a multiple of BLOCK_N.
    """
    pid_m = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1).to(tl.int64) * columns
    end = tl.minimum(start + columns, N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = start + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m = offs_m[:, None] < M
    mask_r = offs_r[None, :] < R
    offs_s = offs_m[:, None] * R + offs_r[None, :]
    s = tl.load(s_ptr + offs_s, mask=mask_m & mask_r, other=0.0)
    g_ptrs = g_ptr + offs_m[:, None] * stride_gm + offs_n[None, :] * stride_gn
    b_ptrs = b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br
    # S is transposed, not G: then both products read G's tile as it was copied to shared memory,
    # and the copies stay asynchronous (sm_80: 12 LDGSTS against 0 with tl.trans(g)).
    st = tl.trans(s)
    p_ptrs = partial_ptr + (pid_m * R + offs_r[:, None]) * N + offs_n[None, :]
    step = tl.full((), BLOCK_N, tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for n in range(0, columns, BLOCK_N):
        mask_n = offs_n < end - n
        g = tl.load(g_ptrs, mask=mask_m & mask_n[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r, other=0.0)
        acc = multiply(g, b, acc, PRECISION)
        p = multiply(st, g, tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32), PRECISION)
        tl.store(p_ptrs, p, mask=(offs_r[:, None] < R) & mask_n[None, :])
        g_ptrs += step * stride_gn
        b_ptrs += step * stride_bn
        p_ptrs += step
    grad_s = (acc * tl.cast(scale, tl.float32)).to(grad_s_ptr.dtype.element_ty)
    split = tl.program_id(1).to(tl.int64) * M * R
    tl.store(grad_s_ptr + split + offs_s, grad_s, mask=mask_m & mask_r)


@triton.jit
def tall_product(
    u_ptr, x_ptr, seed_ptr, partial_ptr,
    M, K, rows, threshold, span,
    stride_um, stride_ur, stride_xm, stride_xk,
    R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_R × BLOCK_K of P[i] `[R, K]` (contiguous), i the slice of `rows` rows."""
    pid_k = tl.program_id(0).to(tl.int64)
    pid_i = tl.program_id(1).to(tl.int64)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_m = pid_i * rows + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(2).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    end = tl.minimum(M, (pid_i + 1) * rows)
    mask_k = offs_k[None, :] < K
    mask_r = offs_r[:, None] < R
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    # Uᵀ is addressed, not transposed after its load, which would cost it its asynchronous copies.
    u_ptrs = u_ptr + offs_r[:, None] * stride_ur + offs_m[None, :] * stride_um
    step = tl.full((), BLOCK_M, tl.int64)
    acc = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for m in range(0, rows, BLOCK_M):
        mask_m = offs_m + m < end
        if seed_ptr is not None:
            key, other = row_keys(seed_ptr, (offs_m + m)[:, None], M, span)
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k, other=0.0)
        u = tl.load(u_ptrs, mask=mask_r & mask_m[None, :], other=0.0)
        if seed_ptr is not None:
            keep = is_kept(key, other, offs_k[None, :], threshold)
            x = tl.where(keep, x, 0.0).to(x.dtype)
        acc = multiply(u, x, acc, PRECISION)
        x_ptrs += step * stride_xm
        u_ptrs += step * stride_um
    p_ptrs = partial_ptr + (pid_i * R + offs_r[:, None]) * K + offs_k[None, :]
    tl.store(p_ptrs, acc, mask=mask_r & mask_k)


@triton.jit
def sum_partials(
    partial_ptr, out_ptr,
    length, count, width, scale,
    stride_row, stride_column,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_N elements of `c · Σ P[i]`, i in order.

    P `[count, length]` is contiguous; out `[length / width, width]` has any strides.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < length
    ptrs = partial_ptr + offs
    step = tl.full((), 1, tl.int64) * length
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for _ in range(count):
        acc += tl.load(ptrs, mask=mask, other=0.0)
        ptrs += step
    out_ptrs = out_ptr + (offs // width) * stride_row + (offs % width) * stride_column
    tl.store(out_ptrs, (acc * tl.cast(scale, tl.float32)).to(out_ptr.dtype.element_ty), mask=mask)


def launch_expand(
    grad_out: Tensor, B: Tensor, s: Tensor, grad_s: Tensor, partial: Tensor, scale: float,
    tile: Tile,
) -> Launch:  # fmt: skip
    """Fill `grad_s [splits, M, R]`, which sums to `scale · grad_out B`, and `partial [i, R, N]`.

    grad_out `[M, N]` and B `[N, R]` of any strides; s `[M, R]`, grad_s and partial are contiguous;
    i counts ⌈M / tile.m⌉ blocks of rows.
    """
    (M, N), R, splits = grad_out.shape, B.shape[1], grad_s.shape[0]
    columns = cdiv(cdiv(N, splits), tile.n) * tile.n
    args = (
        grad_out, B, s, grad_s, partial, M, N, columns, scale, *grad_out.stride(), *B.stride()
    )  # fmt: skip
    constants = {
        "R": R, "PRECISION": precision(grad_out),
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_R": tile.r,
    }  # fmt: skip
    return Launch(expand_grad, (cdiv(M, tile.m), splits), args, constants, tile)


def launch_tall(
    u: Tensor, x: Tensor, seed: Tensor | None, p: float, partial: Tensor, tile: Tile
) -> Launch:
    """Fill `partial [slices, R, K]`, which sums to `uᵀ (x ∘ D)`; u `[M, R]`, x `[M, K]`."""
    (M, K), R, slices = x.shape, u.shape[1], partial.shape[0]
    rows = cdiv(cdiv(M, slices), tile.m) * tile.m
    args = (
        u, x, seed, partial, M, K, rows, threshold_of(p if seed is not None else 0.0),
        span_of(seed, M), *u.stride(), *x.stride(),
    )  # fmt: skip
    constants = {
        "R": R, "PRECISION": precision(x),
        "BLOCK_M": tile.m, "BLOCK_K": tile.k, "BLOCK_R": tile.r,
    }  # fmt: skip
    return Launch(tall_product, (cdiv(K, tile.k), slices, cdiv(R, tile.r)), args, constants, tile)


def launch_sum(partial: Tensor, out: Tensor, scale: float) -> Launch:
    """Fill `out [rows, width]`, any strides, with `scale · partial.sum(0)`."""
    tile = Tile(0, 256, 0, 0, 4, 1)
    length = out.numel()
    args = (partial, out, length, partial.shape[0], out.shape[1], scale, *out.stride())
    return Launch(sum_partials, (cdiv(length, tile.n),), args, {"BLOCK_N": tile.n}, tile)
