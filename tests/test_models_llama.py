"""Llama's configuration, judged by transformers."""

import pytest
import torch
from transformers import LlamaConfig as TheirConfig

from minilora.models import LlamaConfig

pytestmark = pytest.mark.peers


# --- configuration ------------------------------------------------------------------------------

BASE = {"model_type": "llama", "vocab_size": 10, "hidden_size": 16, "intermediate_size": 8}
HEADS = {"num_attention_heads": 4}


def test_config_reads_both_spellings_of_theta():
    old = LlamaConfig.from_dict({**BASE, **HEADS, "rope_theta": 5.0, "rope_scaling": None})
    new = LlamaConfig.from_dict(
        {**BASE, **HEADS, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    )
    assert old == new
    assert old.rope_theta == 5.0
    assert LlamaConfig.from_dict({**BASE, **HEADS}).rope_theta == 10000.0


def test_config_defaults_are_those_of_transformers():
    small = {**BASE, "num_attention_heads": 4, "head_dim": None, "num_key_value_heads": None}
    ours, theirs = LlamaConfig.from_dict(small), TheirConfig(**small)
    for name, value in ours.to_dict().items():
        if name not in ("architectures", "bos_token_id", "eos_token_id", "rope_theta"):
            assert getattr(theirs, name) == value, name


def test_config_survives_the_way_through_transformers():
    ours = LlamaConfig(
        vocab_size=11,
        hidden_size=12,
        intermediate_size=13,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        max_position_embeddings=99,
        rms_norm_eps=0.01,
        rope_theta=7.0,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        bos_token_id=1,
        eos_token_id=[2, 3],
        pad_token_id=4,
    )
    theirs = TheirConfig(**ours.to_dict(torch.bfloat16))
    assert theirs.dtype == torch.bfloat16
    assert LlamaConfig.from_dict(theirs.to_dict()) == ours


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "mistral"),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("hidden_act", "gelu"),
        ("pretraining_tp", 2),
        ("quantization_config", {"quant_method": "gptq"}),
        ("sliding_window", 4096),
        ("use_sliding_window", True),
        ("partial_rotary_factor", 0.5),
        ("rope_interleaved", True),
        ("attention_dropout", 0.1),
        ("is_encoder_decoder", True),
        ("add_cross_attention", True),
    ],
)
def test_config_refuses_other_maths_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}=.* is not built"):
        LlamaConfig.from_dict({**BASE, **HEADS, name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be an integer above 0, found 0"),
        ({"vocab_size": True}, "vocab_size must be an integer"),
        (
            {"vocab_size": 10**400},
            r"vocab_size must be at most 1,073,741,824, found 10+…",
        ),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers must be at most 1,024, found 10000000"),
        (
            {"num_attention_heads": 2**20, "num_key_value_heads": 1, "head_dim": 2**20},
            r"num_attention_heads · head_dim must be at most 1,073,741,824, found 1048576",
        ),
        ({"rope_theta": 10**400}, "rope_theta must be a number above 0"),
        ({"eos_token_id": 2**31}, "eos_token_id must be a token id"),
        ({"layer_types": 5}, "layer_types must be a list of names or null, found 5"),
        ({"hidden_size": "16"}, "hidden_size must be an integer"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers must be an integer"),
        ({"num_attention_heads": None}, "num_attention_heads must be an integer"),
        ({"num_attention_heads": 3}, "num_attention_heads must divide hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number above 0"),
        ({"rope_theta": float("nan")}, "rope_theta must be a number above 0"),
        ({"rope_theta": float("inf")}, "rope_theta must be a number above 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"eos_token_id": -1}, "eos_token_id must be a token id"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id must be a token id"),
        ({"bos_token_id": [1]}, "bos_token_id must be a token id"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object or null"),
        ({"layer_types": ["sliding_attention"]}, "layer_types=.* is not built"),
    ],
)
def test_config_refuses_bad_values(changes, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_dict({**BASE, **HEADS, **changes})


def test_config_refuses_missing_entries():
    with pytest.raises(ValueError, match="must be an object"):
        LlamaConfig.from_dict([])
    with pytest.raises(ValueError, match="must name its model_type"):
        LlamaConfig.from_dict({"vocab_size": 10})
    with pytest.raises(ValueError, match=r"intermediate_size must stand in config\.json"):
        LlamaConfig.from_dict({key: BASE[key] for key in list(BASE)[:3]})
