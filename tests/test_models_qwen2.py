"""What Qwen2 has beside what every family has: any shape, GGUF files, its configuration."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import assert_close, assert_equal_in_parts, read_model, some_ids, their_model
from test_loading_gguf import _metadata, _tensors, _write

from minilora.models import Qwen2, Qwen2Config

pytestmark = pytest.mark.peers


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
    chunks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_forward_and_loss_equal_transformers_for_any_shape(
    groups, kv_heads, half, layers, inner, tied, theta, batch, chunks
):
    heads = groups * kv_heads
    assert_equal_in_parts(
        "qwen2",
        batch,
        chunks,
        1e-6,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_size=heads * 2 * half,
        num_hidden_layers=layers,
        intermediate_size=inner,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )


def test_gguf_files_are_read(tmp_path):
    """Rows of q and k stay in their order there, unlike a Llama's."""
    theirs = their_model("qwen2", hidden_size=64, intermediate_size=32)
    tensors = _tensors(theirs, interleaved=False)
    metadata = _metadata(theirs.config, head_dim=16)
    ours = read_model(_write(tmp_path / "a.gguf", tensors, metadata, architecture="qwen2"))
    assert type(ours) is Qwen2
    with torch.no_grad():
        ids = some_ids(ours, 2, 9)
        assert_close(ours(ids), theirs(ids).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3"}, "model_type='qwen3' is not built"),
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


ENTRIES = {"model_type": "qwen2", "vocab_size": 9, "hidden_size": 16, "intermediate_size": 8}
ENTRIES |= {"num_attention_heads": 4, "num_hidden_layers": 3}


def test_windows_are_off_unless_switched_on():
    assert Qwen2Config.from_dict(ENTRIES | {"sliding_window": 5}).windows == (None,) * 3
    on = ENTRIES | {"use_sliding_window": True}
    assert Qwen2Config.from_dict(on).windows == (None,) * 3  # from layer 28 on
    on |= {"max_window_layers": 1}
    assert Qwen2Config.from_dict(on).windows == (None, 4096, 4096)
    assert Qwen2Config.from_dict(on | {"sliding_window": 5}).windows == (None, 5, 5)
    assert Qwen2Config.from_dict(on | {"sliding_window": None}).windows == (None,) * 3
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert Qwen2Config.from_dict(on | {"layer_types": types}).windows == (4096, None, None)
    assert Qwen2Config(9, 16, 8, 3, 4, 4, 4, sliding_window=7).windows == (7, 7, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": 1}, "use_sliding_window must be true or false, found 1"),
        ({"max_window_layers": -1}, "max_window_layers must be an integer ≥ 0, found -1"),
        ({"sliding_window": 0}, "sliding_window must be an integer above 0, found 0"),
        ({"num_hidden_layers": -2}, "num_hidden_layers must be an integer above 0"),
        ({"layer_types": "sliding_attention"}, "layer_types must be a list of names or null"),
        ({"layer_types": [1, 2, 3]}, "layer_types must be a list of names or null"),
        (
            {"layer_types": ["sliding_attention"]},
            "layer_types must name .* for each of 3 layers, found .*; correct config.json",
        ),
        (
            {"layer_types": ["sliding_attention", "full_attention", "chunked_attention"]},
            "layer_types must name .* for each of 3 layers",
        ),
        (
            {"layer_types": ["sliding_attention"] * 3, "sliding_window": None},
            "sliding_window must be set where layer_types has 'sliding_attention'",
        ),
    ],
)
def test_config_refuses_windows_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        Qwen2Config.from_dict(ENTRIES | {"use_sliding_window": True} | changes)
