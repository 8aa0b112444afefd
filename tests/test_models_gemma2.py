"""What Gemma 2 has beside what every family has: caps, scaled embeddings, its configuration."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import (
    FAMILIES,
    assert_close,
    assert_equal_in_parts,
    our_model,
    some_ids,
    their_model,
)
from transformers import AutoModelForCausalLM
from transformers import Gemma2Config as TheirConfig

import minilora
from minilora.loading import save_pretrained
from minilora.models import Gemma2Config

pytestmark = pytest.mark.peers

BASE = {"model_type": "gemma2", "vocab_size": 9, "hidden_size": 16, "intermediate_size": 8}
cap = st.none() | st.floats(0.5, 60)


@settings(max_examples=15, deadline=None)
@given(
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    half=st.integers(1, 5),
    wide=st.integers(5, 9),
    caps=st.tuples(cap, cap),
    scalar=st.integers(1, 300),
    window=st.integers(1, 12),
    bias=st.booleans(),
    chunks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_forward_and_loss_equal_transformers_for_any_shape(
    groups, kv_heads, half, wide, caps, scalar, window, bias, chunks
):
    heads = groups * kv_heads
    assert_equal_in_parts(
        "gemma2",
        2,
        chunks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=2 * half,
        hidden_size=heads * wide,
        num_hidden_layers=3,
        attn_logit_softcapping=caps[0],
        final_logit_softcapping=caps[1],
        query_pre_attn_scalar=scalar,
        sliding_window=window,
        attention_bias=bias,
    )


def test_an_adapter_on_the_embedding_is_scaled_with_it_as_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = their_model("gemma2")
    ours = minilora.inject(our_model("gemma2", theirs), r=2, alpha=3, targets=["embed_tokens"])
    torch.manual_seed(0)
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    minilora.save(ours, tmp_path)
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    ids = some_ids(ours, 2, 9)
    with torch.no_grad():
        assert_close(ours.eval()(ids), wrapped(ids).logits)


def test_the_loss_through_an_adapter_on_the_head_is_capped():
    model = our_model("gemma2", their_model("gemma2"))
    minilora.inject(model, r=2, alpha=3, targets=["lm_head"])
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    ids = some_ids(model, 2, 9)
    logits = model(ids)[:, :-1].flatten(0, 1)
    assert logits.abs().max() <= model.config.final_logit_softcapping
    wanted = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    assert_close(model.loss(ids, ids), wanted)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_transformers_runs_a_folder_of_a_model_without_windows(family, tmp_path):
    """It asks for the width of a window even where no layer has one."""
    layers = FAMILIES[family].base["num_hidden_layers"]
    theirs = their_model(family, layer_types=["full_attention"] * layers)
    ours = our_model(family, theirs)
    assert ours.config.windows == (None,) * layers
    save_pretrained(ours, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = some_ids(ours, 2, 9)
    with torch.no_grad():
        assert_close(ours(ids), again(ids).logits)


def test_the_published_sizes():
    """The numbers of parameters in the report's table 1, embeddings and the others."""
    config = Gemma2Config.from_dict(
        {"model_type": "gemma2", "vocab_size": 256128, "hidden_size": 2304,
         "intermediate_size": 9216}
    )  # fmt: skip
    with torch.device("meta"):
        model = minilora.models.Gemma2(config, device="meta")
    embedding = model.get_input_embeddings().weight.numel()
    assert embedding == 590_118_912
    assert sum(p.numel() for p in model.parameters()) - embedding == 2_024_517_888


def test_config_defaults_are_those_of_transformers():
    ours, theirs = Gemma2Config.from_dict(BASE), TheirConfig(**BASE)
    for name, value in ours.to_dict().items():
        if name not in ("architectures", "hidden_act", "rope_theta", "rope_parameters"):
            assert getattr(theirs, name) == value, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type='gemma' is not built: minilora's Gemma2"),
        ({"hidden_activation": "gelu"}, "hidden_activation='gelu' is not built"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not built"),
        ({"attn_logit_softcapping": 0}, "attn_logit_softcapping must be a number above 0, found 0"),
        ({"final_logit_softcapping": "a"}, "final_logit_softcapping must be a number above 0"),
        ({"query_pre_attn_scalar": 1.5}, "query_pre_attn_scalar must be an integer above 0"),
    ],
)
def test_config_refuses_other_maths_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        Gemma2Config.from_dict(BASE | changes)
