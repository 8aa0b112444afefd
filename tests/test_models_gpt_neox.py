"""What GPT-NeoX has beside what every family has: its projection, its rope, its head's name."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import assert_equal_in_parts, our_model, read_model, their_model
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig as TheirConfig

import minilora
from minilora.loading.saving import save_pretrained
from minilora.lora import lora_layers
from minilora.models import GPTNeoX, GPTNeoXConfig

pytestmark = pytest.mark.peers

BASE = {"model_type": "gpt_neox", "vocab_size": 9, "hidden_size": 16, "intermediate_size": 8}
BASE |= {"num_attention_heads": 2, "num_hidden_layers": 2}


@settings(max_examples=15, deadline=None)
@given(
    heads=st.integers(1, 4),
    half=st.integers(1, 5),
    share=st.floats(0.01, 1),
    inner=st.integers(1, 30),
    parallel=st.booleans(),
    bias=st.booleans(),
    act=st.sampled_from(["gelu", "gelu_new", "relu", "silu"]),
    chunks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_forward_and_loss_equal_transformers_for_any_shape(
    heads, half, share, inner, parallel, bias, act, chunks
):
    rotated = 2 * max(1, round(half * share))
    assert_equal_in_parts(
        "gpt_neox",
        2,
        chunks,
        1e-6,
        num_attention_heads=heads,
        hidden_size=heads * 2 * half,
        intermediate_size=inner,
        use_parallel_residual=parallel,
        attention_bias=bias,
        hidden_act=act,
        rope_parameters={"rope_type": "default", "partial_rotary_factor": rotated / (2 * half)},
    )


def test_checkpoints_call_the_head_embed_out_and_hold_masks(tmp_path):
    """As Pythia's and what transformers 4 reads."""
    theirs = their_model("gpt_neox")
    ours = our_model("gpt_neox", theirs)
    save_pretrained(ours, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert "embed_out.weight" in tensors and "lm_head.weight" not in tensors
    for layer in range(2):
        tensors[f"gpt_neox.layers.{layer}.attention.bias"] = torch.ones(1, 1, 64, 64)
        tensors[f"gpt_neox.layers.{layer}.attention.masked_bias"] = torch.tensor(-1e9)
        tensors[f"gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, file)
    again = read_model(tmp_path)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_older_keys_are_read_as_transformers_does():
    older = BASE | {"rotary_pct": 0.5, "rotary_emb_base": 50, "hidden_size": 32}
    ours, theirs = GPTNeoXConfig.from_dict(older), TheirConfig(**older)
    assert (ours.rotary_dim, ours.rope_theta) == (8, 50)
    assert GPTNeoXConfig.from_dict(theirs.to_dict()) == ours
    again = TheirConfig(**ours.to_dict())
    assert again.rope_parameters == theirs.rope_parameters


@pytest.mark.parametrize("own", [{}, {"rotary_pct": 0.5, "rotary_emb_base": 50}])
@pytest.mark.parametrize("inner", [{}, {"rope_theta": 70.0, "partial_rotary_factor": 1.0}])
def test_names_of_other_families_must_agree_with_what_transformers_reads(own, inner):
    """It reads them in rope_parameters alone."""
    entries = BASE | {"hidden_size": 32} | own
    if inner:
        entries["rope_parameters"] = {"rope_type": "default", **inner}
    theirs = TheirConfig(**copy.deepcopy(entries)).rope_parameters
    ours = GPTNeoXConfig.from_dict(entries)
    for key in ("rope_theta", "partial_rotary_factor"):
        assert getattr(ours, key) == theirs[key]
        assert GPTNeoXConfig.from_dict(entries | {key: theirs[key]}) == ours
        other = TheirConfig(**copy.deepcopy(entries | {key: 0.75}))
        assert other.rope_parameters == theirs
        with pytest.raises(ValueError, match=rf"{key} must be .*, found 0\.75, which .* ignores"):
            GPTNeoXConfig.from_dict(entries | {key: 0.75})


def test_the_published_size():
    """Pythia-410m's number of parameters on its page."""
    config = GPTNeoXConfig.from_dict(
        BASE | {"vocab_size": 50304, "hidden_size": 1024, "intermediate_size": 4096,
                "num_attention_heads": 16, "num_hidden_layers": 24}
    )  # fmt: skip
    model = GPTNeoX(config, device="meta")
    assert sum(p.numel() for p in model.parameters()) == 405_334_016


def test_adapters_lie_on_the_fused_projection():
    model = minilora.inject(our_model("gpt_neox", their_model("gpt_neox")), r=2)
    names = {name.split(".", 3)[3] for name in lora_layers(model)}
    parts = {"attention.query_key_value", "attention.dense"}
    assert names == parts | {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}


def test_config_defaults_are_those_of_transformers():
    ours, theirs = GPTNeoXConfig.from_dict(BASE), TheirConfig(**BASE)
    for name, value in ours.to_dict().items():
        if name not in ("architectures", "rotary_pct", "rotary_emb_base", "partial_rotary_factor"):
            assert getattr(theirs, name) == value, name
    assert ours.partial_rotary_factor == theirs.rope_parameters["partial_rotary_factor"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dropout": 0.1}, "hidden_dropout=0.1 is not built: minilora's GPTNeoX"),
        ({"hidden_act": "mish"}, "hidden_act='mish' is not built"),
        ({"rotary_pct": 0.4}, "found 3 of 8"),
        ({"use_parallel_residual": 1}, "use_parallel_residual must be true or false, found 1"),
    ],
)
def test_config_refuses_other_maths_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTNeoXConfig.from_dict(BASE | changes)
