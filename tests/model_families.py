"""Small random models of each family, ours and transformers', for the tests that all have to pass.

A new family is a row of `FAMILIES`.
"""

import copy
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from minilora.loading.model import _opened, _path
from minilora.loading.source import make_model, resolve_dtype
from minilora.models import (
    GPT2,
    Gemma2,
    Gemma2Config,
    Gemma3,
    Gemma3Config,
    GPT2Config,
    GPTNeoX,
    GPTNeoXConfig,
    Granite,
    GraniteConfig,
    KVCache,
    Llama,
    LlamaConfig,
    Mistral,
    MistralConfig,
    Olmo2,
    Olmo2Config,
    Phi3,
    Phi3Config,
    Qwen2,
    Qwen2Config,
    Qwen3,
    Qwen3Config,
    SmolLM3,
    SmolLM3Config,
)

# Before 5.23 it leaves out the cap on scores where torch's own attention computes them.
transformers.Gemma2PreTrainedModel._supports_sdpa = False

_DECODER = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_DECODER_SHAPES = {
    "plain": {},
    "grouped": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48},
    "one_key_head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "odd_sizes": {"vocab_size": 101, "intermediate_size": 37, "num_hidden_layers": 3},
    "other_theta_and_eps": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 71.0},
        "rms_norm_eps": 0.1,
    },
}
_SWITCHED_WINDOWS = {
    "windows_above": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 2,
        "num_hidden_layers": 3,
    },
    "windows_of_two": {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 0},
    "windows_by_type": {
        "use_sliding_window": True,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
_TINY = (29, 16, 20, 2, 4, 2, 4, 32)
_GEMMA = {
    **_DECODER,
    "head_dim": 8,
    "query_pre_attn_scalar": 20,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def _rope(kind, **numbers):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 71.0, **numbers}}


_ROPES = {
    "rope_linear": _rope("linear", factor=3.0),
    "rope_dynamic": {**_rope("dynamic", factor=4.0), "max_position_embeddings": 10},
    "rope_llama3": _rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
    "rope_yarn": _rope("yarn", factor=4.0, original_max_position_embeddings=16),
}  # fmt: skip
_FACTORS = {"short_factor": [1.0, 1.5, 2.0, 4.0], "long_factor": [2.0, 5.0, 11.0, 30.0]}


class Family(NamedTuple):
    """A family: our class, theirs and its configuration, what to make of it, and a tiny one.

    Names of shapes whose layers have windows, longer ones than a row not among them, begin with
    "windows".
    """

    ours: Any
    theirs: Any
    config: Any
    base: dict[str, Any]
    shapes: dict[str, dict[str, Any]]
    tiny: Any


