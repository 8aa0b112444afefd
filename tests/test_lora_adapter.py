"""One adapter's parameters: every start, the algebra of its matrices, DoRA's gradients, masks."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import Conv1D
from torch import nn
from torch.nn import functional as F

import minilora
from minilora.lora.adapter import LoRAAdapter
from minilora.lora.base import base_of
from minilora.lora.config import AdapterConfig

F64 = torch.float64


KINDS = ("linear", "conv1d", "embedding", "conv2d")


def base_of_kind(kind, k=7, n=6):
    return {
        "linear": lambda: nn.Linear(k, n),
        "conv1d": lambda: Conv1D(n, k),
        "embedding": lambda: nn.Embedding(k, n),
        "conv2d": lambda: nn.Conv2d(k, n, (3, 2), stride=2, padding=1),
    }[kind]()


def input_of(kind, k=7, dtype=torch.float32):
    if kind == "embedding":
        return torch.tensor([[0, 3, 3], [k - 1, 1, 2]])
    return torch.randn((2, k, 5, 4) if kind == "conv2d" else (2, 3, k), dtype=dtype)


def rows_of(kind, weight):
    """The weight in its own layout as `[N, K]`."""
    return weight.T if kind in ("conv1d", "embedding") else weight.flatten(1)


def apply(kind, W, x, bias=None):
    """What the layer computes with the matrix W `[N, K]`, in torch's own words."""
    if kind == "embedding":
        return W.T[x]
    if kind == "conv2d":
        return F.conv2d(x, W.reshape(len(W), -1, 3, 2), bias, stride=2, padding=1)
    return F.linear(x, W, bias)


def injected(kind, dtype=torch.float32, **options):
    """A holder with one layer, its adapter, the layer's plain twin and W `[N, K]` in float64."""
    model = nn.ModuleDict({"it": base_of_kind(kind).to(dtype)})
    plain = copy.deepcopy(model["it"])
    minilora.inject(model, targets=["it"], dtype=dtype, **{"r": 2, "alpha": 5, **options})
    W = rows_of(kind, plain.weight.detach()).double()
    return model, model["it"].adapters["default"], plain, W


def randomise(factors, std=0.5):
    with torch.no_grad():
        for parameter in factors.parameters():
            parameter.add_(torch.randn_like(parameter) * std)


def dense(f):
    """scaling · B A in float64, the scaling from alpha and r."""
    s = f.alpha / (math.sqrt(f.r) if f.rslora else f.r)
    return s * f.lora_B.detach().double().flatten(1) @ f.lora_A.detach().double().flatten(1)


# ── starts ─────────────────────────────────────────────────────────────────────────────────────


PLAIN, LINEAR_ONLY = ("kaiming", "gaussian"), ("orthogonal", "pissa", "pissa_niter_3", "olora")
STARTS = [(k, i) for k in KINDS for i in PLAIN] + [(k, i) for k in KINDS[:2] for i in LINEAR_ONLY]


@pytest.mark.parametrize(("kind", "init"), STARTS)
@pytest.mark.parametrize("dora", [False, True])
def test_fresh_adapter_changes_nothing_but_rounding(kind, init, dora):
    model, factors, plain, W = injected(kind, init=init, dora=dora)
    x = input_of(kind)
    torch.testing.assert_close(model["it"](x), plain(x), rtol=1e-5, atol=5e-6)
    assert torch.equal(model["it"].base.weight, plain.weight)
    assert (factors.zero_factor is None) == (init not in PLAIN)
    for name in ("lora_A", "lora_B"):
        assert getattr(factors, name).any() == (name != factors.zero_factor)
    assert factors.delta_weight().abs().max() < 1e-5
    if dora:
        torch.testing.assert_close(factors.magnitude.detach().double(), W.norm(dim=1))


