"""`quantize_shrink` and `int8_gemm` against float64, tile by tile and branch by branch."""

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
from minilora.kernels.triton.int8 import launch_int8_gemm, launch_quantize  # noqa: E402
from minilora.kernels.triton.tiles import Tile  # noqa: E402

LAYOUTS = st.sampled_from(["plain", "strided", "transposed"])
RANKS = st.sampled_from([1, 5, 16, 17])


def rows_quantized(x, c, A, seed=None, p=0.0, scale=1.0, finite=True):
    """Run `quantize_shrink` on rows of x ∘ c; return codes, scales and S."""
    (m, k), r = x.shape, len(A)
    codes, t = Output(m, k, dtype=torch.int8), Output(m)
    s = Output(m, r, dtype=x.dtype)
    tile = Tile(16, 0, 16, 16)
    launch_quantize(x, c, A, seed, p, codes.tensor, t.tensor, s.tensor, scale, tile).run()
    return codes.checked(), t.checked(), s.checked() if finite else s.tensor


@pytest.mark.parametrize("dtype", DTYPES)
@examples(5, 15)
@given(
    m=st.sampled_from([0, 1, 7, 33]),
    k=SIZES | st.just(0),
    r=RANKS,
    p=st.sampled_from([0.0, 0.3]),
    scaled=st.booleans(),
    layout=LAYOUTS,
)
def test_quantize_shrink_rounds_rows_and_multiplies(dtype, m, k, r, p, scaled, layout):
    x, A = operand(m, k, dtype=dtype, layout=layout), operand(r, k, dtype=dtype, layout=layout)
    c = operand(k).abs() if scaled else None
    seed = seed_tensor(m=m) if p else None
    codes, t, s = rows_quantized(x, c, A, seed, p, 1.5)
    value = x.double() * (1 if c is None else c.double())
    largest = value.abs().amax(1) if k else torch.zeros(m, device=DEVICE).double()
    expected = torch.where(largest == 0, 1.0, largest / 127)
    torch.testing.assert_close(t.double(), expected, rtol=1e-6, atol=0)
    error = (codes.double() * t[:, None].double() - value).abs()
    assert (error <= t[:, None].double() * (0.5 + 1e-4)).all()
    keep = hashed_mask(seed, m, k, p) if p else torch.ones(m, k, device=DEVICE)
    exact = 1.5 * (x.double() * keep / (1 - p)) @ A.double().t()  # from X: not quantized, no c
    plain = (x * keep.to(dtype) * (1 / (1 - p))) @ A.t() * 1.5
    size = 1.5 * (x.abs().double() * keep / (1 - p)) @ A.abs().double().t()
    assert_as_exact(s, exact, plain, size=size)


def test_codes_round_half_to_even_and_never_reach_minus_128():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -127.0]], device=DEVICE)
    codes, t, _ = rows_quantized(x, None, torch.zeros(1, 6, device=DEVICE))
    assert t.tolist() == [1.0]
    assert codes.tolist() == [[127, 0, 2, 2, 0, -127]]


def test_rows_of_zeros_of_subnormals_and_not_finite_ones():
    x = torch.zeros(5, 20, device=DEVICE)
    x[1] = 1e-42
    x[2, 3], x[3, 7] = float("nan"), float("-inf")
    x[4] = 2.0
    codes, t, _ = rows_quantized(x, None, torch.zeros(1, 20, device=DEVICE), finite=False)
    assert t[0] == 1
    assert codes[0].count_nonzero() == 0
    assert 0 < t[1] < 1e-36
    assert not t[2:4].isfinite().any()  # and so its outputs are not
    assert (codes[4] == 127).all()


@pytest.mark.parametrize("dtype", DTYPES)
@examples(5, 15)
@given(
    m=st.sampled_from([0, 1, 7, 33]),
    n=SIZES,
    k=SIZES | st.sampled_from([0, 70]),
    r=RANKS,
    p=st.sampled_from([0.0, 0.3]),
    scaled=st.booleans(),
    bias=st.booleans(),
    turned=st.booleans(),
    scale=st.sampled_from([2.5, 0.0]),
)
def test_int8_gemm_matches_float64(dtype, m, n, k, r, p, scaled, bias, turned, scale):
    codes = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=DEVICE)
    q = torch.randint(-127, 128, (k, n), dtype=torch.int8, device=DEVICE)
    q = q.t().contiguous().t() if turned else q
    t, w = operand(m).abs() / 127, operand(n).abs() / 127 if scaled else None
    s, b = operand(m, r, dtype=dtype), operand(r, n, dtype=dtype, layout="transposed")
    offset = operand(n, dtype=dtype, layout="strided") if bias else None
    seed = seed_tensor(m=m) if p else None
    out = Output(m, n, dtype=dtype)
    tile = Tile(16, 32, 32, 16, group_m=2)
    launch_int8_gemm(codes, t, q, w, offset, s, b, scale, seed, p, out.tensor, tile).run()
    keep = hashed_mask(seed, m, n, p) / (1 - p) if p else torch.ones(m, n, device=DEVICE)
    columns = torch.ones(n, device=DEVICE) if w is None else w
    whole = codes.double() @ q.double() * t.double()[:, None] * columns.double()
    exact = whole + scale * (s.double() @ b.double()) * keep.double()
    plain = whole.to(dtype) + scale * (s @ b) * keep.to(dtype)
    if bias:
        exact, plain = exact + offset.double(), plain + offset
    size = codes.abs().double() @ q.abs().double() * t.double()[:, None] * columns.double()
    size = size + 4 * s.abs().double() @ b.abs().double()
    assert_as_exact(out.checked(), exact, plain, size=size)


def test_rows_beyond_2_31_elements_are_reached():
    """Rows 2³⁰ elements apart in memory that is never touched between them."""
    apart = 2**30
    memory = torch.empty(4 * apart, dtype=torch.float16, device=DEVICE)  # 8 GiB, mapped lazily
    x = memory.as_strided((4, 20), (apart, 1))
    x.copy_(operand(4, 20, dtype=torch.float16))
    A = operand(3, 20, dtype=torch.float16)
    for found, expected in zip(
        rows_quantized(x, None, A), rows_quantized(x.contiguous(), None, A), strict=True
    ):
        assert torch.equal(found, expected)
