"""captum's integrated gradients run through injected models, adapter on and off."""

import importlib.util
from pathlib import Path

import pytest
import torch

import minilora
from minilora.loading.fetching import fetch
from minilora.loading.model import load_model
from minilora.models import Llama, LlamaConfig

pytest.importorskip("captum")
FILE = Path(__file__).resolve().parents[1] / "examples/captum_attribution.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("captum_attribution", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Letters:
    def encode(self, text):
        return [0 if c == "\n" else ord(c) - 96 for c in text]

    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids)


def judge(script, model, shake, tokenizer, prompt, steps):
    """On is what a merged model gives, off what the plain one gives; the two differ.

    Integrated gradients are complete: they sum to the difference of the logits.
    """
    target = 5
    plain = script.attributions(model, tokenizer, prompt, target, steps)
    shake(minilora.inject(model, r=4, alpha=6, dtype=torch.float64), std=0.02)
    on = script.attributions(model, tokenizer, prompt, target, steps)
    with minilora.disabled(model):
        off = script.attributions(model, tokenizer, prompt, target, steps)
    minilora.merge(model)
    merged = script.attributions(minilora.eject(model), tokenizer, prompt, target, steps)
    words = [tokenizer.decode([i]) for i in tokenizer.encode(prompt)]
    assert on[0] == off[0] == words
    assert torch.equal(off[1], plain[1]) and off[2] == plain[2]
    scale = merged[1].abs().max()
    assert (on[1] - merged[1]).abs().max() < 1e-9 * scale
    assert (on[1] - off[1]).abs().max() > 1e-2 * scale
    for _, found, difference in (on, off):
        assert float(found.sum()) == pytest.approx(difference, rel=0.05, abs=0.05)


def test_captum_attributes_through_a_small_llama(script, shake):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 27,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
             "max_position_embeddings": 32}  # fmt: skip
    model = Llama(LlamaConfig(**shape)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    judge(script, model, shake, Letters(), "captum", 100)


@pytest.mark.real_model
def test_captum_attributes_through_smollm2(script, shake):
    model, tokenizer = load_model(fetch("smollm2-135m"), dtype=torch.float64)
    judge(script, model, shake, tokenizer, "The capital of France is", 24)
