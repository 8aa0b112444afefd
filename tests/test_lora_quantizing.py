"""`minilora.quantize` on whole models, and adapters over what it makes."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import read_by
from torch import nn
from torch.nn.utils import parametrize

import minilora
from minilora.lora.layer import lora_layers
from minilora.models import GPT2, GPT2Config
from minilora.quantization.linear import QuantizedLinear

FORMATS = ["int8", "nf4", "int4"]


class Small(nn.Module):
    """Widths that INT4's groups divide, a tied head, a bias here and there."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 64)
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)
        self.lm_head = nn.Linear(64, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.lm_head(x + self.down(torch.tanh(self.up(x))))


def small(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Small().to(dtype)


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=31, n_positions=16, n_embd=64, n_layer=2, n_head=2, n_inner=None)
    return GPT2(config).eval()


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 10]])
BLOCK = {"int8": 64, "nf4": 64, "int4": 32}
HALF = {"int8": {}, "nf4": {}, "int4": {"block_size": 32}}  # what divides Small's widths


def quantized(format, seed=0, **options):
    return minilora.quantize(small(seed).eval(), format, block_size=BLOCK[format], **options)


def dense(model):
    """A plain copy of a model with its quantized layers decoded, in float64."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], module.plain_module(module.dequantize()))
    return model.double()


@pytest.mark.parametrize("format", FORMATS)
def test_quantize_takes_all_linears_but_the_head(format):
    model = quantized(format)
    kinds = {n: type(m) for n, m in model.named_modules()}
    assert kinds["up"] is kinds["down"] is QuantizedLinear
    assert kinds["lm_head"] is nn.Linear
    assert kinds["embed"] is nn.Embedding
    assert model.lm_head.weight is model.embed.weight
    assert torch.equal(model.up.bias, small().up.bias)
    assert (model(IDS) - small()(IDS)).norm() < 0.2 * small()(IDS).norm()


def test_quantize_takes_the_head_when_asked():
    model = minilora.quantize(small(), "int8", targets=["lm_head", "up"])
    assert type(model.lm_head) is QuantizedLinear
    assert torch.equal(model.embed.weight, small().embed.weight)
    assert type(model.down) is nn.Linear


@pytest.mark.parametrize("format", FORMATS)
def test_conv1d_is_quantized_over_out_in_and_comes_back(format):
    plain = gpt2()
    model = minilora.quantize(copy.deepcopy(plain), format)
    layer = model.transformer.h[0].mlp.c_fc
    weight = plain.transformer.h[0].mlp.c_fc.weight
    assert (layer.in_features, layer.out_features) == tuple(weight.shape)
    direct = QuantizedLinear.from_weight(weight.T, layer.spec)
    assert torch.equal(layer.codes, direct.codes)
    back = layer.plain_module(layer.dequantize())
    assert type(back) is type(plain.transformer.h[0].mlp.c_fc)
    assert torch.equal(back.weight, layer.dequantize().T)
    x = torch.randn(3, 64)
    torch.testing.assert_close(back(x), x @ layer.dequantize().T + layer.bias)
    minilora.inject(model, r=2)
    assert model(torch.tensor([[1, 2, 3]])).isfinite().all()


@settings(max_examples=25)
@given(
    format=st.sampled_from(FORMATS),
    r=st.sampled_from([1, 3, 8]),
    alpha=st.sampled_from([1.0, 5.0]),
    bf16=st.booleans(),
    seed=st.integers(0, 20),
)
def test_every_gradient_is_that_of_the_dense_oracle(format, r, alpha, bf16, seed):
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = minilora.quantize(
        small(seed, dtype), format, block_size=BLOCK[format],
        **read_by(format, compute="dequantize", grad_compute="dequantize"),
    )  # fmt: skip
    torch.manual_seed(seed)
    minilora.inject(model, r=r, alpha=alpha)
    for layer in (model.up, model.down):
        nn.init.normal_(layer.adapters["default"].lora_B, std=0.3)
    W = [m.base.dequantize(torch.float64) for m in (model.up, model.down)]
    parts = [m.adapters["default"] for m in (model.up, model.down)]
    leaves = [t.detach().double().requires_grad_() for p in parts for t in (p.lora_A, p.lora_B)]
    E, b = model.embed.weight.detach().double(), model.up.base.bias.detach().double()
    x = E[IDS]
    up = W[0] + alpha / r * leaves[1] @ leaves[0]
    down = W[1] + alpha / r * leaves[3] @ leaves[2]
    want = (x + torch.tanh(x @ up.T + b) @ down.T) @ E.T
    torch.manual_seed(1)
    g = torch.randn(want.shape, dtype=torch.float64)
    want.backward(g)
    out = model(IDS)
    out.backward(g.to(dtype))
    assert model.up.last_path == model.down.last_path == "fused"
    tolerance = 0.05 if bf16 else 2e-5
    assert (out.detach().double() - want.detach()).norm() <= tolerance * want.norm()
    found = [t.grad for p in parts for t in (p.lora_A, p.lora_B)]
    for mine, leaf in zip(found, leaves, strict=True):
        assert mine.dtype == torch.float32
        assert (mine.double() - leaf.grad).norm() <= tolerance * leaf.grad.norm()
    frozen = [p for n, p in model.named_parameters() if "lora" not in n]
    assert not any(p.requires_grad or p.grad is not None for p in frozen)


@pytest.mark.parametrize("format", FORMATS)
def test_fused_and_general_path_agree_and_checkpointing_too(format):
    model = minilora.inject(quantized(format), r=3, alpha=5)
    nn.init.normal_(model.up.adapters["default"].lora_B)
    fused = model(IDS)
    assert model.up.last_path == "fused"
    model.up.base.register_forward_hook(lambda *_: None)
    general = model(IDS)
    assert model.up.last_path == "general"
    torch.testing.assert_close(general, fused, rtol=1e-4, atol=1e-4)
    again = torch.utils.checkpoint.checkpoint(model, IDS, use_reentrant=False)
    again.sum().backward()
    grad = model.up.adapters["default"].lora_A.grad.clone()
    model.zero_grad()
    model(IDS).sum().backward()
    assert torch.equal(grad, model.up.adapters["default"].lora_A.grad)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("compute", ["dequantize", "int8"])
def test_backward_keeps_codes_x_and_its_product_with_a(format, compute, monkeypatch):
    """No decoded weight, no quantized input, no second copy of x."""
    monkeypatch.setattr("minilora.quantization.options.int8_is_exact", lambda: True)
    layer = nn.Sequential(nn.Linear(64, 96))
    minilora.quantize(layer, format, **read_by(format, compute=compute, grad_compute=compute))
    minilora.inject(layer, r=3, alpha=5)
    x = torch.randn(40, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    own = {p.data_ptr() for p in layer.parameters()}
    others = [t for t in kept if t.data_ptr() not in own]
    assert sorted(tuple(t.shape) for t in others) == [(40, 3), (40, 64)]
    assert x.data_ptr() in {t.data_ptr() for t in others}
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("format", FORMATS)
def test_compiled_and_checkpointed_training_gives_the_eager_gradients(format):
    model = minilora.inject(quantized(format), r=3, alpha=5)
    nn.init.normal_(model.up.adapters["default"].lora_B)
    model.train()
    model(IDS).square().sum().backward()
    want = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    out = torch.utils.checkpoint.checkpoint(compiled, IDS, use_reentrant=False)
    out.square().sum().backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == len(want) == 4
    for mine, eager in zip(found, want, strict=True):
        assert (mine - eager).norm() <= 1e-4 * eager.norm()


def test_quantize_after_inject_keeps_the_adapters():
    model = minilora.inject(small(), r=3, alpha=5)
    nn.init.normal_(model.up.adapters["default"].lora_B)
    before = model.up.adapters["default"].lora_B.clone()
    minilora.quantize(model, "nf4")
    assert type(model.up.base) is QuantizedLinear
    assert torch.equal(model.up.adapters["default"].lora_B, before)
    assert model.up.adapters["default"].lora_A.requires_grad
    assert minilora.eject(model) is model
    assert type(model.up) is QuantizedLinear


def test_dora_over_nf4_is_exact_against_the_decoded_base():
    model = quantized("nf4")
    plain = dense(model).float()
    torch.manual_seed(0)
    minilora.inject(model, r=3, alpha=5, dora=True)
    torch.manual_seed(0)
    minilora.inject(plain, r=3, alpha=5, dora=True)
    for m in (model, plain):
        torch.manual_seed(1)
        for layer in (m.up, m.down):
            nn.init.normal_(layer.adapters["default"].lora_B)
    torch.testing.assert_close(model(IDS), plain(IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_adapters_move_between_quantized_and_plain_bases(format, tmp_path):
    model = minilora.inject(quantized(format), r=2, alpha=3)
    nn.init.normal_(model.up.adapters["default"].lora_B)
    minilora.save(model, tmp_path / "a")
    again = minilora.load(quantized(format), tmp_path / "a")
    assert torch.equal(again(IDS), model(IDS))
    plain = minilora.load(small(), tmp_path / "a")
    assert torch.equal(plain.up.adapters["default"].lora_B, model.up.adapters["default"].lora_B)
    with pytest.raises(ValueError, match="was trained on another base"):
        minilora.load(quantized(format, seed=3), tmp_path / "a")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("keep", ["memory", "disk"])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_merge_dequantized_and_back(format, keep, lora_bias):
    model = quantized(format)
    minilora.inject(model, r=3, alpha=5, targets=["up"] if lora_bias else "all-linear",
                    lora_bias=lora_bias)  # fmt: skip
    nn.init.normal_(model.up.adapters["default"].lora_B)
    if lora_bias:
        nn.init.normal_(model.up.adapters["default"].lora_bias)
    codes = {n: p.clone() for n, p in model.named_parameters()}
    for layer in (model.up.base, model.down if lora_bias else model.down.base):
        how = read_by(format, compute="dequantize")  # so that merging changes rounding only
        layer.spec = dataclasses.replace(layer.spec, **how)
    before = model(IDS)
    assert minilora.merge(model, mode="dequantize", keep=keep) is None
    assert type(model.up.base) is nn.Linear
    torch.testing.assert_close(model(IDS), before, rtol=1e-4, atol=1e-4)
    assert bool(minilora.summary(model).kept_bytes) == (keep == "memory")
    minilora.unmerge(model)
    assert {n for n, _ in model.named_parameters()} == set(codes)
    assert all(torch.equal(p, codes[n]) for n, p in model.named_parameters())
    assert torch.equal(model(IDS), before)


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_unmerging_keeps_casts_made_meanwhile(keep):
    model = minilora.inject(quantized("nf4"), r=3, alpha=5)
    codes = model.up.base.codes.clone()
    minilora.merge(model, mode="dequantize", keep=keep)
    model.to(torch.bfloat16)
    minilora.unmerge(model)
    assert model.up.base.dtype == model.up.base.bias.dtype == torch.bfloat16
    assert torch.equal(model.up.base.codes, codes)


@pytest.mark.parametrize("format", FORMATS)
def test_an_adapter_that_adds_nothing_requantizes_to_the_very_codes(format):
    model = minilora.inject(quantized(format), r=3, alpha=5)
    nn.init.normal_(model.down.adapters["default"].lora_B)
    before, state = model.up.base, copy.deepcopy(model.up.base.state_dict())
    report = minilora.merge(model, mode="requantize")
    assert {x.name: x.of_delta == 0 for x in report.layers} == {"up": True, "down": False}
    assert model.up.base is not before
    assert all(torch.equal(t, state[n]) for n, t in model.up.base.state_dict().items())


def test_integers_into_adapted_layers_are_refused():
    model = minilora.inject(quantized("nf4"), r=3, alpha=5)
    with pytest.raises(TypeError, match="floating-point inputs, found torch.int64"):
        model.up(torch.ones(2, 64, dtype=torch.int64))


def test_quantize_on_shapes_alone():
    with torch.device("meta"):
        model = Small()
    minilora.quantize(model, "int4", block_size=32)
    assert type(model.up) is QuantizedLinear
    assert model(IDS.to("meta")).shape == (2, 4, 11)


def test_merge_without_keep_and_eject_gives_a_plain_model(tmp_path):
    model = minilora.inject(quantized("nf4"), r=3, alpha=5)
    nn.init.normal_(model.up.adapters["default"].lora_B)
    want = dense_delta(model)
    minilora.merge(model, mode="dequantize", keep=None)
    minilora.save(model, tmp_path / "a")  # the file names the quantized base, not the merged one
    minilora.load(quantized("nf4"), tmp_path / "a")
    with pytest.raises(RuntimeError, match="kept none"):
        minilora.unmerge(model)
    minilora.eject(model)
    assert type(model.up) is nn.Linear
    torch.testing.assert_close(model.up.weight.double(), want, rtol=1e-5, atol=1e-5)


def dense_delta(model):
    factors = model.up.adapters["default"]
    delta = factors.lora_B.double() @ factors.lora_A.double() * factors.scaling
    return (model.up.base.dequantize(torch.float64) + delta).detach()


@pytest.mark.parametrize("format", FORMATS)
def test_merge_requantized_reports_its_error(format):
    model = minilora.inject(quantized(format), r=3, alpha=5)
    for layer in (model.up, model.down):
        nn.init.normal_(layer.adapters["default"].lora_B)
    want, base = dense_delta(model), model.up.base.dequantize(torch.float64)
    codes = model.up.base.codes.clone()
    report = minilora.merge(model, mode="requantize", sample=IDS)
    assert type(model.up.base) is QuantizedLinear
    stored = model.up.base.dequantize(torch.float64)
    row = next(x for x in report.layers if x.name == "up")
    assert row.relative == pytest.approx(float((stored - want).norm() / want.norm()), rel=1e-3)
    error = float((stored - want).norm() / (want - base).norm())
    assert row.of_delta == pytest.approx(error, rel=1e-3)
    assert [x.of_delta for x in report.layers] == sorted(x.of_delta for x in report.layers)[::-1]
    assert 0 < report.outputs < 0.5
    assert "of the weight" in str(report)
    assert f"outputs differ by: {report.outputs:.2%}" in str(report)
    minilora.unmerge(model)
    assert torch.equal(model.up.base.codes, codes)


def test_requantizing_that_drowns_the_adapter_is_refused(snapshot, same):
    model = minilora.inject(quantized("nf4"), r=3, alpha=5)
    for layer in (model.up, model.down):
        nn.init.normal_(layer.adapters["default"].lora_B, std=1e-4)
    before = snapshot(model)
    with pytest.raises(
        ValueError,
        match=r"must not lose more than tolerance=1 times .*\(2 of 2 layers .*tolerance=",
    ):
        minilora.merge(model, mode="requantize")
    same(before, snapshot(model))
    report = minilora.merge(model, mode="requantize", tolerance=None)
    assert report.layers[0].of_delta > 1
    assert report.outputs is None
    assert "pass sample=" in str(report)


def test_an_adapter_of_a_quantized_base_merges_into_the_full_precision_one(tmp_path):
    plain = gpt2()
    model = minilora.quantize(copy.deepcopy(plain), "nf4")
    minilora.inject(model, r=3, alpha=5)
    layer = model.transformer.h[0].attn.c_attn
    nn.init.normal_(layer.adapters["default"].lora_B)
    factors = layer.adapters["default"]
    delta = (factors.lora_B @ factors.lora_A * factors.scaling).T.detach()
    minilora.save(model, tmp_path)
    minilora.load(plain, tmp_path)
    want = plain.transformer.h[0].attn.c_attn.weight + delta
    minilora.merge(plain)
    torch.testing.assert_close(
        plain.transformer.h[0].attn.c_attn.weight, want, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"mode='dequantize' .* or 'requantize' .*\(up and 1 more .*the full-precision model"),
        ({"mode": "x"}, "mode must be one of dequantize, requantize or None, found 'x'"),
        ({"mode": "requantize", "tolerance": float("nan")}, "number above 0 or None, found nan"),
        ({"mode": "requantize", "tolerance": "2"}, "number above 0 or None, found '2'"),
    ],
)
def test_merge_wants_to_know_how(options, message, snapshot, same):
    model = minilora.inject(quantized("int8"), r=2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        minilora.merge(model, **options)
    same(before, snapshot(model))


def test_mode_on_a_plain_base_is_refused():
    with pytest.raises(ValueError, match="mode= is for quantized bases, found none"):
        minilora.merge(minilora.inject(small(), r=2), mode="dequantize")


def broken(change):
    model = small()
    change(model)
    return model


def _nan(model):
    model.down.weight.data[3, 4] = float("nan")


def _norm(model):
    parametrize.register_parametrization(model.down, "weight", nn.Identity())


@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        (broken(_nan), {}, ValueError, "the weight of down must be finite, found NaN or Inf"),
        (broken(_norm), {}, ValueError, "down is a Parametrized|down computes its own"),
        (small(), {"format": "fp4"}, ValueError, "format must be one of int8, nf4, int4"),
        (small(), {"format": "int4"}, ValueError, "down has 96 inputs, .*pass block_size=32"),
        (small(), {"block_size": 65}, ValueError, "block_size of nf4 must be one of"),
        (small(), {"compute": "fast"}, ValueError, "compute must be one of auto, int8, dequ"),
        (small(), {"targets": ["nope"]}, ValueError, "'nope' matches none"),
        (small(), {"targets": ["embed"]}, ValueError, "compute the same, and Conv1D, but embed"),
        ("model", {}, TypeError, r"quantize\(\) needs an nn.Module, found str"),
    ],
)  # fmt: skip
def test_quantize_checks_all_before_it_changes_any(model, arguments, error, message, snapshot):
    before = snapshot(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        minilora.quantize(model, **{"format": "nf4", **arguments})
    if before is not None:
        assert before[0] == snapshot(model)[0]


def test_quantized_layers_are_not_quantized_again():
    model = quantized("int8")
    with pytest.raises(ValueError, match=r"up is quantized already \(int8\).*exclude=\['up'\]"):
        minilora.quantize(model, "nf4")
    hooked = small()
    hooked.up.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="up computes its own or has hooks"):
        minilora.quantize(hooked, "nf4")
    merged = minilora.inject(small(), r=2)
    minilora.merge(merged)
    with pytest.raises(RuntimeError, match="needs unmerged weights"):
        minilora.quantize(merged, "nf4")
    whole = small()
    whole.up = nn.Linear(64, 96, dtype=torch.float32)
    whole.up.weight = nn.Parameter(torch.ones(96, 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"up is a Linear of torch, which holds torch.int8 \[96"):
        minilora.quantize(whole, "nf4")
    whole = gpt2()
    conv = whole.transformer.h[0].mlp.c_fc
    conv.weight = nn.Parameter(torch.ones(64, 256, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"c_fc must be floating point, found torch.int8"):
        minilora.quantize(whole, "nf4")


def test_summary_counts_the_stored_bytes():
    model = minilora.inject(quantized("nf4"), r=2)
    found = minilora.summary(model)
    assert found.bytes == sum(p.nbytes for p in model.parameters())
    assert found.bytes < sum(p.nbytes for p in minilora.inject(small(), r=2).parameters())


def test_explain_and_switching_work_over_codes():
    model = minilora.inject(quantized("nf4"), r=2, alpha=3)
    nn.init.normal_(model.up.adapters["default"].lora_B)
    assert {row.name for row in minilora.explain(model).layers} == {"up", "down"}
    from minilora.lora import prepare_switching

    before = model(IDS)
    prepare_switching(model, max_r=4)
    torch.testing.assert_close(model.eval()(IDS), before, rtol=1e-4, atol=1e-4)
    assert copy.deepcopy(model)(IDS).equal(model(IDS))


def test_adapters_go_on_quantized_layers_without_decoding_them(net, monkeypatch):
    """Decoding every weight once left gigabytes of a large model's heap behind."""
    model = minilora.quantize(net(), "int8")

    def never(self, dtype=None):
        raise AssertionError("decoded")

    monkeypatch.setattr(QuantizedLinear, "dequantize", never)
    minilora.inject(model, r=2, alpha=3)
    assert lora_layers(model)


