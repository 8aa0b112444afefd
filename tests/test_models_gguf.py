"""GGUF files of each family, written as llama.cpp's converters do, with the gguf package's names.

What a converter writes and how it changes tensors: the classes of
https://github.com/ggml-org/llama.cpp/tree/master/conversion.
"""

import gguf
import pytest
import torch
from model_families import FAMILIES, assert_close, some_ids, their_model
from test_loading_gguf import _interleaved, _write

from minilora.loading.model import read_model

pytestmark = pytest.mark.peers


def _decoder(config):
    """What `TextModel` writes of every decoder."""
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }


def _granite(config):
    return _decoder(config) | {
        "vocab_size": config.vocab_size,
        "rope.dimension_count": config.hidden_size // config.num_attention_heads,
        "attention.scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
    }


def _rotated(name, value, config):
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = [count for part, count in heads.items() if f".{part}." in name]
    return _interleaved(value, found[0]) if found else value


def _as_it_is(name, value, config):
    return value


# By family: the architecture, its metadata, what becomes of a tensor, and a model's shape.
CASES = {
    "granite": (gguf.MODEL_ARCH.GRANITE, _granite, _rotated, {"mlp_bias": True}),
    "olmo2": (gguf.MODEL_ARCH.OLMO2, _decoder, _as_it_is, {}),
}


def converted(tmp_path, family, **changes):
    """Return a transformers model and the file that it becomes."""
    arch, metadata, change, shape = CASES[family]
    theirs = their_model(family, **shape | changes)
    names = gguf.get_tensor_name_map(arch, theirs.config.num_hidden_layers)
    tensors = {
        names.get_name(name, (".weight", ".bias")): change(name, value.detach(), theirs.config)
        for name, value in theirs.named_parameters()
    }
    assert None not in tensors
    tensors = {name: value.numpy() for name, value in tensors.items()}
    about = metadata(theirs.config)
    file = tmp_path / f"{family}.gguf"
    return theirs, _write(file, tensors, about, architecture=gguf.MODEL_ARCH_NAMES[arch])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", CASES)
def test_a_converted_model_is_read_again(tmp_path, family, tied):
    theirs, file = converted(tmp_path, family, tie_word_embeddings=tied)
    ours = read_model(file)
    assert type(ours) is FAMILIES[family].ours
    state = ours.state_dict()
    for name, value in theirs.state_dict().items():
        assert_close(state[name], value, 1e-6)
    ids = some_ids(ours, 2, 9)
    with torch.no_grad():
        assert_close(ours(ids), theirs(ids).logits)


@pytest.mark.parametrize("family", CASES)
def test_a_key_that_is_not_built_is_refused_by_name(tmp_path, monkeypatch, family):
    arch, metadata, *rest = CASES[family]
    monkeypatch.setitem(CASES, family, (arch, lambda c: metadata(c) | {"clamp_kqv": 8.0}, *rest))
    with pytest.raises(ValueError, match=r"clamp_kqv = 8\.0 is not built"):
        read_model(converted(tmp_path, family)[1])
