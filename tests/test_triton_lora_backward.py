"""`expand_grad`, `tall_product` and `sum_partials` against float64, and that they repeat."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sweeps import examples
from triton_cases import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    SIZES,
    Output,
    assert_as_exact,
    needs_kernels,
    operand,
    seed_tensor,
)

needs_kernels()

from minilora.kernels.dropout import hashed_mask  # noqa: E402
from minilora.kernels.triton.launch import cdiv  # noqa: E402
from minilora.kernels.triton.lora_backward import (  # noqa: E402
    launch_expand,
    launch_sum,
    launch_tall,
)
from minilora.kernels.triton.tiles import Tile, padded  # noqa: E402

LAYOUTS = st.sampled_from(["plain", "strided", "transposed"])
ROWS = st.sampled_from([1, 7, 16, 33, 50])
RANKS = st.sampled_from([1, 2, 5, 16, 17])


@pytest.mark.parametrize("dtype", DTYPES)
@examples(8, 30)
@given(m=ROWS, n=SIZES | st.just(0), r=RANKS, splits=st.sampled_from([1, 2, 3]), layout=LAYOUTS)
def test_expand_grad_matches_float64(dtype, m, n, r, splits, layout):
    G, B = operand(m, n, dtype=dtype, layout=layout), operand(n, r, dtype=dtype, layout=layout)
    s = operand(m, r, dtype=dtype)
    tile = Tile(16, 16, 0, padded(r))
    kind = dtype if splits == 1 else torch.float32
    grad_s, sums = Output(splits, m, r, dtype=kind), Output(cdiv(m, 16), r, n)
    launch_expand(G, B, s, grad_s.tensor, sums.tensor, 2.5, tile).run()
    found = grad_s.checked().sum(0)
    size = 2.5 * G.abs().double() @ B.abs().double()
    assert_as_exact(found, 2.5 * G.double() @ B.double(), 2.5 * (G @ B), "grad_S", size)
    pairs = list(zip(G.split(16), s.split(16), strict=True))
    exact = torch.stack([b.double().t() @ a.double() for a, b in pairs])
    plain = torch.stack([b.float().t() @ a.float() for a, b in pairs])
    size = torch.stack([b.abs().double().t() @ a.abs().double() for a, b in pairs])
    assert_as_exact(sums.checked(), exact, plain, "partials", size)


@pytest.mark.parametrize("dtype", DTYPES)
@examples(8, 25)
@given(
    m=ROWS,
    k=SIZES,
    r=RANKS | st.just(40),
    slices=st.sampled_from([1, 2, 5]),
    p=st.sampled_from([0.0, 0.3]),
    layout=LAYOUTS,
)
def test_tall_product_matches_float64(dtype, m, k, r, slices, p, layout):
    u, x = operand(m, r, dtype=dtype, layout=layout), operand(m, k, dtype=dtype, layout=layout)
    seed = seed_tensor(m=m) if p else None
    sums = Output(slices, r, k)
    launch_tall(u, x, seed, p, sums.tensor, Tile(16, 0, 32, 16)).run()
    keep = hashed_mask(seed, m, k, p) if p else torch.ones(m, k, device=DEVICE)
    exact = u.double().t() @ (x.double() * keep)
    plain = u.float().t() @ (x.float() * keep)
    size = u.abs().double().t() @ x.abs().double()
    assert_as_exact(sums.checked().sum(0), exact, plain, size=size)


@pytest.mark.parametrize("dtype", DTYPES)
@examples(6, 20)
@given(
    count=st.sampled_from([1, 2, 9]),
    rows=st.sampled_from([1, 3, 17]),
    width=st.sampled_from([1, 8, 300]),
    turned=st.booleans(),
)
def test_sum_partials_adds_in_order(dtype, count, rows, width, turned):
    sums = operand(count, rows, width)
    shape = (width, rows) if turned else (rows, width)
    out = Output(*shape, dtype=dtype)
    launch_sum(sums, out.tensor.t() if turned else out.tensor, 1.5).run()
    exact = torch.zeros(rows, width, device=DEVICE)
    for partial in sums:  # the same f32 additions in the same order
        exact = exact + partial
    found = out.checked().t() if turned else out.checked()
    if dtype == torch.bfloat16 and INTERPRETED:  # the interpreter cuts bits off, a GPU rounds
        assert torch.equal(found.view(torch.int16), (exact * 1.5).view(torch.int32) >> 16)
    else:
        assert torch.equal(found, (exact * 1.5).to(dtype))


@pytest.mark.skipif(not INTERPRETED, reason="loads are counted in the interpreter")
@pytest.mark.parametrize("splits", [1, 3])
def test_expand_grad_loads_grad_out_once(splits):
    from traffic import counted

    m, n, r = 37, 45, 5
    G, B, s = operand(m, n), operand(n, r), operand(m, r)
    grad_s, sums = operand(splits, m, r), operand(cdiv(m, 16), r, n)
    launch = launch_expand(G, B, s, grad_s, sums, 1.0, Tile(16, 16, 0, 16))
    loads, stores = counted(launch)
    assert loads["g_ptr"] == G.nbytes
    assert "g_ptr" not in stores
    assert stores["partial_ptr"] == sums.nbytes
    assert stores["grad_s_ptr"] == grad_s.nbytes
