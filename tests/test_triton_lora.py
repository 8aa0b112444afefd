"""The operators with the tiles they choose: every gradient, memory, repeats, torch's own checks."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sweeps import examples, wide
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import DEVICE, DTYPES, assert_as_exact, needs_kernels, operand, seed_tensor

needs_kernels()

from minilora.kernels.dropout import hashed_mask  # noqa: E402
from minilora.kernels.triton import lora  # noqa: E402

NAMES = ["y", "grad_x", "grad_A", "grad_B"]


def exact_linear(x, w, bias, A, B, scaling, keep, G):
    """Y and the gradients by dense matrices in float64; keep is the mask over 1 − p."""
    x, w, A, B, G = (t.detach().double() for t in (x, w, A, B, G))
    delta = scaling * (B @ A)
    y = x @ w + (x * keep) @ delta.t() + (0 if bias is None else bias.double())
    g_delta = G.t() @ (x * keep)
    grad_x = G @ w.t() + (G @ delta) * keep
    return y, grad_x, scaling * B.t() @ g_delta, scaling * g_delta @ A.t()


def plain_linear(x, w, bias, A, B, scaling, keep, G):
    """The same by ordinary torch ops and autograd, everything in x's dtype."""
    x, A, B = (t.detach().to(x.dtype).requires_grad_() for t in (x, A, B))
    y = torch.nn.functional.linear(x, w.t(), bias)
    y = y + (x * keep.to(x.dtype)) @ A.t() @ B.t() * scaling
    y.backward(G)
    return y.detach(), x.grad, A.grad, B.grad


def make(m, n, k, r, dtype, bias=True, layout="plain", factors=None):
    x = operand(m, k, dtype=dtype, layout=layout).requires_grad_()
    w = operand(k, n, dtype=dtype, layout="transposed", scale=k**-0.5)
    A = operand(r, k, dtype=factors or dtype, scale=k**-0.5).requires_grad_()
    B = operand(n, r, dtype=factors or dtype, scale=r**-0.5).requires_grad_()
    G = operand(m, n, dtype=dtype, layout=layout)
    return x, w, operand(n, dtype=dtype) if bias else None, A, B, G


