"""What Mistral has beside what every family has: any shape, its configuration."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import assert_equal_in_parts
from transformers import MistralConfig as TheirConfig

from minilora.models import MistralConfig

pytestmark = pytest.mark.peers

BASE = {"model_type": "mistral", "vocab_size": 9, "hidden_size": 16, "intermediate_size": 8}
BASE |= {"num_attention_heads": 8}


@settings(max_examples=12, deadline=None)
@given(
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    half=st.integers(1, 5),
    size=st.integers(5, 30),
    window=st.none() | st.integers(1, 12),
    batch=st.integers(1, 3),
    chunks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_forward_and_loss_equal_transformers_for_any_shape(
    groups, kv_heads, half, size, window, batch, chunks
):
    assert_equal_in_parts(
        "mistral",
        batch,
        chunks,
        1e-5,
        num_attention_heads=groups * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=2 * half,
        hidden_size=size,
        sliding_window=window,
    )


def test_config_defaults_are_those_of_transformers():
    ours, theirs = MistralConfig.from_dict(BASE), TheirConfig(**BASE)
    for name, value in ours.to_dict().items():
        if name not in ("architectures", "rope_theta"):
            assert getattr(theirs, name) == value, name
    assert ours.windows == (4096,) * 32
    assert MistralConfig.from_dict(BASE | {"sliding_window": None}).windows == (None,) * 32
    assert MistralConfig.from_dict(BASE | {"num_key_value_heads": None}).num_key_value_heads == 8


def test_config_refuses_layers_that_transformers_passes_over():
    types = ["sliding_attention", "full_attention"] * 16
    with pytest.raises(ValueError, match="every layer must be 'sliding_attention'"):
        MistralConfig.from_dict(BASE | {"layer_types": types})
