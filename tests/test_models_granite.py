"""What Granite has beside what every family has: its multipliers, also in the loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import assert_close, assert_equal_in_parts, our_model, some_ids, their_model
from transformers import GraniteConfig as TheirConfig

import minilora
from minilora.models import GraniteConfig

pytestmark = pytest.mark.peers

BASE = {"model_type": "granite", "vocab_size": 9, "hidden_size": 16, "intermediate_size": 8}
BASE |= {"num_attention_heads": 4}
multiplier = st.floats(0.1, 12)


@settings(max_examples=15, deadline=None)
@given(
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    half=st.integers(1, 5),
    size=st.integers(5, 30),
    multipliers=st.tuples(multiplier, st.floats(0.01, 1), st.floats(0.1, 2), multiplier),
    biases=st.tuples(st.booleans(), st.booleans()),
    chunks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_forward_and_loss_equal_transformers_for_any_shape(
    groups, kv_heads, half, size, multipliers, biases, chunks
):
    names = ("embedding", "attention", "residual")
    assert_equal_in_parts(
        "granite",
        2,
        chunks,
        num_attention_heads=groups * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=2 * half,
        hidden_size=size,
        attention_bias=biases[0],
        mlp_bias=biases[1],
        logits_scaling=multipliers[3],
        **{f"{n}_multiplier": m for n, m in zip(names, multipliers[:3], strict=True)},
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_through_an_adapter_on_the_head_is_scaled(compiled):
    model = our_model("granite", their_model("granite"))
    minilora.inject(model, r=2, alpha=3, targets=["lm_head"])
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    model.compiled_loss = compiled
    ids = some_ids(model, 2, 9)
    logits = model(ids)[:, :-1].flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    assert_close(model.loss(ids, ids), wanted)


def test_config_defaults_are_those_of_transformers():
    ours, theirs = GraniteConfig.from_dict(BASE), TheirConfig(**BASE)
    for name, value in ours.to_dict().items():
        if name not in ("architectures", "head_dim", "rope_theta", "rope_parameters"):
            assert getattr(theirs, name) == value, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "granitemoe"}, "model_type='granitemoe' is not built: minilora's Granite"),
        ({"logits_scaling": 0}, "logits_scaling must be a number above 0, found 0"),
        ({"residual_multiplier": None}, "residual_multiplier must be a number above 0"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not built"),
    ],
)
def test_config_refuses_other_maths_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        GraniteConfig.from_dict(BASE | changes)


def test_a_bias_that_an_adapter_brings_to_the_head_is_divided(tmp_path):
    """As in transformers, where the logits are."""
    peft = pytest.importorskip("peft")
    theirs = their_model("granite", logits_scaling=8.0)
    ours = our_model("granite", theirs)
    options = {"r": 2, "lora_alpha": 3, "target_modules": ["lm_head"], "lora_bias": True}
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(**options))
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    minilora.load(ours, tmp_path, trainable=True)
    ids = some_ids(ours, 2, 9)
    assert_close(ours(ids), adapted.eval()(ids).logits)
    logits = adapted(ids).logits[:, :-1].flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    wanted.backward()
    loss = ours.loss(ids, ids)
    loss.backward()
    assert_close(loss, wanted)
    found = [
        [p.grad for p in model.parameters() if p.grad is not None] for model in (ours, adapted)
    ]
    assert len(found[0]) == 3
    for mine, theirs_grad in zip(*(sorted(each, key=torch.numel) for each in found), strict=True):
        assert_close(mine, theirs_grad)