def test_embeddings_start_the_other_way_round():
    factors = LoRAAdapter(50, 400, r=8, alpha=3, embedding=True)
    assert not factors.lora_A.any() and factors.zero_factor == "lora_A"
    B = factors.lora_B.detach()
    assert abs(float(B.mean())) < 0.06 and abs(float(B.std()) - 1) < 0.06


@pytest.mark.parametrize("shape", [(7, 6), (6, 7), (9, 2), (2, 9)])
@pytest.mark.parametrize("r", [2, 4, 8])
def test_orthogonal_factors_multiply_to_zero(r, shape):
    factors = LoRAAdapter(*shape, r=r, alpha=3, init="orthogonal")
    A, B = factors.lora_A.detach().double(), factors.lora_B.detach().double()
    assert A.abs().max() > 1e-3 and B.abs().max() > 1e-3
    assert (B @ A).abs().max() < 1e-6
    # Two halves of one basis: together they span at most r directions, each at most r / 2.
    for factor in (A, B.T):
        assert np.linalg.matrix_rank(factor.numpy(), tol=1e-5) == min(r // 2, factor.shape[1])


def best_part(W, r):
    """The best rank-r part of W `[N, K]`, by numpy."""
    U, S, V = np.linalg.svd(W.numpy(), full_matrices=False)
    return torch.from_numpy(U[:, :r] * S[:r] @ V[:r])


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [5, -5])  # a negative alpha gives NaN
@pytest.mark.parametrize("r", [1, 4, 6])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_pissa_takes_off_the_best_part(kind, r, alpha, rslora):
    _, factors, _, W = injected(kind, r=r, alpha=alpha, rslora=rslora, init="pissa")
    offset = factors.offset_B.double() @ factors.offset_A.double()
    torch.testing.assert_close(offset, best_part(W, r), rtol=0, atol=2e-5)
    torch.testing.assert_close(dense(factors), best_part(W, r), rtol=0, atol=2e-5)


def test_pissa_by_iterations_comes_close():
    low = torch.randn(40, 3) @ torch.randn(3, 30)
    model = nn.ModuleDict({"it": nn.Linear(30, 40)})
    model["it"].weight.data.copy_(low + 0.01 * torch.randn(40, 30))
    W = model["it"].weight.detach().double()
    minilora.inject(model, 3, 7, targets=["it"], init="pissa_niter_6")
    f = model["it"].adapters["default"]
    error = (f.offset_B.double() @ f.offset_A.double() - best_part(W, 3)).norm()
    assert error < 1e-3 * W.norm()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("r", [1, 4, 6])
def test_olora_takes_the_first_columns_of_qr(kind, r):
    """B has orthonormal columns that span W's first r, so that B A equals W there."""
    _, f, _, W = injected(kind, r=r, alpha=5, init="olora")
    A, B = f.lora_A.detach().double(), f.lora_B.detach().double()
    torch.testing.assert_close(B.T @ B, torch.eye(r, dtype=F64), rtol=0, atol=1e-5)
    torch.testing.assert_close((B @ A)[:, :r], W[:, :r], rtol=0, atol=1e-5)
    torch.testing.assert_close(B @ A, B @ B.T @ W, rtol=0, atol=1e-5)
    offset = f.offset_B.double() @ f.offset_A.double()
    torch.testing.assert_close(offset, 5 / r * B @ A, rtol=0, atol=1e-5)


