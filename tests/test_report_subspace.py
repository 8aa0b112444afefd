"""Two adapters' subspaces, ranks to paste, and truncation, against numpy and scipy-free oracles."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from report_models import ALL, filled, kinds
from test_report_spectra import dense  # the oracle's ΔW
from torch import nn

import minilora
from minilora.lora.layer import lora_layers
from minilora.lora.patterns import pattern_value
from minilora.report.subspace import principal_angles, rank_pattern, subspaces, truncate


def two(**options):
    model = kinds(**options)
    minilora.inject(model, r=2, alpha=3, adapter="v2", targets=ALL, dtype=torch.float64)
    return filled(model, "v2", seed=2)


@settings(max_examples=40)
@given(N=st.integers(2, 12), p=st.integers(1, 4), q=st.integers(1, 4), seed=st.integers(0, 99))
def test_principal_angles_match_their_definition(N, p, q, seed):
    torch.manual_seed(seed)
    p, q = min(p, N), min(q, N)
    P, Q = (torch.linalg.qr(torch.randn(N, k, dtype=torch.float64))[0] for k in (p, q))
    angles = principal_angles(P, Q)
    cosines = np.linalg.svd(P.numpy().T @ Q.numpy(), compute_uv=False).clip(0, 1)
    assert len(angles) == min(p, q) and list(angles) == sorted(angles)
    assert np.cos(np.radians(angles)) == pytest.approx(cosines, abs=1e-12)
    assert principal_angles(Q, P) == pytest.approx(angles, abs=1e-9)


@pytest.mark.parametrize("angle", [1e-9, 1e-4, 0.3, 89.9999999])
def test_principal_angles_are_exact_where_cosines_are_flat(angle):
    x = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    radians = torch.tensor(np.radians(angle))
    y = torch.stack([radians.cos(), radians.sin()])[:, None]
    assert principal_angles(x, y)[0] == pytest.approx(angle, rel=1e-6)


def test_compare_matches_dense_matrices():
    model = two()
    found = subspaces(model, "default", "v2")
    assert found.adapters == ("default", "v2")
    assert [layer.name for layer in found.layers] == ALL
    assert found.only_first == found.only_second == ()
    for layer in found.layers:
        spaces, deltas = [], []
        for name, r in (("default", 3), ("v2", 2)):
            _, delta = dense(lora_layers(model)[layer.name], name)
            U, _, Vh = np.linalg.svd(delta, full_matrices=False)
            spaces.append((U[:, :r], Vh[:r].T))
            deltas.append(delta)
        norms = [np.linalg.norm(d) for d in deltas]
        assert layer.cosine == pytest.approx(
            (deltas[0] * deltas[1]).sum() / np.prod(norms), abs=1e-12
        )
        inner = [np.linalg.svd(a.T @ b, compute_uv=False) for a, b in zip(*spaces, strict=True)]
        assert np.cos(np.radians(layer.angles_out)) == pytest.approx(inner[0].clip(0, 1), abs=1e-9)
        assert np.cos(np.radians(layer.angles_in)) == pytest.approx(inner[1].clip(0, 1), abs=1e-9)
        assert layer.shared == pytest.approx((np.concatenate(inner) ** 2).mean(), abs=1e-9)


def test_compare_of_a_scaled_copy_and_of_missing_layers():
    model = kinds()
    for layer in lora_layers(model).values():
        factors = layer.view.new_adapter(r=3, alpha=-10, dtype=torch.float64)
        factors.load_state_dict(layer.adapters["default"].state_dict())
        layer.adapters["copy"] = factors
    del lora_layers(model)["conv"].adapters["copy"]
    lora_layers(model)["out"].adapters["default"].lora_B.data.zero_()
    found = subspaces(model, "default", "copy")
    assert [layer.name for layer in found.layers] == ["embed", "linear", "turned"]
    assert (found.only_first, found.only_second) == (("conv",), ("out",))
    for layer in found.layers:
        assert layer.cosine == pytest.approx(-1)
        assert layer.shared == pytest.approx(1)
        assert max(layer.angles_out + layer.angles_in) < 1e-5


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("default", "default"), "subspaces() needs two different adapters, found 'default' twice"),
        (("default", "v3"), "there is no adapter 'v3'; this model has: default, v2"),
    ],
)
def test_compare_says_what_is_wrong(names, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        subspaces(two(), *names)


NAMES = st.lists(
    st.sampled_from(
        [f"model.layers.{i}.{m}" for i in (0, 1, 2, 11, 12) for m in ("q", "mlp.up", "mlp.0")]
        + ["head", "x.head", "layers.1.q", "modelXlayers.1.q", "1.q", "11.q", "a+b"]
    ),
    min_size=1,
    unique=True,
)


@settings(max_examples=150)
@given(names=NAMES, data=st.data())
def test_rank_pattern_gives_back_exactly_these_ranks(names, data):
    ranks = {name: data.draw(st.integers(1, 4)) for name in names}
    r, patterns = rank_pattern(ranks)
    assert {name: pattern_value(name, patterns, r) for name in names} == ranks


def test_rank_pattern_shares_patterns_between_blocks():
    ranks = {f"h.{i}.attn.c_attn": 8 - (i > 1) for i in range(4)} | {"wte": 2, "h.0.mlp.c_proj": 8}
    assert rank_pattern(ranks) == (8, {"^wte": 2, "^h.(2|3).attn.c_attn": 7})


def test_rank_pattern_is_taken_by_inject():
    model = two()
    ranks = {"embed": 2, "linear": 1, "turned": 3, "conv": 2, "out": 2}
    r, patterns = rank_pattern(ranks)
    minilora.inject(model, r=r, alpha=1, adapter="new", targets=ALL, rank_pattern=patterns)
    assert {n: layer.adapters["new"].r for n, layer in lora_layers(model).items()} == ranks


@pytest.mark.peers
def test_rank_pattern_is_taken_by_peft():
    from peft import LoraConfig, get_peft_model  # a second to import

    net = nn.ModuleDict({"layers": nn.ModuleList(
        nn.ModuleDict({"q": nn.Linear(4, 4), "mlp": nn.Sequential(nn.Linear(4, 4))})
        for _ in range(12))})  # fmt: skip
    names = [n for n, m in net.named_modules() if isinstance(m, nn.Linear)]
    ranks = {name: 1 + i * 5 % 4 for i, name in enumerate(names)}
    r, patterns = rank_pattern(ranks)
    model = get_peft_model(net, LoraConfig(r=r, rank_pattern=patterns, target_modules=names))
    found = {
        n: m.r["default"] for n, m in model.base_model.model.named_modules() if hasattr(m, "r")
    }
    assert found == ranks


@pytest.mark.parametrize("keep", [0.5, 0.9, 1.0])
def test_truncate_is_the_best_approximation_and_off_by_what_the_spectrum_says(keep):
    model = kinds()
    fit = truncate(model, "default", "small", keep=keep)
    found = minilora.explain(model, "default", keep=keep)
    assert fit.adapter == "small" and fit.method == f"truncated, keep={keep:g}"
    for report, row in zip(found.layers, fit.layers, strict=True):
        layer = lora_layers(model)[report.name]
        _, delta = dense(layer)
        _, small = dense(layer, "small")
        U, S, Vh = np.linalg.svd(delta, full_matrices=False)
        r = layer.adapters["small"].r
        assert r == report.suggested_r == row.r
        assert small == pytest.approx((U[:, :r] * S[:r]) @ Vh[:r], abs=1e-12)
        error = np.linalg.norm(delta - small) / np.linalg.norm(delta)
        assert row.error == pytest.approx(report.truncation_error, abs=1e-12)
        assert error == pytest.approx(report.truncation_error, abs=1e-12)
    assert fit.error == pytest.approx(found.predicted_error, abs=1e-12)
    assert found.truncation.error == pytest.approx(fit.error, abs=1e-12)


def test_truncate_to_given_ranks_leaves_the_others(tmp_path):
    model = kinds()
    fit = truncate(model, "default", "small", ranks={"linear": 1})
    ranks = {n: layer.adapters["small"].r for n, layer in lora_layers(model).items()}
    assert ranks == {"embed": 3, "linear": 1, "turned": 3, "conv": 3, "out": 3}
    assert fit.method == "truncated"
    assert [row.error > 1e-12 for row in fit.layers] == [n == "linear" for n in ALL]
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".small." in n)
    minilora.save(model, tmp_path, "small")
    other = kinds()
    minilora.load(other, tmp_path / "small", adapter="small", dtype=torch.float64)
    for name, layer in lora_layers(other).items():
        wanted = lora_layers(model)[name].delta_weight("small")
        torch.testing.assert_close(layer.delta_weight("small"), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"keep": 0}, "keep must lie in (0, 1], the share of ‖ΔW‖² to keep, found 0"),
        ({}, {"keep": True}, "keep must lie in (0, 1], the share of ‖ΔW‖² to keep, found True"),
        ({}, {"name": "default"}, "the model already has an adapter 'default'"),
        ({}, {"adapter": "v9"}, "there is no adapter 'v9'"),
        ({}, {"ranks": {"q": 1}}, "ranks must name layers of adapter 'default', 'q' is none"),
        ({}, {"ranks": {"out": 0}}, "the rank of out must be a whole number of at least 1"),
        ({"bias": "all"}, {}, "truncate() makes a product B A, but adapter 'default' also brings"),
        ({"dora": True}, {}, "adapter 'default' is DoRA (first: embed), which changes all of W"),
    ],
)
def test_truncate_says_what_is_wrong_and_changes_nothing(
    options, arguments, message, snapshot, same
):
    model = kinds(**options)
    before = snapshot(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        truncate(model, **({"adapter": "default", "name": "small"} | arguments))
    same(before, snapshot(model))


def test_comparison_needs_adapters():
    for verb in (subspaces, truncate):
        with pytest.raises(ValueError, match=f"{verb.__name__}\\(\\) needs a model with adapters"):
            verb(nn.Linear(2, 2), "a", "b")
    model = two()
    minilora.merge(model, "v2")
    with pytest.raises(RuntimeError, match=r"truncate\(\) needs unmerged weights"):
        truncate(model, "default", "small")
