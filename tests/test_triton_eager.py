"""Eager code runs the operators' bodies without the operators: the same bits, the same autograd."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sweeps import examples
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import DEVICE, DTYPES, needs_kernels, operand

needs_kernels()

from minilora.kernels import (  # noqa: E402
    FrozenLinear,
    dense_forward,
    dense_grad_x,
    triton_lora_linear,
)
from minilora.kernels.triton import lora, stored  # noqa: E402
from minilora.quantization import Quantization  # noqa: E402
from minilora.quantization.linear import QuantizedLinear  # noqa: E402

N, K, R = 40, 64, 5
FORMATS = st.sampled_from([None, "int8", "nf4", "int4"])
BOTH = pytest.mark.parametrize("format", [None, "int8"])  # one in lora.py, one in stored.py


def make(format, dtype=torch.float32, bias=True, asked=(True, True, True)):
    """Return x `[2, 9, K]`, A and B, those asked for with gradients, and a frozen base."""
    weight, bias = operand(N, K, dtype=dtype), operand(N, dtype=dtype) if bias else None
    base = FrozenLinear((weight, bias), dense_forward, dense_grad_x)
    if format:
        base = QuantizedLinear.from_weight(weight, Quantization(format), bias=bias).frozen()
    x = operand(18, K, dtype=dtype).view(2, 9, K)
    leaves = [x, operand(R, K), operand(N, R)]
    return [t.requires_grad_(want) for t, want in zip(leaves, asked, strict=True)], base


def run(leaves, base, p=0.0):
    x, A, B = leaves
    return triton_lora_linear(x, base, A, B, 1.5, p)


def operators(patch):
    for module in (lora, stored):
        patch.setattr(module, "is_plain", lambda x: False)


class Watch(TorchDispatchMode):
    """Lists our operators."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "minilora":
            self.seen.append(func._schema.name.removeprefix("minilora::"))
        return func(*args, **(kwargs or {}))


@examples(12, 100)
@given(
    format=FORMATS,
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    p=st.sampled_from([0.0, 0.3]),
    asked=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_eager_code_and_the_operators_give_the_same_bits(format, dtype, bias, p, asked):
    leaves, base = make(format, dtype, bias, asked)
    wanted = [t for t in leaves if t.requires_grad]
    G, found = operand(2, 9, N, dtype=dtype), []
    for traced in (False, True):
        torch.manual_seed(1)
        with pytest.MonkeyPatch.context() as patch:
            if traced:
                operators(patch)
            y = run(leaves, base, p)
            assert y.requires_grad == any(asked)
            grads = torch.autograd.grad(y, wanted, G) if wanted else ()
        found.append([y.detach(), *grads])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@BOTH
def test_what_watches_torch_sees_the_operators(format):
    leaves, base = make(format)
    name = "lora_stored" if format else "lora_linear"
    with Watch() as watch:
        run(leaves, base).sum().backward()
    assert watch.seen == [name, f"{name}_backward"]
    by_operators = [t.grad for t in leaves]
    for t in leaves:
        t.grad = None
    run(leaves, base).sum().backward()
    assert all(torch.equal(t.grad, g) for t, g in zip(leaves, by_operators, strict=True))


@BOTH
def test_eager_code_calls_no_operator(format, monkeypatch):
    leaves, base = make(format)
    for name in ("lora_linear", "lora_stored", "lora_linear_backward", "lora_stored_backward"):
        monkeypatch.setattr(torch.ops.minilora, name, None)
    run(leaves, base).sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves)


@BOTH
def test_the_scaling_may_be_an_integer_or_numpys(format):
    (x, A, B), base = make(format)
    expected = triton_lora_linear(x, base, A, B, 2.0)
    for scaling in (2, np.float64(2)):
        assert torch.equal(triton_lora_linear(x, base, A, B, scaling), expected)


@BOTH
def test_a_graph_is_freed_by_backward_unless_retained(format):
    leaves, base = make(format)
    y = run(leaves, base)
    first = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(y.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


@BOTH
def test_a_factor_changed_before_backward_is_noticed(format):
    leaves, base = make(format)
    y = run(leaves, base)
    with torch.no_grad():
        leaves[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@BOTH
def test_a_second_derivative_is_refused(format):
    leaves, base = make(format)
    (grad,) = torch.autograd.grad(run(leaves, base).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()


@BOTH
def test_nothing_is_recorded_where_no_gradient_is(format):
    leaves, base = make(format)
    y = run(leaves, base).detach()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            found = run(leaves, base)
            assert not found.requires_grad
            assert torch.equal(found, y)


def test_batched_gradients_are_those_of_each():
    leaves, base = make(None)
    y, G = run(leaves, base), operand(3, 2, 9, N)
    batched = torch.autograd.grad(y, leaves, G, retain_graph=True, is_grads_batched=True)
    apart = [torch.autograd.grad(y, leaves, g, retain_graph=True) for g in G]
    for found, each in zip(batched, zip(*apart, strict=True), strict=True):
        assert torch.equal(found, torch.stack(each))


def test_vmap_maps_the_operator():
    (x, A, B), base = make(None)
    rows = torch.vmap(lambda row: run((row, A, B), base))(x)
    assert torch.equal(rows, torch.stack([run((row, A, B), base) for row in x]))


@BOTH
def test_values_that_torch_negates_lazily_are_negated(format):
    """Both the input and the gradient: their memory holds the opposite."""
    (x, A, B), base = make(format)
    G = operand(2, 9, N)
    expected = torch.autograd.grad(run((x, A, B), base), (x, A, B), G)
    lazy = [torch.complex(torch.zeros_like(t), -t.detach()).conj().imag for t in (x, G)]
    assert all(t.is_neg() for t in lazy)
    leaf = lazy[0].requires_grad_()
    y = run((leaf, A, B), base)
    assert torch.equal(y, run((x, A, B), base))
    found = torch.autograd.grad(y, (leaf, A, B), lazy[1])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert x.device.type == DEVICE
