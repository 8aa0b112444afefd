"""Adapters for other programs: what is written, what is lost, and that PEFT reads it alike."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_models import net, read_by, shake
from test_lora_combination import F64, IDS, add, agree, best, dense, kinds

import minilora
from minilora.lora import prepare_switching
from minilora.lora.combination import combine
from minilora.lora.layer import lora_layers
from minilora.lora.routes import Slot
from minilora.peft.portable import export, to_lora

LINEARS = ["linear", "turned", "out"]
OPTIONS = {
    "plain": {},
    "rslora": {"rslora": True, "alpha": 7},
    "patterns": {"rank_pattern": {"linear": 2, "conv": 1}, "alpha_pattern": {"out": -9}},
    "pissa": {"targets": LINEARS, "init": "pissa"},
    "zero bias": {"targets": LINEARS, "lora_bias": True},
}


def bare(model, name):
    """Take the noise that `add` put on a lora_bias away again."""
    for layer in lora_layers(model).values():
        if name in layer.adapters and layer.adapters[name].lora_bias is not None:
            layer.adapters[name].lora_bias.data.zero_()
    return model


def dora(model, name):
    """DoRA's change of W by layer in float64, written out: m/‖W + D‖ (W + D) − W."""
    found = {}
    for fqn, D in dense(model, name).items():
        layer = lora_layers(model)[fqn]
        W = layer.view.matrix().detach().numpy()
        m = layer.adapters[name].magnitude.detach().numpy()
        found[fqn] = (m / np.linalg.norm(W + D, axis=1))[:, None] * (W + D) - W
    return found


@pytest.mark.parametrize("option", OPTIONS)
def test_export_is_one_rank_with_the_scaling_inside(tmp_path, option, snapshot, same):
    model = add(kinds(), "other", targets=["out"])
    bare(add(model, "a", seed=2, **OPTIONS[option]), "a").eval()
    expected = model(IDS)
    minilora.activate(model, ["other", "a"], trainable="other")
    before, state = snapshot(model), torch.random.get_rng_state()
    report = export(model, tmp_path / "out", "a")
    same(before, snapshot(model))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert report.adapter == "a"
    assert report.error < 1e-14
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    (r,) = {fit.r for fit in report.layers}
    assert r == max(len(dict(f.named_buffers()).get("offset_A", ())) + f.r for f in adapters(model))
    assert (config["r"], config["lora_alpha"], config["bias"]) == (r, r, "none")
    empty = ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias")
    assert not any(config[key] for key in (*empty, "modules_to_save"))
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert len(tensors) == 2 * len(report.layers)
    assert {t.dtype for t in tensors.values()} == {F64}
    again = minilora.load(kinds(), tmp_path / "out", dtype=F64)
    torch.testing.assert_close(again(IDS), expected)
    agree(dense(again, "default"), dense(model, "a"), 1e-12)


def adapters(model, name="a"):
    return [f.adapters[name] for f in lora_layers(model).values() if name in f.adapters]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("r", [1, 2, 4, 6, 50])
def test_dora_becomes_its_best_rank_r_part(tmp_path, r, rslora, snapshot, same):
    model = add(kinds(), "d", dora=True, rslora=rslora).eval()
    before, wanted = snapshot(model), dora(model, "d")
    report = export(model, tmp_path, r=r)
    same(before, snapshot(model))
    again = minilora.load(kinds(), tmp_path, dtype=F64)
    found = dense(again, "default")
    lost = norm = 0.0
    for fit in report.layers:
        part, tail = best(wanted[fit.name], r)
        np.testing.assert_allclose(found[fit.name], part, atol=1e-9)
        size = np.linalg.norm(wanted[fit.name])
        assert fit.error == pytest.approx(tail / size, rel=1e-6, abs=1e-12)
        assert fit.r == min(r, max(min(w.shape) for w in wanted.values()))
        lost, norm = lost + tail**2, norm + size**2
    assert report.error == pytest.approx(math.sqrt(lost / norm), rel=1e-6, abs=1e-12)
    to_lora(model, "d", "plain", r=r)
    agree(dense(model, "plain"), found, 1e-9)
    if r == 50:
        torch.testing.assert_close(again(IDS), model(IDS))
        minilora.activate(model, "plain")
        torch.testing.assert_close(again(IDS), model(IDS))


