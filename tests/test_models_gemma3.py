"""What Gemma 3 has beside what every family has: two ropes, a pattern of windows, its norms."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import assert_equal_in_parts, our_model, their_model
from transformers import Gemma3TextConfig as TheirConfig

import minilora
from minilora.models import Gemma3, Gemma3Config

pytestmark = pytest.mark.peers

BASE = {"model_type": "gemma3_text", "vocab_size": 9, "hidden_size": 16, "intermediate_size": 8}
FULL, SLIDING = "full_attention", "sliding_attention"


@settings(max_examples=15, deadline=None)
@given(
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    half=st.integers(1, 5),
    wide=st.integers(5, 9),
    pattern=st.integers(1, 4),
    window=st.integers(1, 12),
    thetas=st.tuples(st.floats(10, 1e6), st.floats(10, 1e4)),
    factor=st.none() | st.floats(1, 8),
    chunks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_forward_and_loss_equal_transformers_for_any_shape(
    groups, kv_heads, half, wide, pattern, window, thetas, factor, chunks
):
    heads = groups * kv_heads
    full = {"rope_type": "default"} if factor is None else {"rope_type": "linear", "factor": factor}
    assert_equal_in_parts(
        "gemma3_text",
        2,
        chunks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=2 * half,
        hidden_size=heads * wide,
        sliding_window_pattern=pattern,
        sliding_window=window,
        rope_parameters={
            FULL: full | {"rope_theta": thetas[0]},
            SLIDING: {"rope_type": "default", "rope_theta": thetas[1]},
        },
    )


def test_older_keys_are_read_as_transformers_does():
    """As the published config.json of the 4B's text model has them."""
    older = BASE | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "num_hidden_layers": 7}
    older |= {"rope_theta": 5000, "rope_local_base_freq": 70, "sliding_window_pattern": 3}
    ours, theirs = Gemma3Config.from_dict(older), TheirConfig(**older)
    assert list(ours.layer_types) == theirs.layer_types
    again = Gemma3Config.from_dict(theirs.to_dict())
    assert (again.rope, again.ropes) == (ours.rope, ours.ropes)
    assert ours.ropes[0].theta == 70
    assert (ours.ropes[2].theta, ours.ropes[2].scaling.factor) == (5000, 8.0)
    assert TheirConfig(**ours.to_dict()).rope_parameters == theirs.rope_parameters


def test_an_original_context_counts_only_in_the_rope_that_it_stands_in():
    """As in transformers, which ignores one outside where ropes differ from layer to layer."""
    scaling = {"rope_type": "yarn", "rope_theta": 900.0, "factor": 4.0}
    for stated, original in (({}, 131072), ({"original_max_position_embeddings": 64}, 64)):
        nested = {FULL: scaling | stated, SLIDING: {"rope_type": "default", "rope_theta": 30.0}}
        for rope in ({"rope_parameters": nested}, {"rope_scaling": scaling | stated}):
            entries = BASE | rope | {"original_max_position_embeddings": 8}
            theirs = TheirConfig(**copy.deepcopy(entries)).rope_parameters[FULL]
            assert theirs["original_max_position_embeddings"] == original
            found = Gemma3Config.from_dict(entries).rope_scaling
            assert found.original_max_position_embeddings == original


def test_the_published_sizes():
    """The 1B's number of parameters on its page."""
    config = Gemma3Config.from_dict(
        {"model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152,
         "intermediate_size": 6912, "num_attention_heads": 4, "num_key_value_heads": 1}
    )  # fmt: skip
    assert sum(p.numel() for p in Gemma3(config, device="meta").parameters()) == 999_885_952


def test_config_defaults_are_those_of_transformers():
    ours, theirs = Gemma3Config.from_dict(BASE), TheirConfig(**BASE)
    for name, value in ours.to_dict().items():
        if name not in ("architectures", "hidden_act", "rope_theta", "rope_local_base_freq"):
            assert getattr(theirs, name) == value, name
    assert (ours.rope_theta, ours.rope_local_base_freq) == (1e6, 1e4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3"}, "model_type='gemma3' is not built: minilora's Gemma3"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not built"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not built"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern must be an integer above 0"),
        ({"rope_parameters": {FULL: {}, "odd": 1}}, r"rope_parameters: odd=1 is not built"),
        ({"rope_parameters": {"rope_theta": 5.0}}, r"rope_theta=5.0 is not built: it must hold"),
        (
            {"rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 2.0}}},
            "rope_parameters: rope_type='linear' is not built",
        ),
        ({"rope_local_base_freq": -1}, "rope_local_base_freq must be a number above 0, found -1"),
    ],
)
def test_config_refuses_other_maths_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        Gemma3Config.from_dict(BASE | changes)


def test_adapters_lie_on_every_linear_but_the_head():
    model = minilora.inject(our_model("gemma3_text", their_model("gemma3_text")), r=2)
    names = {name.split(".", 3)[3] for name in minilora.lora.lora_layers(model)}
    attention = {f"self_attn.{part}_proj" for part in "qkvo"}
    assert names == attention | {f"mlp.{part}_proj" for part in ("gate", "up", "down")}
