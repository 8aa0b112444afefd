"""The head fused with the loss, against a dense float64 oracle: chunks, ignored rows, dtypes."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.kernels import linear_cross_entropy

module = importlib.import_module("minilora.kernels.cross_entropy")
IGNORE = -100
# How many times plain torch's own error, in the same dtype, the kernel may make.
C = {"loss": 2.0, "max": 2.0, "rms": 1.5}


def oracle(hidden, weight, labels, reduction="mean", ignore=IGNORE, cap=None):
    """Loss and both gradients from the whole softmax in float64."""
    h, W = hidden.detach().double(), weight.detach().double()
    rows = [i for i, label in enumerate(labels.tolist()) if label != ignore]
    gh, gW, loss = torch.zeros_like(h), torch.zeros_like(W), torch.zeros((), dtype=torch.float64)
    for i in rows:
        logits = W @ h[i]
        slope = torch.ones_like(logits)
        if cap is not None:
            t = torch.tanh(logits / cap)
            logits, slope = cap * t, 1 - t**2
        exps = torch.exp(logits - logits.max())
        p = exps / exps.sum()
        loss -= logits[labels[i]] - logits.max() - torch.log(exps.sum())
        p[labels[i]] -= 1
        p *= slope
        gh[i] = p @ W
        gW += torch.outer(p, h[i])
    n = len(rows) if reduction == "mean" else 1
    return loss / n, gh / n, gW / n


def case(n, d, v, dtype=torch.float32, ignored=0.3):
    hidden, weight = torch.randn(n, d).to(dtype), torch.randn(v, d).to(dtype)
    labels = torch.randint(v, (n,))
    labels[torch.rand(n) < ignored] = IGNORE
    if n:
        labels[n // 2] = v - 1  # one row counts
    return hidden.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.usefixtures("nan_memory")
@settings(max_examples=60)
@given(
    n=st.sampled_from([1, 2, 31, 32, 33, 64, 65, 97]),
    d=st.sampled_from([1, 3, 8, 17]),
    v=st.sampled_from([1, 2, 7, 40]),
    strided=st.booleans(),
    reduction=st.sampled_from(["mean", "sum"]),
    cap=st.none() | st.floats(0.5, 40),
    seed=st.integers(0, 2**16),
)
def test_linear_cross_entropy_matches_the_dense_oracle(n, d, v, strided, reduction, cap, seed):
    torch.manual_seed(seed)
    hidden, weight, labels = case(n, d, v)
    if strided:
        hidden = hidden.detach().t().contiguous().t().requires_grad_()
        weight = weight.detach().t().contiguous().t().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_ELEMENTS", 1)  # the least: 32 rows in a chunk
        loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, cap=cap)
    loss.backward()
    exact = oracle(hidden, weight, labels, reduction, cap=cap)
    for found, truth in zip((loss, hidden.grad, weight.grad), exact, strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=2e-5, atol=1e-4)


@pytest.mark.usefixtures("nan_memory")
@settings(max_examples=40)
@given(
    n=st.sampled_from([0, 1, 2, 31, 32, 33, 65]),
    d=st.sampled_from([1, 3, 17]),
    v=st.sampled_from([2, 7, 40]),
    cap=st.none() | st.floats(0.5, 40),
    seed=st.integers(0, 2**16),
)
def test_each_rows_loss_and_gradient_are_those_of_the_row_alone(n, d, v, cap, seed):
    """Each row's gradient is scaled by a factor of its own; ignored rows have a loss of 0."""
    torch.manual_seed(seed)
    hidden, weight, labels = case(n, d, v)
    weight.requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_ELEMENTS", 1)
        found = linear_cross_entropy(hidden, weight, labels, reduction="none", cap=cap)
    assert found.shape == (n,) and found.dtype == torch.float32
    factors = torch.randn(n)
    found.backward(factors)
    for i in range(n):
        loss, grad, _ = oracle(hidden[i : i + 1], weight, labels[i : i + 1], "sum", cap=cap)
        torch.testing.assert_close(found[i].double(), loss, rtol=2e-5, atol=1e-4)
        wanted = (factors[i] * grad[0]).to(torch.float64)
        torch.testing.assert_close(hidden.grad[i].double(), wanted, rtol=2e-5, atol=1e-4)


