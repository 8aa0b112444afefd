"""`shrink` and `low_rank_gemm` against float64, tile by tile and branch by branch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sweeps import examples
from triton_cases import (
    DEVICE,
    DTYPES,
    SIZES,
    Output,
    assert_as_exact,
    needs_kernels,
    operand,
    seed_tensor,
)

needs_kernels()

from minilora.kernels.dropout import hashed_mask  # noqa: E402
from minilora.kernels.triton.lora_forward import launch_gemm, launch_shrink  # noqa: E402
from minilora.kernels.triton.tiles import Tile  # noqa: E402

LAYOUTS = st.sampled_from(["plain", "strided", "transposed"])
ROWS = st.sampled_from([0, 1, 7, 16, 33])
RANKS = st.sampled_from([1, 2, 5, 16, 17, 40])


@pytest.mark.parametrize("dtype", DTYPES)
@examples(8, 25)
@given(m=ROWS, k=SIZES | st.just(0), r=RANKS, p=st.sampled_from([0.0, 0.3]), layout=LAYOUTS)
def test_shrink_matches_float64(dtype, m, k, r, p, layout):
    x, A = operand(m, k, dtype=dtype, layout=layout), operand(r, k, dtype=dtype, layout=layout)
    seed = seed_tensor(m=m) if p else None
    out = Output(m, r, dtype=dtype)
    launch_shrink(x, A, seed, p, out.tensor, 1.5, Tile(16, 0, 16, 0)).run()
    keep = hashed_mask(seed, m, k, p) if p else torch.ones(m, k, device=DEVICE)
    exact = 1.5 * (x.double() * keep / (1 - p)) @ A.double().t()
    plain = (x * keep.to(dtype) * (1 / (1 - p))) @ A.t() * 1.5
    size = 1.5 * (x.abs().double() * keep / (1 - p)) @ A.abs().double().t()
    assert_as_exact(out.checked(), exact, plain, size=size)


@pytest.mark.parametrize("dtype", DTYPES)
@examples(8, 30)
@given(
    m=ROWS,
    n=SIZES,
    k=SIZES | st.just(0),
    r=RANKS,
    p=st.sampled_from([0.0, 0.3]),
    bias=st.booleans(),
    layout=LAYOUTS,
    turned=LAYOUTS,
)
def test_low_rank_gemm_matches_float64(dtype, m, n, k, r, p, bias, layout, turned):
    x = operand(m, k, dtype=dtype, layout=layout)
    w = operand(k, n, dtype=dtype, layout=turned)
    s, b = operand(m, r, dtype=dtype), operand(r, n, dtype=dtype, layout=turned)
    offset = operand(n, dtype=dtype, layout="strided") if bias else None
    seed = seed_tensor(m=m) if p else None
    out = Output(m, n, dtype=dtype)
    tile = Tile(16, 32, 16, 16, group_m=2)
    launch_gemm(x, w, offset, s, b, 2.5, seed, p, out.tensor, tile).run()
    keep = hashed_mask(seed, m, n, p) if p else torch.ones(m, n, device=DEVICE)
    exact = x.double() @ w.double() + 2.5 * (s.double() @ b.double()) * keep / (1 - p)
    plain = x @ w + 2.5 * (s @ b) * keep.to(dtype) * (1 / (1 - p))
    size = x.abs().double() @ w.abs().double() + 4 * s.abs().double() @ b.abs().double()
    if bias:
        exact, plain = exact + offset.double(), plain + offset
    assert_as_exact(out.checked(), exact, plain, size=size)


def test_a_mask_zeroes_the_same_elements_in_every_kernel():
    """A product with the identity shows the mask itself."""
    from minilora.kernels.triton.lora_backward import launch_tall

    m, k, p = 40, 48, 0.4
    seed, ones = seed_tensor(), torch.ones(m, k, device=DEVICE)
    eye = torch.eye(k, device=DEVICE)
    first = Output(m, k)
    launch_shrink(ones, eye, seed, p, first.tensor, 1 - p, Tile(16, 0, 16, 0)).run()
    second = Output(m, k)
    nothing = torch.zeros(m, 0, device=DEVICE), torch.zeros(0, k, device=DEVICE)
    launch_gemm(
        *nothing, None, ones, eye, 1 - p, seed, p, second.tensor, Tile(32, 16, 16, 16)
    ).run()
    # s b = 1·I has one 1 in a column: rows of ones give every element of the mask.
    third = Output(1, m, k)
    launch_tall(torch.eye(m, device=DEVICE), ones, seed, p, third.tensor, Tile(16, 0, 32, 16)).run()
    mask = hashed_mask(seed, m, k, p)
    for found in (first, second, third):
        assert torch.equal(found.checked().reshape(m, k) != 0, mask)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_hashed_mask_looks_drawn(p):
    rows, columns = 600, 1000
    one = hashed_mask(seed_tensor(), rows, columns, p).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(one.mean() - (1 - p)) < 5 * deviation / (rows * columns) ** 0.5
    assert (one.mean(0) - (1 - p)).abs().max() < 5 * deviation / rows**0.5
    assert (one.mean(1) - (1 - p)).abs().max() < 5 * deviation / columns**0.5
    other = hashed_mask(seed_tensor(8), rows, columns, p).double()
    centred = one - one.mean()
    size = 5 * deviation**2 / (rows * columns) ** 0.5  # of a covariance of independent draws
    for shifted in (
        centred.roll(1, 0),
        centred.roll(1, 1),
        centred.roll(16, 1),
        centred.roll((1, 1), (0, 1)),
        other - other.mean(),
    ):
        assert abs((centred * shifted).mean()) < size


def test_addresses_beyond_2_31_elements_are_reached():
    """Rows 2³⁰ elements apart in memory that is never touched between them."""
    apart = 2**30
    memory = torch.empty(4 * apart, dtype=torch.float16, device=DEVICE)  # 8 GiB, mapped lazily
    x = memory.as_strided((4, 20), (apart, 1))
    x.copy_(operand(4, 20, dtype=torch.float16))
    A = operand(3, 20, dtype=torch.float16)
    s = Output(4, 3, dtype=torch.float16)
    launch_shrink(x, A, None, 0.0, s.tensor, 1.0, Tile(16, 0, 16, 0)).run()
    assert_as_exact(s.checked(), x.double() @ A.double().t(), x @ A.t())
    y = Output(20, 4, dtype=torch.float16)
    left, zero = operand(20, 20, dtype=torch.float16), torch.zeros(20, 1, dtype=torch.float16)
    zero = zero.to(DEVICE)
    tile = Tile(16, 16, 16, 16)
    launch_gemm(left, x.t(), None, zero, zero[:4].t(), 1.0, None, 0.0, y.tensor, tile).run()
    assert_as_exact(y.checked(), left.double() @ x.double().t(), left @ x.t())
