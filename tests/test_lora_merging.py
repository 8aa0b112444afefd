"""Merging and unmerging: the very bits back, and what is refused."""

import copy
import io
import pickle
import resource
import warnings

import pytest
import torch
from small_models import bits, net, shake, two_adapters, unchanged
from torch import nn

import minilora
from minilora.lora import end_switching, prepare_switching
from minilora.lora.trial import acts_as_linear


@pytest.mark.parametrize("keep", ["memory", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_restores_the_very_bits(keep, dtype):
    model, x = net(dtype=dtype), torch.randn(3, 12, dtype=dtype)
    shake(minilora.inject(model, r=4, alpha=6))
    before, y = bits(model), model(x)
    W = model.q_proj.base.weight
    delta = model.q_proj.adapters["default"].delta_weight().to(dtype)
    assert not torch.equal((W + delta) - delta, W)  # subtracting would not do
    minilora.merge(model, keep=keep)
    model.eval()
    assert not torch.equal(model.q_proj.base.weight, before["q_proj.base.weight"])
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(model(x), y, rtol=tolerance, atol=tolerance)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        minilora.unmerge(one)
        unchanged(one, before, [p.requires_grad for p in model.parameters()])


def test_merged_model_refuses_what_would_be_lost(tmp_path):
    model, x = shake(minilora.inject(net(), r=4, alpha=6)), torch.randn(3, 12)
    minilora.save(model, tmp_path / "before")
    minilora.merge(model, keep=None)
    minilora.save(model, tmp_path / "after")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    model.train()
    calls = {
        "a merged adapter can't be trained": lambda: model(x),
        r"inject\(\) needs unmerged": lambda: minilora.inject(model, adapter="b"),
        r"load\(\) needs unmerged": lambda: minilora.load(model, tmp_path / "before", "b"),
        r"activate\(\) needs unmerged": lambda: minilora.activate(model, None),
        r"merge\(\) needs unmerged": lambda: minilora.merge(model),
        r"kept none": lambda: minilora.unmerge(model),
    }
    for text, call in calls.items():
        with pytest.raises(RuntimeError, match=text):
            call()
    merged = model.q_proj.base.weight.clone()
    assert torch.equal(minilora.eject(model).q_proj.weight, merged)


def test_merge_refuses_shared_and_overflowing_weights():
    tied = nn.Module()
    tied.embed, tied.out = nn.Embedding(9, 12), nn.Linear(12, 9, bias=False)
    tied.out.weight = tied.embed.weight
    shake(minilora.inject(tied, r=2, alpha=3, targets=["out"]))
    with pytest.raises(ValueError, match=r"merging into out would change embed\.weight too"):
        minilora.merge(tied)
    small = minilora.inject(nn.Sequential(nn.Linear(4, 4).half()), r=2, alpha=3)
    small[0].adapters["default"].lora_B.data.fill_(1e7)
    before = bits(small)
    with pytest.raises(ValueError, match="merged weight of 0 must be finite"):
        minilora.merge(small)
    unchanged(small, before, [p.requires_grad for p in small.parameters()])


def test_merge_refuses_when_no_adapter_is_active():
    model = two_adapters()
    minilora.activate(model, None)
    with pytest.raises(ValueError, match="needs an adapter: none is active and none was named"):
        minilora.merge(model)


def test_unmerge_refuses_without_originals():
    model = two_adapters()
    minilora.merge(model, "default", keep=None)
    with pytest.raises(RuntimeError, match=r"merge\(keep=None\) kept none \(first: q_proj\)"):
        minilora.unmerge(model)


def test_merge_refuses_a_base_whose_weight_is_recomputed():
    model = net()
    nn.utils.parametrizations.weight_norm(model.q_proj)
    minilora.inject(model, r=2, alpha=3, targets=["q_proj"])
    with pytest.raises(ValueError, match="q_proj wraps a Parametrized.* is no plain parameter"):
        minilora.merge(model)


def test_merge_refuses_a_weight_that_overlaps_another():
    """Slices of one tensor are no `is`-equal parameters, and yet one memory."""
    whole = torch.randn(8, 6)
    model = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(6, 4)})
    model["a"].weight = nn.Parameter(whole[:4])
    model["b"].weight = nn.Parameter(whole[3:7])
    minilora.inject(model, r=2, alpha=3, targets=["a"])
    with pytest.raises(ValueError, match=r"merging into a would change b\.weight too"):
        minilora.merge(model)


