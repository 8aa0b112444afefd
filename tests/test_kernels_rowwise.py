"""The norm and SwiGLU against float64, their gradients, and what they keep for backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from minilora.kernels import geglu, reference, rms_norm, swiglu

EPS = 1e-5


def norm_oracle(x, weight, eps=EPS):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def swiglu_oracle(gate, up):
    return gate / (1 + (-gate).exp()) * up


def geglu_oracle(gate, up):
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return gate * (1 + inner.tanh()) / 2 * up


OPS = {
    "rms_norm": (lambda x, w: rms_norm(x, w, EPS), norm_oracle),
    "rms_norm_offset": (
        lambda x, w: rms_norm(x, w, EPS, 2),
        lambda x, w: norm_oracle(x, w + 2),
    ),
    "swiglu": (swiglu, swiglu_oracle),
    "geglu": (geglu, geglu_oracle),
}

GATED = ("swiglu", "geglu")


def operands(name, rows, width, dtype):
    second = (*rows, width) if name in GATED else (width,)
    return torch.randn(*rows, width).to(dtype), torch.randn(*second).to(dtype)


def error(found, wanted):
    return float(
        (found.detach().double() - wanted.detach()).norm() / wanted.detach().norm().clamp(min=1e-30)
    )


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)]
)
@settings(max_examples=25)
@given(rows=st.lists(st.integers(1, 5), min_size=1, max_size=3), width=st.integers(2, 67))
def test_value_and_gradients(name, dtype, bound, rows, width):
    torch.manual_seed(width)
    ours, oracle = OPS[name]
    narrow = [t.requires_grad_() for t in operands(name, rows, width, dtype)]
    wide = [t.detach().double().requires_grad_() for t in narrow]
    y, want = ours(*narrow), oracle(*wide)
    assert y.dtype == dtype
    assert error(y, want) < bound
    grad = torch.randn(y.shape).to(dtype)
    found = torch.autograd.grad(y, narrow, grad)
    wanted = torch.autograd.grad(want, wide, grad.double())
    # A row's gradient is what is left of two terms that nearly cancel in narrow rows.
    scale = max(1.0, *(float(grad.double().norm() / w.norm().clamp(min=1e-30)) for w in wanted))
    for f, w in zip(found, wanted, strict=True):
        assert f.dtype == dtype
        assert error(f, w) < bound * scale


def test_reference_is_the_oracle():
    x, weight = operands("rms_norm", (3, 2), 7, torch.float64)
    torch.testing.assert_close(reference.rms_norm(x, weight, EPS), norm_oracle(x, weight))
    gate, up = operands("swiglu", (3, 2), 7, torch.float64)
    torch.testing.assert_close(reference.swiglu(gate, up), swiglu_oracle(gate, up))


@pytest.mark.parametrize("name", OPS)
def test_second_derivatives(name):
    ours, _ = OPS[name]
    first, second = (t.requires_grad_() for t in operands(name, (2, 3), 5, torch.float64))
    assert torch.autograd.gradcheck(ours, (first, second))
    assert torch.autograd.gradgradcheck(ours, (first, second))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_the_gradients_asked_for(name, wanted):
    ours, oracle = OPS[name]
    inputs = operands(name, (3,), 8, torch.float64)
    asked = [t.clone().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
    twins = [t.clone().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
    ours(*asked).sum().backward()
    oracle(*twins).sum().backward()
    for a, t, w in zip(asked, twins, wanted, strict=True):
        assert (a.grad is not None) == w
        if w:
            torch.testing.assert_close(a.grad, t.grad)


def test_weights_wider_than_the_rows_keep_their_dtype():
    """A trained norm in f32 over bf16 rows."""
    x, weight = operands("rms_norm", (7,), 24, torch.bfloat16)
    x, weight = x.requires_grad_(), weight.float().requires_grad_()
    y = rms_norm(x, weight, EPS)
    assert y.dtype == torch.float32
    grad_x, grad_w = torch.autograd.grad(y.sum(), (x, weight))
    assert (grad_x.dtype, grad_w.dtype) == (torch.bfloat16, torch.float32)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    for f, w in zip(
        (grad_x, grad_w), torch.autograd.grad(norm_oracle(*wide).sum(), wide), strict=True
    ):
        assert error(f, w) < 1e-2


def test_with_an_offset_the_result_is_rounded_once():
    """As transformers' OLMo 2 and Gemma do; Llama's norm rounds before it weights."""
    x, weight = operands("rms_norm", (70,), 24, torch.bfloat16)
    wanted = norm_oracle(x.double(), weight.double() + 1).bfloat16()
    assert (rms_norm(x, weight, EPS, 1) != wanted).float().mean() < 1e-2
    assert (rms_norm(x, weight + 1, EPS) != wanted).float().mean() > 0.2
    assert rms_norm(x, weight.float(), EPS, 0).dtype == torch.bfloat16


def test_a_row_of_zeros_has_a_finite_gradient():
    x, weight = torch.zeros(2, 6, requires_grad=True), torch.ones(6)
    (grad,) = torch.autograd.grad(rms_norm(x, weight, EPS).sum(), x)
    torch.testing.assert_close(grad, torch.full_like(x, EPS**-0.5))


@pytest.mark.parametrize("name", OPS)
def test_without_a_gradient_the_value_is_the_same(name):
    ours, _ = OPS[name]
    first, second = operands(name, (3, 4), 9, torch.bfloat16)
    with torch.no_grad():
        plain = ours(first, second)
    assert torch.equal(plain, ours(first.requires_grad_(), second))


@pytest.mark.parametrize("name", OPS)
def test_nothing_but_the_inputs_is_kept(name):
    ours, _ = OPS[name]
    first, second = (t.requires_grad_() for t in operands(name, (4, 5), 8, torch.bfloat16))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(first, second)
    assert [t.data_ptr() for t in kept] == [first.data_ptr(), second.data_ptr()]


@pytest.mark.parametrize("name", OPS)
def test_gradients_of_single_rows(name):
    """torch.func sees through both: a gradient for each row apart."""
    ours, oracle = OPS[name]
    first, second = operands(name, (4,), 6, torch.float64)
    dims = (0, None) if name not in GATED else (0, 0)
    found, wanted = (
        torch.func.vmap(torch.func.grad(lambda a, b, f=f: f(a, b).square().sum()), in_dims=dims)(
            first, second
        )
        for f in (ours, oracle)
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", OPS)
def test_tangents(name):
    """Forward mode, where nothing is recorded for backward."""
    ours, oracle = OPS[name]
    inputs, tangents = (operands(name, (2, 3), 5, torch.float64) for _ in range(2))
    found, wanted = (torch.func.jvp(f, inputs, tangents) for f in (ours, oracle))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", OPS)
def test_compiled_is_eager(name):
    ours, _ = OPS[name]
    first, second = (t.requires_grad_() for t in operands(name, (3, 5), 16, torch.float32))
    traced = torch.compile(ours, dynamic=True)
    for f, w in zip(
        torch.autograd.grad(traced(first, second).sum(), (first, second)),
        torch.autograd.grad(ours(first, second).sum(), (first, second)),
        strict=True,
    ):
        torch.testing.assert_close(f, w)


class Shifted(torch.nn.Module):
    offset = 1  # of the class, as a family's norm has it

    def __init__(self, weight):
        super().__init__()
        self.weight, self.eps = weight, EPS

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps, self.offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_norms_with_an_offset_are_traced_in_one_graph(dtype):
    x, weight = operands("rms_norm", (3, 5), 16, dtype)
    both = torch.nn.Sequential(Shifted(weight), Shifted(weight * 2))
    x.requires_grad_()
    traced = torch.compile(both, dynamic=True, fullgraph=True)
    found, wanted = (torch.autograd.grad(f(x).sum(), x)[0] for f in (traced, both))
    assert error(found, wanted.double()) < 20 * torch.finfo(dtype).eps


def test_the_value_is_what_the_plain_formula_gives():
    """To the bit, since checkpoints are compared with other libraries' outputs."""
    x, weight = operands("rms_norm", (6,), 40, torch.bfloat16)
    wide = x.float()
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    assert torch.equal(rms_norm(x, weight, EPS), weight * unit.to(x.dtype))
    assert torch.equal(swiglu(x, x), F.silu(x) * x)