def test_losses_by_row_in_narrow_dtypes_and_a_frozen_heads_gradient():
    """The gradient keeps the input's dtype; a weight that can't get one is no error."""
    for dtype in (torch.bfloat16, torch.float16):
        hidden, weight, labels = case(40, 8, 30, dtype, ignored=0)
        with torch.no_grad():
            alone = linear_cross_entropy(hidden, weight, labels, reduction="none")
        weight.requires_grad_(False)
        found = linear_cross_entropy(hidden, weight, labels, reduction="none")
        assert torch.equal(alone, found)
        found.sum().backward()
        want = oracle(hidden, weight, labels, "sum")
        assert hidden.grad.dtype == dtype
        assert float(found.detach().sum()) == pytest.approx(float(want[0]), rel=2e-2)
        torch.testing.assert_close(hidden.grad.double(), want[1], rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("which", ["hidden", "weight", "both"])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_linear_cross_entropy_passes_gradcheck_over_several_chunks(
    which, reduction, cap, monkeypatch
):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 1)
    hidden, weight, labels = case(41, 3, 5, torch.float64)
    assert int((labels != IGNORE).sum()) % 32 != 0  # the last chunk is a part of one
    assert int((labels == IGNORE).sum()) > 0
    hidden.requires_grad_(which != "weight")
    weight.requires_grad_(which != "hidden")

    def run(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels, reduction=reduction, cap=cap)

    assert torch.autograd.gradcheck(run, (hidden, weight))


def test_linear_cross_entropy_chunks_bound_the_logits(monkeypatch):
    """Several chunks are really taken, and no product is larger than one."""
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 40 * 50)
    shapes = []
    mm = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda a, b, **o: (shapes.append(a.shape[0]), mm(a, b, **o))[1]
    )
    hidden, weight, _ = case(130, 6, 50)
    linear_cross_entropy(hidden.detach(), weight.detach(), torch.randint(50, (130,)))
    assert shapes == [40, 40, 40, 10]


def test_linear_cross_entropy_never_multiplies_ignored_rows():
    """An ignored row may hold NaN or Inf: it takes no part, and its gradient is exactly 0."""
    hidden, weight, labels = case(20, 4, 9, ignored=0.5)
    clean = hidden.detach().clone()
    with torch.no_grad():
        hidden[labels == IGNORE] = float("nan")
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    exact = oracle(clean, weight, labels)
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(hidden.grad[labels == IGNORE], torch.zeros_like(hidden[labels == IGNORE]))
    assert weight.grad.isfinite().all()


def test_linear_cross_entropy_reads_ignore_index():
    hidden, weight, _ = case(12, 4, 9)
    labels = torch.arange(12) % 9
    loss = linear_cross_entropy(hidden, weight, labels, ignore_index=3)
    loss.backward()
    exact = oracle(hidden, weight, labels, ignore=3)
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-5, atol=1e-6)
    assert (hidden.grad[labels == 3] == 0).all()


def test_linear_cross_entropy_survives_huge_logits():
    hidden, weight, labels = case(9, 5, 8)
    with torch.no_grad():
        hidden *= 1e4
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    torch.testing.assert_close(
        loss.double(), oracle(hidden, weight, labels)[0], rtol=1e-5, atol=1e-3
    )
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_cross_entropy_is_as_exact_as_plain_torch(dtype, cap, autocast):
    given_dtype = torch.float32 if autocast else dtype
    hidden, weight, labels = case(200, 24, 60)
    hidden, weight = (
        t.detach().to(dtype).to(given_dtype).requires_grad_() for t in (hidden, weight)
    )
    exact = oracle(hidden, weight, labels, cap=cap)
    narrow = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
    logits = (narrow[0] @ narrow[1].T).float()
    plain = torch.nn.functional.cross_entropy(
        logits if cap is None else cap * (logits / cap).tanh(), labels
    )
    plain.backward()
    with torch.autocast("cpu", dtype, enabled=autocast and dtype != torch.float32):
        loss = linear_cross_entropy(hidden, weight, labels, cap=cap)
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == given_dtype
    # Two sums of 140 rounded terms may differ by luck: the loss is held to a float's width too.
    assert abs(loss.double() - exact[0]) <= C["loss"] * abs(plain.double() - exact[0]) + 1e-6
    for found, other, truth in zip(
        (hidden.grad, weight.grad), (t.grad for t in narrow), exact[1:], strict=True
    ):
        ours, theirs = found.double() - truth, other.double() - truth
        assert ours.abs().max() <= C["max"] * theirs.abs().max()
        assert ours.norm() <= C["rms"] * theirs.norm()


