"""Adapters made of adapters, against dense float64 sums and PEFT's add_weighted_adapter."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from report_models import ALL, Kinds
from small_models import net, shake
from torch import nn

import minilora
from minilora.lora import mixed, prepare_switching
from minilora.lora.combination import METHODS, PRUNING, ApproximatedLayer, Approximation, combine
from minilora.lora.layer import lora_layers

F64 = torch.float64


IDS = torch.arange(14) * 5 % 11


def kinds(seed=0):
    torch.manual_seed(seed)
    return Kinds().double()


def add(model, name, seed=1, targets=ALL, **options):
    """Put an adapter on, with every parameter of it random."""
    options = {"r": 3, "alpha": 5} | options
    minilora.inject(model, targets=targets, adapter=name, dtype=F64, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            if name in layer.adapters:
                for p in layer.adapters[name].parameters():
                    p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3)
    return model


def dense(model, name):
    """ΔW [N, K] of each layer as numpy float64, written out from the parameters alone."""
    found = {}
    for fqn, layer in lora_layers(model).items():
        if name not in layer.adapters:
            continue
        f = layer.adapters[name]
        A = f.lora_A.detach().double().numpy().reshape(f.lora_A.shape[0], -1)
        B = f.lora_B.detach().double().numpy().reshape(-1, f.lora_A.shape[0])
        found[fqn] = B @ A * (f.alpha / math.sqrt(f.r) if f.rslora else f.alpha / f.r)
        if f.offset_A is not None:
            found[fqn] = found[fqn] - f.offset_B.double().numpy() @ f.offset_A.double().numpy()
    return found


def total(model, weights):
    """Σ w ΔW by layer, a missing layer counting as 0."""
    result = {}
    for name, weight in weights.items():
        for fqn, delta in dense(model, name).items():
            result[fqn] = result.get(fqn, 0) + weight * delta
    return result


def best(matrix, r):
    U, S, V = np.linalg.svd(matrix, full_matrices=False)
    return U[:, :r] * S[:r] @ V[:r], math.sqrt((S[r:] ** 2).sum())


def agree(found, expected, tolerance=1e-10):
    assert set(found) == set(expected)
    for fqn, value in expected.items():
        scale = max(1.0, np.abs(value).max())
        np.testing.assert_allclose(found[fqn], value, rtol=0, atol=tolerance * scale, err_msg=fqn)


weights_st = st.floats(-3, 3).map(lambda w: round(w, 3))
source_st = st.fixed_dictionaries(
    {
        "r": st.sampled_from([1, 2, 3, 5, 7]),
        "alpha": st.sampled_from([0.5, 1, 4, -3]),
        "rslora": st.booleans(),
        "targets": st.lists(st.sampled_from(ALL), min_size=1, unique=True),
    }
)


@settings(max_examples=40)
@given(st.lists(st.tuples(source_st, weights_st), min_size=1, max_size=4), st.integers(1, 12))
@pytest.mark.filterwarnings("ignore:minilora. r=")
def test_cat_is_the_sum_and_svd_its_best_part(sources, r):
    model, weights = kinds(), {}
    for i, (options, weight) in enumerate(sources):
        add(model, f"a{i}", seed=i, **options)
        weights[f"a{i}"] = weight
    expected = total(model, weights)
    report = combine(model, weights, "sum")
    agree(dense(model, "sum"), expected)
    assert report.error < 1e-14
    ranks = {fqn: sum(s["r"] for s, _ in sources if fqn in s["targets"]) for fqn in expected}
    assert {f.name: f.r for f in report.layers} == ranks
    assert all(lora_layers(model)[n].adapters["sum"].scaling == 1 for n in expected)
    short = combine(model, weights, "short", method="svd", r=r)
    lost, norm = 0.0, 0.0
    for fit in short.layers:
        part, tail = best(expected[fit.name], r)
        size = np.linalg.norm(expected[fit.name])
        agree({"": dense(model, "short")[fit.name]}, {"": part}, 1e-7)  # the subspace, near ties
        assert fit.lost == pytest.approx(tail, rel=1e-6, abs=1e-9 * max(1, size))
        assert fit.norm == pytest.approx(size, rel=1e-9, abs=1e-9)
        assert fit.r <= r
        lost, norm = lost + tail**2, norm + size**2
    if norm > 1e-9:
        assert short.error == pytest.approx(math.sqrt(lost / norm), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rslora": True, "alpha": 7},
        {"rank_pattern": {"linear": 2, "conv": 1}, "alpha_pattern": {"out": -9, "embed": 2}},
        {"targets": ["linear", "turned", "out"], "init": "pissa"},
        {"targets": ["linear", "turned", "out"], "init": "olora", "rslora": True},
        {"targets": ["linear", "turned", "out"], "init": "orthogonal", "r": 2},
    ],
)
def test_one_adapter_with_weight_one_is_itself(method, options):
    model = add(kinds(), "a", **options)
    density = 1.0 if method in PRUNING else None
    report = combine(model, {"a": 1}, "b", method=method, density=density)
    agree(dense(model, "b"), dense(model, "a"), 1e-12)
    assert report.error < 1e-12
    expected = model(IDS)
    minilora.activate(model, "b")
    torch.testing.assert_close(model(IDS), expected)


def test_the_sum_acts_like_its_sources_together(tmp_path):
    model = add(add(kinds(), "a"), "b", seed=2, targets=["linear", "conv"], rslora=True, r=2)
    minilora.activate(model, ["a", "b"])
    expected = model(IDS)
    combine(model, {"a": 1, "b": 1}, "c")
    minilora.activate(model, "c")
    torch.testing.assert_close(model(IDS), expected)
    with mixed(model, ["c"] * len(IDS)):
        torch.testing.assert_close(model(IDS), expected)
    minilora.save(model, tmp_path, "c")
    again = minilora.load(kinds(), tmp_path / "c", dtype=F64)
    torch.testing.assert_close(again(IDS), expected)
    minilora.merge(model.eval())
    torch.testing.assert_close(model(IDS), expected)
    minilora.unmerge(model)
    minilora.delete(model, "c")
    assert list(minilora.summary(model).adapters[0].ranks) == [3]


def ties(deltas, weights):
    elected = np.where(sum(deltas) >= 0, 1, -1)
    agrees = [np.sign(d) == elected for d in deltas]
    summed = sum(w * d * a for d, w, a in zip(deltas, weights, agrees, strict=True))
    return summed / np.maximum(sum(a.astype(float) for a in agrees), 1)


def largest(delta, density):
    k = max(1, int(density * delta.size))
    edge = np.sort(np.abs(delta).ravel())[-k]
    return delta * (np.abs(delta) >= edge)


@pytest.mark.parametrize("density", [0.05, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("method", PRUNING)
def test_pruning_acts_on_delta_weights(method, density):
    model = add(add(kinds(), "a"), "b", seed=2, rslora=True, r=2, alpha=9)
    add(model, "c", seed=3, targets=["linear", "conv"], r=1)
    weights = {"a": 0.7, "b": -1.3, "c": 2.0}
    sources = {name: dense(model, name) for name in weights}
    before = torch.random.get_rng_state()
    report = combine(model, weights, "new", method=method, density=density, r=4, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    generator = torch.Generator().manual_seed(5)
    found = dense(model, "new")
    for fit in report.layers:
        here = [(sources[n][fit.name], w) for n, w in weights.items() if fit.name in sources[n]]
        deltas = [d for d, _ in here]
        if method.startswith("dare") and density < 1:
            masks = [torch.rand(d.shape, generator=generator).numpy() < density for d in deltas]
            deltas = [d * m / density for d, m in zip(deltas, masks, strict=True)]
        elif density < 1:
            deltas = [largest(d, density) for d in deltas]
        scales = [w for _, w in here]
        if "ties" in method:
            wanted = ties(deltas, scales)
        else:
            wanted = sum(w * d for d, w in zip(deltas, scales, strict=True))
        part, tail = best(wanted, 4)
        np.testing.assert_allclose(found[fit.name], part, atol=1e-9)
        assert fit.lost == pytest.approx(tail, rel=1e-6, abs=1e-10)
        assert fit.norm == pytest.approx(np.linalg.norm(wanted))
    combine(model, weights, "again", method=method, density=density, r=4, seed=5)
    agree(dense(model, "again"), found, 0)
    if density < 1:
        combine(model, weights, "other", method=method, density=density, r=4, seed=6)
        same = all(np.array_equal(v, found[n]) for n, v in dense(model, "other").items())
        assert same == (not method.startswith("dare"))


def test_dare_keeps_the_expectation():
    model = add(kinds(), "a", targets=["out"])
    mean = 0
    for seed in range(400):
        combine(model, {"a": 1}, "b", method="dare_linear_svd", density=0.5, r=20, seed=seed)
        mean = mean + dense(model, "b")["out"] / 400
        minilora.delete(model, "b")
    wanted = dense(model, "a")["out"]
    # Each element has variance ΔW² (1 − density) / density; five standard errors of the mean.
    assert (np.abs(mean - wanted) <= 5 * np.abs(wanted) / 20 + 1e-12).all()


def test_new_adapter_is_frozen_and_nothing_else_changes(snapshot, same):
    model = add(add(kinds(), "a"), "b", seed=2)
    minilora.activate(model, ["b", "a"], trainable="a")
    model.linear.base.bias.requires_grad_(True)  # what a user set by hand stays
    model.eval()
    before, state = snapshot(model), torch.random.get_rng_state()
    for method in METHODS:
        density = 0.5 if method in PRUNING else None
        combine(model, {"a": 2, "b": -1}, "new", method=method, density=density)
        assert torch.equal(torch.random.get_rng_state(), state)
        new = [layer.adapters["new"] for layer in lora_layers(model).values()]
        assert not any(p.requires_grad for f in new for p in f.parameters())
        assert not any(f.training for f in new)
        assert all(layer.active == ("b", "a") for layer in lora_layers(model).values())
        for layer in lora_layers(model).values():
            del layer.adapters["new"]
        same(before, snapshot(model))


def test_part_that_was_injected_alone_stays_as_it_is(snapshot, same):
    model = nn.Sequential(kinds(), nn.Linear(3, 3))
    add(model[0], "a")
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    combine(model, {"a": 1}, "b")
    after = {n: p.requires_grad for n, p in model.named_parameters() if ".b." not in n}
    assert after == flags
    assert not hasattr(model, "_minilora_trainable")


def test_dtypes_of_the_new_factors():
    model = shake(minilora.inject(net(), r=2, alpha=3, dtype="bfloat16"))
    for dtype, found in ((None, torch.float32), ("bfloat16", torch.bfloat16), (F64, F64)):
        report = combine(model, {"default": 0.3}, "new", dtype=dtype)
        assert model.q_proj.adapters["new"].lora_A.dtype == found
        bound = {torch.float32: 2**-23, torch.bfloat16: 2**-8, F64: 1e-15}[found]
        assert report.error <= bound
        assert (report.error > 1e-4) == (found == torch.bfloat16)  # rounding is part of the error
        minilora.delete(model, "new")
    minilora.inject(model, adapter="wide", dtype=F64, r=2)
    combine(model, {"default": 1, "wide": 1}, "new")
    assert model.q_proj.adapters["new"].lora_B.dtype == F64


def test_what_cancels_counts_as_nothing():
    model = add(add(kinds(), "a"), "twin")
    for layer in lora_layers(model).values():
        layer.adapters["twin"].load_state_dict(layer.adapters["a"].state_dict())
    for method in ("cat", "svd"):
        report = combine(model, {"a": 1, "twin": -1}, method, method=method)
        assert report.error == 0
        assert all(np.abs(d).max() < 1e-12 for d in dense(model, method).values())
    assert combine(model, {"a": 0}, "none").error == 0
    assert ApproximatedLayer("x", 1, 0.0, 2.0).error == math.inf


def test_report_prints_the_layers_with_an_error():
    fit = Approximation(
        "new", "svd", (ApproximatedLayer("a.q", 4, 2.0, 1.0), ApproximatedLayer("b", 8, 2.0, 0.0))
    )
    assert fit.error == pytest.approx(math.sqrt(1 / 8))
    assert str(fit).splitlines() == [
        "module     r  relative error",
        "a.q        4  0.5",
        "new (svd): 2 layers, error 0.354",
    ]
    assert str(Approximation("new", "export", fit.layers[1:])) == "new (export): 1 layers, exact"


def test_slot_of_a_model_prepared_for_switching(snapshot, same):
    model = add(add(kinds(), "a"), "b", seed=2).eval()
    minilora.activate(model, "a")
    prepare_switching(model, max_r=3)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"adapter 'c' on embed has rank 6.*holds max_r=3"):
        combine(model, {"a": 1, "b": 1}, "c")
    same(before, snapshot(model))
    combine(model, {"a": 1, "b": 1}, "c", method="svd")
    minilora.activate(model, "c")
    assert model(IDS).isfinite().all()


ERRORS = [
    (({"a": 1}, "b", {}), "the model already has an adapter 'b'; choose another name"),
    (({"a": 1}, "a.b", {}), "an adapter's name must consist of letters"),
    (({"x": 1}, "c", {}), "there is no adapter 'x'; this model has: a, b"),
    (({}, "c", {}), r"combine\(\) needs at least one adapter, found an empty mapping"),
    (({"a": math.nan}, "c", {}), "the weight of adapter 'a' must be a finite number, found nan"),
    (({"a": True}, "c", {}), "the weight of adapter 'a' must be a finite number, found True"),
    (({"a": "1"}, "c", {}), "the weight of adapter 'a' must be a finite number, found '1'"),
    (({"a": 1}, "c", {"method": "sum"}), "method must be one of cat, svd, ties_svd.*found 'sum'$"),
    (({"a": 1}, "c", {"method": "ties"}), "found 'ties'; 'ties' in PEFT acts on A and B apart"),
    (({"a": 1}, "c", {"method": "linear"}), "is not the sum of the products, 'cat' is"),
    (({"a": 1}, "c", {"r": 4}), "r has no meaning with method='cat'"),
    (({"a": 1}, "c", {"method": "svd", "r": 0}), "r must be a whole number of at least 1, found 0"),
    (({"a": 1}, "c", {"density": 0.5}), "density is for ties_svd.*leave it out with 'cat'"),
    (({"a": 1}, "c", {"method": "ties_svd"}), r"needs a density in \(0, 1\].*found None"),
    (({"a": 1}, "c", {"method": "ties_svd", "density": 0}), r"density in \(0, 1\].*found 0$"),
    (({"a": 1}, "c", {"method": "ties_svd", "density": 1.5}), r"density in \(0, 1\].*found 1.5"),
    (({"a": 1}, "c", {"dtype": "int8"}), "dtype must be a floating-point torch dtype"),
    (({"a": 1e300}, "c", {"dtype": "float16"}), "new factors of embed must be finite, found NaN"),
]


@pytest.mark.parametrize(("call", "text"), ERRORS)
def test_errors_leave_the_model_unchanged(call, text, snapshot, same):
    model = add(add(kinds(), "a"), "b", seed=2)
    before = snapshot(model)
    weights, name, options = call
    with pytest.raises(ValueError, match=text):
        combine(model, weights, name, **options)
    same(before, snapshot(model))


def test_errors_of_type():
    model = add(kinds(), "a")
    with pytest.raises(TypeError, match="takes a mapping of adapters' names to weights, found"):
        combine(model, ["a"], "c")
    with pytest.raises(TypeError, match="seed must be a whole number, found 0.5"):
        combine(model, {"a": 1}, "c", seed=0.5)
    with pytest.raises(ValueError, match=r"combine\(\) needs a model with adapters"):
        combine(kinds(), {"a": 1}, "c")


def test_what_is_no_low_rank_sum_is_refused(snapshot, same):
    model = add(kinds(), "plain")
    add(model, "dora", dora=True, targets=["linear"])
    add(model, "copied", bias="all")
    add(model, "biased", lora_bias=True, targets=["linear", "out"])
    add(model, "broken")
    model.conv.adapters["broken"].lora_A.data[0, 0] = math.inf
    texts = {
        "dora": "adapter 'dora' is DoRA .first: linear.*convert it with minilora.peft.to_lora",
        "copied": "'copied' also brings trained copies of base parameters .first: linear.bias",
        "biased": "'biased' also has a lora_bias on linear that is not 0",
        "broken": "adapter 'broken' must be finite, found NaN or Inf on conv",
    }
    before = snapshot(model)
    for method in METHODS:
        for name, text in texts.items():
            density = 0.5 if method in PRUNING else None
            with pytest.raises(ValueError, match=text):
                combine(model, {"plain": 1, name: 1}, "c", method=method, density=density)
        same(before, snapshot(model))
    for layer in lora_layers(model).values():
        if "biased" in layer.adapters:
            layer.adapters["biased"].lora_bias.data.zero_()
    combine(model, {"plain": 1, "biased": 1}, "c")
    assert model.linear.adapters["c"].lora_bias is None
    minilora.activate(model, "plain")
    minilora.merge(model)
    with pytest.raises(RuntimeError, match=r"combine\(\) needs unmerged weights, but plain is"):
        combine(model, {"plain": 1}, "d")


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "conv2d"])
@pytest.mark.parametrize("method", ["cat", "svd", "ties_svd", "magnitude_prune_svd"])
def test_equal_to_pefts_weighted_adapter(tmp_path, kind, method):
    peft = pytest.importorskip("peft")
    matrix = pytest.importorskip("test_peft_matrix")
    base = matrix.made(kind)
    ours = minilora.inject(
        copy.deepcopy(base), r=3, alpha=5, targets=matrix.KINDS[kind][2], adapter="a"
    )
    minilora.inject(ours, r=4, alpha=4, targets=matrix.KINDS[kind][2], adapter="b")
    matrix.shake(p for n, p in ours.named_parameters() if "adapters" in n)
    for name in ("a", "b"):
        minilora.save(ours, tmp_path, name)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a", "a").eval()
    theirs.load_adapter(tmp_path / "b", "b")
    density = 0.4 if method in PRUNING else None
    theirs.add_weighted_adapter(
        ["a", "b"], [0.8, -0.5], "c", combination_type=method, density=density,
        svd_rank=None if method == "cat" else 4,
    )  # fmt: skip
    theirs.set_adapter("c")
    r = None if method == "cat" else 4
    combine(ours, {"a": 0.8, "b": -0.5}, "c", method=method, density=density, r=r)
    for fqn, layer in lora_layers(ours).items():
        delta = theirs.get_submodule(f"base_model.model.{fqn}").get_delta_weight("c").detach()
        found = layer.view.as_weight(layer.delta_weight("c"))
        torch.testing.assert_close(found, delta, rtol=0, atol=2e-5 * float(delta.abs().max()))
    minilora.activate(ours, "c")
    expected = matrix.run(ours, kind)
    torch.testing.assert_close(matrix.run(theirs, kind), expected, rtol=1e-4, atol=1e-4)
    minilora.save(ours, tmp_path, "c")
    context = matrix.strict()
    try:
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "c").eval()
    finally:
        context.__exit__(None, None, None)
    torch.testing.assert_close(matrix.run(loaded, kind), expected, **matrix.F32)