def test_to_lora_changes_nothing_else_and_shares_nothing(snapshot, same):
    model = add(add(kinds(), "a", rslora=True), "d", seed=2, dora=True, targets=["linear", "conv"])
    minilora.activate(model, ["a", "d"], trainable="a")
    before = snapshot(model.eval())
    for source, r in (("a", None), ("a", 2), ("a", 9), ("d", 4)):
        report = to_lora(model, source, "new", r)
        assert report.adapter == "new"
        for layer in lora_layers(model).values():
            if "new" in layer.adapters:
                f = layer.adapters["new"]
                assert (f.scaling, f.dropout, f.training) == (1, 0, False)
                assert f.r == {None: 3, 2: 2, 9: 3, 4: 4}[r]
                assert not any(p.requires_grad for p in f.parameters())
                f.lora_A.data.zero_()
                f.lora_B.data.zero_()
                del layer.adapters["new"]
        same(before, snapshot(model))
    wanted = dense(model, "a")
    report = to_lora(model, "a", "short", 2)
    for fit in report.layers:
        part, tail = best(wanted[fit.name], 2)
        np.testing.assert_allclose(dense(model, "short")[fit.name], part, atol=1e-9)
        assert fit.lost == pytest.approx(tail)


def test_converted_dora_can_be_combined():
    model = add(add(kinds(), "a"), "d", seed=2, dora=True, targets=["linear", "conv"])
    wanted = dense(model, "a")
    for fqn, delta in dora(model, "d").items():
        wanted[fqn] = wanted[fqn] - 0.5 * delta
    to_lora(model, "d", "plain", 6)
    combine(model, {"a": 1, "plain": -0.5}, "both")
    agree(dense(model, "both"), wanted, 1e-9)


def test_dora_is_taken_from_the_base_beside_anothers_copy(tmp_path):
    model = add(kinds(), "d", dora=True, targets=["linear"])
    wanted = dora(model, "d")
    add(model, "copied", targets=["out"], modules_to_save=["linear"])
    model.get_parameter("linear.base.weight").data.mul_(3)  # the copy, which is in place
    to_lora(model, "d", "plain", 6)
    agree(dense(model, "plain"), wanted, 1e-9)
    export(model, tmp_path, "d", r=6)
    agree(dense(minilora.load(kinds(), tmp_path, dtype=F64), "default"), wanted, 1e-9)


def test_dtype_and_name_of_an_export(tmp_path):
    model = shake(minilora.inject(net(), r=3, alpha=5))
    assert export(model, tmp_path).error < 1e-7
    report = export(model, tmp_path, dtype="bfloat16")
    assert 1e-4 < report.error < 2**-8
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    shake(minilora.inject(model, adapter="export", r=2), "export")  # the writer's own first choice
    assert export(model, tmp_path / "x", "export").layers[0].r == 2
    assert set(model.q_proj.adapters) == {"default", "export"}
    assert export(model, tmp_path / "x").adapter == "export"  # the only active one
    minilora.activate(model, ["default", "export"])
    with pytest.raises(ValueError, match="several adapters are there .default, export.; say which"):
        export(model, tmp_path / "x")


def test_export_from_a_model_prepared_for_switching(tmp_path, snapshot, same):
    model = add(add(kinds(), "a"), "b", seed=2, r=1).eval()
    prepare_switching(model, max_r=4)
    before = snapshot(model)
    export(model, tmp_path, "a")
    same(before, snapshot(model))
    with pytest.raises(ValueError, match="adapter 'wide' on embed has rank 3, .*max_r=2"):
        narrow = add(kinds(), "b", r=3).eval()
        minilora.activate(narrow, None)
        for layer in lora_layers(narrow).values():
            layer.enter(Slot(layer, 2))
        to_lora(narrow, "b", "wide")


