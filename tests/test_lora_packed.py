"""Adapters on linears that other libraries pack: bitsandbytes', loaded by transformers."""

import pytest
import torch
import transformers
from torch import nn

import minilora
from minilora.lora.base import base_of
from minilora.lora.layer import lora_layers

IDS = torch.arange(24)[None]
GATE = "model.layers.0.mlp.gate_proj"
FORMS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
FORMS["double"] = FORMS["nf4"] | {"bnb_4bit_use_double_quant": True}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def loaded(folder, form=None):
    options = {}
    if form is not None:
        pytest.importorskip("bitsandbytes")
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            bnb_4bit_compute_dtype=torch.float32, **FORMS[form]
        )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", **options
    ).eval()


def trained(model):
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.adapters["default"].lora_B, std=0.1)
    return model


@pytest.mark.parametrize("form", FORMS)
def test_shapes_and_values_are_those_of_the_weight(stored, form):
    full, model = loaded(stored), loaded(stored, form)
    rows = {row.name: row for row in minilora.targets(model, r=8)}
    assert (rows[GATE].out_features, rows[GATE].in_features) == (128, 64)
    assert str(minilora.targets(model, r=8)) == str(minilora.targets(full, r=8))
    wanted = full.get_submodule(GATE).weight.detach()
    for run in range(2):  # bitsandbytes stores the weight anew in its first forward
        found = base_of(model.get_submodule(GATE)).values()
        assert found.shape == (128, 64) and found.is_floating_point()
        assert (found.float() - wanted).norm() < 0.2 * wanted.norm()
        if not run:
            model(IDS)
    minilora.inject(model, r=8)  # a warning about wide ranks would be an error here
    minilora.inject(full, r=8)
    assert minilora.summary(model).parameters == minilora.summary(full).parameters


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ran", [False, True])
def test_adapters_go_to_the_full_model_and_back(stored, tmp_path, form, ran):
    model = loaded(stored, form)
    if ran:
        model(IDS)
    trained(minilora.inject(model, r=4, alpha=6))
    minilora.save(model, tmp_path / "a")
    full = minilora.load(loaded(stored), tmp_path / "a")
    here, there = lora_layers(model), lora_layers(full)
    assert all(torch.equal(here[n].delta_weight("default"), there[n].delta_weight("default"))
               for n in here)  # fmt: skip
    again = loaded(stored, form)
    minilora.load(again, tmp_path / "a")
    with torch.no_grad():
        assert ran or torch.equal(again(IDS).logits, model(IDS).logits)  # running rounds its scales
    minilora.save(full, tmp_path / "b")
    minilora.load(loaded(stored, form), tmp_path / "b")


def test_another_packed_base_is_refused(stored, tmp_path):
    minilora.save(minilora.inject(loaded(stored, "nf4"), r=4), tmp_path)
    other = loaded(stored)
    nn.init.normal_(other.get_submodule(GATE).weight)
    with pytest.raises(ValueError, match=r"another base: sampled weights of .* must be alike"):
        minilora.load(other, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_dora_reads_the_decoded_weight(stored, form):
    model = loaded(stored, form)
    model(IDS)
    plain = model(IDS).logits
    W = base_of(model.get_submodule(GATE)).values().double()
    minilora.inject(model, r=4, dora=True, targets=["gate_proj"])
    layer = model.get_submodule(GATE)
    factors = layer.adapters["default"]
    assert torch.allclose(factors.magnitude.double(), W.norm(dim=1), rtol=1e-5)
    assert torch.allclose(model(IDS).logits, plain, rtol=1e-4, atol=1e-4)
    factors.magnitude.mul_(2)
    x = torch.randn(5, 64)
    assert torch.allclose(layer(x), 2 * layer.base(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_training_lowers_the_loss(stored, form):
    model = minilora.inject(loaded(stored, form), r=8)
    rows = [{"input_ids": IDS[0].tolist()}] * 4
    config = minilora.TrainConfig(max_steps=4, lr=1e-2, batch_size=2, dtype="float32")
    found = minilora.fit(model, rows, config=config, quiet=True)
    assert found.losses[-1] < found.losses[0] - 0.1


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_what_would_write_into_packed_weights_is_refused(stored, form):
    model = loaded(stored, form)
    with pytest.raises(ValueError, match=r"self_attn.q_proj is quantized already \(bitsandbytes-"):
        minilora.quantize(model)
    model(IDS)  # bitsandbytes may store the weight anew
    minilora.inject(model, r=2)
    before = model(IDS).logits
    with pytest.raises(ValueError, match=r"is packed \(bitsandbytes-.*save the adapter, load"):
        minilora.merge(model)
    assert torch.equal(model(IDS).logits, before)


class Packed(nn.Module):
    """A linear as GPTQ's and AWQ's programs store it: integers, and no matrix of floats."""

    def __init__(self, k, n, names=("qweight", "qzeros")):
        super().__init__()
        self.in_features, self.out_features = k, n
        for name in names:
            self.register_buffer(name, torch.zeros(k // 8, n, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(k // 4, n))

    def forward(self, x):
        return x.new_zeros(*x.shape[:-1], self.out_features)


class Coded(nn.Linear):
    """A linear whose weight is stored in a dtype that needs scales to be read."""

    def __init__(self, k, n):
        super().__init__(k, n)
        self.weight = nn.Parameter(self.weight.to(torch.float8_e4m3fn), requires_grad=False)


class Dynamic(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.ao.nn.quantized.dynamic.Linear(8, 12)


@pytest.mark.parametrize("targets", ["all-linear", ["up", "down"], ".*(up|down)", ["down"]])
@pytest.mark.parametrize("make", [Packed, Coded])
def test_unknown_packed_linears_are_refused_by_name(make, targets):
    model = nn.ModuleDict({"up": nn.Linear(8, 12), "down": make(8, 12)})
    for verb in (minilora.targets, minilora.inject):
        with pytest.raises(
            ValueError, match=rf"down is a {make.__name__} of test.*minilora.quantize"
        ):
            verb(model, targets=targets)
    assert not lora_layers(model)
    minilora.inject(model, targets=["up"])
    assert list(lora_layers(model)) == ["up"]


def test_a_packed_linear_can_be_excluded():
    model = nn.ModuleDict({"up": nn.Linear(8, 12), "down": Packed(8, 12)})
    assert list(lora_layers(minilora.inject(model, exclude=["down"]))) == ["up"]


def test_dynamically_quantized_linears_of_torch_are_refused():
    with pytest.raises(ValueError, match=r"linear is a Linear of torch, which packs its weight"):
        minilora.inject(Dynamic(), targets=["linear"])
