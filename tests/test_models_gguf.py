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


def _gemma(config):
    """Scores are scaled by head_dim: llama.cpp has no key for it, but a rule."""
    found = {key: value for key, value in _decoder(config).items() if key != "rope.freq_base"}
    return found | {
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.sliding_window": config.sliding_window,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }


def _gemma3(config):
    ropes = config.rope_parameters
    config.rope_parameters = ropes["full_attention"]
    found = _decoder(config) | {
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.sliding_window": config.sliding_window,
        "rope.freq_base_swa": ropes["sliding_attention"]["rope_theta"],
        "rope.scaling.type": ropes["full_attention"]["rope_type"],
        "rope.scaling.factor": ropes["full_attention"]["factor"],
    }
    config.rope_parameters = ropes
    return found


def _plus_one(name, value, config):
    return value + 1 if name.endswith("norm.weight") else value


def _llama(config):
    return _decoder(config) | {"rope.dimension_count": config.head_dim}


def _qwen3(config):
    heads = {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    return _decoder(config) | heads


def _phi3(config):
    return _decoder(config) | {
        "rope.dimension_count": config.hidden_size // config.num_attention_heads,
        "rope.scaling.original_context_length": config.max_position_embeddings,
        "attention.sliding_window": config.sliding_window or 0,
    }


def _gpt2(config):
    return {
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "block_count": config.n_layer,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
    }


def _turned(name, value, config):
    return value.T.contiguous() if ".c_" in name and value.dim() == 2 else value


def _rotated(name, value, config):
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = [count for part, count in heads.items() if f".{part}." in name]
    return _interleaved(value, found[0]) if found else value


def _as_it_is(name, value, config):
    return value


# By family: the architecture, its metadata, what becomes of a tensor, and a model's shape.
CASES = {
    "gemma2": (
        gguf.MODEL_ARCH.GEMMA2,
        _gemma,
        _plus_one,
        {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 4},
    ),
    "gemma3_text": (
        gguf.MODEL_ARCH.GEMMA3,
        _gemma3,
        _plus_one,
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "sliding_window": 4,
            "num_hidden_layers": 7,
            "sliding_window_pattern": 6,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            },
        },
    ),
    "gpt2": (gguf.MODEL_ARCH.GPT2, _gpt2, _turned, {}),
    "gpt2, wider": (gguf.MODEL_ARCH.GPT2, _gpt2, _turned, {"n_inner": 37}),
    "llama": (gguf.MODEL_ARCH.LLAMA, _llama, _rotated, {}),
    "llama, biases": (gguf.MODEL_ARCH.LLAMA, _llama, _rotated, {"attention_bias": True}),
    "phi3": (gguf.MODEL_ARCH.PHI3, _phi3, _as_it_is, {}),
    "phi3, window": (gguf.MODEL_ARCH.PHI3, _phi3, _as_it_is, {"sliding_window": 5}),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, _decoder, _as_it_is, {}),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, _qwen3, _as_it_is, {}),
    "granite": (gguf.MODEL_ARCH.GRANITE, _granite, _rotated, {"mlp_bias": True}),
    "olmo2": (gguf.MODEL_ARCH.OLMO2, _decoder, _as_it_is, {}),
}


TIED = ("gemma2", "gemma3_text")  # the converter leaves their heads out


def converted(tmp_path, family, **changes):
    """Return a transformers model and the file that it becomes."""
    arch, metadata, change, shape = CASES[family]
    theirs = their_model(family.split(",")[0], **shape | changes)
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


@pytest.mark.parametrize(
    ("family", "tied"),
    [(family, tied) for family in CASES for tied in (False, True) if tied or family not in TIED],
)
def test_a_converted_model_is_read_again(tmp_path, family, tied):
    theirs, file = converted(tmp_path, family, tie_word_embeddings=tied or family in TIED)
    ours = read_model(file)
    assert type(ours) is FAMILIES[family.split(",")[0]].ours
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
        read_model(converted(tmp_path, family, tie_word_embeddings=True)[1])


def test_the_largest_gemmas_scale_scores_by_what_llama_cpp_knows_of_them(tmp_path):
    """The 27B models, known by their number of layers: hidden_size / num_attention_heads."""
    theirs, file = converted(
        tmp_path, "gemma2", num_hidden_layers=46, tie_word_embeddings=True, query_pre_attn_scalar=8
    )
    assert read_model(file).config.query_pre_attn_scalar == theirs.config.query_pre_attn_scalar


@pytest.mark.parametrize("family", ["llama", "olmo2", "qwen2", "qwen3"])
def test_keys_that_are_absent_mean_what_llama_cpp_takes(tmp_path, monkeypatch, family):
    """Not what a config.json without them would mean: Qwen3's heads are 128 wide there."""
    arch, metadata, *rest = CASES[family]
    absent = ("attention.key_length", "attention.value_length", "rope.freq_base")

    def without(config):
        return {key: value for key, value in metadata(config).items() if key not in absent}

    monkeypatch.setitem(CASES, family, (arch, without, *rest))
    width = {"head_dim": 8} if family == "qwen3" else {}
    theirs, file = converted(
        tmp_path, family, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **width
    )
    ours = read_model(file)
    assert ours.config.head_dim == theirs.config.hidden_size // theirs.config.num_attention_heads
    ids = some_ids(ours, 2, 9)
    with torch.no_grad():
        assert_close(ours(ids), theirs(ids).logits)
