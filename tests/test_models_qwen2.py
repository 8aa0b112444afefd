"""The Qwen2 model, judged by transformers: numbers, cache, folders, GGUF files."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models_gguf import _metadata, _tensors, _write
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM
from transformers import Qwen2Config as TheirConfig

import minilora
from minilora.loading.model import read_model
from minilora.loading.saving import save_pretrained
from minilora.models import Qwen2, Qwen2Config

pytestmark = pytest.mark.peers


def _theirs(dtype=torch.float32, **changes):
    """A random transformers model whose biases are not zero."""
    shape = {
        "vocab_size": 53,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 48,
    }
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(TheirConfig(**{**shape, **changes})).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def _ours(theirs):
    model = Qwen2(Qwen2Config.from_dict(theirs.config.to_dict()), dtype=theirs.dtype)
    model.load_state_dict(theirs.state_dict())
    return model.eval()


def _ids(batch, tokens, vocab=53):
    return torch.randint(0, vocab, (batch, tokens), generator=torch.Generator().manual_seed(2))


def _close(found, wanted, tolerance=1e-5):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


@settings(max_examples=15)
@given(
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    half=st.integers(1, 5),
    layers=st.integers(1, 3),
    inner=st.integers(1, 30),
    tied=st.booleans(),
    theta=st.sampled_from([71.0, 1e6]),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 12),
)
def test_forward_equals_transformers_for_any_shape(
    groups, kv_heads, half, layers, inner, tied, theta, batch, tokens
):
    heads = groups * kv_heads
    theirs = _theirs(
        torch.float64,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_size=heads * 2 * half,
        num_hidden_layers=layers,
        intermediate_size=inner,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    with torch.no_grad():
        # transformers keeps the rotary frequencies in f32.
        _close(_ours(theirs)(_ids(batch, tokens)), theirs(_ids(batch, tokens)).logits, 1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_every_gradient_equal_transformers(tied):
    theirs = _theirs(tie_word_embeddings=tied)
    ours, ids = _ours(theirs), _ids(3, 9)
    labels = ids.clone()
    labels[0, :5] = labels[2, 3:] = -100  # ragged: a mean of means would show
    wanted, found = theirs(ids, labels=labels).loss, ours.loss(ids, labels)
    _close(found, wanted)
    wanted.backward()
    found.backward()
    gradients = dict(ours.named_parameters())
    assert gradients.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        if not name.endswith("k_proj.bias"):  # attention does not see it: rounding is left
            _close(gradients[name].grad, parameter.grad, 2e-5)


def test_greedy_text_equals_transformers_token_for_token():
    """Rows of unequal length, so padded on the left, from the cache."""
    theirs = _theirs()
    prompts = [_ids(1, n)[0].tolist() for n in (7, 1, 4)]
    found = minilora.generate(_ours(theirs), prompts, max_new_tokens=20)
    for prompt, new in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        wanted = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert new == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("tied", [True, False])
def test_folders_are_read_and_written_as_by_transformers(tmp_path, tied):
    theirs = _theirs(torch.bfloat16, tie_word_embeddings=tied, eos_token_id=[2, 3])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = read_model(tmp_path / "theirs")
    assert type(ours) is Qwen2
    save_pretrained(ours, tmp_path / "ours")
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert type(again) is Qwen2ForCausalLM
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    wanted = theirs.state_dict()
    for found in (
        ours.state_dict(),
        again.state_dict(),
        read_model(tmp_path / "ours").state_dict(),
    ):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    assert again.config.eos_token_id == [2, 3]


def test_gguf_files_are_read(tmp_path):
    """Rows of q and k stay in their order there, unlike a Llama's."""
    theirs = _theirs(hidden_size=64, intermediate_size=32)
    tensors = _tensors(theirs, interleaved=False)
    metadata = _metadata(theirs.config, head_dim=16)
    ours = read_model(_write(tmp_path / "a.gguf", tensors, metadata, architecture="qwen2"))
    assert type(ours) is Qwen2
    with torch.no_grad():
        _close(ours(_ids(2, 9)), theirs(_ids(2, 9)).logits)


def test_adapters_quantized_storage_and_training_take_it():
    model = _ours(_theirs())
    minilora.quantize(model, "int8")
    minilora.inject(model, r=2)
    rows = [{"input_ids": row, "labels": row} for row in _ids(4, 9).tolist()]
    before = minilora.evaluate(model, rows).loss
    minilora.fit(model, rows, config=minilora.TrainConfig(max_steps=5, lr=1e-2), quiet=True)
    assert minilora.evaluate(model, rows).loss < before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window=True is not built: minilora's Qwen2"),
        ({"model_type": "qwen3"}, "model_type='qwen3' is not built"),
        ({"layer_types": ["sliding_attention"]}, "layer_types=.* is not built"),
    ],
)
def test_config_refuses_other_maths_by_name(changes, message):
    entries = {"model_type": "qwen2", "vocab_size": 9, "hidden_size": 16, "intermediate_size": 8}
    entries |= {"num_attention_heads": 4, "sliding_window": 4096}
    config = Qwen2Config.from_dict(entries)
    assert (config.max_position_embeddings, config.qkv_bias) == (32768, True)
    assert "attention_bias" not in config.to_dict()
    with pytest.raises(ValueError, match=message):
        Qwen2Config.from_dict(entries | changes)