# offset_A is lora_A's own memory, so training moves what must stay
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dora", [False, True])
def test_training_leaves_the_offset_as_it_was(init, dora):
    model, f, plain, W = injected("linear", init=init, dora=dora)
    offset = f.offset_B.double() @ f.offset_A.double()
    optimizer = torch.optim.AdamW(f.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model["it"](torch.randn(8, 7)).square().sum().backward()
        optimizer.step()
    assert torch.equal(f.offset_B.double() @ f.offset_A.double(), offset)
    expected = W + dense(f) - offset
    if dora:
        expected = f.magnitude.detach().double()[:, None] * F.normalize(expected, dim=1)
    x = torch.randn(4, 7)
    y = apply("linear", expected, x.double(), plain.bias.double())
    torch.testing.assert_close(model["it"](x).double(), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["kaiming", "pissa", "olora", "orthogonal"])
def test_narrow_factors_start_within_their_rounding(init):
    model = nn.ModuleDict({"it": nn.Linear(7, 6)})
    plain, x = copy.deepcopy(model["it"]), torch.randn(5, 7)
    minilora.inject(model, 2, 5, targets=["it"], init=init, dora=True, dtype="bfloat16")
    torch.testing.assert_close(model["it"](x), plain(x), rtol=2**-8, atol=2**-7)


# a row of zeros has the length 0, and 0 / 0 is NaN
@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_fresh_dora_adapter_leaves_a_row_of_zeros_alone(kind):
    model = nn.ModuleDict({"it": base_of_kind(kind)})
    rows_of(kind, model["it"].weight.data)[2] = 0
    plain, x = copy.deepcopy(model["it"]), input_of(kind)
    minilora.inject(model, 2, 5, targets=["it"], dora=True)
    torch.testing.assert_close(model["it"](x), plain(x), rtol=1e-5, atol=1e-5)


# ── the algebra of the matrices ────────────────────────────────────────────────────────────────


@settings(max_examples=80)
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 9),
    r=st.integers(1, 13),
    zero=st.sampled_from(["nothing", "a row", "B", "A", "W"]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    offset=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_row_lengths_are_those_of_the_dense_sum(n, k, r, zero, scale, offset, seed):
    torch.manual_seed(seed)
    factors = LoRAAdapter(k, n, r=r, alpha=1.7 * r + 1)
    randomise(factors, scale)
    W = torch.randn(n, k)
    if offset:
        factors.offset_A, factors.offset_B = torch.randn(2, k), torch.randn(n, 2)
    if zero == "a row":
        W[0], factors.lora_B.data[0] = 0, 0
        if offset:
            factors.offset_B[0] = 0
    for name in ("A", "B"):
        if zero == name:
            getattr(factors, f"lora_{name}").data.zero_()
    if zero == "W":
        W.zero_()
    total = W.double() + dense(factors)
    A, B = factors.lora_A.detach().double(), factors.lora_B.detach().double()
    parts = W.double().norm(dim=1) + abs(factors.scaling) * B.abs() @ A.norm(dim=1)
    if offset:
        A, B = factors.offset_A.double(), factors.offset_B.double()
        total -= B @ A
        parts += B.abs() @ A.norm(dim=1)
    found = factors.row_lengths(W)
    assert found.dtype == torch.float32 and not found.requires_grad
    # Squares are added and may cancel: their rounding counts against the parts, not the sum.
    for lengths, epsilon in ((found, 2e-7), (factors.double().row_lengths(W.double()), 3e-16)):
        error = (lengths.double().square() - total.square().sum(1)).abs()
        assert (error <= 8 * (r + k) * epsilon * parts.square()).all()
        if zero == "a row":
            assert lengths[0] == 0


@settings(max_examples=40)
@given(
    r=st.integers(1, 5),
    alpha=st.sampled_from([0.3, 7.0, -2.0]),
    rslora=st.booleans(),
    extra=st.sampled_from(["none", "offset"]),
    kernel=st.sampled_from([(), (3, 2)]),
    seed=st.integers(0, 2**16),
)
def test_product_plain_and_delta_weight_agree(r, alpha, rslora, extra, kernel, seed):
    torch.manual_seed(seed)
    f = LoRAAdapter(4, 5, r=r, alpha=alpha, rslora=rslora, kernel_size=kernel)
    randomise(f)
    K = 4 * math.prod(kernel)
    expected = dense(f)
    if extra == "offset":
        f.offset_A, f.offset_B = torch.randn(3, K), torch.randn(5, 3)
        expected = expected - f.offset_B.double() @ f.offset_A.double()
    A, B = f.product()
    assert A.shape == (A.shape[0], K) and B.shape == (5, A.shape[0])
    assert not A.requires_grad and not B.requires_grad
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(B.double() @ A.double(), expected, **tolerance)
    torch.testing.assert_close(f.delta_weight().double(), expected, **tolerance)
    A, B, rank, number, rooted = f.plain()
    assert A.shape[0] == B.shape[1] == rank == (r + 3 if extra == "offset" else r)
    assert A.shape[1:] == (4, *kernel) or extra == "offset"
    s = number / (math.sqrt(rank) if rooted else rank)
    found = s * B.double().flatten(1) @ A.double().flatten(1)
    torch.testing.assert_close(found, expected, **tolerance)


# ── DoRA ───────────────────────────────────────────────────────────────────────────────────────


def dora_case(kind, **options):
    """A float64 layer with a moved DoRA adapter, and its input."""
    model, f, plain, W = injected(kind, dtype=F64, dora=True, alpha=3, **options)
    randomise(f, 0.3)
    x = input_of(kind, dtype=F64)
    if kind != "embedding":
        x.requires_grad_()
    return model["it"], f, plain, W, x


def dora_oracle(kind, W, x, bias, A, B, m, s, frozen=0.0):
    """`m/‖W + sBA‖ · (W + sBA) x + b`, the length a constant to the gradient."""
    total = W - frozen + s * B.flatten(1) @ A.flatten(1)
    return apply(kind, (m / total.norm(dim=1).detach())[:, None] * total, x, bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rslora", [False, True])
def test_dora_gradients_are_those_of_the_oracle(kind, rslora):
    layer, f, plain, W, x = dora_case(kind, rslora=rslora)
    y = layer(x)
    G = torch.randn_like(y)
    inputs = [f.lora_A, f.lora_B, f.magnitude] + ([] if kind == "embedding" else [x])
    found = torch.autograd.grad(y, inputs, G)
    A, B, m = (t.detach().clone().requires_grad_() for t in inputs[:3])
    s = 3 / (math.sqrt(2) if rslora else 2)
    expected_y = dora_oracle(kind, W, x, getattr(plain, "bias", None), A, B, m, s)
    torch.testing.assert_close(y, expected_y)
    expected = torch.autograd.grad(expected_y, [A, B, m, *inputs[3:]], G)
    for here, there in zip(found, expected, strict=True):
        torch.testing.assert_close(here, there)


@pytest.mark.parametrize("kind", KINDS)
def test_dora_passes_gradcheck_where_the_length_is_held(kind):
    layer, f, _, W, x = dora_case(kind)
    lengths = f.row_lengths(W)
    f.row_lengths = lambda _: lengths  # a constant to the gradient, so one to the differences too

    def run(A, B, m, *x_given):
        names = ("lora_A", "lora_B", "magnitude")
        swap = {f"adapters.default.{n}": v for n, v in zip(names, (A, B, m), strict=True)}
        return torch.func.functional_call(layer, swap, x_given or (x,))

    inputs = (f.lora_A, f.lora_B, f.magnitude) + (() if kind == "embedding" else (x,))
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_dora_drops_x_in_the_branch_and_in_its_part_of_the_base(kind):
    """`y = W x + b + (ratio − 1) W D(x) + ratio · s B A D(x)`, one mask for both."""
    layer, f, plain, W, x = dora_case(kind, dropout=0.4)
    layer.train()
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    mask = torch.empty(x.shape).bernoulli_(0.6)
    D = x * mask.double() / 0.6
    delta = 3 / 2 * f.lora_B.detach().flatten(1) @ f.lora_A.detach().flatten(1)
    ratio = f.magnitude.detach() / (W + delta).norm(dim=1)
    change = ratio[:, None] * (W + delta) - W
    expected = apply(kind, W, x, plain.bias) + apply(kind, change, D)
    assert 0.3 < mask.mean() < 0.9
    torch.testing.assert_close(y, expected)
    layer.eval()
    torch.testing.assert_close(layer(x), apply(kind, W + change, x, plain.bias))


# with DoRA the offset sees the dropped x, without it the whole x
@pytest.mark.parametrize("dora", [False, True])
def test_dropout_does_not_reach_the_frozen_offset(dora):
    """W − offset is PiSSA's base: its x is whole, and DoRA's part of the base sees D(x)."""
    model, f, plain, W = injected("linear", dtype=F64, init="pissa", dropout=0.4, dora=dora)
    base = W - f.offset_B @ f.offset_A
    f.offset_A = f.offset_A.clone()
    randomise(f, 0.3)
    x = input_of("linear", dtype=F64)
    torch.manual_seed(5)
    y = model["it"].train()(x)
    torch.manual_seed(5)
    D = x * torch.empty(x.shape).bernoulli_(0.6).double() / 0.6
    delta = dense(f)
    ratio = f.magnitude.detach() / (base + delta).norm(dim=1) if dora else torch.ones(6)
    change = ratio[:, None] * (base + delta) - base
    torch.testing.assert_close(y, F.linear(x, base, plain.bias) + F.linear(D, change))


# ── lora_bias ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["fused", "general"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_lora_bias_is_scaled_like_the_branch(kind, rslora, path):
    model, f, plain, W = injected(kind, lora_bias=True, rslora=rslora, r=3)
    assert not f.lora_bias.any()
    randomise(f)
    if path == "general":
        model["it"].base.register_forward_hook(lambda *_: None)
    x = input_of(kind)
    s = 5 / (math.sqrt(3) if rslora else 3)
    bias = plain.bias.double() + s * f.lora_bias.detach().double()
    expected = apply(kind, W + dense(f), x.double(), bias)
    y = model["it"](x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    G = torch.randn_like(y)
    y.backward(G)
    total = s * (G.sum((0, 2, 3)) if kind == "conv2d" else G.sum((0, 1)))
    torch.testing.assert_close(f.lora_bias.grad, total, rtol=1e-4, atol=1e-4)
    before = plain.bias.detach().clone()
    minilora.merge(model)
    torch.testing.assert_close(model["it"].eval()(x).double(), expected, rtol=1e-4, atol=1e-4)
    minilora.unmerge(model)
    assert torch.equal(model["it"].base.bias, before)


# ── what it says of itself ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "given",
    [
        {"r": 2, "alpha": 5, "dropout": 0.1, "rslora": True, "init": "gaussian", "lora_bias": True},
        {"r": 2, "alpha": 5, "dora": True, "init": "olora"},
    ],
    ids=["bias", "dora"],
)
def test_an_adapter_says_which_options_it_was_made_with(given):
    asked = AdapterConfig(**given).factor_options("layer")
    assert base_of(nn.Linear(4, 5)).new_adapter(**asked).options() == asked


def test_adapter_shows_its_numbers():
    _, f, _, _ = injected("linear", init="olora", dora=True, dropout=0.1)
    assert repr(f) == "LoRAAdapter(r=2, alpha=5, scaling=2.5, dropout=0.1, dora, init=olora)"
    assert repr(LoRAAdapter(3, 4, r=2, alpha=1)) == "LoRAAdapter(r=2, alpha=1, scaling=0.5)"


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("linear", (6, 7)), ("conv1d", (6, 7)), ("embedding", (6, 7)), ("conv2d", (6, 42))],
)
def test_every_base_has_a_matrix_and_a_way_back(kind, shape):
    base = base_of(base_of_kind(kind))
    W = base.matrix()
    assert W.shape == shape == base.shape
    assert torch.equal(base.as_weight(W), base.module.weight)
    f = base.new_adapter(r=2, alpha=3)
    assert f.delta_weight().shape == shape
    assert f.lora_A.flatten(1).shape == (2, shape[1]) and f.lora_B.shape[:2] == (6, 2)
