"""Spectra from the factors against a dense float64 SVD, for every kind of layer."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from report_models import ALL, kinds
from torch import nn

import minilora
from minilora.lora.layer import lora_layers
from minilora.report.spectra import energy_kept, layer_report, rank_for, truncation_error

EPS = np.finfo(np.float64).eps


def dense(layer, name="default"):
    """W and ΔW as numpy matrices, written out from the parameters."""
    factors, W = layer.adapters[name], layer.base.weight.detach().double().numpy()
    if isinstance(layer.base, nn.Embedding) or type(layer.base).__name__ == "Conv1D":
        W = W.T
    A, B = (f.detach().double().numpy() for f in (factors.lora_A, factors.lora_B))
    W, A, B = (m.reshape(m.shape[0], -1) for m in (W, A, B))
    return W, factors.alpha / factors.r * B @ A


def one(N, K, r, seed=0, alpha=3.0, dtype=torch.float64, fill=True, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(K, N, dtype=dtype))
    minilora.inject(model, r=r, alpha=alpha, dtype=dtype, **options)
    (layer,) = lora_layers(model).values()
    if fill:
        nn.init.normal_(layer.adapters["default"].lora_B)
    return layer


def report(layer, keep=0.9, largest=2048):
    return layer_report("0", 0, "linear", layer, "default", keep, largest)


@settings(max_examples=40)
@given(N=st.integers(1, 17), K=st.integers(1, 17), r=st.integers(1, 7), seed=st.integers(0, 99))
@pytest.mark.filterwarnings("ignore:minilora")
def test_layer_report_spectrum_is_the_dense_matrix_own(N, K, r, seed):
    layer = one(N, K, r, seed)
    W, delta = dense(layer)
    found = report(layer)
    sigma = np.linalg.svd(delta, compute_uv=False)
    tiny = 64 * EPS * sigma[0]
    wanted = np.zeros(len(found.singular_values))
    wanted[: min(len(sigma), len(wanted))] = sigma[: len(wanted)]
    assert np.abs(np.array(found.singular_values) - wanted).max() <= tiny
    assert found.norm == pytest.approx(np.linalg.norm(delta), rel=64 * EPS)
    assert found.weight_norm == pytest.approx(np.linalg.norm(W), rel=64 * EPS)
    assert found.relative == found.norm / found.weight_norm
    assert found.spectral_norm == found.singular_values[0]
    assert (found.shape, found.r, found.dora) == ((N, K), r, False)
    shares = sigma[sigma > 0] / sigma.sum()
    assert found.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), 1e-6)


@settings(max_examples=40)
@given(N=st.integers(1, 17), K=st.integers(1, 17), r=st.integers(1, 7), seed=st.integers(0, 99))
@pytest.mark.filterwarnings("ignore:minilora")
def test_layer_report_energies_rise_to_one_and_predict_every_truncation(N, K, r, seed):
    found = report(one(N, K, r, seed))
    _, delta = dense(one(N, K, r, seed))
    U, S, Vh = np.linalg.svd(delta, full_matrices=False)
    assert found.energy[-1] == 1.0
    assert all(a <= b for a, b in zip(found.energy, found.energy[1:], strict=False))
    for k, share in enumerate(found.energy, 1):
        error = np.linalg.norm(delta - (U[:, :k] * S[:k]) @ Vh[:k]) / np.linalg.norm(delta)
        assert truncation_error(found.singular_values, k) == pytest.approx(error, abs=64 * EPS)
        assert share == pytest.approx(1 - error**2, abs=64 * EPS)
    assert found.energy[found.suggested_r - 1] >= 0.9
    assert found.suggested_r == 1 or found.energy[found.suggested_r - 2] < 0.9
    assert found.truncation_error == truncation_error(found.singular_values, found.suggested_r)


@pytest.mark.parametrize("name", ALL)
def test_layer_report_reads_every_kind_of_layer(name):
    layer = lora_layers(kinds())[name]
    W, delta = dense(layer)
    found = report(layer)
    sigma = np.linalg.svd(delta, compute_uv=False)[: found.r]
    assert found.shape == W.shape
    assert found.singular_values == pytest.approx(list(sigma), abs=64 * EPS * sigma[0])
    check_directions(found, W, delta)


def check_directions(found, W, delta):
    """Overlaps and similarities against dense SVDs of W and of W + ΔW."""
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    n = min(found.r, len(S))
    total = np.linalg.norm(delta) ** 2
    gram = 1e-6  # from W Wᵀ: squared singular values, so half of the digits at the small end
    assert found.overlap_out == pytest.approx(
        np.linalg.norm(U[:, :n].T @ delta) ** 2 / total, abs=gram
    )
    assert found.overlap_in == pytest.approx(
        np.linalg.norm(delta @ Vh[:n].T) ** 2 / total, abs=gram
    )
    new = np.linalg.svd(W + delta, full_matrices=False)[0][:, : min(10, len(S))]
    cosines = np.abs(U.T @ new).max(0)
    assert found.similarities == pytest.approx(list(cosines), abs=gram)
    assert found.intruders == (cosines < 0.5).sum()


@settings(max_examples=30)
@given(N=st.integers(2, 15), K=st.integers(2, 15), r=st.integers(1, 4), seed=st.integers(0, 99))
@pytest.mark.filterwarnings("ignore:minilora")
def test_layer_report_directions_match_dense_svds(N, K, r, seed):
    layer = one(N, K, r, seed)
    check_directions(report(layer), *dense(layer))


def test_layer_report_counts_a_new_strong_direction_as_an_intruder():
    layer = one(40, 30, 1, alpha=50.0)
    W, delta = dense(layer)
    layer.adapters["default"].lora_A.data /= 1e4
    assert report(layer).intruders == 0 and min(report(layer).similarities) > 0.9
    layer.adapters["default"].lora_A.data *= 1e4
    # Spread over W's 30 directions, the new one is like none of them; the other nine stay W's.
    U = np.linalg.svd(W, full_matrices=False)[0]
    assert np.abs(U.T @ np.linalg.svd(W + delta)[0][:, 0]).max() < 0.5
    found = report(layer)
    assert found.intruders >= 1 and found.similarities[0] < 0.5


def test_layer_report_panels_change_nothing(monkeypatch):
    for shape in ((9, 5), (5, 9)):
        layer = one(*shape, 3)
        whole = report(layer)
        monkeypatch.setattr("minilora.report.spectra.PANEL", 7)
        parts = report(layer)
        monkeypatch.undo()
        assert parts.singular_values == whole.singular_values
        assert parts.weight_norm == pytest.approx(whole.weight_norm, rel=64 * EPS)
        assert parts.overlap_out == pytest.approx(whole.overlap_out, rel=1e-9)
        assert parts.similarities == pytest.approx(whole.similarities, rel=1e-9)


def test_layer_report_of_large_layers_leaves_directions_out():
    found = report(one(9, 12, 2), largest=8)
    assert found.overlap_out is found.overlap_in is found.similarities is found.intruders is None
    assert report(one(9, 12, 2), largest=9).intruders is not None


def test_layer_report_of_no_change_loses_nothing():
    found = report(one(6, 5, 3, fill=False))
    assert found.norm == found.relative == found.effective_rank == found.truncation_error == 0
    assert found.energy == (1.0, 1.0, 1.0) and found.suggested_r == 1
    assert found.overlap_in is None and found.intruders is None


def test_layer_report_of_pissa_sees_only_what_training_changed():
    layer = one(8, 7, 3, init="pissa", fill=False)
    found = report(layer)
    assert found.r == 6 and found.norm == 0 and found.singular_values == (0.0,) * 6
    before = layer.view.matrix() + layer.delta_weight("default")
    layer.adapters["default"].lora_B.data += torch.randn(8, 3)
    delta = layer.view.matrix() + layer.delta_weight("default") - before
    sigma = torch.linalg.svdvals(delta)[:6].tolist()
    assert report(layer).singular_values == pytest.approx(sigma, abs=1e-12)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_layer_report_of_dora_measures_the_whole_change(shape):
    layer = one(*shape, 2, dora=True)
    factors = layer.adapters["default"]
    factors.magnitude.data *= torch.linspace(0.5, 2, shape[0], dtype=torch.float64)
    W, low = dense(layer)
    m = factors.magnitude.detach().numpy()
    delta = (m / np.linalg.norm(W + low, axis=1))[:, None] * (W + low) - W
    found = report(layer)
    assert found.dora
    assert found.norm == pytest.approx(np.linalg.norm(delta), rel=1e-12)
    sigma = np.linalg.svd(low, compute_uv=False)[:2]
    assert found.singular_values == pytest.approx(list(sigma), rel=1e-12)
    check_directions(found, W, delta)


def test_layer_report_reads_the_base_once_through_its_matrix():
    """So a base that decodes its weight is decoded once per layer."""
    layer, calls = one(9, 5, 2), []
    other = torch.randn(9, 5)

    def decoded():
        calls.append(1)
        return other

    layer.view.matrix = decoded
    found = report(layer)
    assert len(calls) == 1
    assert found.weight_norm == pytest.approx(float(other.double().norm()), rel=1e-12)
    check_directions(found, other.double().numpy(), dense(layer)[1])


def test_layer_report_reads_bf16_bases_as_they_are():
    layer = one(9, 5, 2, dtype=torch.bfloat16)
    W, delta = dense(layer)
    found = report(layer)
    assert found.weight_norm == pytest.approx(np.linalg.norm(W), rel=1e-14)
    assert found.norm == pytest.approx(np.linalg.norm(delta), rel=1e-14)


def test_energy_rank_and_error_by_hand():
    values = (3.0, 2.0, 1.0)
    assert energy_kept(values) == pytest.approx((9 / 14, 13 / 14, 1.0))
    assert [rank_for(values, keep) for keep in (0.1, 0.64, 0.7, 0.95, 1)] == [1, 1, 2, 3, 3]
    assert truncation_error(values, 1) == pytest.approx(math.sqrt(5 / 14))
    assert truncation_error(values, 3) == 0