def compare(x, w, bias, A, B, G, scaling, seed, p, lucky=False, products=None):
    y = lora.lora_dense(x, w, bias, A, B, scaling, seed, p)
    y.backward(G)
    keep = torch.ones_like(x, dtype=torch.float64)
    if p:
        keep = hashed_mask(seed, *x.shape, p).double() / (1 - p)
    narrow = [t.detach().to(x.dtype) for t in (A, B)]
    exact = exact_linear(x, w, bias, *narrow, scaling, keep, G)
    with products or nullcontext():
        plain = plain_linear(x, w, bias, *narrow, scaling, keep, G)
    sizes = [None] * 4
    if lucky:  # shapes so small that sums can cancel
        absolute = [None if t is None else t.detach().abs() for t in (x, w, bias, *narrow)]
        sizes = exact_linear(*absolute, scaling, keep, G.abs())
    for name, found, truth, other, size in zip(
        NAMES, (y.detach(), x.grad, A.grad, B.grad), exact, plain, sizes, strict=True
    ):
        assert_as_exact(found, truth, other, name, size)
    assert (y.dtype, x.grad.dtype, A.grad.dtype, B.grad.dtype) == (
        x.dtype, x.dtype, A.dtype, B.dtype
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@examples(4, 8)
@given(
    m=st.sampled_from([0, 1, 63, 130]),
    n=st.sampled_from([1, 31, 129]),
    k=st.sampled_from([1, 47, 160]),
    r=st.sampled_from([1, 3, 16, 33]),
    p=st.sampled_from([0.0, 0.25]),
    bias=st.booleans(),
    layout=st.sampled_from(["plain", "strided", "transposed"]),
)
@pytest.mark.usefixtures("nan_memory")
def test_lora_linear_matches_float64(dtype, m, n, k, r, p, bias, layout):
    seeds = seed_tensor(m=m) if p else None
    compare(*make(m, n, k, r, dtype, bias, layout), 2.5, seeds, p, True)


SHORT = {(torch.bfloat16, 64), (torch.float16, 256)}  # f32 is in the next test


@pytest.mark.parametrize(
    ("dtype", "r"),
    [(d, r) if (d, r) in SHORT else wide(d, r) for r in (4, 64, 256) for d in DTYPES],
)
@pytest.mark.usefixtures("nan_memory")
def test_lora_linear_matches_float64_over_several_tiles(dtype, r):
    # 84,000 elements: of fewer, the rounding of one row of S can decide the largest error.
    compare(*make(560, 150, 170, r, dtype), 2.5, seed_tensor(m=560), 0.1)


class Quarters(TorchDispatchMode):
    """Each product is the sum of four: so cuBLAS multiplies where few tiles leave warps idle."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            return func(*args, **(kwargs or {}))
        *bias, a, b = args
        parts = [torch.mm(*pair) for pair in zip(a.chunk(4, 1), b.chunk(4, 0), strict=True)]
        return sum(parts + bias)


@pytest.mark.parametrize("r", [4, wide(64)])
@pytest.mark.usefixtures("sums_in_order")
def test_f32_is_as_exact_as_sums_of_quarters(r):
    """The shape in which it was not, on an H100 and an H200."""
    compare(*make(560, 150, 170, r, torch.float32), 2.5, seed_tensor(m=560), 0.1,
            products=Quarters())  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_factors_in_f32_get_gradients_in_f32(dtype):
    x, w, bias, A, B, G = make(40, 50, 60, 5, dtype, factors=torch.float32)
    compare(x, w, bias, A, B, G, 1.5, seed_tensor(), 0.2)
    assert not torch.equal(A.grad, A.grad.to(dtype).float())  # not rounded on the way


def test_gradients_stop_where_none_is_asked():
    x, w, bias, A, B, G = make(20, 30, 25, 4, torch.float32)
    whole = {}
    lora.lora_dense(x, w, bias, A, B, 1.5).backward(G)
    for name, t in zip("xAB", (x, A, B), strict=True):
        whole[name], t.grad = t.grad, None
    for asked in "xAB":
        for name, t in zip("xAB", (x, A, B), strict=True):
            t.requires_grad_(name == asked).grad = None
        lora.lora_dense(x, w, bias, A, B, 1.5).backward(G)
        for name, t in zip("xAB", (x, A, B), strict=True):
            assert (t.grad is not None) == (name == asked)
            if name == asked:
                torch.testing.assert_close(t.grad, whole[name], rtol=1e-5, atol=1e-5)


def test_results_repeat_bit_for_bit():
    x, w, bias, A, B, G = make(150, 70, 90, 8, torch.float16)
    runs = []
    for _ in range(2):
        for t in (x, A, B):
            t.grad = None
        y = lora.lora_dense(x, w, bias, A, B, 1.5, seed_tensor(), 0.1)
        y.backward(G)
        runs.append([y.detach(), x.grad, A.grad, B.grad])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_only_x_s_and_the_factors_are_kept():
    x, w, bias, A, B, _ = make(64, 80, 48, 4, torch.float16)
    seed, kept = seed_tensor(), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora.lora_dense(x, w, bias, A, B, 1.5, seed, 0.1)
    for t in (x, w, A, B, seed):
        kept.pop(t.untyped_storage().data_ptr())
    assert list(kept.values()) == [64 * 4 * 2]  # S


@pytest.mark.parametrize("dropout", [False, True])
def test_operators_pass_torchs_own_checks(dropout):
    x, w, bias, A, B, G = make(20, 30, 25, 4, torch.float32)
    seed, p = (seed_tensor(), 0.2) if dropout else (None, 0.0)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(
        torch.ops.minilora.lora_linear.default, (x, w, bias, A, B, 1.5, seed, p), test_utils=checks
    )
    s = operand(20, 4)
    arguments = (G, *(t.detach() for t in (x, w, A, B)), s, 1.5, seed, p, [True, False, True])
    torch.library.opcheck(
        torch.ops.minilora.lora_linear_backward.default, arguments, test_utils=checks
    )
    assert x.device.type == DEVICE