def test_disk_copy_survives_a_pickle_of_the_model():
    model = two_adapters()
    minilora.activate(model, "default")
    before = bits(model)
    minilora.merge(model, keep="disk")
    data = pickle.dumps(model)
    file = model.q_proj.route.kept.disk.file
    del model
    assert not file.exists()  # the last user is gone, and the file with it
    twin = pickle.loads(data)
    minilora.unmerge(twin)
    assert all(torch.equal(value, before[name]) for name, value in bits(twin).items())


def test_merge_on_a_full_disk_leaves_the_model_unmerged():
    model = shake(minilora.inject(net(), r=4, alpha=6))
    before, flags = bits(model), [p.requires_grad for p in model.parameters()]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(RuntimeError, match="originals.safetensors must be written.*too large"):
            minilora.merge(model, keep="disk")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    unchanged(model, before, flags)
    minilora.merge(model, keep="disk")


class Tied(nn.Module):
    """A head that is its embedding's weight, and a layer between them."""

    def __init__(self):
        super().__init__()
        self.embed, self.mid = nn.Embedding(9, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.mid(self.embed(ids))))


def test_a_tied_head_trains_and_merges_without_touching_the_embedding():
    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(9)
    weight = model.embed.weight.detach().clone()
    shake(minilora.inject(model, r=2, alpha=3, targets=["head", "mid"]))
    y = model(ids)
    y.square().sum().backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    optimizer.step()
    assert torch.equal(model.embed.weight, weight) and model.embed.weight.grad is None
    assert model.head.base.weight is model.embed.weight
    trained = model(ids)
    assert not torch.equal(trained, y)
    model.eval()
    with pytest.raises(ValueError, match=r"would change embed\.weight too.*untie=True"):
        minilora.merge(model)
    minilora.merge(model, untie=True)
    torch.testing.assert_close(model(ids), trained)
    assert torch.equal(model.embed.weight, weight)
    assert not torch.equal(model.head.weight, weight)
    minilora.unmerge(model)
    assert model.head.base.weight is model.embed.weight
    assert torch.equal(model.embed.weight, weight)
    assert torch.equal(model(ids), trained)


@pytest.mark.parametrize("one", ["default", "b"])
@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_merging_one_of_several_adds_that_one_alone(one, keep):
    model, x = two_adapters().eval(), torch.randn(3, 12)
    minilora.activate(model, one)
    alone, before = model(x), bits(model)
    for active in (["default", "b"], None, "default"):
        minilora.activate(model, active)
        expected = model(x)
        minilora.merge(model, one, keep=keep)
        torch.testing.assert_close(model(x), alone)
        assert {row.name: row.merged for row in minilora.summary(model).adapters}[one]
        minilora.unmerge(model)
        assert all(torch.equal(value, before[name]) for name, value in bits(model).items())
        assert torch.equal(model(x), expected)