FAMILIES = {
    "gpt2": Family(
        GPT2,
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        {"vocab_size": 61, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
        {
            "plain": {},
            "one_head": {"n_head": 1},
            "odd_sizes": {"vocab_size": 101, "n_embd": 35, "n_head": 7, "n_layer": 3},
            "n_inner": {"n_inner": 37},
            "untied": {"tie_word_embeddings": False},
            "unscaled": {"scale_attn_weights": False},
            "scaled_by_layer": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
            "only_by_layer": {
                "scale_attn_by_inverse_layer_idx": True,
                "scale_attn_weights": False,
            },
            "epsilon": {"layer_norm_epsilon": 0.1},
        },
        GPT2Config(29, 32, 16, 2, 4),
    ),
    "gemma2": Family(
        Gemma2,
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config,
        {**_GEMMA, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0},
        {
            **_DECODER_SHAPES,
            "wide_heads": {"head_dim": 24},
            "windows": {"sliding_window": 5, "num_hidden_layers": 3},
            "windows_by_type": {
                "sliding_window": 4,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "no_caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        },
        Gemma2Config(
            *_TINY,
            query_pre_attn_scalar=4,
            sliding_window=6,
            layer_types=("sliding_attention", "full_attention"),
        ),
    ),
    "gemma3_text": Family(
        Gemma3,
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig,
        {**_GEMMA, "num_hidden_layers": 3, "sliding_window_pattern": 3},
        {
            **{name: shape for name, shape in _DECODER_SHAPES.items() if "theta" not in name},
            "wide_heads": {"head_dim": 24},
            "windows": {"sliding_window": 5},
            "windows_by_type": {
                "sliding_window": 4,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
            "capped": {"final_logit_softcapping": 3.0},
            "windows_and_ropes": {
                "sliding_window": 4,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
                },
            },
        },
        Gemma3Config(
            *_TINY,
            query_pre_attn_scalar=4,
            sliding_window=6,
            layer_types=("sliding_attention",) * 2,
        ),
    ),
    "gpt_neox": Family(
        GPTNeoX,
        transformers.GPTNeoXForCausalLM,
        transformers.GPTNeoXConfig,
        {
            **{key: value for key, value in _DECODER.items() if "key_value" not in key},
            "hidden_size": 64,
            "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5},
            "eos_token_id": 2,
        },
        {
            "plain": {},
            "one_head": {"num_attention_heads": 1},
            "one_after_the_other": {"use_parallel_residual": False},
            "no_biases": {"attention_bias": False},
            "tied": {"tie_word_embeddings": True},
            "relu": {"hidden_act": "relu"},
            "whole_heads": {
                "rope_parameters": {"partial_rotary_factor": 1.0, "rope_theta": 71.0},
                "layer_norm_eps": 0.1,
            },
        },
        GPTNeoXConfig(29, 16, 20, 2, 4, 4, 4, 32, partial_rotary_factor=0.5),
    ),
    "granite": Family(
        Granite,
        transformers.GraniteForCausalLM,
        transformers.GraniteConfig,
        {
            **_DECODER,
            "embedding_multiplier": 1.5,
            "attention_multiplier": 0.6,
            "residual_multiplier": 1.3,
            "logits_scaling": 1.7,
        },
        {
            **_DECODER_SHAPES,
            "wide_heads": {"head_dim": 24},
            "biases": {"attention_bias": True, "mlp_bias": True},
        },
        GraniteConfig(*_TINY, embedding_multiplier=2.0, logits_scaling=1.5),
    ),
    "llama": Family(
        Llama,
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        _DECODER,
        {
            **_DECODER_SHAPES,
            **_ROPES,
            "rope_longrope": _rope("longrope", original_max_position_embeddings=5, **_FACTORS),
            "wide_heads": {"head_dim": 24},
            "biases": {"attention_bias": True, "mlp_bias": True},
        },
        LlamaConfig(*_TINY),
    ),
    "mistral": Family(
        Mistral,
        transformers.MistralForCausalLM,
        transformers.MistralConfig,
        {**_DECODER, "sliding_window": None},
        {
            **_DECODER_SHAPES,
            "windows": {"sliding_window": 5},
            "windows_of_two": {"sliding_window": 2},
            "wide_heads": {"head_dim": 24},
            "rope_yarn": _ROPES["rope_yarn"],
        },
        MistralConfig(*_TINY),
    ),
    "olmo2": Family(
        Olmo2,
        transformers.Olmo2ForCausalLM,
        transformers.Olmo2Config,
        {**_DECODER, "eos_token_id": 2, "pad_token_id": None},
        {**_DECODER_SHAPES, "wide_heads": {"head_dim": 24}, "biases": {"attention_bias": True}},
        Olmo2Config(*_TINY),
    ),
    "phi3": Family(
        Phi3,
        transformers.Phi3ForCausalLM,
        transformers.Phi3Config,
        {**_DECODER, "intermediate_size": 44, "eos_token_id": 2, "pad_token_id": None},
        {
            **_DECODER_SHAPES,
            "windows": {"sliding_window": 5},
            "windows_of_two": {"sliding_window": 2},
            "rope_in_part": {"partial_rotary_factor": 0.75},
            "rope_longrope": {
                **_rope("longrope", **{key: each[:3] for key, each in _FACTORS.items()}),
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 20,
                "max_position_embeddings": 80,
            },
        },
        Phi3Config(*_TINY),
    ),
    "qwen2": Family(
        Qwen2,
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config,
        _DECODER,
        {**_DECODER_SHAPES, **_SWITCHED_WINDOWS},
        Qwen2Config(*_TINY),
    ),
    "qwen3": Family(
        Qwen3,
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config,
        {**_DECODER, "head_dim": 8, "intermediate_size": 44},
        {
            **_DECODER_SHAPES,
            **_SWITCHED_WINDOWS,
            "wide_heads": {"head_dim": 24},
            "biases": {"attention_bias": True},
        },
        Qwen3Config(*_TINY),
    ),
    "smollm3": Family(
        SmolLM3,
        transformers.SmolLM3ForCausalLM,
        transformers.SmolLM3Config,
        {**_DECODER, "pad_token_id": 0, "no_rope_layer_interval": 2},
        {
            **_DECODER_SHAPES,
            "every_fourth": {"num_hidden_layers": 5, "no_rope_layer_interval": 4},
            "no_rope_by_layer": {"num_hidden_layers": 3, "no_rope_layers": [0, 1, 0]},
            "windows": {"use_sliding_window": True, "sliding_window": 5},
            "windows_by_type": _SWITCHED_WINDOWS["windows_by_type"],
            "rope_yarn": _ROPES["rope_yarn"],
            "wide_heads": {"head_dim": 24},
            # All rotated: elsewhere a bias of the keys has no gradient, as it shifts all of a row.
            "biases": {"attention_bias": True, "mlp_bias": True, "no_rope_layers": [1, 1]},
        },
        SmolLM3Config(*_TINY, no_rope_layer_interval=2),
    ),
}


CHECKS: dict[str, str] = {}  # what all families have to pass, a column of docs/models.md each


def check(title):
    """List a test among those that all families have to pass."""

    def listed(test):
        CHECKS[title] = test.__name__
        return test

    return listed


def every_family(title):
    """List a test, and run it for each family."""
    return lambda test: check(title)(pytest.mark.parametrize("family", FAMILIES)(test))


def every_shape(title):
    """List a test, and run it for each shape of each family."""
    cases = [(family, shape) for family, row in FAMILIES.items() for shape in row.shapes]
    return lambda test: check(title)(pytest.mark.parametrize(("family", "shape"), cases)(test))


def their_model(family, dtype=torch.float32, **changes):
    """Return a transformers model whose logits are of order 1 and whose biases are not zero."""
    torch.manual_seed(0)
    row = FAMILIES[family]
    return _shaken(row.theirs(row.config(**{**row.base, **changes})).to(dtype).eval(), 0.2)


def our_model(family, theirs):
    """Return ours with the same weights."""
    row = FAMILIES[family]
    config = row.ours.config_class.from_dict(theirs.config.to_dict())
    model = row.ours(config, dtype=theirs.dtype)
    model.load_state_dict(theirs.state_dict())
    return model.eval()


def tiny(family, tied=False):
    """Return a model of ours of 29 words and 2 blocks."""
    torch.manual_seed(1)
    row = FAMILIES[family]
    return _shaken(row.ours(row.tiny.replace(tie_word_embeddings=tied)).eval(), 0.3)


def _shaken(model, std):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
    return model


def some_ids(model, batch, tokens):
    """Return the same ids for every model of a vocabulary."""
    draw = torch.Generator().manual_seed(2)
    return torch.randint(0, model.config.vocab_size, (batch, tokens), generator=draw)


def assert_close(found, wanted, tolerance=1e-5):
    """Two f32 computations of the same numbers in another order: relative to the largest value."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def assert_rounded(found, theirs, ids):
    """Ours in f64 against theirs with norms and frequencies in f32: not farther off than all of it.

    Norms of few numbers make much of a rounding: models are 5 wide or more. Of more rows than are
    judged, as the rounding of a few tokens may be small by chance.
    """
    more = torch.cat([ids, some_ids(theirs, 16, ids.shape[1]).to(ids)])
    exact = theirs(more).logits
    noise = (copy.deepcopy(theirs).float()(more).logits - exact).abs().max()
    wanted = exact[: len(ids)]
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 4 * noise + 1e-6 * wanted.abs().max()


def assert_equal_in_parts(family, batch, chunks, tolerance=None, **changes):
    """Logits in one pass equal transformers', and those with a cache in chunks; also the loss.

    Of a model in f64, with these changes of the family's configuration. The tolerance is for norms
    or rotary frequencies that theirs computes in f32; without one `assert_rounded` judges. Returns
    the model.
    """
    theirs = their_model(family, torch.float64, **changes)
    ours = our_model(family, theirs)
    ids = some_ids(ours, batch, sum(chunks))
    cache = KVCache(ours, batch, sum(chunks))
    with torch.no_grad():
        whole = ours(ids)
        if tolerance is None:
            assert_rounded(whole, theirs, ids)
        else:
            assert_close(whole, theirs(ids).logits, tolerance)
        parts = [ours(part, cache=cache) for part in ids.split(chunks, dim=1)]
        assert_close(torch.cat(parts, dim=1), whole, 1e-10)
        if sum(chunks) > 1:
            wanted = torch.nn.functional.cross_entropy(
                whole[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
            )
            assert_close(ours.loss(ids, ids), wanted, 1e-10)
    return ours


def read_model(source, dtype=None, prepare=None):
    """Read a model without its tokenizer, by default as it is stored."""
    dtype = resolve_dtype(dtype)
    return make_model(_opened(_path(source), dtype), dtype, "cpu", prepare=prepare)
