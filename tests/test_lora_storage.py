"""Bytes on shapes against the bytes of real modules, and against sums done by hand."""

import pytest
import torch
from torch import nn

import minilora
from minilora.lora import sizes
from minilora.models import GPT2, GPT2Config, Llama, LlamaConfig

TINYLLAMA = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}  # fmt: skip


def small(kind, device=None):
    if kind == "gpt2":
        config = GPT2Config(vocab_size=61, n_positions=32, n_embd=64, n_layer=2, n_head=2)
        return GPT2(config, device=device)
    return Llama(
        LlamaConfig(
            vocab_size=61, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=32,
            tie_word_embeddings=kind == "tied",
        ),
        device=device,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "tied", "untied"])
@pytest.mark.parametrize(
    ("format", "options"),
    [
        (None, {}),
        ("int8", {}),
        ("nf4", {}),
        ("nf4", {"double_quant": False, "block_size": 128}),
        ("int4", {"block_size": 32}),
        ("nf4", {"targets": ["lm_head", "h.0.attn.c_attn"]}),
    ],
)
def test_bytes_on_shapes_are_the_modules_bytes(kind, format, options):
    if "targets" in options and kind != "gpt2":
        options = {"targets": ["lm_head", "layers.0.mlp.up_proj"]}
    real = small(kind).to(torch.bfloat16)
    if format:
        minilora.quantize(real, format, **options)
    planned = sizes(small(kind, "meta"), format, dtype=torch.bfloat16, **options)
    assert planned == sizes(real)
    held = {id(t): t.nbytes for t in [*real.parameters(), *real.buffers()]}
    assert planned.total == sum(held.values())
    minilora.inject(real, r=3)
    with_adapters = sizes(real)
    assert with_adapters.base == planned.base
    assert with_adapters.adapters == sum(p.nbytes for p in real.parameters() if p.requires_grad)
    assert minilora.summary(real).bytes == with_adapters.total


def test_tinyllama_in_nf4_is_under_900_mb():
    model = Llama(LlamaConfig(**TINYLLAMA), device="meta")
    found = sizes(model, "nf4", dtype=torch.bfloat16)
    per_block = 2 * 2048 * 2048 + 2 * 256 * 2048 + 3 * 5632 * 2048
    assert found.codes == 22 * per_block // 2
    assert found.total < 0.9e9
    assert found.embeddings + found.linears == 2 * 32000 * 2048 * 2


def test_seven_billion_in_nf4():
    """The linears take 3.34 GB: "7B in 3.5 GB" leaves out head and embeddings, 0.5 GB."""
    model = Llama(LlamaConfig(**LLAMA_7B), device="meta")
    found = sizes(model, "nf4", dtype=torch.bfloat16)
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert found.codes == weights // 2
    blocks = weights // 64
    assert found.scales == pytest.approx(blocks * (1 + 4 / 256), rel=1e-5)
    assert 3.3e9 < found.codes + found.scales < 3.6e9
    assert found.total > 3.8e9


def test_what_cannot_be_quantized_by_shape():
    with pytest.raises(ValueError, match="0 has 96 inputs, which groups of 64 do not divide"):
        sizes(nn.Sequential(nn.Linear(96, 4), nn.Linear(4, 4)), "int4", targets=["0"])
    with pytest.raises(ValueError, match="format must be one of"):
        sizes(nn.Sequential(nn.Linear(96, 4)), "int3")


def test_it_prints():
    text = str(sizes(small("untied"), "nf4"))
    assert "MB (codes 0.0, scales 0.0" in text
