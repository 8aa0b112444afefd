"""What Phi-3 has beside what every family has: fused projections, a window, its configuration."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import assert_equal_in_parts, our_model, their_model
from transformers import Phi3Config as TheirConfig

import minilora
from minilora.lora import lora_layers
from minilora.models import Phi3Config

pytestmark = pytest.mark.peers

BASE = {"model_type": "phi3", "vocab_size": 9, "hidden_size": 16, "intermediate_size": 8}
BASE |= {"num_attention_heads": 4}


@settings(max_examples=15, deadline=None)
@given(
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    half=st.integers(1, 5),
    inner=st.integers(1, 30),
    rotated=st.sampled_from([1.0, 0.5]),
    window=st.none() | st.integers(1, 12),
    batch=st.integers(1, 3),
    chunks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_forward_and_loss_equal_transformers_for_any_shape(
    groups, kv_heads, half, inner, rotated, window, batch, chunks
):
    heads = groups * kv_heads
    assert_equal_in_parts(
        "phi3",
        batch,
        chunks,
        1e-6,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_size=heads * 4 * half,
        intermediate_size=inner,
        sliding_window=window,
        partial_rotary_factor=rotated,
    )


def test_adapters_lie_on_the_fused_projections():
    model = minilora.inject(our_model("phi3", their_model("phi3", num_hidden_layers=1)), r=2)
    parts = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    assert sorted(lora_layers(model)) == sorted(f"model.layers.0.{part}" for part in parts)


def test_config_defaults_are_those_of_transformers():
    ours, theirs = Phi3Config.from_dict(BASE), TheirConfig(**BASE)
    for name, value in ours.to_dict().items():
        others = ("architectures", "head_dim", "rope_theta", "partial_rotary_factor")
        if name not in others:
            assert getattr(theirs, name) == value, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resid_pdrop": 0.1}, "resid_pdrop=0.1 is not built: minilora's Phi3"),
        ({"embd_pdrop": 0.1}, "embd_pdrop=0.1 is not built"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not built"),
        (
            {"sliding_window": 4, "layer_types": ["full_attention"] * 32},
            "layer_types=.* is not built: every layer must be 'sliding_attention'",
        ),
        ({"sliding_window": 0}, "sliding_window must be an integer above 0, found 0"),
    ],
)
def test_config_refuses_other_maths_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        Phi3Config.from_dict(BASE | changes)
