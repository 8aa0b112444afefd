"""The Llama model, judged by transformers."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

from minilora.models import Llama, LlamaConfig
from minilora.models.blocks import KVCache

pytestmark = pytest.mark.peers

# Two f32 computations of the same numbers in another order: relative to the largest value.
F32 = 1e-5

SHAPES = {
    "plain": {},
    "grouped": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48},
    "one_key_head": {"num_key_value_heads": 1},
    "wide_heads": {"head_dim": 24},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "odd_sizes": {"vocab_size": 101, "intermediate_size": 37, "num_hidden_layers": 3},
    "other_theta_and_eps": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 71.0},
        "rms_norm_eps": 0.1,
    },
}


def _theirs(**changes):
    """A random transformers model whose logits are of order 1 and whose biases are not zero."""
    shape = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(TheirConfig(**{**shape, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def _ours(theirs):
    model = Llama(LlamaConfig.from_dict(theirs.config.to_dict()))
    model.load_state_dict(theirs.state_dict())
    return model.eval()


def _tiny(**changes):
    torch.manual_seed(1)
    config = LlamaConfig(29, 16, 20, 2, 4, 2, 4, max_position_embeddings=32, **changes)
    model = Llama(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def _ids(model, batch, tokens):
    torch.manual_seed(2)
    return torch.randint(0, model.config.vocab_size, (batch, tokens))


def _close(found, wanted, tolerance=F32):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def _head_mean(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# --- the same numbers as transformers -----------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_transformers(shape):
    theirs = _theirs(**SHAPES[shape])
    ours = _ours(theirs)
    ids = _ids(ours, 3, 11)
    with torch.no_grad():
        wanted = theirs(ids).logits
        assert wanted.abs().max() > 0.5
        _close(ours(ids), wanted)
        _close(ours(ids, last=2), wanted[:, -2:])


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
    for name, parameter in theirs.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        _close(gradients[name].grad, parameter.grad, 2 * F32)  # sums of 30 rows in another order


def test_forward_with_positions_equals_transformers():
    theirs = _theirs()
    ours = _ours(theirs)
    ids = _ids(ours, 2, 6)
    positions = torch.tensor([[3, 4, 5, 9, 10, 11], [0, 1, 7, 8, 20, 63]])
    with torch.no_grad():
        _close(ours(ids, positions=positions), theirs(ids, position_ids=positions).logits)
        one = theirs(ids, position_ids=positions[:1].expand(2, -1)).logits
        _close(ours(ids, positions=positions[0]), one)


def test_forward_in_bf16_is_as_exact_as_transformers():
    theirs = _theirs()
    ours = _ours(theirs)
    ids = _ids(ours, 4, 16)
    with torch.no_grad():
        exact = ours(ids).double()
        found = ours.bfloat16()(ids)
        frequencies = theirs.model.rotary_emb.inv_freq.clone()
        theirs.bfloat16().model.rotary_emb.inv_freq = frequencies  # in f32, as from_pretrained has
        wanted = theirs(ids).logits
    assert found.dtype == torch.bfloat16
    assert (found - exact).pow(2).mean() <= 1.1**2 * (wanted - exact).pow(2).mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_loss_is_summed_in_a_wide_dtype(dtype):
    model = _tiny()
    ids = _ids(model, 2, 7)
    wanted = model.loss(ids, ids)
    found = model.to(dtype).loss(ids, ids)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(found - wanted) <= (F32 if dtype == torch.float64 else 0.02) * wanted


def test_forward_accepts_int32_ids():
    model = _tiny()
    ids = _ids(model, 2, 5)
    assert torch.equal(model(ids.int()), model(ids))


# --- the cache ----------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(chunks=st.lists(st.integers(1, 5), min_size=1, max_size=6), batch=st.integers(1, 3))
def test_cache_in_any_chunks_equals_one_pass(chunks, batch):
    model = _tiny()
    ids = _ids(model, batch, sum(chunks))
    cache = KVCache(model, batch, sum(chunks))
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in ids.split(chunks, dim=1)]
        _close(torch.cat(parts, dim=1), model(ids))
    assert cache.length == sum(chunks)


def test_greedy_text_with_cache_equals_transformers_token_for_token():
    theirs = _theirs(num_key_value_heads=1)
    ours = _ours(theirs)
    prompt = _ids(ours, 2, 4)
    wanted = theirs.generate(
        prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    cached, plain, step = prompt, prompt, prompt
    cache = KVCache(ours, 2, 24)
    with torch.no_grad():
        for _ in range(20):
            step = ours(step, cache=cache, last=1).argmax(-1)
            cached = torch.cat((cached, step), dim=1)
            plain = torch.cat((plain, ours(plain)[:, -1:].argmax(-1)), dim=1)
    assert len(set(wanted[0, 4:].tolist())) > 3  # not one token over and over
    assert torch.equal(cached, wanted)
    assert torch.equal(plain, wanted)


def test_cache_forgets_when_length_is_lowered():
    model = _tiny()
    ids = _ids(model, 1, 6)
    cache = KVCache(model, 1, 8)
    with torch.no_grad():
        model(ids, cache=cache)
        cache.length = 2
        _close(model(ids[:, 2:5], cache=cache), model(ids[:, :5])[:, 2:])


def test_cache_has_the_dtype_of_the_model():
    model = _tiny().bfloat16()
    cache = KVCache(model, 2, 5)
    assert cache.keys[0].dtype == torch.bfloat16
    assert list(cache.values[1].shape) == [2, 2, 5, 4]


def test_cache_that_is_full_refuses_and_stays():
    model = _tiny()
    cache = KVCache(model, 1, 4)
    model(_ids(model, 1, 3), cache=cache)
    before = cache.keys[0].clone()
    with pytest.raises(ValueError, match="at most 4 tokens: 3 are in it and 2 more do not fit"):
        model(_ids(model, 1, 2), cache=cache)
    assert cache.length == 3
    assert torch.equal(cache.keys[0][:, :, :3], before[:, :, :3])


def test_cache_refuses_another_batch_and_no_room():
    model = _tiny()
    with pytest.raises(ValueError, match="made for 1 sequences, found a batch of 2"):
        model(_ids(model, 2, 3), cache=KVCache(model, 1, 4))
    with pytest.raises(ValueError, match="batch and max_length of 1 or more, found 1 and 0"):
        KVCache(model, 1, 0)


# --- masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 5), (1, 5, 5), (4, 5, 5), (2, 1, 5, 5), (2, 4, 5, 5)])
def test_mask_that_is_causal_changes_nothing(shape):
    model = _tiny()
    ids = _ids(model, 2, 5)
    mask = torch.ones(shape, dtype=torch.bool).tril()
    _close(model(ids, mask=mask), model(ids))


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


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(5, 5),
        torch.ones(5, 4, dtype=torch.bool),
        torch.ones(3, 5, 5, dtype=torch.bool),
        torch.ones(1, 1, 1, 5, 5, dtype=torch.bool),
    ],
)
def test_mask_of_another_kind_is_refused(mask):
    model = _tiny()
    with pytest.raises(ValueError, match=r"mask must be bool .* broadcast to .* \[2, 4, 5, 5\]"):
        model(_ids(model, 2, 5), mask=mask)


# --- loss ---------------------------------------------------------------------------------------


class _WrappedHead(nn.Module):
    """What an adapter makes of a head: the base and an addition."""

    def __init__(self, base):
        super().__init__()
        self.base, self.shift = base, nn.Parameter(torch.randn(base.out_features) * 0.1)

    def forward(self, x):
        return self.base(x) + self.shift


@pytest.mark.parametrize("chunk", [1, 2**24])
def test_loss_goes_through_a_wrapped_head(monkeypatch, chunk):
    monkeypatch.setattr("minilora.models.causal._CHUNK_ELEMENTS", chunk)
    model = _tiny()
    model.lm_head = _WrappedHead(model.lm_head)
    ids = _ids(model, 8, 9)  # 64 rows: two chunks of the smallest size
    labels = ids.clone()
    labels[:, 3:5] = -100
    wanted = _head_mean(model(ids), labels)
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    found = model.loss(ids, labels)
    found.backward()
    _close(found, wanted)
    for name, parameter in model.named_parameters():
        _close(parameter.grad, gradients[name])


def test_loss_runs_the_hooks_of_a_head():
    model = _tiny()
    ids = _ids(model, 2, 5)
    handle = model.lm_head.register_forward_hook(lambda module, args, out: out * 2)
    doubled = model.loss(ids, ids)
    _close(doubled, _head_mean(model(ids), ids))
    handle.remove()
    assert abs(model.loss(ids, ids) - doubled) > 0.01


def test_loss_of_frozen_weights_needs_no_gradient():
    model = _tiny().requires_grad_(False)
    ids = _ids(model, 2, 5)
    assert not model.loss(ids, ids).requires_grad


@pytest.mark.parametrize("tokens", [1, 4])
def test_loss_refuses_labels_none_of_which_counts(tokens):
    model = _tiny()
    ids = _ids(model, 2, tokens)
    labels = torch.full_like(ids, -100)
    labels[:, 0] = 5  # nothing predicts the first token
    with pytest.raises(ValueError, match="at least one label after the first token must count"):
        model.loss(ids, labels)


def test_loss_refuses_other_labels():
    model = _tiny()
    ids = _ids(model, 2, 5)
    with pytest.raises(ValueError, match=r"labels must be int64 of input_ids' shape \[2, 5\]"):
        model.loss(ids, ids[:, :4])
    with pytest.raises(ValueError, match=r"found torch\.int32"):
        model.loss(ids, ids.int())
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 29\)"):
        model.loss(ids, ids + 29)


# --- checkpointing, compile, copies -------------------------------------------------------------


def test_gradient_checkpointing_changes_no_gradient_and_runs_layers_again():
    model = _tiny()
    ids = _ids(model, 2, 6)
    calls = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))

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


def test_deepcopy_keeps_the_head_tied():
    model = _tiny(tie_word_embeddings=True)
    twin = copy.deepcopy(model)
    ids = _ids(model, 1, 4)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert twin.lm_head.weight is not model.lm_head.weight
    assert torch.equal(twin(ids), model(ids))


def test_tied_head_is_one_parameter():
    model = _tiny(tie_word_embeddings=True)
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert _tiny().lm_head.weight is not _tiny().model.embed_tokens.weight


# --- input that does not fit --------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(1, 2),
        torch.zeros(2, 0, dtype=torch.int64),
        torch.zeros(0, 2, dtype=torch.int64),
        torch.zeros(1, 2, dtype=torch.int16),
    ],
)
def test_forward_refuses_what_are_no_ids(ids):
    with pytest.raises(ValueError, match=r"input_ids must be \[batch, tokens\] of int64 or int32"):
        _tiny()(ids)


@pytest.mark.parametrize("wrong", [-1, 29])
def test_forward_refuses_ids_out_of_range(wrong):
    ids = torch.tensor([[0, 28, wrong]])
    with pytest.raises(ValueError, match=r"token ids must lie in \[0, 29\), found ids from"):
        _tiny()(ids)


def test_forward_refuses_a_sequence_that_is_too_long():
    model = _tiny()
    assert model(_ids(model, 1, 32)).shape == (1, 32, 29)
    with pytest.raises(ValueError, match=r"at most 32 tokens .*, found 33"):
        model(_ids(model, 1, 33))
    cache = KVCache(model, 1, 40)
    model(_ids(model, 1, 30), cache=cache)
    with pytest.raises(ValueError, match=r"at most 32 tokens .*, found 33"):
        model(_ids(model, 1, 3), cache=cache)


def test_forward_refuses_positions_that_do_not_fit():
    model = _tiny()
    ids = _ids(model, 2, 3)
    with pytest.raises(ValueError, match=r"positions must be integers of shape \[3\] or \[2, 3\]"):
        model(ids, positions=torch.arange(4))
    with pytest.raises(ValueError, match="positions must be integers"):
        model(ids, positions=torch.arange(3.0))
    with pytest.raises(ValueError, match=r"positions must lie in \[0, 32\), found 0 to 32"):
        model(ids, positions=torch.tensor([0, 1, 32]))


def test_forward_refuses_no_last_position():
    model = _tiny()
    with pytest.raises(ValueError, match="last must be 1 or more positions, or None"):
        model(_ids(model, 1, 3), last=0)


# --- configuration ------------------------------------------------------------------------------

BASE = {"model_type": "llama", "vocab_size": 10, "hidden_size": 16, "intermediate_size": 8}
HEADS = {"num_attention_heads": 4}


def test_config_reads_both_spellings_of_theta():
    old = LlamaConfig.from_dict({**BASE, **HEADS, "rope_theta": 5.0, "rope_scaling": None})
    new = LlamaConfig.from_dict(
        {**BASE, **HEADS, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    )
    assert old == new
    assert old.rope_theta == 5.0
    assert LlamaConfig.from_dict({**BASE, **HEADS}).rope_theta == 10000.0


def test_config_defaults_are_those_of_transformers():
    small = {**BASE, "num_attention_heads": 4, "head_dim": None, "num_key_value_heads": None}
    ours, theirs = LlamaConfig.from_dict(small), TheirConfig(**small)
    for name, value in ours.to_dict().items():
        if name not in ("architectures", "bos_token_id", "eos_token_id", "rope_theta"):
            assert getattr(theirs, name) == value, name


def test_config_survives_the_way_through_transformers():
    ours = LlamaConfig(
        vocab_size=11,
        hidden_size=12,
        intermediate_size=13,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        max_position_embeddings=99,
        rms_norm_eps=0.01,
        rope_theta=7.0,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        bos_token_id=1,
        eos_token_id=[2, 3],
        pad_token_id=4,
    )
    theirs = TheirConfig(**ours.to_dict(torch.bfloat16))
    assert theirs.dtype == torch.bfloat16
    assert LlamaConfig.from_dict(theirs.to_dict()) == ours


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "mistral"),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("hidden_act", "gelu"),
        ("pretraining_tp", 2),
        ("quantization_config", {"quant_method": "gptq"}),
        ("sliding_window", 4096),
        ("use_sliding_window", True),
        ("partial_rotary_factor", 0.5),
        ("rope_interleaved", True),
        ("attention_dropout", 0.1),
        ("is_encoder_decoder", True),
        ("add_cross_attention", True),
    ],
)
def test_config_refuses_other_maths_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}=.* is not built"):
        LlamaConfig.from_dict({**BASE, **HEADS, name: value})


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "factor": 8.0},
        {"type": "linear", "factor": 2.0},
        {"rope_type": "default", "factor": 2.0},
        {"rope_type": "default", "partial_rotary_factor": 0.25},
    ],
)
def test_config_refuses_scaled_rotations(key, rope):
    with pytest.raises(ValueError, match=f"{key}: .* is not built"):
        LlamaConfig.from_dict({**BASE, **HEADS, key: rope})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be an integer above 0, found 0"),
        ({"vocab_size": True}, "vocab_size must be an integer"),
        (
            {"vocab_size": 10**400},
            r"vocab_size must be at most 1,073,741,824, found 10+…",
        ),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers must be at most 1,024, found 10000000"),
        (
            {"num_attention_heads": 2**20, "num_key_value_heads": 1, "head_dim": 2**20},
            r"num_attention_heads · head_dim must be at most 1,073,741,824, found 1048576",
        ),
        ({"rope_theta": 10**400}, "rope_theta must be a number above 0"),
        ({"eos_token_id": 2**31}, "eos_token_id must be a token id"),
        ({"layer_types": 5}, "layer_types=5 is not built"),
        ({"hidden_size": "16"}, "hidden_size must be an integer"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers must be an integer"),
        ({"num_attention_heads": None}, "num_attention_heads must be an integer"),
        ({"num_attention_heads": 3}, "num_attention_heads must divide hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number above 0"),
        ({"rope_theta": float("nan")}, "rope_theta must be a number above 0"),
        ({"rope_theta": float("inf")}, "rope_theta must be a number above 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"eos_token_id": -1}, "eos_token_id must be a token id"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id must be a token id"),
        ({"bos_token_id": [1]}, "bos_token_id must be a token id"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object or null"),
        ({"layer_types": ["sliding_attention"]}, "layer_types=.* is not built"),
    ],
)
def test_config_refuses_bad_values(changes, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_dict({**BASE, **HEADS, **changes})


def test_config_refuses_missing_entries():
    with pytest.raises(ValueError, match="must be an object"):
        LlamaConfig.from_dict([])
    with pytest.raises(ValueError, match="must name its model_type"):
        LlamaConfig.from_dict({"vocab_size": 10})
    with pytest.raises(ValueError, match=r"intermediate_size must stand in config\.json"):
        LlamaConfig.from_dict({key: BASE[key] for key in list(BASE)[:3]})


# --- the room -----------------------------------------------------------------------------------


def test_import_of_models_needs_no_optional_package():
    lines = (
        "import sys, minilora.models",
        "names = {'tokenizers', 'jinja2', 'gguf', 'transformers', 'huggingface_hub'}",
        "print(sorted(names & set(sys.modules)))",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