@pytest.mark.parametrize("format", FORMATS)
def test_adapters_of_a_quantized_conv1d_fit_the_plain_one_and_back(tmp_path, format):
    """Both store the transposed weight, so both are sampled at the same places."""
    model = minilora.inject(minilora.quantize(gpt2(), format), r=4)
    minilora.save(model, tmp_path / "a")
    minilora.merge(model, mode="dequantize")
    minilora.save(model, tmp_path / "b")
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "b" / "adapter_model.safetensors"
    ).read_bytes()
    plain = minilora.load(gpt2(), tmp_path / "a")
    minilora.save(plain, tmp_path / "c")
    minilora.load(minilora.quantize(gpt2(), format), tmp_path / "c")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_a_trained_bias_of_a_quantized_layer_has_its_gradient(format, after):
    model = small()
    if not after:
        minilora.quantize(model, format, **HALF[format])
    minilora.inject(model, r=2, alpha=3, targets=["up", "down"], bias="lora_only")
    if after:
        minilora.quantize(model, format, **HALF[format])
    y, bias = model(IDS), model.up.bias
    y.square().sum().backward()
    up, down = (getattr(model, n).base for n in ("up", "down"))
    x = model.embed(IDS).detach()
    h = torch.tanh(up(x).detach())
    grad_h = (2 * y.detach() @ model.lm_head.weight.detach()) @ down.weight
    wanted = (grad_h * (1 - h**2)).flatten(0, 1).sum(0)
    torch.testing.assert_close(bias.grad, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))


@pytest.mark.parametrize("options", [{"targets": ["up"]}, {"targets": "all-linear", "dora": True}])
@pytest.mark.parametrize("format", FORMATS)
def test_quantized_layers_are_recomputed_whether_adapted_or_not(format, options):
    """A checkpoint lets what a step kept be asked for once."""
    plain, again = (
        minilora.inject(minilora.quantize(small(), format, **HALF[format]), r=2, alpha=3, **options)
        for _ in range(2)
    )
    plain(IDS).square().sum().backward()
    torch.utils.checkpoint.checkpoint(again, IDS, use_reentrant=False).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name


def test_whole_copies_of_codes_are_refused(snapshot, same):
    model = minilora.quantize(small(), "nf4", targets=["down"])
    before = snapshot(model)
    message = r"train copies of floating-point parameters, found torch\.uint8 in down\..*quantized"
    with pytest.raises(ValueError, match=message):
        minilora.inject(model, targets=["up"], modules_to_save=["down"])
    same(snapshot(model), before)
