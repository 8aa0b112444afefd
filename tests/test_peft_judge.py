"""PEFT itself reads what we write and we read what it writes."""

import warnings

import pytest
import torch
from small_models import shake
from torch import nn

import minilora
from minilora.lora.layer import lora_layers


def llama(seed=0):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config)


IDS = torch.arange(18).reshape(2, 9) * 7 % 50


OPTIONS = [
    {"alpha": 6},
    {"alpha": 7, "rslora": True, "targets": ["q_proj", "v_proj"]},
    {"alpha": 5, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {r"layers\.1\..*up_proj": 9}},
]


@pytest.mark.peers
@pytest.mark.parametrize("options", OPTIONS)
def test_peft_reads_what_we_write_without_a_warning_and_back(tmp_path, options):
    peft = pytest.importorskip("peft")
    ours = shake(minilora.inject(llama(), r=4, **options))
    minilora.save(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # transformers' own renaming, which PEFT has not followed yet
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing", FutureWarning)
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours")
    with torch.no_grad():
        expected = theirs(IDS).logits
        torch.testing.assert_close(ours(IDS).logits, expected, rtol=1e-5, atol=1e-5)
        theirs.save_pretrained(tmp_path / "theirs")
        back = minilora.load(llama(), tmp_path / "theirs")
        torch.testing.assert_close(back(IDS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.peers
def test_peft_adapters_load_here_several_at_once(tmp_path):
    peft = pytest.importorskip("peft")
    first = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    second = peft.LoraConfig(r=2, lora_alpha=5, use_rslora=True, target_modules=r".*\.[qv]_proj",
                             init_lora_weights=False)  # fmt: skip
    theirs = peft.get_peft_model(llama(), first)
    theirs.add_adapter("b", second)
    for name, parameter in theirs.named_parameters():
        if "lora_B.default" in name:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = minilora.load(llama(), tmp_path)
    minilora.load(ours, tmp_path / "b", adapter="b")
    with torch.no_grad():
        for name in ("default", "b"):
            theirs.set_adapter(name)
            minilora.activate(ours, name)
            torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.peers
def test_gradients_equal_pefts(tmp_path):
    peft = pytest.importorskip("peft")
    ours = shake(minilora.inject(llama(), r=4, alpha=6))
    minilora.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for fqn, layer in lora_layers(ours).items():
        for factor in ("lora_A", "lora_B"):
            grad = getattr(layer.adapters["default"], factor).grad
            key = f"base_model.model.{fqn}.{factor}.default.weight"
            torch.testing.assert_close(grad, expected[key], rtol=1e-4, atol=1e-6)
