"""The GPT-2 model, judged by transformers: numbers, text, folders."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel
from transformers import GPT2Config as TheirConfig
from transformers.pytorch_utils import Conv1D as TheirConv1D

import minilora
from minilora.loading.model import load_model, read_model
from minilora.loading.saving import save_pretrained
from minilora.models import GPT2, Conv1D, GPT2Config
from minilora.models.blocks import KVCache
from minilora.models.gpt2 import ACTIVATIONS

pytestmark = pytest.mark.peers

# Two computations of the same numbers in another order: relative to the largest value.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
QKV = "transformer.h.1.attn.c_attn.weight"
EMBEDDING = "transformer.wte.weight"

SHAPES = {
    "plain": {},
    "one_head": {"n_head": 1},
    "odd_sizes": {"vocab_size": 101, "n_embd": 35, "n_head": 7, "n_layer": 3, "n_positions": 23},
    "n_inner": {"n_inner": 37},
    "untied": {"tie_word_embeddings": False},
    "unscaled": {"scale_attn_weights": False},
    "scaled_by_layer": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
    "only_by_layer": {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
    "epsilon": {"layer_norm_epsilon": 0.1},
}


def _theirs(dtype=torch.float32, **changes):
    """A random transformers model whose logits are of order 1 and whose biases are not zero."""
    shape = {"vocab_size": 61, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(TheirConfig(**{**shape, **changes})).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def _ours(theirs):
    model = GPT2(GPT2Config.from_dict(theirs.config.to_dict()), dtype=theirs.dtype)
    model.load_state_dict(theirs.state_dict())
    return model.eval()


def _tiny(**changes):
    torch.manual_seed(1)
    shape = {"vocab_size": 29, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4}
    model = GPT2(GPT2Config(**{**shape, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def _ids(model, batch, tokens):
    torch.manual_seed(2)
    return torch.randint(0, model.config.vocab_size, (batch, tokens))


def _close(found, wanted, times=1):
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    assert (found - wanted).abs().max() <= times * TOLERANCE[wanted.dtype] * wanted.abs().max()


# --- the same numbers as transformers -----------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_forward_equals_transformers(shape, dtype):
    theirs = _theirs(dtype, **SHAPES[shape])
    ours = _ours(theirs)
    ids = _ids(ours, 3, 11)
    with torch.no_grad():
        wanted = theirs(ids).logits
        assert wanted.abs().max() > 0.5
        _close(ours(ids), wanted)
        _close(ours(ids, last=2), wanted[:, -2:])
        assert (ours(ids.flip(1)) - wanted).abs().max() > 0.1


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_equals_transformers(activation):
    theirs = _theirs(torch.float64, activation_function=activation)
    ours = _ours(theirs)
    with torch.no_grad():
        _close(ours(_ids(ours, 2, 9)), theirs(_ids(ours, 2, 9)).logits)


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
    activation=st.sampled_from(sorted(ACTIVATIONS)),
)
def test_forward_equals_transformers_for_any_shape(
    heads, head_dim, layers, vocab, inner, batch, tokens, spare, flags, activation
):
    names = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings")
    theirs = _theirs(
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
    ours = _ours(theirs)
    ids = _ids(ours, batch, tokens)
    with torch.no_grad():
        _close(ours(ids), theirs(ids).logits)


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_every_gradient_equal_transformers(shape):
    theirs = _theirs(**SHAPES[shape])
    ours = _ours(theirs)
    ids = _ids(ours, 3, 9)
    labels = ids.clone()
    labels[0, :5] = labels[2, 3:] = -100  # ragged: a mean of means would show
    wanted, found = theirs(ids, labels=labels).loss, ours.loss(ids, labels)
    _close(found, wanted)
    wanted.backward()
    found.backward()
    gradients = dict(ours.named_parameters())
    assert gradients.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        _close(gradients[name].grad, parameter.grad, 2)  # sums of 30 rows in another order


def test_training_mode_applies_no_dropout():
    theirs = _theirs(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    ours = _ours(theirs).train()
    ids = _ids(ours, 2, 7)
    with torch.no_grad():
        _close(ours(ids), theirs(ids).logits)


def test_forward_with_positions_equals_transformers():
    theirs = _theirs()
    ours = _ours(theirs)
    ids = _ids(ours, 2, 6)
    positions = torch.tensor([[3, 4, 5, 9, 10, 11], [0, 1, 7, 8, 20, 47]])
    with torch.no_grad():
        wanted = theirs(ids, position_ids=positions).logits
        _close(ours(ids, positions=positions), wanted)
        _close(ours(ids, positions=positions.to(torch.int16)), wanted)
        one = theirs(ids, position_ids=positions[:1].expand(2, -1)).logits
        _close(ours(ids, positions=positions[0]), one)


def test_forward_in_bf16_is_as_exact_as_transformers():
    theirs = _theirs()
    ours = _ours(theirs)
    ids = _ids(ours, 4, 16)
    with torch.no_grad():
        exact = ours(ids).double()
        found, wanted = ours.bfloat16()(ids), theirs.bfloat16()(ids).logits
    assert found.dtype == torch.bfloat16
    assert (found - exact).pow(2).mean() <= 1.1**2 * (wanted - exact).pow(2).mean()


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
    assert model.loss(*[_ids(model, 4, 20)] * 2).item() == pytest.approx(math.log(503), rel=0.02)


# --- text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_greedy_text_equals_transformers_token_for_token(tied):
    """Rows of unequal length, so padded on the left, against one row at a time."""
    theirs = _theirs(n_layer=3, tie_word_embeddings=tied)
    ours = _ours(theirs)
    prompts = [_ids(ours, 1, n)[0].tolist() for n in (7, 1, 4)]
    found = minilora.generate(ours, prompts, max_new_tokens=30)
    for prompt, new in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        wanted = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=30,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert new == wanted[0, len(prompt) :].tolist()
        # Not one token over and over, which is what a random tied head writes.
        assert tied or len(set(new)) > 3


@settings(max_examples=20)
@given(chunks=st.lists(st.integers(1, 5), min_size=1, max_size=6), batch=st.integers(1, 3))
def test_cache_in_any_chunks_equals_one_pass(chunks, batch):
    model = _tiny()
    ids = _ids(model, batch, sum(chunks))
    cache = KVCache(model, batch, sum(chunks))
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in ids.split(chunks, dim=1)]
        _close(torch.cat(parts, dim=1), model(ids))
    assert cache.length == sum(chunks)


def test_cache_has_the_dtype_and_shape_of_the_model():
    cache = KVCache(_tiny().bfloat16(), 2, 5)
    assert cache.keys[0].dtype == torch.bfloat16
    assert len(cache.keys) == 2
    assert list(cache.values[1].shape) == [2, 4, 5, 4]


def test_mask_for_left_padding_equals_the_unpadded_sequences():
    model = _tiny()
    ids = _ids(model, 2, 8)
    pads = torch.tensor([3, 0])
    real = torch.arange(8) >= pads[:, None]
    mask = real[:, None, None, :] & torch.ones(8, 8, dtype=torch.bool).tril()
    positions = (torch.arange(8) - pads[:, None]).clamp(min=0)
    with torch.no_grad():
        found = model(ids, mask=mask, positions=positions)
        assert found.isfinite().all()  # rows of padding may attend to nothing
        _close(found[0, 3:], model(ids[:1, 3:])[0])
        _close(found[1], model(ids[1:])[0])
        cache = KVCache(model, 2, 8)
        model(ids[:, :6], mask=mask[:, :, :6, :6], positions=positions[:, :6], cache=cache)
        rest = model(ids[:, 6:], mask=mask[:, :, 6:], positions=positions[:, 6:], cache=cache)
    _close(rest, found[:, 6:])


# --- training -----------------------------------------------------------------------------------


class _WrappedHead(nn.Module):
    """What an adapter makes of a head: the base and an addition."""

    def __init__(self, base):
        super().__init__()
        self.base, self.shift = base, nn.Parameter(torch.randn(base.out_features) * 0.1)

    def forward(self, x):
        return self.base(x) + self.shift


def test_loss_goes_through_a_wrapped_head():
    model = _tiny()
    model.lm_head = _WrappedHead(model.lm_head)
    ids = _ids(model, 8, 9)
    labels = ids.clone()
    labels[:, 3:5] = -100
    logits = model(ids)[:, :-1].flatten(0, 1)
    wanted = F.cross_entropy(logits, labels[:, 1:].flatten())
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    found = model.loss(ids, labels)
    found.backward()
    _close(found, wanted)
    for name, parameter in model.named_parameters():
        _close(parameter.grad, gradients[name])


def test_gradient_checkpointing_changes_no_gradient_and_runs_blocks_again():
    model = _tiny()
    ids = _ids(model, 2, 6)
    calls = []
    model.transformer.h[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients(checkpointing):
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        calls.clear()
        model.loss(ids, ids).backward()
        return [parameter.grad.clone() for parameter in model.parameters()], len(calls)

    model.train()
    plain, once = gradients(False)
    again, twice = gradients(True)
    model.eval()
    _, evaluating = gradients(True)
    assert (once, twice, evaluating) == (1, 2, 1)
    for left, right in zip(plain, again, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("cached", [False, True])
def test_forward_compiles_in_one_graph(cached):
    model = _tiny()
    ids = _ids(model, 2, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        if cached:
            caches = [KVCache(model, 2, 8) for _ in range(2)]
            _close(compiled(ids, cache=caches[0]), model(ids, cache=caches[1]))
            assert caches[0].length == 6
        else:
            _close(compiled(ids), model(ids))


def test_tied_head_is_one_parameter_and_stays_so_in_a_copy():
    model = _tiny()
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.transformer.wte.weight
    assert twin.lm_head.weight is not model.lm_head.weight
    assert torch.equal(twin(_ids(model, 1, 4)), model(_ids(model, 1, 4)))
    assert "lm_head.weight" in dict(_tiny(tie_word_embeddings=False).named_parameters())


# --- input that does not fit --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(1, 2)), r"input_ids must be \[batch, tokens\] of int64 or int32"),
        (lambda m: m(torch.tensor([[0, 29]])), r"token ids must lie in \[0, 29\), found ids from"),
        (lambda m: m(_ids(m, 1, 33)), r"at most 32 tokens \(n_positions\), found 33; shorten"),
        (lambda m: m(_ids(m, 1, 3), last=0), "last must be 1 or more positions, or None"),
        (
            lambda m: m(_ids(m, 1, 3), positions=torch.tensor([0, 1, 32])),
            r"positions must lie in \[0, 32\), found 0 to 32",
        ),
        (
            lambda m: m(_ids(m, 1, 3), positions=torch.arange(3.0)),
            r"positions must be integers of shape \[3\] or \[1, 3\], found torch.float32",
        ),
        (
            lambda m: m(_ids(m, 1, 3), mask=torch.ones(3, 3)),
            r"mask must be bool .* broadcast to .* \[1, 4, 3, 3\]",
        ),
        (
            lambda m: m(_ids(m, 2, 3), cache=KVCache(m, 1, 4)),
            "made for 1 sequences, found a batch of 2",
        ),
        (
            lambda m: m.loss(_ids(m, 2, 5), _ids(m, 2, 4)),
            r"labels must be int64 of input_ids' shape \[2, 5\]",
        ),
    ],
)
def test_model_refuses_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(_tiny())


def test_forward_counts_cached_tokens_against_the_context():
    model = _tiny()
    cache = KVCache(model, 1, 40)
    model(_ids(model, 1, 30), cache=cache)
    with pytest.raises(ValueError, match=r"at most 32 tokens .*, found 33"):
        model(_ids(model, 1, 3), cache=cache)
    assert cache.length == 30


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
    _theirs().save_pretrained(tmp_path / "theirs")
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
def test_from_pretrained_reads_every_layout_of_the_hub(folder, layout):
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
        _close(ours(_ids(ours, 2, 9)), theirs(_ids(ours, 2, 9)).logits)


@pytest.mark.parametrize("bare", [False, True])
def test_from_pretrained_reads_shards(folder, bare):
    theirs = _theirs()
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
        _close(ours(_ids(ours, 2, 9)), theirs(_ids(ours, 2, 9)).logits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_pretrained_and_transformers_read_each_other(tmp_path, folder, dtype, tied):
    theirs = _theirs(dtype, tie_word_embeddings=tied, resid_pdrop=0.3, eos_token_id=[2, 3])
    theirs.save_pretrained(folder)
    ours = read_model(folder)
    save_pretrained(ours, tmp_path / "ours")
    again, report = GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.dtype == dtype
    assert again.config.resid_pdrop == 0.3
    assert again.generation_config.eos_token_id == [2, 3]
    assert (again.lm_head.weight is again.transformer.wte.weight) == tied
    wanted = theirs.state_dict()
    assert again.state_dict().keys() == wanted.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    assert torch.equal(again(_ids(ours, 2, 9)).logits, theirs(_ids(ours, 2, 9)).logits)
    again.save_pretrained(tmp_path / "back")
    back = read_model(tmp_path / "back")
    assert (back.lm_head.weight is back.transformer.wte.weight) == tied
    assert back.config == ours.config
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_save_pretrained_gives_the_same_files_again(tmp_path, folder):
    save_pretrained(read_model(folder), tmp_path / "a")
    first = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    save_pretrained(read_model(tmp_path / "a"), tmp_path / "a")  # over itself
    assert {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()} == first


def test_save_pretrained_keeps_a_head_that_was_untied(tmp_path, folder):
    ours = read_model(folder)
    ours.lm_head.weight = nn.Parameter(ours.lm_head.weight.detach() * 2)
    save_pretrained(ours, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        _close(again(_ids(ours, 2, 9)).logits, ours(_ids(ours, 2, 9)))


def test_save_pretrained_refuses_other_models(tmp_path, folder):
    ours = read_model(folder)
    ours.transformer.h[0].mlp.c_fc = nn.Sequential(ours.transformer.h[0].mlp.c_fc)
    with pytest.raises(ValueError, match=r"a plain GPT2, .*\.h\.0\.mlp\.c_fc\.0"):
        save_pretrained(ours, tmp_path / "ours")
    with pytest.raises(TypeError, match=r"models of .* \(GPT2, Llama.*\), found Linear; write"):
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
def test_from_pretrained_refuses_other_tensors_by_name(folder, change, message):
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
    theirs = _theirs(vocab_size=end + 1, tie_word_embeddings=False, **ends)
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
    _theirs(vocab_size=size).save_pretrained(tmp_path)
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


@pytest.mark.parametrize("kind", ["mistral", None, ["gpt2"]])
def test_load_model_refuses_another_model_type(folder, kind):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": kind}))
    with pytest.raises(
        ValueError, match=r"model_type that is built \(gpt2, llama\), found .*inject"
    ):
        load_model(folder)
