"""Parts of an adapter left out or alone, against models whose factors are zeroed by hand."""

import copy

import pytest
import torch
from report_models import Causal, causal, filled, sentences

import minilora
from minilora.lora.layer import lora_layers
from minilora.report.ablation import ablate, kinds_of, only, parts_of
from minilora.report.tokens import measured
from minilora.running.paired import token_losses

PARTS = {
    "whole adapter": "",
    "block 0": "layers.0.",
    "block 1": "layers.1.",
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "mlp.0": "mlp.0",
    "mlp.2": "mlp.2",
}


def loss(model):
    losses = token_losses(model, sentences(), batch_size=2)
    return measured(losses, losses).before


def with_only(model, wanted):
    """A copy in which the adapter is 0 wherever `wanted` is false."""
    model = copy.deepcopy(model)
    for name, layer in lora_layers(model).items():
        if not wanted(name):
            layer.adapters["default"].lora_B.data.zero_()
    return model


def test_ablate_measures_each_part_without_and_alone():
    model = causal()
    found = ablate(model, "default", sentences(), batch_size=2, pad_id=0)
    assert [a.part for a in found] == list(PARTS)
    assert [a.by for a in found] == ["all", "block", "block"] + ["kind"] * 4
    assert [a.layers for a in found] == [8, 4, 4, 2, 2, 2, 2]
    full, base = loss(model), loss(with_only(model, lambda name: False))
    for a in found:
        text = PARTS[a.part]
        without = loss(with_only(model, lambda name, text=text: text not in name))
        alone = loss(with_only(model, lambda name, text=text: text in name))
        assert a.without == pytest.approx(without, abs=1e-6)  # losses are kept in f32
        assert a.alone == pytest.approx(alone, abs=1e-6)
        assert a.rise == pytest.approx(without - full, abs=1e-6)
        assert a.gain == pytest.approx(base - alone, abs=1e-6)
        assert a.rise_error > 0 or a.rise == 0


@pytest.mark.parametrize("options", [{}, {"bias": "all"}, {"dora": True}])
def test_ablate_of_all_layers_is_the_base_to_the_last_bit(options):
    torch.manual_seed(0)
    model = causal(dtype=torch.float32, **options)
    for copies in minilora.lora.Survey(model).copies.values():
        for value in copies.by_name.values():
            value.data.add_(0.1)
    found = ablate(model, "default", sentences(), batch_size=2, pad_id=0)
    with minilora.disabled(model):
        base = token_losses(model, sentences(), batch_size=2)
        ids = torch.tensor([[1, 2, 3]])
        logits = model(ids)
    plain = minilora.eject(copy.deepcopy(model))
    assert all(map(torch.equal, base, token_losses(plain, sentences(), batch_size=2)))
    names = [n for n, layer in lora_layers(model).items()]
    with only(model, "default", [], copies=False):
        assert torch.equal(model(ids), logits)
    with only(model, "default", names):
        assert not torch.equal(model(ids), logits)
    assert found[0].without == measured(base, base).before
    assert found[0].alone == loss(model)
    assert found[0].rise == pytest.approx(found[0].gain) and found[0].rise != 0


def test_ablate_counts_trained_copies_as_a_part():
    model = causal(modules_to_save=["lm_head"])
    minilora.lora.Survey(model).copies_of("default")["lm_head.weight"].data += 0.5
    *others, last = ablate(model, "default", sentences(), batch_size=2, pad_id=0)
    assert (last.part, last.by, last.layers) == ("trained copies", "kind", 0)
    assert [a.part for a in others] == list(PARTS)
    low = with_only(model, lambda name: False)
    assert last.alone == pytest.approx(loss(low), abs=1e-6)
    assert last.rise != 0


def test_only_gives_everything_back(snapshot, same):
    model = causal()
    minilora.inject(model, r=1, alpha=2, adapter="v2", targets=["q_proj"])
    filled(model, "v2")
    minilora.activate(model, ["v2", "default"])
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), only(model, "default", ["layers.0.q_proj"]):
        active = {name: layer.active for name, layer in lora_layers(model).items() if layer.active}
        assert active == {"layers.0.q_proj": ("default",)}
        raise ZeroDivisionError
    same(before, snapshot(model))


def test_parts_of_puts_layers_outside_blocks_apart():
    model = causal(targets=["lm_head", "q_proj"])
    assert parts_of(model, "default") == [
        ("whole adapter", "all", ["layers.0.q_proj", "layers.1.q_proj", "lm_head"]),
        ("block 0", "block", ["layers.0.q_proj"]),
        ("block 1", "block", ["layers.1.q_proj"]),
        ("outside blocks", "block", ["lm_head"]),
        ("q_proj", "kind", ["layers.0.q_proj", "layers.1.q_proj"]),
        ("lm_head", "kind", ["lm_head"]),
    ]


def test_kinds_of_names():
    names = ["h.3.attn.c_proj", "h.3.mlp.c_proj", "h.1.mlp.c_fc", "h.1.mlp.0", "wte"]
    assert list(kinds_of(names).values()) == ["attn.c_proj", "mlp.c_proj", "c_fc", "mlp.0", "wte"]


def test_parts_of_keeps_stacks_of_blocks_apart():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"encoder": Causal(blocks=1), "decoder": Causal()})
    minilora.inject(model, r=1, targets=["q_proj", "encoder.lm_head"])
    parts = parts_of(model, "default")
    assert [(part, names) for part, by, names in parts if by == "block"] == [
        ("encoder.layers.0", ["encoder.layers.0.q_proj"]),
        ("decoder.layers.0", ["decoder.layers.0.q_proj"]),
        ("decoder.layers.1", ["decoder.layers.1.q_proj"]),
        ("outside blocks", ["encoder.lm_head"]),
    ]
    assert [part for part, by, _ in parts if by == "kind"] == [
        "encoder.layers.q_proj",
        "lm_head",
        "decoder.layers.q_proj",
    ]
    found = minilora.explain(model).layers
    assert len({(v.kind, v.block) for v in found}) == len(found)  # a cell of the heat map each
