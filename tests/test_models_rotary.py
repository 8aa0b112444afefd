"""Rotary embeddings: every `rope_type` against transformers', lengths, partial heads, bad keys."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import assert_close, our_model, some_ids, their_model
from transformers import LlamaConfig as TheirConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import minilora
from minilora.models import SCALINGS, KVCache, LlamaConfig, Phi3Config
from minilora.models.rope import Rope
from minilora.models.rotary import document_lengths, rotate, rotation_at

pytestmark = pytest.mark.peers

BASE = {"model_type": "llama", "vocab_size": 9, "hidden_size": 16, "intermediate_size": 8}
BASE |= {"num_attention_heads": 2, "max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 12}
TYPES = {
    "default": {},
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 3.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "short_factor": [1.0, 1.1, 1.5, 2.0],
        "long_factor": [1.0, 2.0, 7.5, 30.0],
        "original_max_position_embeddings": 16,
    },
}


def entries(kind, **changes):
    return BASE | {"rope_parameters": {"rope_type": kind, **TYPES[kind], **changes}}


def theirs_at(config, positions):
    embedding = LlamaRotaryEmbedding(TheirConfig(**config))
    cos, sin = embedding(torch.empty(0), positions)
    half = cos.shape[-1] // 2
    return cos[..., :half], sin[..., :half]


def ours_at(config, positions):
    cos, sin = rotation_at(LlamaConfig.from_dict(config).rope, positions, torch.float32)
    return cos[:, 0], sin[:, 0]


NUMBER = st.floats(1.0, 40.0)
FACTORS = st.lists(st.floats(0.5, 60), min_size=8, max_size=8)


@st.composite
def ropes(draw):
    kind = draw(st.sampled_from(sorted(TYPES)))
    rope = {"rope_type": kind, "rope_theta": draw(st.sampled_from([1.5, 71.0, 1e4, 5e5]))}
    original = {"original_max_position_embeddings": draw(st.integers(2, 70))}
    if kind in ("linear", "dynamic", "llama3", "yarn"):
        rope["factor"] = draw(NUMBER)
    if kind == "llama3":
        low = draw(NUMBER)
        rope |= {"low_freq_factor": low, "high_freq_factor": low + draw(NUMBER)} | original
    if kind == "yarn":
        slow = draw(NUMBER)
        others = {
            "attention_factor": draw(NUMBER),
            "beta_fast": slow + draw(NUMBER),
            "beta_slow": slow,
            "mscale": draw(NUMBER),
            "mscale_all_dim": draw(NUMBER),
            "truncate": draw(st.booleans()),
        }
        rope |= {key: others[key] for key in draw(st.sets(st.sampled_from(sorted(others))))}
        rope |= original
        if ("beta_slow" in rope) != ("beta_fast" in rope):
            rope |= {"beta_slow": slow, "beta_fast": others["beta_fast"]}
    if kind == "longrope":
        rope |= {"short_factor": draw(FACTORS), "long_factor": draw(FACTORS)} | original
        if draw(st.booleans()):
            rope[draw(st.sampled_from(["factor", "attention_factor"]))] = draw(NUMBER)
    return rope


@settings(max_examples=150, deadline=None)
@given(rope=ropes(), start=st.integers(0, 20), tokens=st.integers(1, 90))
def test_every_type_equals_transformers(rope, start, tokens):
    config = BASE | {"head_dim": 16, "rope_parameters": rope}
    positions = torch.arange(start, start + tokens)[None]
    found, wanted = ours_at(config, positions), theirs_at(config, positions)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize("kind", TYPES)
def test_both_spellings_of_config_json_are_one(kind):
    new = LlamaConfig.from_dict(entries(kind, rope_theta=5.0))
    scaling = TYPES[kind] | {"type": kind}
    old = LlamaConfig.from_dict(BASE | {"rope_theta": 5.0, "rope_scaling": scaling})
    assert old == new
    assert LlamaConfig.from_dict(new.to_dict()) == new
    assert LlamaConfig.from_dict(TheirConfig(**new.to_dict()).to_dict()) == new
    assert new.to_dict()["rope_theta"] == 5.0
    assert ("rope_scaling" in new.to_dict()) == (kind != "default")
    hash(new.rope)


def test_the_original_context_is_where_transformers_finds_it():
    """At the top, else beside the type, else it is the context."""
    rope, key = {"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings"
    for config, wanted in (
        (BASE | {"rope_scaling": rope}, 64),
        (BASE | {"rope_scaling": rope | {key: 32}}, 32),
        (BASE | {"rope_scaling": rope | {key: 32}, key: 16}, 16),
    ):
        assert LlamaConfig.from_dict(config).rope_scaling.original_max_position_embeddings == wanted
        positions = torch.arange(64)[None]
        for ours, theirs in zip(
            ours_at(config, positions), theirs_at(config, positions), strict=True
        ):
            assert_close(ours, theirs)


def test_phi3_has_longrope_alone_under_three_names():
    config = BASE | {"model_type": "phi3", "original_max_position_embeddings": 7}
    factors = {"short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
    config["partial_rotary_factor"] = 0.75
    found = [
        Phi3Config.from_dict(config | {"rope_scaling": {"type": name, **factors}})
        for name in ("longrope", "su", "yarn")
    ]
    assert found[0] == found[1] == found[2]
    assert found[0].rope == Rope(6, 10000.0, found[0].rope_scaling, 64)
    written = found[0].to_dict()
    assert written["rope_scaling"] == {"type": "longrope", **factors}  # as transformers 4 wants it
    assert written["original_max_position_embeddings"] == 7
    assert written["partial_rotary_factor"] == 0.75
    del config["original_max_position_embeddings"]
    config["rope_scaling"] = {"type": "su", **factors}
    assert Phi3Config.from_dict(config).rope_scaling.original_max_position_embeddings == 4096
    with pytest.raises(ValueError, match="rope_type='llama3' is not built, only default, longrope"):
        Phi3Config.from_dict(config | {"rope_scaling": {"type": "llama3", **factors}})


# --- lengths ------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=3))
def test_document_lengths(rows):
    width = max(map(sum, rows))
    positions, lengths = [], []
    for row in rows:
        full = [*row, *[1] * (width - sum(row))]
        positions.append([i for n in full for i in range(n)])
        lengths.append([n for n in full for _ in range(n)])
    assert document_lengths(torch.tensor(positions)).tolist() == lengths
    assert document_lengths(torch.tensor(positions[0])).tolist() == lengths[0]


def test_document_lengths_of_padded_rows_and_gaps():
    assert document_lengths(torch.tensor([[0, 0, 0, 1, 2]])).tolist() == [[1, 1, 3, 3, 3]]
    assert document_lengths(torch.tensor([3, 4, 9])).tolist() == [10, 10, 10]
    assert document_lengths(torch.tensor([[7], [0]])).tolist() == [[8], [1]]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rows_and_packed_documents_do_not_depend_on_each_other(kind):
    """One beyond the original context beside one below it, in a batch and in a row."""
    config = {"rope_parameters": {"rope_type": kind, **TYPES[kind]}}
    config |= {"max_position_embeddings": 16 if kind == "dynamic" else 64}
    ours = our_model("llama", their_model("llama", **config))
    a, b = some_ids(ours, 1, 21), some_ids(ours, 1, 9)
    packed = torch.cat((a, b), dim=1)
    positions = torch.cat((torch.arange(21), torch.arange(9)))
    number = torch.tensor([0] * 21 + [1] * 9)
    mask = (number[:, None] == number) & torch.ones(30, 30, dtype=torch.bool).tril()
    with torch.no_grad():
        found = ours(packed, positions=positions, mask=mask)
        assert_close(found[:, :21], ours(a))
        assert_close(found[:, 21:], ours(b))
        assert (ours(a)[:, :9] - ours(a[:, :9])).abs().max() > 0.01  # the length does matter
    rows = minilora.generate(ours, [a[0, :14].tolist(), b[0, :3].tolist()], max_new_tokens=6)
    for prompt, row in zip((a[0, :14], b[0, :3]), rows, strict=True):
        assert minilora.generate(ours, [prompt.tolist()], max_new_tokens=6) == [row]


def test_cached_keys_that_would_be_wrong_are_refused_and_generate_makes_them_anew():
    config = {"rope_parameters": {"rope_type": "longrope", **TYPES["longrope"]}}
    ours = our_model("llama", their_model("llama", **config))
    ids = some_ids(ours, 2, 20)
    cache = KVCache(ours, 2, 32)
    with torch.no_grad():
        ours(ids[:, :15], cache=cache)
        ours(ids[:, 15:16], cache=cache)
        with pytest.raises(ValueError, match="documents of this length have other rotary"):
            ours(ids[:, 16:18], cache=cache)
        assert cache.length == 16
        cache.length = 0
        parts = [ours(part, cache=cache) for part in ids.split([18, 1, 1], dim=1)]
        assert_close(torch.cat(parts, dim=1), ours(ids))
    prompts = [ids[0, :13].tolist(), ids[1, :6].tolist(), ids[1, :2].tolist()]
    stop = minilora.generate(ours, prompts[2:], max_new_tokens=12)[0][-1]  # stops before others
    found = minilora.generate(ours, prompts, max_new_tokens=12, stop=stop)
    for prompt, new in zip(prompts, found, strict=True):
        row = list(prompt)
        for token in new:
            with torch.no_grad():  # every token by a pass over all before it
                assert token == int(ours(torch.tensor([row]))[0, -1].argmax())
            row.append(token)


def test_the_dynamic_type_has_a_longer_context():
    config = LlamaConfig.from_dict(entries("dynamic"))
    assert config.context_length == 192
    assert config.max_position_embeddings == 64
    assert LlamaConfig.from_dict(entries("linear")).context_length == 64
    ours = our_model("llama", their_model("llama", **{
        "max_position_embeddings": 5, "rope_parameters": {"rope_type": "dynamic", "factor": 1.5}
    }))  # fmt: skip
    assert ours(some_ids(ours, 1, 7)).shape[1] == 7
    with pytest.raises(ValueError, match="at most 7 tokens"):
        ours(some_ids(ours, 1, 8))
    with pytest.raises(ValueError, match="context of 7 tokens, found 4"):
        minilora.generate(ours, [[1, 2, 3, 4]], max_new_tokens=4)


def test_a_part_of_a_head_is_rotated():
    x, positions = torch.randn(2, 3, 5, 10), torch.arange(5)
    rotation = rotation_at(Rope(6, 100.0), positions, torch.float32)
    found = rotate(x, rotation)
    assert torch.equal(found[..., 6:], x[..., 6:])
    assert torch.equal(found[..., :6], rotate(x[..., :6].contiguous(), rotation))
    angle = positions.double() * 100.0 ** (-2 / 6)
    a, b = x[..., 1].double(), x[..., 4].double()
    assert_close(found[..., 1].double(), a * angle.cos() - b * angle.sin(), 1e-6)
    assert_close(found[..., 4].double(), b * angle.cos() + a * angle.sin(), 1e-6)
    assert rotate(x, None) is x
    assert rotation_at(None, positions, torch.float32) is None


# --- what does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "proportional"}, "rope_type='proportional' is not built, only default, lin"),
        ({"rope_type": "linear", "type": "yarn"}, r"one rope_type, found \['linear', 'yarn'\]"),
        ({"rope_type": 5}, r"one rope_type, found \[5\]"),
        ({"rope_type": "linear"}, "must give factor for the rope_type 'linear', found none"),
        ({"rope_type": "llama3", "factor": 2.0}, "must give low_freq_factor, high_freq_factor for"),
        ({"rope_type": "default", "factor": 2.0}, "factor=2.0 is not built for .* 'default'"),
        ({"rope_type": "yarn", "factor": 2.0, "finetuned": True}, "finetuned=True is not built"),
        ({"rope_type": "linear", "factor": 0.5}, "factor of the linear .* at least 1, found 0.5"),
        ({"rope_type": "linear", "factor": math.nan}, "at least 1, found nan"),
        ({"rope_type": "linear", "factor": "2"}, "at least 1, found '2'"),
        ({"rope_type": "yarn", "truncate": 1}, "truncate of the yarn .* true or false, found 1"),
        ({"rope_type": "yarn", "beta_fast": 0}, "beta_fast of .* a number above 0, found 0"),
        ({"rope_type": "yarn", "mscale": "1"}, "mscale of the yarn .* must be a number, found"),
        (
            {"rope_type": "yarn", "original_max_position_embeddings": 1},
            "original_max_position_embeddings of the yarn .* an integer above 1, found 1",
        ),
        ({"rope_type": "yarn", "factor": 2, "rope_theta": 1.0}, "rope_theta must be above 1 for"),
        (
            {**TYPES["llama3"], "rope_type": "llama3", "high_freq_factor": 1.0},
            "high_freq_factor of the llama3 .* must be above low_freq_factor, found 1.0 and 1.0",
        ),
        (
            {**TYPES["longrope"], "rope_type": "longrope", "long_factor": [1.0] * 3},
            "must have 4 numbers, one for each rotated pair, found 4 and 3",
        ),
        (
            {**TYPES["longrope"], "rope_type": "longrope", "short_factor": 1.0},
            "short_factor of the longrope .* a list of numbers above 0, found 1.0",
        ),
        ({"rope_type": "default", "partial_rotary_factor": 0.25}, "factor=0.25 is not built"),
    ],
)
def test_config_refuses_ropes_by_name(key, rope, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_dict(BASE | {key: rope})


def test_config_refuses_two_ropes_and_heads_that_do_not_fit():
    two = entries("linear") | {"rope_scaling": {"type": "linear", "factor": 3.0}}
    with pytest.raises(ValueError, match="rope_parameters and rope_scaling must describe one"):
        LlamaConfig.from_dict(two)
    with pytest.raises(ValueError, match="head_dim must be at least 4 for the dynamic"):
        LlamaConfig.from_dict(entries("dynamic") | {"head_dim": 2})
    for share in (0.4, 1.5, 0.1):
        with pytest.raises(ValueError, match="head_dim must be even .* rotated, found"):
            Phi3Config.from_dict(BASE | {"model_type": "phi3", "partial_rotary_factor": share})


def test_a_config_takes_a_scaling_and_no_object():
    scaling = SCALINGS["linear"](factor=2.0)
    assert LlamaConfig(9, 8, 8, 1, 2, 2, 4, rope_scaling=scaling).rope.scaling == scaling
    with pytest.raises(ValueError, match="rope_scaling must be a Scaling of minilora.models or"):
        LlamaConfig(9, 8, 8, 1, 2, 2, 4, rope_scaling={"rope_type": "linear", "factor": 2.0})


def test_every_type_is_in_this_file():
    assert {*TYPES} == {"default", *SCALINGS}
