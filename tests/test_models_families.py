"""Every family, judged by transformers: logits, gradients, text, folders."""

import pytest
import torch
from model_families import (
    FAMILIES,
    assert_close,
    check,
    every_family,
    every_shape,
    our_model,
    read_model,
    some_ids,
    their_model,
)
from torch import nn
from transformers import AutoModelForCausalLM

import minilora
from minilora.loading.saving import save_pretrained
from minilora.lora import lora_layers
from minilora.models import KVCache

pytestmark = pytest.mark.peers

SHAPES = [(family, shape) for family, row in FAMILIES.items() for shape in row.shapes]
OTHERS = [each for each in SHAPES if each[1].startswith(("windows", "rope"))]
OTHERS.remove(("llama", "rope_longrope"))  # with its cache transformers mixes two rotations there
WINDOWS = [(family, shape) for family, shape in SHAPES if shape.startswith("windows")]


@every_shape("logits")
def test_forward_equals_transformers(family, shape):
    theirs = their_model(family, **FAMILIES[family].shapes[shape])
    ours = our_model(family, theirs)
    ids = some_ids(ours, 3, 11)
    with torch.no_grad():
        wanted = theirs(ids).logits
        assert wanted.abs().max() > 0.5
        assert_close(ours(ids), wanted)
        assert_close(ours(ids, last=2), wanted[:, -2:])
        assert (ours(ids.flip(1)) - wanted).abs().max() > 0.1


@every_shape("every gradient")
def test_loss_and_every_gradient_equal_transformers(family, shape):
    theirs = their_model(family, **FAMILIES[family].shapes[shape])
    ours = our_model(family, theirs)
    ids = some_ids(ours, 3, 9)
    labels = ids.clone()
    labels[0, :5] = labels[2, 3:] = -100  # ragged: a mean of means would show
    wanted, found = theirs(ids, labels=labels).loss, ours.loss(ids, labels)
    assert_close(found, wanted)
    wanted.backward()
    found.backward()
    gradients = dict(ours.named_parameters())
    assert gradients.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        assert_close(gradients[name].grad, parameter.grad, 2e-5)  # sums in another order


@pytest.mark.parametrize(("family", "shape"), WINDOWS)
def test_windows_hold_for_cached_and_padded_rows(family, shape):
    """In chunks of any length, and beside a mask: the windowed rule is written out here."""
    ours = our_model(family, their_model(family, **FAMILIES[family].shapes[shape]))
    ids, pads = some_ids(ours, 2, 11), torch.tensor([3, 0])
    cache = KVCache(ours, 2, 11)
    with torch.no_grad():
        wanted = ours(ids)
        parts = [ours(part, cache=cache) for part in ids.split([4, 1, 3, 1, 2], dim=1)]
        assert_close(torch.cat(parts, dim=1), wanted)
        seen = (torch.arange(11) >= pads[:, None])[:, None, None] & torch.ones(11, 11).tril().bool()
        positions = (torch.arange(11) - pads[:, None]).clamp(min=0)
        found = ours(ids, mask=seen, positions=positions)
        assert_close(found[0, 3:], ours(ids[:1, 3:])[0])
        assert_close(found[1], wanted[1])


@pytest.mark.parametrize(("family", "shape"), WINDOWS)
def test_a_mask_is_made_for_each_window_once_and_only_where_one_is_needed(family, shape):
    ours = our_model(family, their_model(family, **FAMILIES[family].shapes[shape]))
    for window in {*ours.windows} - {None}:
        masks = ours._masks(None, 2, window, 0, torch.device("cpu"))
        assert masks[window] is None
        masks = ours._masks(None, 2, window + 1, 0, torch.device("cpu"))
        assert masks.pop(window).shape == (window + 1, window + 1)
        assert set(masks) <= {None}
        assert masks.get(None) is None


@every_family("positions")
def test_forward_with_positions_equals_transformers(family):
    theirs = their_model(family)
    ours = our_model(family, theirs)
    ids = some_ids(ours, 2, 6)
    positions = torch.tensor([[3, 4, 5, 9, 10, 11], [0, 1, 7, 8, 20, 63]])
    with torch.no_grad():
        wanted = theirs(ids, position_ids=positions).logits
        assert_close(ours(ids, positions=positions), wanted)
        assert_close(ours(ids, positions=positions.to(torch.int16)), wanted)
        one = theirs(ids, position_ids=positions[:1].expand(2, -1)).logits
        assert_close(ours(ids, positions=positions[0]), one)


@every_family("bf16")
def test_forward_in_bf16_is_as_exact_as_transformers(tmp_path, family):
    theirs = their_model(family)
    ours = our_model(family, theirs)
    ids = some_ids(ours, 4, 16)
    theirs.save_pretrained(tmp_path)  # `.bfloat16()` would round the rotary frequencies, too
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = ours(ids).double()
        found, wanted = ours.bfloat16()(ids), theirs(ids).logits
    assert found.dtype == torch.bfloat16
    assert (found - exact).pow(2).mean() <= 1.1**2 * (wanted - exact).pow(2).mean()


