"""What Qwen3 has beside what every family has: any shape, GGUF files, its configuration."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import assert_close, assert_equal_in_parts, read_model, some_ids, their_model
from test_loading_gguf import PARTS, _metadata, _tensors, _write

from minilora.models import Qwen3, Qwen3Config

pytestmark = pytest.mark.peers


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
        "qwen3",
        batch,
        chunks,
        num_attention_heads=groups * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=2 * half,
        hidden_size=size,
        attention_bias=bias,
    )


def test_gguf_files_are_read(tmp_path, monkeypatch):
    """Rows of q and k stay in their order there, unlike a Llama's."""
    for norm in ("q_norm", "k_norm"):
        monkeypatch.setitem(PARTS, f"self_attn.{norm}", f"attn_{norm}")
    theirs = their_model("qwen3", hidden_size=64, intermediate_size=32, head_dim=32)
    metadata = _metadata(theirs.config) | {
        "attention.key_length": 32,
        "attention.value_length": 32,
    }
    tensors = _tensors(theirs, interleaved=False)
    ours = read_model(_write(tmp_path / "a.gguf", tensors, metadata, architecture="qwen3"))
    assert type(ours) is Qwen3
    with torch.no_grad():
        ids = some_ids(ours, 2, 9)
        assert_close(ours(ids), theirs(ids).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3_moe"}, "model_type='qwen3_moe' is not built"),
    ],
)
def test_config_refuses_other_maths_by_name(changes, message):
    entries = {"model_type": "qwen3", "vocab_size": 9, "hidden_size": 16, "intermediate_size": 8}
    entries |= {"num_attention_heads": 4}
    config = Qwen3Config.from_dict(entries)
    assert (config.max_position_embeddings, config.head_dim) == (32768, 128)
    with pytest.raises(ValueError, match=message):
        Qwen3Config.from_dict(entries | changes)
