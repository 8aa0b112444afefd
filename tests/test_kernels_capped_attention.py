"""Capped attention against a dense float64 oracle: every gradient, masks, chunks, dtypes."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.kernels import capped_attention

module = importlib.import_module("minilora.kernels.capped")


def oracle(q, k, v, mask, scale, cap):
    """The formula, all scores at once."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = torch.tanh(q @ k.mT * scale / cap) * cap
    T, S = scores.shape[-2:]
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T) if mask is None else mask
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def case(B, kv_heads, group, T, past, D, dtype=torch.float64):
    q = torch.randn(B, T, kv_heads * group, D).transpose(1, 2)  # as models have them
    k, v = (torch.randn(B, T + past, kv_heads, D).transpose(1, 2) for _ in range(2))
    return [t.to(dtype) for t in (q * 3, k, v)]


def some_mask(kind, q, k):
    """Each row sees a key: of its own number, or the first."""
    B, H, T, S = *q.shape[:3], k.shape[2]
    shape = {"rows": (B, 1, T, S), "heads": (B, H, T, S), "keys": (1, 1, 1, S), "2d": (T, S)}[kind]
    mask = torch.rand(shape) < 0.5
    mask |= torch.eye(T, S, dtype=torch.bool) if kind != "keys" else torch.arange(S) == 0
    return mask


def value_and_gradients(function, inputs, grad_out, *rest):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves, *rest)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))


@pytest.mark.usefixtures("nan_memory")
@settings(deadline=None, max_examples=40)
@given(
    B=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    T=st.sampled_from([1, 2, 5, 7, 8, 9, 23]),
    past=st.sampled_from([0, 1, 6]),
    D=st.sampled_from([1, 8, 13]),
    kind=st.sampled_from([None, "rows", "heads", "keys", "2d"]),
    scale=st.floats(0.05, 1.5),
    cap=st.floats(0.3, 60),
)
def test_value_and_gradients_are_the_oracles(B, kv_heads, group, T, past, D, kind, scale, cap):
    torch.manual_seed(T)
    q, k, v = case(B, kv_heads, group, T, past, D)
    mask = None if kind is None else some_mask(kind, q, k)
    rest = torch.randn(q.shape, dtype=q.dtype), mask, scale, cap
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_QUERIES", 4)  # several chunks, the last one ragged
        found = value_and_gradients(capped_attention, (q, k, v), *rest)
    for mine, true in zip(found, value_and_gradients(oracle, (q, k, v), *rest), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_is_as_exact_as_the_plain_formula(dtype, autocast):
    torch.manual_seed(0)
    inputs = case(2, 2, 3, 150, 0, 16, dtype)  # chunks of 128 and 22
    grad_out = torch.randn(inputs[0].shape)
    rest = grad_out, None, 0.25, 5.0
    exact = value_and_gradients(oracle, [t.double() for t in inputs], *rest)
    plain = value_and_gradients(oracle, inputs, *rest)
    mixed = [t.float() if autocast else t for t in inputs]
    with torch.autocast("cpu", dtype, enabled=autocast and dtype != torch.float32):
        found = value_and_gradients(capped_attention, mixed, *rest)
    assert found[0].dtype == dtype
    for mine, theirs, true in zip(found, plain, exact, strict=True):
        assert (mine - true).norm() <= 1.5 * (theirs - true).norm()


def test_a_row_that_sees_nothing_stays_finite():
    q, k, v = case(1, 1, 2, 3, 0, 4)
    mask = torch.tensor([[[[True, False, False], [False] * 3, [True] * 3]]])
    found = value_and_gradients(capped_attention, (q, k, v), torch.ones_like(q), mask, 0.5, 2.0)
    assert all(part.isfinite().all() for part in found)


def test_a_traced_call_of_any_length_gives_the_same():
    torch.manual_seed(1)
    traced = torch.compile(capped_attention, dynamic=True, fullgraph=True)
    for T in (5, 150):
        inputs = case(2, 2, 3, T, 0, 8, torch.float32)
        rest = torch.randn(inputs[0].shape), None, 0.3, 4.0
        found, wanted = (value_and_gradients(f, inputs, *rest) for f in (traced, capped_attention))
        assert all(map(torch.equal, found, wanted))


def test_nothing_of_tokens_times_tokens_is_kept():
    q, k, v = (t.requires_grad_() for t in case(1, 2, 2, 300, 0, 4))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        capped_attention(q, k, v, None, 0.5, 2.0)
    assert kept == [q.shape, k.shape, v.shape]


def test_the_operations_are_well_formed():
    q, k, v = (t.requires_grad_() for t in case(1, 2, 2, 9, 0, 4))
    rest = (None, 0.5, 2.0)
    torch.library.opcheck(torch.ops.minilora.capped_attention, (q, k, v, *rest))
    detached = [t.detach() for t in (torch.randn_like(q), q, k, v)]
    torch.library.opcheck(torch.ops.minilora.capped_attention_backward, (*detached, *rest))


def test_a_row_that_sees_nothing_has_the_gradient_of_what_is_computed():
    """Its weights are those of a constant: queries and keys there have no part in it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    mask[..., 3, :] = False
    scale, cap = 0.5, 3.0
    out = capped_attention(q, k, v, mask=mask, scale=scale, cap=cap)
    scores = cap * torch.tanh(scale * q @ k.mT / cap)
    wanted = scores.where(mask, torch.finfo(scores.dtype).min).softmax(-1) @ v
    torch.testing.assert_close(out, wanted)
    grad = torch.randn_like(out)
    for found, right in zip(*(torch.autograd.grad(y, (q, k, v), grad) for y in (out, wanted)),
                            strict=True):  # fmt: skip
        torch.testing.assert_close(found, right)