@check("greedy text, rows padded")
@pytest.mark.parametrize(("family", "shape"), [*((f, "plain") for f in FAMILIES), *OTHERS])
def test_greedy_text_equals_transformers_token_for_token(family, shape):
    """Rows of unequal length, so padded on the left, against one row at a time."""
    changes = FAMILIES[family].shapes[shape] | {"tie_word_embeddings": False}
    theirs = their_model(family, **changes)
    ours = our_model(family, theirs)
    prompts = [some_ids(ours, 1, n)[0].tolist() for n in (7, 1, 4)]
    found = minilora.generate(ours, prompts, max_new_tokens=30)
    for prompt, new in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        wanted = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert new == wanted[0, len(prompt) :].tolist()
        assert len(set(new)) > 3  # not one token over and over


@pytest.mark.parametrize(("family", "shape"), SHAPES)
def test_config_survives_the_way_through_transformers(family, shape):
    row = FAMILIES[family]
    theirs = row.config(**{**row.base, **row.shapes[shape]})
    ours = row.ours.config_class.from_dict(theirs.to_dict())
    again = row.config(**ours.to_dict())
    assert row.ours.config_class.from_dict(again.to_dict()) == ours
    known = theirs.to_dict().keys() & ours.to_dict().keys()
    for key in known - {"architectures", "rope_parameters"}:  # which has defaults written out
        assert again.to_dict()[key] == theirs.to_dict()[key], key


@check("folders both ways")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_save_pretrained_and_transformers_read_each_other(tmp_path, family, dtype, tied):
    theirs = their_model(family, dtype, tie_word_embeddings=tied, eos_token_id=[2, 3])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = read_model(tmp_path / "theirs")
    assert type(ours) is FAMILIES[family].ours
    assert not ours.training
    assert ours.name_or_path == str(tmp_path / "theirs")
    save_pretrained(ours, tmp_path / "ours")
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(theirs)
    assert again.dtype == dtype
    assert again.generation_config.eos_token_id == [2, 3]
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    again.save_pretrained(tmp_path / "back")
    back = read_model(tmp_path / "back")
    assert (back.lm_head.weight is back.get_input_embeddings().weight) == tied
    assert back.config == ours.config
    wanted = theirs.state_dict()
    for found in (ours.state_dict(), again.state_dict(), back.state_dict()):
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, wanted[name]), name
    if dtype == torch.float32:
        with torch.no_grad():
            assert_close(ours(some_ids(ours, 2, 9)), again(some_ids(ours, 2, 9)).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_save_pretrained_gives_the_same_files_again(tmp_path, family):
    def everything(folder):
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    their_model(family).save_pretrained(tmp_path / "theirs")
    save_pretrained(read_model(tmp_path / "theirs"), tmp_path / "a")
    first = everything(tmp_path / "a")
    save_pretrained(read_model(tmp_path / "a"), tmp_path / "b")
    assert everything(tmp_path / "b") == first
    save_pretrained(read_model(tmp_path / "b"), tmp_path / "b")  # over itself
    assert everything(tmp_path / "b") == first


@pytest.mark.parametrize("family", FAMILIES)
def test_save_pretrained_keeps_a_head_that_was_untied(tmp_path, family):
    their_model(family, tie_word_embeddings=True).save_pretrained(tmp_path / "theirs")
    ours = read_model(tmp_path / "theirs")
    ours.lm_head.weight = nn.Parameter(ours.lm_head.weight.detach() * 2)
    save_pretrained(ours, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    ids = some_ids(ours, 2, 9)
    with torch.no_grad():
        assert_close(again(ids).logits, ours(ids))


@every_family("trained over INT8")
def test_a_family_is_trained_over_quantized_layers(family):
    model = our_model(family, their_model(family))
    minilora.inject(minilora.quantize(model, "int8"), r=2)
    rows = [{"input_ids": row, "labels": row} for row in some_ids(model, 4, 9).tolist()]
    before = minilora.evaluate(model, rows).loss
    minilora.fit(model, rows, config=minilora.TrainConfig(max_steps=5, lr=1e-2), quiet=True)
    assert minilora.evaluate(model, rows).loss < before


@every_family("PEFT out")
def test_peft_reads_our_adapter(tmp_path, family):
    peft = pytest.importorskip("peft")
    theirs = their_model(family)
    ours = minilora.inject(our_model(family, theirs), r=3, alpha=4).eval()
    ids = some_ids(ours, 2, 9)
    with torch.no_grad():
        plain = ours(ids)
        for name, parameter in ours.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
        minilora.save(ours, tmp_path)
        wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
        assert (ours(ids) - plain).abs().max() > 0.1
        assert_close(ours(ids), wrapped(ids).logits)
    assert _adapted(wrapped) == set(lora_layers(ours))


@every_family("PEFT in")
def test_we_read_an_adapter_that_peft_made(tmp_path, family):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(their_model(family), config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
        wrapped.save_pretrained(tmp_path)
        ours = our_model(family, their_model(family))
        ids = some_ids(ours, 2, 9)
        plain = ours(ids)
        minilora.load(ours, tmp_path)
        assert (ours(ids) - plain).abs().max() > 0.1
        assert_close(ours(ids), wrapped(ids).logits)
    assert _adapted(wrapped) == set(lora_layers(ours))


def _adapted(wrapped):
    """The layers of a model of PEFT that carry an adapter."""
    names = {name for name, _ in wrapped.named_parameters() if ".lora_A." in name}
    return {name.removeprefix("base_model.model.").split(".lora_A.")[0] for name in names}
