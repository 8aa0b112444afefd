"""The low-rank products against a dense float64 oracle: values, gradients, memory, odd shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.kernels import (
    BACKENDS,
    FrozenLinear,
    check_backend,
    conv1d_forward,
    conv1d_grad_x,
    dense_forward,
    dense_grad_x,
    dropout_mask,
    lora_add,
    lora_linear,
    probe,
    reference,
)
from minilora.quantization import Quantization, QuantizedLinear

# How many times plain torch's own error, in the same dtype, a kernel may make: the one table.
C = {
    torch.float32: {"max": 2.0, "rms": 1.5},
    torch.bfloat16: {"max": 2.0, "rms": 1.5},
    torch.float16: {"max": 2.0, "rms": 1.5},
}
SIZES = st.sampled_from([1, 2, 3, 5, 7, 13, 17, 24, 31, 33])


def oracle(x, W, b, A, B, scaling, mask, p, G):
    """Y and the gradients of x, A, B by dense matrices in float64: W + s·B·A is formed whole."""
    x, W, A, B, G = (t.detach().double() for t in (x, W, A, B, G))
    keep = torch.ones_like(x) if mask is None else mask.double() / (1 - p)
    X, Gf, keep = (
        x.reshape(-1, x.shape[-1]),
        G.reshape(-1, G.shape[-1]),
        keep.reshape(-1, x.shape[-1]),
    )
    dropped = X * keep
    delta = scaling * (B @ A)
    Y = X @ W.T + dropped @ delta.T + (0 if b is None else b.detach().double())
    gX = Gf @ W + (Gf @ delta) * keep
    g_delta = Gf.T @ dropped
    return (
        Y.reshape(G.shape),
        gX.reshape(x.shape),
        scaling * B.T @ g_delta,
        scaling * g_delta @ A.T,
    )


def frozen(W, b):
    return FrozenLinear((W, b), dense_forward, dense_grad_x)


def general(x, base, A, B, scaling, mask=None, p=0.0):
    W, b = base.tensors
    return lora_add(torch.nn.functional.linear(x, W, b), x, A, B, scaling, mask, p)


def fused_as_on_cuda(x, base, A, B, scaling, mask=None, p=0.0):
    """With the scale of dropout in `scaling`."""
    return lora_linear(x, base, A, B, scaling / (1 - p), mask)


PATHS = {"fused": lora_linear, "general": general, "fused on CUDA": fused_as_on_cuda}


def make(shape, n, r, bias, *, p=0.0, dtype=torch.float32, factor_dtype=None):
    k = shape[-1]
    W, A, B = torch.randn(n, k) / k**0.5, torch.randn(r, k) / k**0.5, torch.randn(n, r) / r**0.5
    b = torch.randn(n).to(dtype) if bias else None
    x, G = torch.randn(shape), torch.randn(*shape[:-1], n)
    mask = dropout_mask(x, p) if p else None
    factor_dtype = factor_dtype or dtype
    A, B = (t.to(factor_dtype).requires_grad_() for t in (A, B))
    return x.to(dtype).requires_grad_(), W.to(dtype), b, A, B, mask, G.to(dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.usefixtures("nan_memory")
@settings(max_examples=60)
@given(
    m=st.sampled_from([0, 1, 2, 7, 16, 33]),
    k=SIZES,
    n=SIZES,
    r=st.sampled_from([1, 2, 5, 40]),
    dims=st.integers(1, 4),
    bias=st.booleans(),
    p=st.sampled_from([0.0, 0.25]),
    strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_lora_linear_matches_the_dense_oracle_on_every_shape(
    path, m, k, n, r, dims, bias, p, strided, seed
):
    torch.manual_seed(seed)
    shape = {1: (k,), 2: (m, k), 3: (2, m, k), 4: (2, 1, m, k)}[dims]
    x, W, b, A, B, mask, G = make(shape, n, r, bias, p=p)
    if strided and dims > 1:  # the same numbers under strides that no view can flatten
        x = x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
        G = G.transpose(0, -1).contiguous().transpose(0, -1)
    s = (3.0 * r + 1) / r
    y = PATHS[path](x, frozen(W, b), A, B, s, mask, p)
    assert y.shape == G.shape
    y.backward(G)
    for found, exact in zip(
        (y, x.grad, A.grad, B.grad), oracle(x, W, b, A, B, s, mask, p, G), strict=True
    ):
        torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_lora_linear_passes_gradcheck_once_and_twice(path, bias, p):
    x, W, b, A, B, mask, _ = make((2, 3, 4), 5, 3, bias, p=p, dtype=torch.float64)

    def run(x, A, B):
        return PATHS[path](x, frozen(W, b), A, B, 7 / 3, mask, p)

    assert torch.autograd.gradcheck(run, (x, A, B))
    assert torch.autograd.gradgradcheck(run, (x, A, B))


def test_lora_linear_gradients_stop_where_none_is_asked():
    x, W, b, A, B, _, G = make((4, 5), 3, 2, True)
    base = frozen(W, b)
    for asked in (x, A, B):
        for t in (x, A, B):
            t.requires_grad_(t is asked).grad = None
        lora_linear(x, base, A, B, 1.5).backward(G)
        assert [t.grad is not None for t in (x, A, B)] == [t is asked for t in (x, A, B)]


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_reference_is_the_oracle_and_its_backward(p):
    x, W, b, A, B, mask, G = make((6, 5), 4, 3, True, p=p, dtype=torch.float64)
    y = reference.lora_linear(x, W, b, A, B, 5 / 3, mask, p)
    with torch.no_grad():
        grads = reference.lora_linear_backward(G, x, W, A, B, 5 / 3, mask, p)
    exact = oracle(x, W, b, A, B, 5 / 3, mask, p, G)
    for found, expected in zip((y, *grads), exact, strict=True):
        torch.testing.assert_close(found, expected)


def errors(found, exact):
    difference = found.detach().double() - exact
    return {
        "max": float(difference.abs().max() / exact.abs().max()),
        "rms": float(difference.norm() / exact.norm()),
    }


@pytest.mark.parametrize("factor_dtype", ["same", torch.float32])
@pytest.mark.parametrize("dtype", C)
@pytest.mark.parametrize("path", PATHS)
def test_lora_linear_is_as_exact_as_plain_torch_in_the_same_dtype(path, dtype, factor_dtype):
    factor_dtype = dtype if factor_dtype == "same" else factor_dtype
    x, W, b, A, B, mask, G = make(
        (96, 130), 70, 12, True, p=0.2, dtype=dtype, factor_dtype=factor_dtype
    )
    s = 20 / 12
    exact = oracle(x, W, b, A.to(dtype), B.to(dtype), s, mask, 0.2, G)
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, A, B)]
    dropped = leaves[0] * mask / 0.8
    plain = torch.nn.functional.linear(leaves[0], W, b) + s * (dropped @ leaves[1].T @ leaves[2].T)
    plain.backward(G)
    y = PATHS[path](x, frozen(W, b), A, B, s, mask, 0.2)
    assert y.dtype == dtype
    y.backward(G)
    assert (x.grad.dtype, A.grad.dtype, B.grad.dtype) == (dtype, factor_dtype, factor_dtype)
    ours = (y, x.grad, A.grad, B.grad)
    theirs = (plain, *(leaf.grad for leaf in leaves))
    for name, found, other, truth in zip(
        ["y", "grad_x", "grad_A", "grad_B"], ours, theirs, exact, strict=True
    ):
        for kind, c in C[dtype].items():
            assert errors(found, truth)[kind] <= c * errors(other, truth)[kind], (name, kind)


def test_lora_add_widens_a_narrow_base_output_and_rounds_once():
    x, W, b, A, B, _, _ = make((20, 16), 12, 3, True, dtype=torch.float32)
    y = torch.nn.functional.linear(x, W, b).detach().bfloat16()
    found = lora_add(y, x, A, B, 4 / 3)
    exact = (y.double() + 4 / 3 * (x.double() @ A.double().T @ B.double().T)).bfloat16()
    assert found.dtype == torch.bfloat16
    # One rounding: equal to the rounded float64 sum but for ties that f32 sums differently.
    assert (found != exact).float().mean() < 0.02


def test_lora_add_leaves_its_arguments_unchanged():
    x, W, b, A, B, mask, _ = make((4, 5), 3, 2, True, p=0.5)
    y = torch.randn(4, 3)
    before = [t.detach().clone() for t in (y, x, A, B, mask)]
    lora_add(y, x, A, B, 1.5, mask, 0.5)
    lora_linear(x, frozen(W, b), A, B, 1.5, mask, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, (y, x, A, B, mask), strict=True))


@pytest.mark.parametrize(
    ("dtype", "slow", "size"),  # bytes of a number of S
    [(torch.float32, True, 4), (torch.bfloat16, False, 2), (torch.bfloat16, True, 2)],
)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_lora_linear_keeps_only_x_s_the_factors_and_the_mask(p, dtype, slow, size, monkeypatch):
    monkeypatch.setattr(probe, "is_slow", lambda dtype: slow and dtype == torch.bfloat16)
    M, K, N, R = 64, 48, 80, 4
    x, W, b, A, B, mask, _ = make((2, M // 2, K), N, R, True, p=p, dtype=dtype)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_linear(x, frozen(W, b), A, B, 1.5, mask, p)
    own = {t.untyped_storage().data_ptr() for t in (x, W, b, A, B, mask) if t is not None}
    new = {address: size for address, size in kept.items() if address not in own}
    assert list(new.values()) == [M * R * size]  # S, and no other tensor of its own
    assert set(kept) - set(new) == own


@pytest.mark.parametrize("path", PATHS)
def test_dropout_zeroes_the_same_inputs_forward_and_backward(path):
    """With W = 0 only the branch is left, so grad_x must vanish exactly where x was dropped."""
    x, W, _, A, B, mask, G = make((9, 8), 6, 3, False, p=0.5)
    PATHS[path](x, frozen(torch.zeros_like(W), None), A, B, 1.5, mask, 0.5).backward(G)
    assert torch.equal(x.grad != 0, mask)
    assert 0 < mask.sum() < mask.numel()


def test_lora_linear_ignores_autocast_inside():
    x, W, b, A, B, _, G = make((8, 16), 12, 3, True)
    expected = lora_linear(x, frozen(W, b), A, B, 1.5)
    with torch.autocast("cpu", torch.bfloat16):
        found = lora_linear(x, frozen(W, b), A, B, 1.5)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    found.backward(G)
    assert x.grad.dtype == torch.float32


def test_check_backend_refuses_what_cannot_run():
    assert BACKENDS == ("auto", "torch", "triton")
    check_backend("auto")
    check_backend("torch")
    with pytest.raises(
        ValueError, match="backend must be one of auto, torch, triton, found 'cuda'"
    ):
        check_backend("cuda")
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: .*use backend='auto'"):
        check_backend("triton")


def test_a_compiled_sum_is_added_in_place():
    """As CUDA's graphs do; what is written into is a product, and no copy of it is made."""
    from torch._inductor.utils import run_and_get_code

    from minilora.kernels.low_rank import _add_in_place

    y, s, B = torch.randn(12, 9), torch.randn(12, 4), torch.randn(4, 9)
    torch.library.opcheck(_add_in_place, (y.clone(), s, B, 0.5))

    def added(x, w):
        product = torch.mm(x, w)
        _add_in_place(product, s, B, 0.5)
        return product.relu()

    x, w = torch.randn(12, 7), torch.randn(7, 9)
    found, (code,) = run_and_get_code(torch.compile(added), x, w)
    torch.testing.assert_close(found, (x @ w + 0.5 * s @ B).relu())
    assert code.count("extern_kernels.mm(") == 1 and "clone" not in code
    assert "add_product_.default(buf0" in code


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", ["linear", "conv1d", "nf4"])
def test_a_branch_far_below_the_bases_rounding_still_counts(dtype, stored):
    """Added to a rounded base two thirds of it were lost, forward and backward."""
    torch.manual_seed(0)
    M, K, N, R = 128, 256, 192, 8
    smallest = 1e-4 if dtype == torch.bfloat16 else 1e-5
    x, G = torch.randn(M, K).to(dtype).requires_grad_(), torch.randn(M, N).to(dtype)
    W, A = (torch.randn(n, K) / K**0.5 for n in (N, R))
    B = torch.randn(N, R) * smallest
    if stored == "nf4":
        layer = QuantizedLinear.from_weight(W, Quantization("nf4", block_size=64))
        base, W = layer.frozen(), layer.dequantize(dtype)
    else:
        W = W.to(dtype)
        linear = (W, dense_forward, dense_grad_x)
        kept, *products = linear if stored == "linear" else (W.t(), conv1d_forward, conv1d_grad_x)
        base = FrozenLinear((kept, None), *products)
    y = lora_linear(x, base, A, B, 1.5)
    y.backward(G)
    x64, G64, W64, A64, B64 = (t.detach().to(dtype).double() for t in (x, G, W, A, B))
    for found, plain, branch in (
        (y, x64 @ W64.t(), 1.5 * x64 @ A64.t() @ B64.t()),
        (x.grad, G64 @ W64, 1.5 * G64 @ B64 @ A64),
    ):
        share = ((found.detach().double() - plain) * branch).sum() / branch.square().sum()
        assert branch.norm() < 2e-3 * plain.norm()
        assert 0.9 < share < 1.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_that_the_product_cancels_is_not_rounded_first(dtype):
    torch.manual_seed(0)
    K, N, R = 256, 64, 4
    bias = (5 * torch.randn(N)).to(dtype)
    x = (1 + 0.1 * torch.randn(128, K)).to(dtype)
    W = (torch.randn(N, K) / 50 - bias.float()[:, None] / K).to(dtype)
    A, B = torch.randn(R, K) / K**0.5, torch.randn(N, R) / 100
    base = FrozenLinear((W, bias), dense_forward, dense_grad_x)
    with torch.no_grad():
        y = lora_linear(x, base, A, B, 1.0)
    x64, W64, A64, B64 = (t.to(dtype).double() for t in (x, W, A, B))
    exact = x64 @ W64.t() + bias.double() + x64 @ A64.t() @ B64.t()
    assert (y.double() - exact).norm() < torch.finfo(dtype).eps * exact.norm()
