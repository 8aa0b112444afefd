"""LoRALayer: which path it takes, that every path is right, and what it shows of its base."""

import copy
import math
import pickle
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from minilora.kernels import FrozenLinear, Stored
from minilora.lora.adapter import LoRAAdapter, Pair
from minilora.lora.layer import LoRALayer, choose_path, lora_layers
from minilora.lora.routes import Merged
from minilora.lora.samples import weight_sample
from minilora.quantization import Quantization, QuantizedLinear

# How many times plain torch's own error, in the same dtype, a layer may make: the one table.
C = {"max": 2.0, "rms": 1.5}


def layer(
    k=6, n=5, *, adapters=(("a", 3, 4.0),), dropout=0.0, bias=True, dtype=torch.float32, **options
):
    """A frozen Linear with adapters (name, r, alpha), all active, whose B is not zero."""
    base = nn.Linear(k, n, bias=bias, dtype=dtype).requires_grad_(False)
    wrapped = LoRALayer(base, **options)
    for name, r, alpha in adapters:
        factors = LoRAAdapter(
            k, n, r=r, alpha=alpha, dropout=dropout, dtype=torch.promote_types(dtype, torch.float32)
        )
        nn.init.normal_(factors.lora_B)
        wrapped.adapters[name] = factors
    wrapped.active = tuple(wrapped.adapters)
    return wrapped


def oracle(wrapped, x):
    """Dense float64: x · (W + Σ alpha/r · B A)ᵀ + b."""
    W = wrapped.base.weight.detach().double()
    for name in wrapped.active:
        f = wrapped.adapters[name]
        W = W + f.alpha / f.r * f.lora_B.detach().double() @ f.lora_A.detach().double()
    y = x.detach().double() @ W.T
    return y if wrapped.base.bias is None else y + wrapped.base.bias.detach().double()


def nothing(*_):
    """A hook that changes nothing."""


def force_general(wrapped):
    wrapped.base.register_forward_hook(nothing)
    return wrapped


