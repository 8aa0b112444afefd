"""What OLMo 2 has beside what every family has: any shape, its configuration."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import assert_equal_in_parts
from transformers import Olmo2Config as TheirConfig

from minilora.models import Olmo2Config

pytestmark = pytest.mark.peers

BASE = {"model_type": "olmo2", "vocab_size": 9, "hidden_size": 16, "intermediate_size": 8}
BASE |= {"num_attention_heads": 4}


@settings(max_examples=15, deadline=None)
@given(
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    half=st.integers(1, 5),
    size=st.integers(5, 30),
    bias=st.booleans(),
    batch=st.integers(1, 3),
    chunks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_forward_and_loss_equal_transformers_for_any_shape(
    groups, kv_heads, half, size, bias, batch, chunks
):
    assert_equal_in_parts(
        "olmo2",
        batch,
        chunks,
        num_attention_heads=groups * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=2 * half,
        hidden_size=size,
        attention_bias=bias,
    )


def test_config_defaults_are_those_of_transformers():
    ours, theirs = Olmo2Config.from_dict(BASE), TheirConfig(**BASE)
    for name, value in ours.to_dict().items():
        if name not in ("architectures", "head_dim", "rope_theta", "rope_parameters"):
            assert getattr(theirs, name) == value, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "olmo3"}, "model_type='olmo3' is not built: minilora's Olmo2"),
        ({"sliding_window": 4096}, "sliding_window=4096 is not built"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not built"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not built"),
    ],
)
def test_config_refuses_other_maths_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        Olmo2Config.from_dict(BASE | changes)
