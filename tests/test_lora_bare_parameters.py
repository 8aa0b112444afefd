"""Parameters that no adapter reaches: stacked experts, and layers whose weight is used directly."""

import json

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

import minilora
from minilora.lora.layer import lora_layers

IDS = torch.arange(1, 13)[None]
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def qwen():
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, moe_intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=8,
        num_experts_per_tok=2, max_position_embeddings=64,
    )).eval()  # fmt: skip


def deepseek():
    torch.manual_seed(0)
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4,
        n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=8,
        kv_lora_rank=8, qk_rope_head_dim=4, v_head_dim=8, qk_nope_head_dim=8, n_group=1,
        topk_group=1, max_position_embeddings=64,
    )).eval()  # fmt: skip


def mamba():
    torch.manual_seed(0)
    return transformers.MambaForCausalLM(transformers.MambaConfig(
        vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=4,
    )).eval()  # fmt: skip


@pytest.fixture
def quiet():
    """Leave out the warning that inject gives here."""
    with pytest.warns(UserWarning, match="minilora: no adapter reaches"):
        yield


def shaken(model):
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.adapters["default"].lora_B, std=0.2)
    return model


def test_the_share_that_no_adapter_reaches_is_said():
    model = qwen()
    bare = sum(p.numel() for n, p in model.named_parameters() if ".mlp." in n)  # and the router
    share = bare / sum(p.numel() for p in model.parameters())
    found = minilora.targets(model)
    assert found.unreached == pytest.approx(share)
    line = f"no adapter reaches {share:.0%} of the parameters: 3 are the weight of no linear"
    assert line in str(found) and f"(largest: {EXPERTS}, [8, 48, 32])" in str(found)
    with pytest.warns(UserWarning, match=rf"minilora: {line[:44]}.*they stay as they are"):
        minilora.inject(model, r=2)
    summary = minilora.summary(model)
    assert summary.unreached == pytest.approx(bare / summary_base(model)) and line[:40] in str(
        summary
    )


def summary_base(model):
    return sum(p.numel() for n, p in model.named_parameters() if ".adapters." not in n)


def test_nothing_is_said_of_a_model_of_layers():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "norm": nn.LayerNorm(8), "e": nn.Embedding(9, 8)})
    assert minilora.targets(model).unreached == 0
    assert "reaches" not in str(minilora.targets(model))
    assert "reaches" not in str(minilora.summary(minilora.inject(model, r=2)))


@pytest.mark.parametrize("targets", [["gate_up_proj"], ["q_proj", "down_proj"], ["experts"],
                                     r".*experts\..*", ["mlp.experts.down_proj"]])  # fmt: skip
def test_naming_stacked_experts_says_what_they_are(targets):
    model = qwen()
    for verb in (minilora.targets, minilora.inject):
        with pytest.raises(ValueError, match=r"that are no layer's weight \(first: .*Qwen3MoeExp"):
            verb(model, targets=targets)
    assert not lora_layers(model)


def test_a_name_that_layers_have_too_takes_the_layers(quiet):
    model = minilora.inject(deepseek(), r=2, targets=["down_proj"])
    assert list(lora_layers(model)) == ["model.layers.0.mlp.down_proj",
                                        "model.layers.1.mlp.shared_experts.down_proj"]  # fmt: skip


@pytest.mark.peers
@pytest.mark.parametrize("targets", ["all-linear", ["down_proj", "q_a_proj"], ["gate_proj"]])
def test_peft_reads_adapters_beside_stacked_experts(tmp_path, quiet, targets):
    """PEFT takes `gate_proj` and the like in such a model for the experts, if nothing is done."""
    model = shaken(minilora.inject(deepseek(), r=3, alpha=5, targets=targets, rslora=True,
                                   rank_pattern={"layers.0.mlp.*": 2}
                                   if targets == "all-linear" else None))  # fmt: skip
    minilora.save(model, tmp_path)
    assert minilora.check(tmp_path)[0].takes
    wanted = model(IDS).logits
    theirs = peft.PeftModel.from_pretrained(deepseek(), tmp_path).eval()
    assert (
        (theirs(IDS).logits - wanted).abs().max() < 1e-5 < (deepseek()(IDS).logits - wanted).norm()
    )
    again = minilora.load(deepseek(), tmp_path)
    assert torch.equal(again(IDS).logits, wanted)
    theirs.save_pretrained(tmp_path / "theirs")
    back = minilora.load(deepseek(), tmp_path / "theirs")
    assert torch.equal(back(IDS).logits, wanted)