# ── numbers ────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=50)
@given(
    shape=st.sampled_from([(6,), (1, 6), (0, 6), (7, 6), (2, 3, 6), (2, 0, 6), (2, 1, 3, 6)]),
    ranks=st.lists(st.sampled_from([1, 2, 5, 11]), min_size=1, max_size=3),
    bias=st.booleans(),
    fused=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_forward_sums_the_active_adapters_like_the_oracle(shape, ranks, bias, fused, strided, seed):
    torch.manual_seed(seed)
    names = [(f"a{i}", r, 1.5 * r + 1 + i) for i, r in enumerate(ranks)]
    wrapped = layer(adapters=names, bias=bias)
    if not fused:
        force_general(wrapped)
    x = torch.randn(shape)
    if strided:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    x.requires_grad_()
    y = wrapped(x)
    assert wrapped.last_path == (None if not x.numel() else "fused" if fused else "general")
    torch.testing.assert_close(y.double(), oracle(wrapped, x), rtol=1e-5, atol=5e-5)
    G = torch.randn_like(y)
    y.backward(G)
    W = sum(f.scaling * f.lora_B.double() @ f.lora_A.double() for f in wrapped.adapters.values())
    W = (W + wrapped.base.weight.double()).detach()
    torch.testing.assert_close(x.grad.double(), G.double() @ W, rtol=1e-5, atol=1e-4)
    flat_g, flat_x = G.double().reshape(-1, 5), x.detach().double().reshape(-1, 6)
    for f in wrapped.adapters.values():
        A, B = f.lora_A.detach().double(), f.lora_B.detach().double()
        s = f.alpha / f.r
        torch.testing.assert_close(
            f.lora_A.grad.double(), s * B.T @ flat_g.T @ flat_x, rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            f.lora_B.grad.double(), s * flat_g.T @ flat_x @ A.T, rtol=1e-4, atol=1e-4
        )
    assert wrapped.base.weight.grad is None


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("path", ["fused", "general"])
def test_forward_passes_gradcheck(path, bias, p):
    wrapped = layer(4, 3, adapters=(("a", 2, 5.0),), dropout=p, bias=bias, dtype=torch.float64)
    if path == "general":
        force_general(wrapped)

    def run(x, A, B):
        torch.manual_seed(5)  # the same mask at every evaluation
        swap = {"adapters.a.lora_A": A, "adapters.a.lora_B": B}
        return torch.func.functional_call(wrapped, swap, (x,))

    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    f = wrapped.adapters["a"]
    assert torch.autograd.gradcheck(run, (x, f.lora_A, f.lora_B))
    assert wrapped.last_path == path


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_both_paths_agree(autocast, p):
    fused = layer(33, 17, adapters=(("a", 5, 7.0),), dropout=p)
    general = force_general(layer(33, 17, adapters=(("a", 5, 7.0),), dropout=p))
    general.load_state_dict(fused.state_dict())
    grads = []
    for wrapped in (fused, general):
        torch.manual_seed(1)
        x = torch.randn(9, 33, requires_grad=True)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            y = wrapped(x)
        y.backward(torch.ones_like(y))
        f = wrapped.adapters["a"]
        grads.append((y, x.grad, f.lora_A.grad, f.lora_B.grad))
    assert (fused.last_path, general.last_path) == ("fused", "general")
    for a, b in zip(*grads, strict=True):
        assert a.dtype == b.dtype
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error < (1e-6 if autocast is None else 2**-7)


@pytest.mark.parametrize("mode", ["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["fused", "general"])
def test_forward_is_as_exact_as_plain_torch_in_the_same_dtype(path, dtype, mode):
    stored = torch.float32 if mode == "autocast" else dtype
    wrapped = layer(130, 70, adapters=(("a", 12, 20.0),), dtype=stored)
    wrapped.adapters["a"].lora_B.data.div_(12**0.5)
    if path == "general":
        force_general(wrapped)
    f, base = wrapped.adapters["a"], wrapped.base
    x = torch.randn(64, 130, dtype=stored, requires_grad=True)
    G = torch.randn(64, 70)
    with torch.autocast("cpu", dtype, enabled=mode == "autocast" and dtype != torch.float32):
        y = wrapped(x)
    assert y.dtype == dtype
    y.backward(G.to(dtype))
    assert wrapped.last_path == path

    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, f.lora_A, f.lora_B)]
    plain = nn.functional.linear(leaves[0], base.weight.to(dtype), base.bias.to(dtype))
    plain = plain + (20 / 12) * (leaves[0] @ leaves[1].T @ leaves[2].T)
    plain.backward(G.to(dtype))

    X, A, B, W = (t.detach().to(dtype).double() for t in (x, f.lora_A, f.lora_B, base.weight))
    Gd = G.to(dtype).double()
    delta = 20 / 12 * (B @ A)
    exact = (
        X @ (W + delta).T + base.bias.to(dtype).double(),
        Gd @ (W + delta),
        20 / 12 * B.T @ Gd.T @ X,
        20 / 12 * Gd.T @ X @ A.T,
    )
    ours = (y, x.grad, f.lora_A.grad, f.lora_B.grad)
    assert f.lora_A.grad.dtype == f.lora_B.grad.dtype == torch.float32
    for found, other, truth in zip(ours, (plain, *(t.grad for t in leaves)), exact, strict=True):
        a, b = found.detach().double() - truth, other.detach().double() - truth
        assert a.abs().max() <= C["max"] * b.abs().max()
        assert a.norm() <= C["rms"] * b.norm()


def test_compute_dtype_float32_gives_a_bf16_base_the_f32_branch():
    wrapped = layer(64, 48, dtype=torch.bfloat16, compute_dtype=torch.float32)
    x = torch.randn(10, 64, dtype=torch.bfloat16)
    f = wrapped.adapters["a"]
    branch = 4 / 3 * (x.double() @ f.lora_A.double().T @ f.lora_B.double().T)
    expected = (wrapped.base(x).double() + branch).bfloat16()
    found = wrapped(x)
    assert wrapped.last_path == "general"
    assert found.dtype == torch.bfloat16
    assert (found != expected).float().mean() < 0.02  # ties alone may fall the other way


def test_no_active_adapter_is_the_base_to_the_bit():
    wrapped = layer()
    x = torch.randn(4, 6)
    wrapped.active = ()
    assert torch.equal(wrapped(x), wrapped.base(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["fused", "general"])
@pytest.mark.parametrize("bias", [True, False])
def test_zero_b_is_the_base_to_the_bit(path, dtype, bias):
    wrapped = layer(33, 17, dtype=dtype, bias=bias)
    nn.init.zeros_(wrapped.adapters["a"].lora_B)
    if path == "general":
        force_general(wrapped)
    x = torch.randn(5, 33, dtype=dtype)
    assert torch.equal(wrapped(x), wrapped.base(x))
    assert wrapped.last_path == path


# ── dropout ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["fused", "general"])
def test_dropout_masks_the_branch_and_its_grad_x(path):
    """W = 0 leaves the branch alone: one mask explains both y and grad_x."""
    wrapped = layer(40, 5, dropout=0.5, bias=False)
    nn.init.zeros_(wrapped.base.weight)
    if path == "general":
        force_general(wrapped)
    x = torch.randn(7, 40, requires_grad=True)
    y = wrapped(x)
    y.backward(torch.randn_like(y))
    keep = (x.grad != 0).double()
    assert 0.3 < float(keep.mean()) < 0.7
    torch.testing.assert_close(y.double(), oracle(wrapped, x * keep / 0.5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["fused", "general"])
def test_dropout_is_off_in_eval_and_unbiased_in_training(path):
    wrapped = layer(20, 6, dropout=0.3)
    if path == "general":
        force_general(wrapped)
    x = torch.randn(1, 20)
    wrapped.eval()
    torch.testing.assert_close(wrapped(x).double(), oracle(wrapped, x), rtol=1e-5, atol=1e-5)
    assert torch.equal(wrapped(x), wrapped(x))
    wrapped.train()
    assert not torch.equal(wrapped(x), wrapped(x))
    draws = wrapped(x.expand(20000, 20)).double()
    error = (draws.mean(0) - oracle(wrapped, x)[0]).abs()
    assert (error < 5 * draws.std(0) / 20000**0.5).all()  # 5 standard errors of a mean


def test_several_adapters_draw_their_own_masks():
    """With dropout each adapter's branch is masked alone, so the layer takes the general path."""
    wrapped = layer(30, 4, adapters=(("a", 2, 3.0), ("b", 3, 5.0)), dropout=0.5, bias=False)
    nn.init.zeros_(wrapped.base.weight)
    for f in wrapped.adapters.values():
        f.lora_A.data.fill_(1)
        f.lora_B.data.zero_()
    wrapped.adapters["a"].lora_B.data[0, 0] = 1
    wrapped.adapters["b"].lora_B.data[1, 0] = 1
    x = torch.ones(1, 30, requires_grad=True)
    y = wrapped(x)
    assert wrapped.last_path == "general"
    kept_a = torch.autograd.grad(y[0, 0], x, retain_graph=True)[0] != 0
    kept_b = torch.autograd.grad(y[0, 1], x)[0] != 0
    assert not torch.equal(kept_a, kept_b)
    assert not kept_a.all()
    assert not kept_b.all()


# ── which path ─────────────────────────────────────────────────────────────────────────────────


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class TensorLike(torch.Tensor):
    pass


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def replace_forward(base):
    plain = base.forward
    base.forward = lambda x: 2 * plain(x)  # as accelerate's hooks do


SURPRISES = {
    "forward hook": lambda b: b.register_forward_hook(lambda m, args, y: 2 * y),
    "forward pre-hook": lambda b: b.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "replaced forward": replace_forward,
    "parametrization": lambda b: parametrize.register_parametrization(b, "weight", Twice()),
    "weight norm": parametrizations.weight_norm,
    "subclass": lambda b: setattr(b, "__class__", Doubled),
    "trainable weight": lambda b: b.weight.requires_grad_(True),
    "trainable bias": lambda b: b.bias.requires_grad_(True),
    "tensor subclass": lambda b: b._parameters.update(
        weight=nn.Parameter(b.weight.detach().as_subclass(TensorLike), requires_grad=False)
    ),
    "full backward hook": lambda b: b.register_full_backward_hook(nothing),
    "full backward pre-hook": lambda b: b.register_full_backward_pre_hook(nothing),
}


@pytest.mark.parametrize("surprise", SURPRISES)
def test_general_path_serves_whatever_the_base_really_computes(surprise):
    wrapped = layer()
    assert wrapped.view.products() is not None
    SURPRISES[surprise](wrapped.base)
    assert wrapped.view.products() is None
    x = torch.randn(4, 6, requires_grad=True)
    f = wrapped.adapters["a"]
    branch = 4 / 3 * (x.double() @ f.lora_A.double().T @ f.lora_B.double().T)
    y = wrapped(x)
    assert wrapped.last_path == "general"
    expected = wrapped.base(x).double() + branch
    torch.testing.assert_close(torch.Tensor(y.detach()), torch.Tensor(expected.detach()).float())


def test_general_path_honours_global_module_hooks():
    wrapped = layer()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(m))
    try:
        assert wrapped.view.products() is None
        wrapped(torch.randn(2, 6))
    finally:
        handle.remove()
    assert wrapped.base in seen
    assert wrapped.view.products() is not None


def test_hooks_on_the_base_fire_and_backward_hooks_see_its_gradient():
    wrapped = layer()
    seen = []
    wrapped.base.register_full_backward_hook(lambda m, gi, go: seen.append((gi[0], go[0])))
    x = torch.randn(4, 6, requires_grad=True)
    G = torch.randn(4, 5)
    wrapped(x).backward(G)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0][0], G @ wrapped.base.weight)
    torch.testing.assert_close(seen[0][1], G)