def test_errors_leave_model_and_folder_unchanged(tmp_path, snapshot, same):
    model = add(kinds(), "a")
    add(model, "d", dora=True, targets=["linear"])
    add(model, "copied", targets=["out"], bias="lora_only")
    add(model, "biased", targets=["out"], lora_bias=True)
    add(model, "broken")
    model.conv.adapters["broken"].lora_A.data[0, 0] = math.inf
    add(model, "huge")
    model.linear.adapters["huge"].lora_B.data.fill_(1e30)
    export(model, tmp_path / "a", "a")
    files = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    before = snapshot(model)
    texts = {
        ("x", None): "there is no adapter 'x'; this model has: ",
        ("d", None): r"needs r=... for a DoRA adapter.*first: linear.*'d' has r=3, a larger",
        ("d", 0): "r must be a whole number of at least 1, found 0",
        ("copied", None): "'copied' also brings trained copies of base parameters",
        ("biased", None): "'biased' also has a lora_bias on out that is not 0",
        ("broken", None): "adapter 'broken' must be finite, found NaN or Inf on conv",
        ("huge", None): "new factors of linear must be finite, found NaN or Inf in torch.float16",
    }  # fmt: skip
    for (name, r), text in texts.items():
        with pytest.raises(ValueError, match=text):
            to_lora(model, name, "new", r, dtype="float16")
        with pytest.raises(ValueError, match=text):
            export(model, tmp_path / "a", name, r=r, dtype="float16")
    with pytest.raises(ValueError, match="the model already has an adapter 'd'"):
        to_lora(model, "a", "d")
    with pytest.raises(ValueError, match="an adapter's name must consist of"):
        to_lora(model, "a", "d/e")
    with pytest.raises(
        RuntimeError, match="config.json must be written, but that failed: File exists"
    ):
        export(model, tmp_path / "a/adapter_config.json", "a")
    same(before, snapshot(model))
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == files
    minilora.activate(model, "a")
    minilora.merge(model)
    for call in (lambda: export(model, tmp_path, "a"), lambda: to_lora(model, "a", "new")):
        with pytest.raises(RuntimeError, match="needs unmerged weights, but a is merged"):
            call()
    for call in (lambda: export(net(), tmp_path), lambda: to_lora(net(), "a", "new")):
        with pytest.raises(ValueError, match="needs a model with adapters"):
            call()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("format", ["int8", "nf4", "int4"])
def test_export_from_a_quantized_base(tmp_path, format, dora):
    """The change is that of the decoded base, and the file goes onto the same quantized one."""

    def base():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 64))
        return minilora.quantize(net, format, **read_by(format, block_size=32))

    model = shake(minilora.inject(base(), r=3, alpha=5, dora=dora))
    report = export(model, tmp_path, r=64 if dora else None)
    assert report.error < 1e-5
    again = minilora.load(base(), tmp_path)
    for fqn, layer in lora_layers(model).items():
        delta = layer.delta_weight("default")
        assert delta.abs().max() > 0.01
        found = lora_layers(again)[fqn].delta_weight("default")
        torch.testing.assert_close(found, delta, rtol=1e-4, atol=1e-5)
    if not dora:  # which also scales what the formats' products of activations round
        x = torch.randn(5, 64)
        torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "conv2d"])
@pytest.mark.parametrize("option", ["plain", "rslora", "dora", "dora-rslora", "patterns", "pissa"])
def test_peft_reads_an_export_alike(tmp_path, kind, option):
    peft = pytest.importorskip("peft")
    matrix = pytest.importorskip("test_peft_matrix")
    if (kind, option) in matrix.LEFT_OUT:
        pytest.skip("PiSSA is for linear layers")
    base = matrix.made(kind)
    ours = minilora.inject(
        copy.deepcopy(base), r=4, alpha=6, targets=matrix.KINDS[kind][2],
        **matrix.filled(matrix.OPTIONS[option][0], kind),
    )  # fmt: skip
    matrix.shake(p for p in ours.parameters() if p.requires_grad)
    report = export(ours, tmp_path, r=100 if "dora" in option else None)
    assert report.error < 1e-5
    context = matrix.strict()
    try:
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    finally:
        context.__exit__(None, None, None)
    torch.testing.assert_close(matrix.run(theirs, kind), matrix.run(ours, kind), **matrix.F32)
    assert not torch.allclose(matrix.run(ours, kind), matrix.run(base, kind), atol=1e-3)
    assert minilora.check(tmp_path)[0].takes
