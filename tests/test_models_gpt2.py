"""The GPT-2 model, judged by transformers: numbers, text, folders."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import assert_close, our_model, read_model, some_ids, their_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoTokenizer, GPT2LMHeadModel
from transformers import GPT2Config as TheirConfig
from transformers.pytorch_utils import Conv1D as TheirConv1D

import minilora
from minilora.loading.model import load_model
from minilora.loading.saving import save_pretrained
from minilora.models import GPT2, Conv1D, GPT2Config
from minilora.models.gpt_blocks import ACTIVATIONS

pytestmark = pytest.mark.peers

QKV = "transformer.h.1.attn.c_attn.weight"
EMBEDDING = "transformer.wte.weight"


# --- the same numbers as transformers -----------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_equals_transformers(activation):
    theirs = their_model("gpt2", torch.float64, activation_function=activation)
    ours = our_model("gpt2", theirs)
    with torch.no_grad():
        assert_close(ours(some_ids(ours, 2, 9)), theirs(some_ids(ours, 2, 9)).logits, 1e-10)


@settings(max_examples=30)
@given(
    heads=st.integers(1, 5),
    head_dim=st.integers(1, 9),
    layers=st.integers(1, 3),
    vocab=st.integers(1, 40),
    inner=st.one_of(st.none(), st.integers(1, 50)),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 12),
    spare=st.integers(0, 2),
    flags=st.tuples(*(st.booleans() for _ in range(3))),
    # transformers writes the √(2/π) of gelu_fast in ten digits: a logit near zero shows it.
    activation=st.sampled_from(sorted(set(ACTIVATIONS) - {"gelu_fast"})),
)
def test_forward_equals_transformers_for_any_shape(
    heads, head_dim, layers, vocab, inner, batch, tokens, spare, flags, activation
):
    names = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings")
    theirs = their_model(
        "gpt2",
        torch.float64,
        n_head=heads,
        n_embd=heads * head_dim,
        n_layer=layers,
        vocab_size=vocab,
        n_inner=inner,
        n_positions=tokens + spare,
        activation_function=activation,
        **dict(zip(names, flags, strict=True)),
    )
    ours = our_model("gpt2", theirs)
    ids = some_ids(ours, batch, tokens)
    with torch.no_grad():
        assert_close(ours(ids), theirs(ids).logits, 1e-10)


def test_training_mode_applies_no_dropout():
    theirs = their_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    ours = our_model("gpt2", theirs).train()
    ids = some_ids(ours, 2, 7)
    with torch.no_grad():
        assert_close(ours(ids), theirs(ids).logits)


def test_conv1d_equals_transformers_to_the_bit():
    theirs, ours = TheirConv1D(7, 5), Conv1D(7, 5)
    assert type(ours).__name__ == "Conv1D"
    assert (ours.nf, ours.nx, list(ours.weight.shape)) == (7, 5, [5, 7])
    ours.load_state_dict(theirs.state_dict())
    for shape in ((5,), (3, 5), (2, 3, 5), (0, 5), (2, 0, 5)):
        x = torch.randn(shape)
        assert torch.equal(ours(x), theirs(x))
    x = torch.randn(2, 5, 3).transpose(1, 2)  # not contiguous
    assert torch.equal(ours(x), theirs(x.contiguous()))
    assert "nf=7, nx=5" in repr(ours)


def test_fresh_model_is_random_with_small_residual_maps():
    model = GPT2(GPT2Config(vocab_size=503, n_positions=64, n_embd=64, n_layer=8, n_head=4))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert not parameter.any(), name
        elif parameter.dim() == 2:
            std = 0.02 / 4 if name.endswith(".c_proj.weight") else 0.02  # sqrt(2 · 8 layers)
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
        else:
            assert (parameter == 1).all(), name
    assert model.loss(*[some_ids(model, 4, 20)] * 2).item() == pytest.approx(
        math.log(503), rel=0.02
    )


# --- configuration ------------------------------------------------------------------------------


def test_config_defaults_are_those_of_transformers():
    assert GPT2Config.from_dict(TheirConfig().to_dict()) == GPT2Config()
    assert GPT2Config.from_dict({"model_type": "gpt2"}) == GPT2Config()


def test_config_survives_the_way_through_transformers():
    ours = GPT2Config(
        vocab_size=11,
        n_positions=12,
        n_embd=15,
        n_layer=3,
        n_head=5,
        n_inner=7,
        activation_function="gelu",
        layer_norm_epsilon=0.01,
        scale_attn_weights=False,
        scale_attn_by_inverse_layer_idx=True,
        tie_word_embeddings=False,
        resid_pdrop=0.0,
        embd_pdrop=0.2,
        attn_pdrop=0.3,
        bos_token_id=1,
        eos_token_id=[2, 3],
        pad_token_id=4,
    )
    theirs = TheirConfig(**ours.to_dict(torch.bfloat16))
    assert theirs.dtype == torch.bfloat16
    assert GPT2Config.from_dict(theirs.to_dict()) == ours
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.max_position_embeddings == theirs.max_position_embeddings == 12
    assert (ours.head_dim, ours.num_key_value_heads, ours.intermediate_size) == (3, 5, 7)


def test_config_reads_the_common_names_as_transformers_does():
    common = {"hidden_size": 30, "num_attention_heads": 5, "num_hidden_layers": 2}
    common |= {"max_position_embeddings": 9, "model_type": "gpt2"}
    ours = GPT2Config.from_dict(common)
    assert (ours.n_embd, ours.n_head, ours.n_layer, ours.n_positions) == (30, 5, 2, 9)
    assert ours == GPT2Config.from_dict(TheirConfig(**common).to_dict())
    assert GPT2Config.from_dict({**common, "n_head": 5}) == ours
    with pytest.raises(ValueError, match="n_head and num_attention_heads are one number .* 6 and"):
        GPT2Config.from_dict({**common, "n_head": 6})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "gpt_neo"),
        ("architectures", ["GPT2ForSequenceClassification"]),
        ("activation_function", "tanh"),
        ("activation_function", ["gelu"]),
        ("reorder_and_upcast_attn", True),
        ("add_cross_attention", True),
        ("is_encoder_decoder", True),
        ("quantization_config", {"quant_method": "gptq"}),
        ("pruned_heads", {"0": [1]}),
    ],
)
def test_config_refuses_other_maths_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}=.* is not built"):
        GPT2Config.from_dict({"model_type": "gpt2", name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be an integer above 0, found 0; correct config.json"),
        ({"n_positions": True}, "n_positions must be an integer"),
        ({"n_embd": "16"}, "n_embd must be an integer"),
        ({"n_layer": 1.5}, "n_layer must be an integer"),
        ({"n_head": None}, "n_head must be an integer"),
        ({"n_head": 5}, "n_head must divide n_embd, found 5 and 768; correct config.json"),
        ({"n_inner": 0}, "n_inner must be an integer above 0"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon must be a number above 0"),
        ({"scale_attn_weights": 1}, "scale_attn_weights must be true or false"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings must be true or false"),
        ({"resid_pdrop": 1.0}, r"resid_pdrop must be a probability in \[0, 1\), found 1.0"),
        ({"attn_pdrop": False}, "attn_pdrop must be a probability"),
        ({"eos_token_id": -1}, "eos_token_id must be a token id"),
        ({"bos_token_id": [1]}, "bos_token_id must be a token id"),
    ],
)
def test_config_refuses_bad_values(changes, message):
    with pytest.raises(ValueError, match=message):
        GPT2Config.from_dict({"model_type": "gpt2", **changes})


def test_config_refuses_what_is_none():
    with pytest.raises(ValueError, match="must be an object, found"):
        GPT2Config.from_dict([])
    with pytest.raises(ValueError, match="must name its model_type"):
        GPT2Config.from_dict({"vocab_size": 10})


# --- folders ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A folder that transformers wrote."""
    their_model("gpt2").save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def _rewrite(folder, change):
    """Change the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    tensors = change({name: tensor.clone() for name, tensor in tensors.items()})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _bare(tensors):
    """The names of OpenAI's own weights."""
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def _with_masks(tensors, dtype=torch.float32):
    prefix = "transformer." if EMBEDDING in tensors else ""
    causal = torch.ones(48, 48).tril().view(1, 1, 48, 48).to(dtype)
    masks = {f"{prefix}h.{i}.attn.bias": causal.clone() for i in range(2)}
    fills = {f"{prefix}h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    return {**tensors, **masks, **fills}


def _with_head(tensors):
    return {**tensors, "lm_head.weight": tensors[EMBEDDING].clone()}


LAYOUTS = {
    "prefixed": lambda t: t,
    "bare": _bare,
    "bare_with_masks": lambda t: _with_masks(_bare(t)),
    "prefixed_with_bool_masks": lambda t: _with_masks(t, torch.bool),
    "prefixed_with_uint8_masks_and_head": lambda t: _with_masks(_with_head(t), torch.uint8),
    "bare_with_head": lambda t: _bare(_with_head(t)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reading_reads_every_layout_of_the_hub(folder, layout):
    _rewrite(folder, LAYOUTS[layout])
    ours, theirs = read_model(folder), GPT2LMHeadModel.from_pretrained(folder)
    assert not ours.training
    assert ours.name_or_path == str(folder)
    assert ours.lm_head.weight is ours.transformer.wte.weight
    wanted = theirs.state_dict()
    assert ours.state_dict().keys() == wanted.keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    with torch.no_grad():
        assert_close(ours(some_ids(ours, 2, 9)), theirs(some_ids(ours, 2, 9)).logits)


@pytest.mark.parametrize("bare", [False, True])
def test_reading_reads_shards(folder, bare):
    theirs = their_model("gpt2")
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    if bare:
        for shard in shards:
            save_file(_bare(load_file(shard)), shard, metadata={"format": "pt"})
        index = folder / "model.safetensors.index.json"
        entries = _bare(json.loads(index.read_text())["weight_map"])
        masks = {"h.0.attn.bias": shards[0].name}  # named by the index, and nowhere else
        index.write_text(json.dumps({"weight_map": {**entries, **masks}}))
    ours = read_model(folder)
    with torch.no_grad():
        assert_close(ours(some_ids(ours, 2, 9)), theirs(some_ids(ours, 2, 9)).logits)


def test_save_pretrained_refuses_other_models(tmp_path, folder):
    ours = read_model(folder)
    ours.transformer.h[0].mlp.c_fc = nn.Sequential(ours.transformer.h[0].mlp.c_fc)
    with pytest.raises(ValueError, match=r"a plain GPT2, .*\.h\.0\.mlp\.c_fc\.0"):
        save_pretrained(ours, tmp_path / "ours")
    with pytest.raises(TypeError, match=r"models of .* \(GPT2, .*Llama.*\), found Linear; write"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def _without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without(QKV), f"found missing: {QKV};"),
        (_without("transformer.wpe.weight"), r"found missing: transformer\.wpe\.weight;"),
        (lambda t: {**t, "extra": torch.ones(2)}, "found unexpected: extra;"),
        (  # one letter beside the masks that are passed over
            lambda t: {**t, "transformer.h.0.attn.biases": torch.ones(2)},
            r"found unexpected: transformer\.h\.0\.attn\.biases;",
        ),
        (
            lambda t: {**t, "transformer.h.0.crossattention.bias": torch.ones(2)},
            r"found unexpected: transformer\.h\.0\.crossattention\.bias;",
        ),
        (
            lambda t: {**_bare(t), "h.2.ln_1.bias": torch.ones(2)},
            r"found unexpected: transformer\.h\.2\.ln_1\.bias;",
        ),
        (
            lambda t: {**t, QKV: t[QKV].T.contiguous()},
            r"attn\.c_attn\.weight \[96, 32\] instead of \[32, 96\]",
        ),
        (
            lambda t: {**t, "h.0.ln_1.bias": torch.ones(32)},
            r"transformer\.h\.0\.ln_1\.bias must be stored once, found .*; fetch",
        ),
        (
            lambda t: {**t, QKV: t[QKV].to(torch.int8)},
            f"{QKV} in .* must be stored in a floating-point type .* found I8",
        ),
        (
            lambda t: {**t, "lm_head.weight": t[EMBEDDING] + 1},
            r"tie_word_embeddings is true in .* differs from transformer\.wte\.weight; set it",
        ),
    ],
)
def test_reading_refuses_other_tensors_by_name(folder, change, message):
    _rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        read_model(folder, dtype=torch.float32)


# --- load_model ---------------------------------------------------------------------------------

TEXTS = ["hello, world", "Hello", " 12 wörlds\n"]


def _backend():
    """A byte-level BPE with the cuts and the one special token of GPT-2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "he", "ll", "hell", "Ġw", "<|endoftext|>"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w")]
    backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return backend


def _add_tokenizer(folder, **entries):
    backend = _backend()
    backend.save(str(folder / "tokenizer.json"))
    # As in OpenAI's folder, which names no special token.
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 48, **entries}))
    return backend.get_vocab_size()


def test_load_model_writes_the_text_that_transformers_writes(tmp_path):
    end = _add_tokenizer(tmp_path) - 1
    ends = {"bos_token_id": end, "eos_token_id": end}
    theirs = their_model("gpt2", vocab_size=end + 1, tie_word_embeddings=False, **ends)
    theirs.save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path, dtype=None)
    assert type(model) is GPT2
    judge = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (end, end, {end})
    assert judge.eos_token_id == end
    found = minilora.generate(model, TEXTS, tokenizer=tokenizer, max_new_tokens=20)
    for text, new in zip(TEXTS, found, strict=True):
        ids = judge(text, return_tensors="pt")
        assert tokenizer.encode(text) == ids.input_ids[0].tolist()
        out = theirs.generate(**ids, max_new_tokens=20, do_sample=False, pad_token_id=end)
        written = judge.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
        assert written.startswith(new)
        assert set(written[len(new) :]) <= {"�"}  # a character cut by the limit is held back
        assert len(set(new)) > 3
    save_pretrained(model, tmp_path / "ours", tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").eos_token_id == end
    assert load_model(tmp_path / "ours", dtype=None)[1].eos_id == end


def test_load_model_keeps_special_tokens_that_are_named(tmp_path):
    size = _add_tokenizer(tmp_path, eos_token="hell", pad_token="he")
    their_model("gpt2", vocab_size=size).save_pretrained(tmp_path)
    tokenizer = load_model(tmp_path)[1]
    judge = AutoTokenizer.from_pretrained(tmp_path)
    named = [tokenizer.eos_id, tokenizer.pad_id]
    assert judge.convert_ids_to_tokens(named) == ["hell", "he"]
    assert tokenizer.decode(named) == judge.decode(named, skip_special_tokens=True) == ""
    assert tokenizer.bos_id is None
    _add_tokenizer(tmp_path, pad_token="he")
    tokenizer = load_model(tmp_path)[1]
    assert AutoTokenizer.from_pretrained(tmp_path).convert_ids_to_tokens(tokenizer.pad_id) == "he"
    assert tokenizer.eos_id == tokenizer.bos_id == size - 1


@pytest.mark.parametrize("kind", ["gpt3", None, ["gpt2"]])
def test_load_model_refuses_another_model_type(folder, kind):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": kind}))
    with pytest.raises(ValueError, match=r"model_type that is built \(.*gpt2, .*llama.*\), found "):
        load_model(folder)