def test_trainable_base_weight_gets_its_gradient():
    wrapped = layer()
    wrapped.base.weight.requires_grad_(True)
    x, G = torch.randn(4, 6), torch.randn(4, 5)
    wrapped(x).backward(G)
    torch.testing.assert_close(wrapped.base.weight.grad, G.T @ x)
    assert wrapped.base.bias.grad is None


def test_compute_dtype_equal_to_the_inputs_stays_fused():
    wrapped = layer(compute_dtype=torch.float32)
    wrapped(torch.randn(2, 6))
    assert wrapped.last_path == "fused"
    wrapped.compute_dtype = torch.float64
    x = torch.randn(2, 6)
    y = wrapped(x)
    assert (wrapped.last_path, y.dtype) == ("general", torch.float32)
    torch.testing.assert_close(y.double(), oracle(wrapped, x), rtol=1e-6, atol=1e-6)


def test_an_input_of_another_dtype_meets_the_base_as_it_would_alone():
    wrapped = layer(dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        wrapped(torch.randn(2, 6))
    assert wrapped.last_path == "general"
    wrapped.base.register_forward_pre_hook(lambda m, args: (args[0].bfloat16(),))
    x = torch.randn(2, 6)
    f = wrapped.adapters["a"]
    branch = 4 / 3 * (x @ f.lora_A.T @ f.lora_B.T)
    torch.testing.assert_close(wrapped(x), (wrapped.base(x).float() + branch).bfloat16())


def test_float64_under_autocast_stays_float64():
    wrapped = layer(dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = wrapped(x)
    assert (y.dtype, wrapped.last_path) == (torch.float64, "fused")
    torch.testing.assert_close(y, oracle(wrapped, x))


@pytest.mark.parametrize("adapters", [1, 2])
def test_fused_path_keeps_no_second_copy(adapters):
    """Kept for backward beyond what is there anyway: S, and with several adapters their stack."""
    M, K, N, R = 32, 24, 40, 3
    wrapped = layer(K, N, adapters=[(f"a{i}", R, 4.0) for i in range(adapters)])
    x = torch.randn(M, K, requires_grad=True)
    there = {t.untyped_storage().data_ptr() for t in (x, *wrapped.parameters())}
    new = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in there:
            new[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        wrapped(x)
    stack = 0 if adapters == 1 else adapters * R * (K + N) * 4
    assert sum(new.values()) == M * R * adapters * 4 + stack


@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="Inductor needs a C++ compiler"
)
def test_compiled_layer_gives_the_same_numbers():
    wrapped = layer(24, 20, adapters=(("a", 3, 4.0),))
    compiled = torch.compile(wrapped, fullgraph=True)
    results = []
    for run in (wrapped, compiled):
        x = torch.linspace(-1, 1, 8 * 24).reshape(8, 24).requires_grad_()
        wrapped.zero_grad()
        y = run(x)
        (y**2).sum().backward()
        f = wrapped.adapters["a"]
        results.append([t.detach().clone() for t in (y, x.grad, f.lora_A.grad, f.lora_B.grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ── one adapter's numbers ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("r", "alpha", "rslora", "scaling"),
    [(4, 6, False, 1.5), (4, 6, True, 3.0), (1, 0.5, False, 0.5), (3, -6, False, -2.0)],
)
def test_scaling_is_alpha_over_r_or_its_root(r, alpha, rslora, scaling):
    f = LoRAAdapter(5, 7, r=r, alpha=alpha, rslora=rslora)
    assert f.scaling == pytest.approx(scaling)
    nn.init.normal_(f.lora_B)
    expected = scaling * (f.lora_B.double() @ f.lora_A.double())
    torch.testing.assert_close(f.delta_weight().double(), expected, rtol=1e-6, atol=1e-6)
    assert not f.delta_weight().requires_grad
    assert f"scaling={scaling:g}" in repr(f)


def test_delta_weight_of_narrow_factors_is_computed_wide():
    f = LoRAAdapter(50, 40, r=8, alpha=12, dtype=torch.bfloat16)
    nn.init.normal_(f.lora_B)
    assert f.delta_weight().dtype == torch.float32
    exact = 1.5 * (f.lora_B.double() @ f.lora_A.double())
    torch.testing.assert_close(f.delta_weight().double(), exact, rtol=1e-5, atol=1e-5)


def test_init_kaiming_is_uniform_within_its_bound():
    """kaiming_uniform(a=√5) of fan-in K is uniform on ±1/√K, variance 1/(3K)."""
    f = LoRAAdapter(400, 10, r=200, alpha=3)
    bound = 1 / math.sqrt(400)
    assert f.lora_A.abs().max() <= bound
    assert f.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert torch.equal(f.lora_B, torch.zeros(10, 200))


def test_init_gaussian_has_standard_deviation_one_over_r():
    f = LoRAAdapter(2000, 10, r=50, alpha=3, init="gaussian")
    assert f.lora_A.std().item() == pytest.approx(1 / 50, rel=0.02)
    assert abs(f.lora_A.mean().item()) < 5 / 50 / math.sqrt(f.lora_A.numel())
    assert torch.equal(f.lora_B, torch.zeros(10, 50))


# ── what it shows ──────────────────────────────────────────────────────────────────────────────


def test_layer_shows_its_base_and_says_what_it_does():
    wrapped = layer(backend="torch", compute_dtype=torch.float32, dropout=0.1)
    assert wrapped.weight is wrapped.base.weight
    assert wrapped.bias is wrapped.base.bias
    assert (wrapped.in_features, wrapped.out_features) == (6, 5)
    shown = repr(wrapped)
    for part in ("active=['a']", "backend=torch", "compute_dtype=torch.float32", "dropout=0.1"):
        assert part in shown
    assert "merged" not in shown
    wrapped.enter(Merged(("a",)))
    assert "merged=['a']" in repr(wrapped)


@pytest.mark.parametrize("training", [True, False])
def test_layer_keeps_the_base_as_it_is_and_its_mode(training):
    base = nn.Linear(3, 4).train(training)
    wrapped = LoRALayer(base)
    assert wrapped.base is base
    assert wrapped.training is base.training is training


def test_merged_layer_refuses_a_training_forward():
    wrapped = layer()
    wrapped.enter(Merged(("a",)))
    x = torch.randn(2, 6)
    with pytest.raises(RuntimeError, match="a merged adapter can't be trained: a is merged"):
        wrapped(x)
    with torch.no_grad():
        assert torch.equal(wrapped(x), wrapped.base(x))
    wrapped.eval()
    assert torch.equal(wrapped(x), wrapped.base(x))


def test_lora_layers_lists_a_shared_layer_once():
    shared = layer()
    model = nn.ModuleDict({"x": shared, "y": nn.ModuleList([shared]), "z": layer()})
    assert list(lora_layers(model)) == ["x", "z"]


def test_weight_sample_depends_on_the_name_and_the_values_alone():
    weight = torch.randn(30, 20)
    sample = weight_sample("a.b", weight)
    assert sample.shape == (64,)
    assert sample.dtype == torch.float32
    assert set(sample.tolist()) <= set(weight.flatten().tolist())
    assert torch.equal(sample, weight_sample("a.b", weight.t().contiguous().t()))
    assert torch.equal(sample, weight_sample("a.b", nn.Parameter(weight)).detach())
    assert not torch.equal(sample, weight_sample("a.c", weight))
    torch.manual_seed(9)
    state = torch.get_rng_state()
    weight_sample("a.b", weight)
    assert torch.equal(state, torch.get_rng_state())  # a fingerprint must not move the dropout


def test_dora_in_bfloat16_keeps_small_changes_of_length():
    """m/‖W‖ − 1 of 0.001 is below bfloat16's step at 1, and must still act."""
    torch.manual_seed(0)
    base = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    wrapped = LoRALayer(base)
    wrapped.adapters["a"] = wrapped.view.new_adapter(r=2, alpha=3, dora=True)
    wrapped.active = ("a",)
    wrapped.adapters["a"].magnitude.data.mul_(1.001)
    x = torch.randn(4000, 64, dtype=torch.bfloat16)
    added = wrapped.dora(base(x), x, wrapped.adapters["a"], torch.bfloat16)
    expected = 0.001 * x.double() @ base.weight.double().T
    error = (added.double() - expected).square().mean() / expected.square().mean()
    assert error.sqrt() < 0.01


# ── the choice of a path, and products that are made once ──────────────────────────────────────

A, B = torch.zeros(2, 6), torch.zeros(5, 2)
F32, BF16 = torch.float32, torch.bfloat16
DENSE = FrozenLinear((torch.zeros(5, 6), None), None, None)
CODES = DENSE._replace(tensors=(A,), stored=Stored("int8", 0, "auto", "auto"))
ONE, DROPPED = [Pair(A, B, 2.0, 0.0)], [Pair(A, B, 2.0, 0.1)]


@pytest.mark.parametrize(
    ("expected", "arguments"),
    [
        ("fused", ("auto", DENSE, ONE, F32, False, None)),
        ("triton", ("triton", DENSE, ONE, F32, False, None)),
        ("fused", ("auto", DENSE, DROPPED, F32, False, F32)),
        ("fused", ("auto", DENSE, ONE * 2, F32, False, None)),
        ("fused", ("auto", DENSE, ONE, BF16, True, None)),  # autocast casts the weight
        ("fused", ("auto", CODES, ONE, BF16, False, None)),  # codes are decoded to any dtype
        ("general", ("triton", None, ONE, F32, False, None)),
        ("general", ("auto", DENSE, ONE, BF16, False, None)),
        ("general", ("auto", CODES, ONE, torch.int64, False, None)),
        ("general", ("auto", DENSE, ONE, F32, False, torch.float64)),
        ("general", ("auto", DENSE, ONE + DROPPED, F32, False, None)),  # masks of their own
    ],
)
def test_the_path_is_chosen_by_what_the_fused_step_can_do(expected, arguments):
    assert choose_path(*arguments) == expected


CHANGES = {
    "a cast": lambda m: m.double(),
    "another bias": lambda m: m.base._parameters.update(bias=nn.Parameter(torch.ones(5), False)),
    "a state dict": lambda m: m.load_state_dict(
        {n: t + 1 for n, t in m.state_dict().items()}, assign=True
    ),
    "a quantized base": lambda m: m._modules.update(
        base=QuantizedLinear.from_weight(m.base.weight, Quantization("int8"), bias=m.base.bias)
    ),
    "a trainable weight": lambda m: m.base.weight.requires_grad_(True),
    "a hook": lambda m: m.base.register_forward_hook(lambda m, args, y: 2 * y),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_products_are_made_once_until_something_changes(change, copied):
    wrapped = copied(layer())
    x = torch.randn(3, 6)
    wrapped(x)
    first = wrapped.view.products()
    assert wrapped.view.products() is first
    CHANGES[change](wrapped)
    f, x = wrapped.adapters["a"], x.to(wrapped.adapters["a"].lora_A.dtype)
    y = wrapped(x)
    expected = wrapped.base(x) + 4 / 3 * x @ f.lora_A.T @ f.lora_B.T
    torch.testing.assert_close(y, expected)
    assert wrapped.last_path == (
        "general" if change in ("a hook", "a trainable weight") else "fused"
    )


def test_a_strangers_linear_in_the_bases_place_is_called():
    """As torch.ao's dynamic quantization puts one there after inject."""
    wrapped, x = layer(), torch.randn(3, 6)
    before = wrapped(x)
    wrapped.base = nn.Sequential(wrapped.base)
    torch.testing.assert_close(wrapped(x), before)
    assert wrapped.last_path == "general"