@pytest.mark.peers
@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"dora": True}, {"lora_bias": True}])
def test_what_peft_can_only_misread_is_said(tmp_path, quiet, options):
    model = shaken(minilora.inject(deepseek(), r=2, **options))
    with pytest.warns(UserWarning, match="minilora: PEFT takes .* for the model's stacked experts"):
        minilora.save(model, tmp_path)
    reader = minilora.check(tmp_path)[0]
    assert not reader.takes and "stacked experts" in reader.problems[0]
    assert torch.equal(minilora.load(deepseek(), tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.peers
def test_pefts_adapters_on_stacked_experts_are_refused_by_name(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=[
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj"])  # fmt: skip
    peft.get_peft_model(qwen(), config).save_pretrained(tmp_path)
    model = qwen()
    with pytest.raises(ValueError, match=rf"target_parameters must name .*found {EXPERTS} \[8, 48"):
        minilora.load(model, tmp_path)
    assert not lora_layers(model)
    of_peft, vllm, llama_cpp = minilora.check(tmp_path)
    assert of_peft.takes and "minilora.load refuses them" in of_peft.notes[0]
    assert all("factors of other parameters" in r.problems[0] for r in (vllm, llama_cpp))
    peft.PeftModel.from_pretrained(qwen(), tmp_path)


@pytest.mark.parametrize("value", ["experts", [1], {"a": 1}])
def test_target_parameters_of_another_kind_are_refused(tmp_path, value, quiet):
    minilora.save(minilora.inject(qwen(), r=2), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_parameters": value}))
    with pytest.raises(ValueError, match="target_parameters must be a list of parameter names"):
        minilora.load(qwen(), tmp_path, verify=False)
    with pytest.raises(ValueError, match="target_parameters must be a list of parameter names"):
        minilora.check(tmp_path)


@pytest.mark.peers
def test_check_is_true_to_peft_on_mamba(tmp_path):
    model = minilora.inject(mamba(), r=2, targets=["in_proj", "out_proj"])
    with pytest.warns(UserWarning, match="minilora: PEFT refuses backbone.layers.0.mixer.out_proj"):
        minilora.save(model, tmp_path / "a")
    assert not minilora.check(tmp_path / "a")[0].takes
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba"):
        peft.PeftModel.from_pretrained(mamba(), tmp_path / "a")
    minilora.save(minilora.inject(mamba(), r=2, targets=["in_proj"]), tmp_path / "b")
    assert minilora.check(tmp_path / "b")[0].takes
    peft.PeftModel.from_pretrained(mamba(), tmp_path / "b")
    with safe_open(tmp_path / "b" / "adapter_model.safetensors", "pt") as file:
        assert "minilora_not_for_peft" not in file.metadata()


def test_a_weight_used_without_its_layer_is_said(capsys):
    """Mamba multiplies by `dt_proj.weight`, so an adapter on that layer is never applied."""
    model = minilora.inject(mamba(), r=2)
    rows = [{"input_ids": IDS[0].tolist()}] * 2
    minilora.fit(model, rows, config=minilora.TrainConfig(max_steps=1, dtype="float32"))
    told = capsys.readouterr().err
    assert (
        "1 adapted layers do nothing, because the model uses their weight without calling" in told
    )
    assert "first: backbone.layers.0.mixer.dt_proj" in told and "saw no token" not in told