@pytest.mark.parametrize("scale", [65536.0, 1e-7])
def test_linear_cross_entropy_backward_keeps_scales_outside_fp16(scale):
    """A loss scale of 2¹⁶ or a division by many tokens is no fp16 number; the products are."""
    hidden, weight, labels = case(6, 8, 5, torch.float16)
    with torch.no_grad():
        hidden *= 0.1
        weight *= 0.1 if scale > 1 else 300
    loss = linear_cross_entropy(hidden, weight, labels, reduction="sum")
    (loss * scale).backward()
    exact = oracle(hidden, weight, labels, "sum")[1] * scale
    assert hidden.grad.dtype == torch.float16
    # Half of fp16's smallest step, and its relative precision, a few times over.
    torch.testing.assert_close(hidden.grad.double(), exact, rtol=4e-3, atol=1.2e-7 + 4e-3 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_linear_cross_entropy_compiled_is_the_eager_one(dtype, cap):
    hidden, weight, labels = case(50, 8, 31, dtype)
    found = []
    for fused in (False, True):
        loss = linear_cross_entropy(hidden, weight, labels, cap=cap, fused=fused)
        found.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).norm() <= 8 * torch.finfo(dtype).eps * a.double().norm()


def test_linear_cross_entropy_of_no_rows():
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64)
    loss = linear_cross_entropy(hidden, weight, labels, reduction="sum")
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.shape == (0, 4)
    assert torch.equal(weight.grad, torch.zeros(5, 4))


def test_linear_cross_entropy_leaves_its_arguments_unchanged():
    hidden, weight, labels = case(9, 4, 5)
    before = [t.detach().clone() for t in (hidden, weight, labels)]
    linear_cross_entropy(hidden, weight, labels).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, weight, labels), strict=True))


def test_linear_cross_entropy_keeps_gradients_in_place_of_logits():
    hidden, weight, labels = case(64, 8, 500, ignored=0.0)
    weight.requires_grad_(False)
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear_cross_entropy(hidden, weight, labels)
    assert max(kept) == hidden.numel()


H, W, Y = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((H, W, Y), {"reduction": "max"}, "must be 'mean', 'sum' or 'none', found 'max'"),
        (
            (H, W.clone().requires_grad_(), Y),
            {"reduction": "none"},
            "reduction='none' needs a frozen weight, found one that requires gradients; compute",
        ),
        ((H[0], W, Y), {}, r"hidden must be \[N, D\] and weight \[V, D\] .*\[4\] and \[5, 4\]"),
        ((H, W[:, :2], Y), {}, r"with the same D, found \[3, 4\] and \[5, 2\]"),
        (
            (H, W, Y[:2]),
            {},
            r"labels must be int64 of shape \[3\], found torch.int64 of shape \[2\]",
        ),
        ((H, W, Y.int()), {}, "labels must be int64 .* found torch.int32"),
        ((H.bfloat16(), W, Y), {}, "must share a dtype, found torch.bfloat16 and torch.float32"),
        (
            (H, W, Y - 100),
            {},
            r"at least one label must count, found 3 rows all equal to .*\(-100\)",
        ),
        ((H, W, Y + 5), {}, r"labels must lie in \[0, 5\) or be -100, found values from 5 to 5"),
        ((H, W, Y - 1), {}, "found values from -1 to -1"),
    ],
)
def test_linear_cross_entropy_refuses(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*arguments, **options)