class OwnForward(nn.Linear):
    """As transformers' FalconLinear: a linear, written out."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Clipped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-9, 9)


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Stateful(nn.Linear):
    """A linear that draws, counts and has a child."""

    def __init__(self, N, K):
        super().__init__(N, K)
        self.drop, self.calls = nn.Dropout(0.5), nn.Buffer(torch.zeros(1))

    def forward(self, x):
        self.calls.add_(1)
        return super().forward(x) + 0 * self.drop(x).sum()


def test_a_forward_that_is_tried_leaves_everything_as_it_was():
    layer, state = Stateful(12, 20), torch.get_rng_state()
    assert acts_as_linear(layer)
    assert layer.training and layer.drop.training and not layer.calls
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_subclass_that_computes_a_linear_is_merged_and_quantized(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(OwnForward(64, 96), OwnForward(96, 64, bias=False)).to(dtype)
    for name, base in model.named_children():
        before = base.weight.detach().double()
        minilora.inject(model, r=3, alpha=5, targets=[name], adapter=f"a{name}")
        layer = model.get_submodule(name)
        nn.init.normal_(layer.adapters[f"a{name}"].lora_B, std=0.1)
        minilora.activate(model, f"a{name}")
        wanted = before + layer.delta_weight(f"a{name}").double()
        minilora.merge(model)
        assert torch.equal(layer.base.weight, wanted.to(dtype) if dtype != torch.bfloat16 else
                           wanted.float().to(dtype)) and type(layer.base) is OwnForward  # fmt: skip
        minilora.unmerge(model)
        assert torch.equal(layer.base.weight.double(), before)
    minilora.eject(model)
    x = torch.randn(5, 64, dtype=dtype)
    plain = model(x)
    minilora.quantize(model, "int8")
    assert (model(x) - plain).norm() < 0.05 * plain.norm()
    minilora.inject(model, r=2)
    minilora.merge(model, mode="dequantize")
    assert [type(m) for m in minilora.eject(model)] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("kind", [Clipped, Noisy, Pair])
def test_a_subclass_that_computes_something_else_is_refused(kind):
    model = nn.Sequential(kind(64, 64), nn.Linear(64, 64))
    with pytest.raises(ValueError, match=f"that compute the same, and .* is a {kind.__name__}"):
        minilora.quantize(model)
    assert type(model[1]) is nn.Linear
    minilora.inject(model, r=2)
    with pytest.raises(
        ValueError, match=f"0 wraps a {kind.__name__} whose weight .* something els"
    ):
        minilora.merge(model)


@pytest.mark.parametrize(("scale", "loses"), [(0.3, False), (3e-4, True)])
@pytest.mark.parametrize("format", [None, "int8"])
def test_merge_says_when_16_bits_drown_the_adapter(scale, loses, format):
    plain = net(dtype=torch.bfloat16)
    if format is not None:
        minilora.quantize(plain, format)
    model = shake(minilora.inject(plain, r=4, alpha=6), scale=scale)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        minilora.merge(model, mode=None if format is None else "dequantize")
    assert ["rounding to the base's dtype loses" in str(one.message) for one in said] == [
        True
    ] * loses
    minilora.unmerge(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minilora.merge(model.float(), mode=None if format is None else "dequantize")


def test_merge_under_autocast_is_exact():
    models = [shake(minilora.inject(net(), r=4, alpha=6)) for _ in range(2)]
    minilora.merge(models[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        minilora.merge(models[1])
    for one, other in zip(*(bits(model).values() for model in models), strict=True):
        assert torch.equal(one, other)


def test_row_lengths_under_autocast_are_exact():
    factors = shake(minilora.inject(net(), r=4, alpha=6)).q_proj.adapters["default"]
    W = torch.randn(20, 12)
    wanted = (W.double() + factors.delta_weight().double()).norm(dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = factors.row_lengths(W)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)


def test_state_dicts_with_and_without_merged_adapters_are_not_mixed():
    model, x = shake(minilora.inject(net(), r=4, alpha=6)).eval(), torch.randn(3, 12)
    plain, y = copy.deepcopy(model.state_dict()), model(x)
    minilora.merge(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    merged = torch.load(file)
    with pytest.raises(RuntimeError, match="same adapters merged .* none there and default in q_"):
        model.load_state_dict(plain)
    model.load_state_dict(merged)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    minilora.unmerge(model)
    with pytest.raises(RuntimeError, match="default there and none in q_proj: .* twice or not"):
        model.load_state_dict(merged)
    model.load_state_dict(plain)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("mode", ["dequantize", "requantize"])
def test_merging_leaves_every_module_in_its_mode(mode):
    model = minilora.quantize(net(), "int8")
    shake(minilora.inject(model, r=2, alpha=3))
    for i, module in enumerate(model.modules()):
        module.training = bool(i % 2)
    before = {name: module.training for name, module in model.named_modules()}
    more = {"tolerance": None, "sample": torch.randn(3, 12)} if mode == "requantize" else {}
    for verb in (lambda: minilora.merge(model, mode=mode, **more),
                 lambda: minilora.unmerge(model)):  # fmt: skip
        verb()
        assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.parametrize("mode", [None, "dequantize"])
def test_what_only_requantizing_reads_is_refused(mode):
    model = net() if mode is None else minilora.quantize(net(), "int8")
    shake(minilora.inject(model, r=2, alpha=3))
    before = bits(model)
    with pytest.raises(ValueError, match=r"sample measures .* goes with mode='requantize', found"):
        minilora.merge(model, mode=mode, sample=torch.randn(3, 12))
    with pytest.raises(ValueError, match=r"tolerance measures what rounding anew costs"):
        minilora.merge(model, mode=mode, tolerance=0.1)
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())


def test_merging_below_a_slot_brings_the_slot_back():
    model, x = two_adapters().eval(), torch.randn(3, 12)
    minilora.activate(model, "default")
    prepare_switching(model, 6)
    y = model(x)
    minilora.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    minilora.unmerge(model)
    assert torch.equal(model(x), y)
    minilora.activate(model, ["default", "b"])
    assert not torch.equal(model(x), y)
    end_switching(model)
    assert model.q_proj.route is None
