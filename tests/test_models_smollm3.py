"""What SmolLM3 has beside what every family has: layers without rotation, its configuration."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import assert_equal_in_parts
from transformers import SmolLM3Config as TheirConfig

from minilora.models import SmolLM3Config

pytestmark = pytest.mark.peers

BASE = {"model_type": "smollm3", "vocab_size": 9, "hidden_size": 32, "intermediate_size": 8}


@settings(max_examples=12, deadline=None)
@given(
    groups=st.integers(1, 3),
    half=st.integers(1, 5),
    size=st.integers(5, 30),
    rotated=st.lists(st.integers(0, 1), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 12),
    batch=st.integers(1, 3),
    chunks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_forward_and_loss_equal_transformers_for_any_shape(
    groups, half, size, rotated, window, batch, chunks
):
    ours = assert_equal_in_parts(
        "smollm3",
        batch,
        chunks,
        1e-5,
        num_attention_heads=2 * groups,
        head_dim=2 * half,
        hidden_size=size,
        num_hidden_layers=len(rotated),
        no_rope_layers=rotated,
        use_sliding_window=window is not None,
        sliding_window=window,
    )
    assert [block.rope is not None for block in ours.blocks] == [bool(each) for each in rotated]


def test_config_defaults_are_those_of_transformers():
    ours, theirs = SmolLM3Config.from_dict(BASE), TheirConfig(**BASE)
    for name, value in ours.to_dict().items():
        if name not in ("architectures", "rope_theta", "head_dim"):
            assert getattr(theirs, name) == value, name
    assert ours.ropes == ((ours.rope,) * 3 + (None,)) * 9
    assert SmolLM3Config(9, 8, 8, 4, 2, 2, 4).ropes[2:] == (
        SmolLM3Config(9, 8, 8, 4, 2, 2, 4).rope,
        None,
    )


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_windows_are_where_nothing_is_rotated(interval):
    config = BASE | {"use_sliding_window": True, "sliding_window": 3, "num_hidden_layers": 5}
    config["no_rope_layer_interval"] = interval
    ours, theirs = SmolLM3Config.from_dict(config), TheirConfig(**config)
    assert [window is None for window in ours.windows] == [r is not None for r in ours.ropes]
    assert ours.to_dict()["layer_types"] == theirs.layer_types
    assert ours.to_dict()["no_rope_layers"] == theirs.no_rope_layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_rope_layers": 5}, "no_rope_layers must be a list or null, found 5"),
        ({"no_rope_layers": [True] * 36}, "no_rope_layers must be a list or null"),
        ({"no_rope_layers": [1]}, "no_rope_layers must hold 0 or 1 for each of 36 layers, found"),
        ({"no_rope_layers": [2] * 36}, "no_rope_layers must hold 0 or 1"),
        ({"no_rope_layer_interval": 0}, "no_rope_layer_interval must be an integer above 0"),
        (
            {"no_rope_layer_interval": 0, "use_sliding_window": True, "sliding_window": 2},
            "no_rope_layer_interval must be an integer above 0",
        ),
    ],
)
def test_config_refuses_bad_values(changes, message):
    with pytest.raises(ValueError, match=message):
        SmolLM3Config.from_dict(BASE | changes)
