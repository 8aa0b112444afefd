"""The errors of long f32 sums: each kernel beside one accumulator that takes every product."""

import pytest
import torch
from triton_cases import DEVICE, Output, needs_kernels, operand

needs_kernels()

from minilora.kernels.triton import tiles  # noqa: E402
from minilora.kernels.triton.int8 import launch_int8_gemm, launch_quantize  # noqa: E402
from minilora.kernels.triton.lora_backward import launch_expand, launch_tall  # noqa: E402
from minilora.kernels.triton.lora_forward import launch_gemm, launch_shrink  # noqa: E402

F32 = torch.float32
LONG, RANK, M, N, R = 1024, 256, 16, 24, 5


def one_accumulator(a, b):
    """Return `a b`, each k added to one f32 sum by an FMA, in order."""
    total = torch.zeros(len(a), b.shape[1], device=DEVICE)
    for x, y in zip(a.t().double(), b.double(), strict=True):
        total = (x[:, None] * y + total).float()
    return total


def shrink():
    x, A, s = operand(M, LONG), operand(R, LONG), Output(M, R)
    launch_shrink(x, A, None, 0.0, s.tensor, 1.0, tiles.shrink_tile(M, R, F32, 90, "ieee")).run()
    return s, x, A.t()


def quantize_shrink():
    x, A, s = operand(M, LONG), operand(R, LONG), Output(M, R)
    codes, t = Output(M, LONG, dtype=torch.int8), Output(M)
    tile = tiles.quantize_tile(R, F32, 90, "ieee")
    launch_quantize(x, None, A, None, 0.0, codes.tensor, t.tensor, s.tensor, 1.0, tile).run()
    return s, x, A.t()


def low_rank_gemm():
    x, w, y = operand(M, LONG), operand(LONG, N), Output(M, N)
    s, b = operand(M, R, scale=0.0), operand(R, N)
    tile = tiles.gemm_tile(M, N, R, F32, 90, "ieee")
    launch_gemm(x, w, None, s, b, 1.0, None, 0.0, y.tensor, tile).run()
    return y, x, w


def low_rank_branch():
    s, b, y = operand(M, RANK), operand(RANK, N), Output(M, N)
    tile = tiles.gemm_tile(M, N, RANK, F32, 90, "ieee")
    launch_gemm(s[:, :0], b[:0], None, s, b, 1.0, None, 0.0, y.tensor, tile).run()
    return y, s, b


def int8_gemm():
    s, b, y = operand(M, RANK), operand(RANK, N), Output(M, N)
    codes, q = (torch.zeros(shape, dtype=torch.int8, device=DEVICE) for shape in ((M, 64), (64, N)))
    tile = tiles.int8_tile(M, N, RANK, F32, 90, False)
    t = operand(M).abs()
    launch_int8_gemm(codes, t, q, None, None, s, b, 1.0, None, 0.0, y.tensor, tile).run()
    return y, s, b


def expand_grad():
    G, B, s = operand(M, LONG), operand(LONG, R), operand(M, R)
    grad_s, sums = Output(1, M, R), Output(1, R, LONG)
    launch_expand(G, B, s, grad_s.tensor, sums.tensor, 1.0, tiles.Tile(16, 32, 0, 16)).run()
    return grad_s, G, B


def tall_product():
    u, x, sums = operand(LONG, R), operand(LONG, N), Output(1, R, N)
    launch_tall(u, x, None, 0.0, sums.tensor, tiles.tall_tile(R, F32, 90)).run()
    return sums, u.t(), x


@pytest.mark.parametrize(
    "product",
    [shrink, quantize_shrink, low_rank_gemm, low_rank_branch, int8_gemm, expand_grad, tall_product],
)
@pytest.mark.usefixtures("sums_in_order")
def test_a_long_f32_sum_has_half_the_error_of_one_accumulator(product):
    out, a, b = product()
    exact = a.double() @ b.double()
    ours, one = (
        (t.double() - exact).square().mean().sqrt()
        for t in (out.checked().reshape(exact.shape), one_accumulator(a, b))
    )
    assert ours <= one / 2
