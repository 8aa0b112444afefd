"""GGUF files of each family, written as llama.cpp's converters do, with the gguf package's names.

What a converter writes and how it changes tensors: the classes of
https://github.com/ggml-org/llama.cpp/tree/master/conversion.
"""

import math

import gguf
import pytest
import torch
from model_families import FAMILIES, assert_close, read_model, some_ids, their_model
from test_loading_gguf import _interleaved, _write
from transformers import AutoModelForCausalLM

from minilora.loading import save_pretrained
from minilora.models.rope import Llama3, LongRope

pytestmark = pytest.mark.peers


def _decoder(config):
    """What `TextModel` writes of every decoder."""
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }


def _granite(config):
    return _decoder(config) | {
        "vocab_size": config.vocab_size,
        "rope.dimension_count": config.hidden_size // config.num_attention_heads,
        "attention.scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
    }


def _gemma(config):
    """Scores are scaled by head_dim: llama.cpp has no key for it, but a rule."""
    found = {key: value for key, value in _decoder(config).items() if key != "rope.freq_base"}
    return found | {
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.sliding_window": config.sliding_window,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }


def _gemma3(config):
    ropes = config.rope_parameters
    config.rope_parameters = ropes["full_attention"]
    found = _decoder(config) | {
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.sliding_window": config.sliding_window,
        "rope.freq_base_swa": ropes["sliding_attention"]["rope_theta"],
        "rope.scaling.type": ropes["full_attention"]["rope_type"],
        "rope.scaling.factor": ropes["full_attention"]["factor"],
    }
    config.rope_parameters = ropes
    return found


def _plus_one(name, value, config):
    return value + 1 if name.endswith("norm.weight") else value


def _llama(config):
    """A width of heads that is stated is written, too."""
    stated = getattr(config, "head_dim", None)
    width = stated or config.hidden_size // config.num_attention_heads
    found = _decoder(config) | {"rope.dimension_count": width}
    if stated is None:
        return found
    return found | {"attention.key_length": width, "attention.value_length": width}


def _qwen3(config):
    heads = {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    return _decoder(config) | heads


def _phi3(config):
    width = config.hidden_size // config.num_attention_heads
    original = getattr(config, "original_max_position_embeddings", config.max_position_embeddings)
    found = _decoder(config) | {
        "rope.dimension_count": int(width * config.rope_parameters["partial_rotary_factor"]),
        "rope.scaling.original_context_length": original,
        "attention.sliding_window": config.sliding_window or 0,
    }
    if config.rope_parameters["rope_type"] == "default":
        return found
    stretch = math.log(config.max_position_embeddings / original) / math.log(original)
    return found | {"rope.scaling.attn_factor": math.sqrt(1 + stretch)}


def _scaled(config):
    """What `TextModel` writes of linear and yarn."""
    rope = config.rope_parameters
    found = {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        original = rope["original_max_position_embeddings"]
        found |= {"rope.scaling.original_context_length": original}
        betas = {f"rope.scaling.yarn_{k}": v for k, v in rope.items() if k.startswith("beta_")}
        found |= betas
    return _llama(config) | found


def _gpt_neox(config):
    width = config.hidden_size // config.num_attention_heads
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "rope.dimension_count": int(width * config.rope_parameters["partial_rotary_factor"]),
        "attention.head_count": config.num_attention_heads,
        "use_parallel_residual": config.use_parallel_residual,
        "attention.layer_norm_epsilon": config.layer_norm_eps,
    }


def _by_part(name, value, config):
    if ".query_key_value." not in name:
        return value
    heads = value.reshape(config.num_attention_heads, 3, -1, *value.shape[1:])
    return torch.cat([heads[:, i].reshape(-1, *value.shape[1:]) for i in range(3)])


def _gpt2(config):
    return {
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "block_count": config.n_layer,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
    }


def _turned(name, value, config):
    return value.T.contiguous() if ".c_" in name and value.dim() == 2 else value


def _rotated(name, value, config):
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = [count for part, count in heads.items() if f".{part}." in name]
    return _interleaved(value, found[0]) if found else value


def _freqs(config):
    """What `LlamaModel.generate_extra_tensors` makes of the llama3 type."""
    rope, found = config.rope_parameters, []
    longest = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    shortest = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    for i in range(config.head_dim // 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (2 * i / config.head_dim)
        share = rope["original_max_position_embeddings"] / wave - rope["low_freq_factor"]
        share /= rope["high_freq_factor"] - rope["low_freq_factor"]
        between = 1 / ((1 - share) / rope["factor"] + share)
        found.append(1 if wave < shortest else rope["factor"] if wave > longest else between)
    return {"rope_freqs.weight": torch.tensor(found, dtype=torch.float32)}


def _factors(config):
    """What `Phi3MiniModel.generate_extra_tensors` does."""
    rope = config.rope_parameters
    lists = {name: rope.get(f"{name}_factor") for name in ("long", "short")}
    return {f"rope_factors_{k}.weight": torch.tensor(v) for k, v in lists.items() if v}


def _as_it_is(name, value, config):
    return value


def _rope(kind, **numbers):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 71.0, **numbers}}


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LONGROPE = {"short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 5.0, 11.0]}
# By family: the architecture, its metadata, what becomes of a tensor, and a model's shape.
CASES = {
    "gemma2": (
        gguf.MODEL_ARCH.GEMMA2,
        _gemma,
        _plus_one,
        {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 4},
    ),
    "gemma3_text": (
        gguf.MODEL_ARCH.GEMMA3,
        _gemma3,
        _plus_one,
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "sliding_window": 4,
            "num_hidden_layers": 7,
            "sliding_window_pattern": 6,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            },
        },
    ),
    "gpt2": (gguf.MODEL_ARCH.GPT2, _gpt2, _turned, {}),
    "gpt2, wider": (gguf.MODEL_ARCH.GPT2, _gpt2, _turned, {"n_inner": 37}),
    "llama": (gguf.MODEL_ARCH.LLAMA, _llama, _rotated, {}),
    "llama, biases": (gguf.MODEL_ARCH.LLAMA, _llama, _rotated, {"attention_bias": True}),
    "llama, linear": (gguf.MODEL_ARCH.LLAMA, _scaled, _rotated, _rope("linear", factor=3.0)),
    "llama, yarn": (
        gguf.MODEL_ARCH.LLAMA,
        _scaled,
        _rotated,
        {**_rope("yarn", factor=4.0, original_max_position_embeddings=16), "head_dim": 32},
    ),
    "llama, yarn with betas": (
        gguf.MODEL_ARCH.LLAMA,
        _scaled,
        _rotated,
        {
            **_rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=8.0),
            "head_dim": 32,
        },
    ),
    "llama, llama3": (
        gguf.MODEL_ARCH.LLAMA,
        _llama,
        _rotated,
        {**_rope("llama3", original_max_position_embeddings=32, **_LLAMA3), "head_dim": 24},
    ),
    "llama, as no other": (
        gguf.MODEL_ARCH.LLAMA,
        _llama,
        _rotated,
        {
            **_rope(
                "llama3",
                original_max_position_embeddings=37,
                factor=3.0,
                low_freq_factor=1.5,
                high_freq_factor=2.5,
            ),
            "head_dim": 24,
        },
    ),
    "phi3, in part": (gguf.MODEL_ARCH.PHI3, _phi3, _as_it_is, {"partial_rotary_factor": 0.75}),
    "phi3, longrope": (
        gguf.MODEL_ARCH.PHI3,
        _phi3,
        _as_it_is,
        {
            **_rope("longrope", **_LONGROPE),
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 5,
        },
    ),
    "mistral": (gguf.MODEL_ARCH.LLAMA, _llama, _rotated, {}),
    "smollm3": (
        gguf.MODEL_ARCH.SMOLLM3,
        _llama,
        _rotated,
        {"num_hidden_layers": 5, "no_rope_layer_interval": 4},
    ),
    "gpt_neox": (
        gguf.MODEL_ARCH.GPTNEOX,
        _gpt_neox,
        _by_part,
        {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "gpt_neox, one after the other": (
        gguf.MODEL_ARCH.GPTNEOX,
        _gpt_neox,
        _by_part,
        {
            "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 1.0},
            "use_parallel_residual": False,
            "hidden_size": 48,
            "num_attention_heads": 3,
        },
    ),
    "phi3": (gguf.MODEL_ARCH.PHI3, _phi3, _as_it_is, {}),
    "phi3, window": (gguf.MODEL_ARCH.PHI3, _phi3, _as_it_is, {"sliding_window": 5}),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, _decoder, _as_it_is, {}),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, _qwen3, _as_it_is, {}),
    "granite": (gguf.MODEL_ARCH.GRANITE, _granite, _rotated, {"mlp_bias": True}),
    "olmo2": (gguf.MODEL_ARCH.OLMO2, _decoder, _as_it_is, {}),
}


TIED = ("gemma2", "gemma3_text")  # the converter leaves their heads out


def converted(tmp_path, family, more=(), **changes):
    """Return a transformers model and the file that it becomes."""
    arch, metadata, change, shape = CASES[family]
    theirs = their_model(family.split(",")[0], **shape | changes)
    names = gguf.get_tensor_name_map(arch, theirs.config.num_hidden_layers)
    tensors = {
        names.get_name(name, (".weight", ".bias")): change(name, value.detach(), theirs.config)
        for name, value in theirs.named_parameters()
    }
    assert None not in tensors
    rope = theirs.config.rope_parameters if "gemma" not in family and family[:4] != "gpt2" else {}
    extra = {"llama3": _freqs, "longrope": _factors}.get(rope.get("rope_type"))
    tensors |= (extra(theirs.config) if extra else {}) | dict(more)
    tensors = {name: value.numpy() for name, value in tensors.items()}
    about = metadata(theirs.config)
    file = tmp_path / f"{family}.gguf"
    return theirs, _write(file, tensors, about, architecture=gguf.MODEL_ARCH_NAMES[arch])


@pytest.mark.parametrize(
    ("family", "tied"),
    [(family, tied) for family in CASES for tied in (False, True) if tied or family not in TIED],
)
def test_a_converted_model_is_read_again(tmp_path, family, tied):
    theirs, file = converted(tmp_path, family, tie_word_embeddings=tied or family in TIED)
    ours = read_model(file)
    assert type(ours) is FAMILIES[family.split(",")[0].replace("mistral", "llama")].ours
    state = ours.state_dict()
    for name, value in theirs.state_dict().items():
        assert_close(state[name], value, 1e-6)
    ids = some_ids(ours, 2, 9)
    with torch.no_grad():
        assert_close(ours(ids), theirs(ids).logits)


@pytest.mark.parametrize("family", CASES)
def test_a_key_that_is_not_built_is_refused_by_name(tmp_path, monkeypatch, family):
    arch, metadata, *rest = CASES[family]
    monkeypatch.setitem(CASES, family, (arch, lambda c: metadata(c) | {"clamp_kqv": 8.0}, *rest))
    with pytest.raises(ValueError, match=r"clamp_kqv = 8\.0 is not built"):
        read_model(converted(tmp_path, family, tie_word_embeddings=True)[1])


def test_the_largest_gemmas_scale_scores_by_what_llama_cpp_knows_of_them(tmp_path):
    """The 27B models, known by their number of layers: hidden_size / num_attention_heads."""
    theirs, file = converted(
        tmp_path, "gemma2", num_hidden_layers=46, tie_word_embeddings=True, query_pre_attn_scalar=8
    )
    assert read_model(file).config.query_pre_attn_scalar == theirs.config.query_pre_attn_scalar


@pytest.mark.parametrize("family", ["llama", "olmo2", "qwen2", "qwen3"])
def test_keys_that_are_absent_mean_what_llama_cpp_takes(tmp_path, monkeypatch, family):
    """Not what a config.json without them would mean: Qwen3's heads are 128 wide there."""
    arch, metadata, *rest = CASES[family]
    absent = ("attention.key_length", "attention.value_length", "rope.freq_base")

    def without(config):
        return {key: value for key, value in metadata(config).items() if key not in absent}

    monkeypatch.setitem(CASES, family, (arch, without, *rest))
    width = {"head_dim": 8} if family == "qwen3" else {}
    theirs, file = converted(
        tmp_path, family, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **width
    )
    ours = read_model(file)
    assert ours.config.head_dim == theirs.config.hidden_size // theirs.config.num_attention_heads
    ids = some_ids(ours, 2, 9)
    with torch.no_grad():
        assert_close(ours(ids), theirs(ids).logits)


def test_a_list_of_divisors_is_known_as_the_rule_that_made_it(tmp_path):
    """So that its folder says llama3; any other list is a longrope of it, which is the same."""
    _, file = converted(tmp_path, "llama, llama3")
    assert read_model(file).config.rope_scaling == Llama3(8.0, 1.0, 4.0, 32)
    _, file = converted(tmp_path, "llama, as no other")
    found = read_model(file).config.rope_scaling
    assert isinstance(found, LongRope)
    assert found.short_factor == found.long_factor
    assert found.attention_factor == 1


@pytest.mark.parametrize("family", ["llama, llama3", "llama, as no other", "phi3, longrope"])
def test_a_folder_of_a_file_says_the_same_of_the_rope(tmp_path, family):
    """transformers reads what we write of what llama.cpp's converter wrote of theirs."""
    theirs, file = converted(tmp_path, family)
    ours = read_model(file)
    save_pretrained(ours, tmp_path / "folder")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32).eval()
    ids = some_ids(ours, 2, 9)
    with torch.no_grad():
        assert_close(again(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize(
    ("family", "tensors", "keys", "message"),
    [
        ("llama", {"rope_freqs.weight": [1.0, 2.0]}, {}, "rope_freqs.weight must have 4 numbers"),
        ("llama", {"rope_freqs.weight": [1.0, 2.0, 3.0, 0.0]}, {}, "a list of numbers above 0"),
        ("llama", {"rope_freqs.weight": [1.0, 2.0, math.nan, 3.0]}, {}, "numbers above 0"),
        ("llama", {"rope_freqs.weight": [1.0] * 4}, {"type": "yarn", "factor": 2.0},
         "type = 'yarn', .*factor = 2.0, rope_freqs.weight is not built"),
        ("llama", {"rope_factors_long.weight": [1.0] * 4}, {}, "factors_long.weight is not built"),
        ("llama", {}, {"type": "longrope"}, "llama: rope.scaling.type = 'longrope' is not built"),
        ("llama", {}, {"type": "cubic"}, "rope.scaling.type = 'cubic' is not built"),
        ("llama", {}, {"attn_factor": 1.5}, "rope.scaling.attn_factor = 1.5 is not built"),
        ("llama", {}, {"type": "linear", "factor": 2.0, "yarn_beta_fast": 3.0}, "beta_fast = 3.0"),
        ("llama", {}, {"type": "yarn", "factor": 2.0, "yarn_ext_factor": 0.5}, "ext_factor = 0.5"),
        ("llama", {}, {"type": "linear", "factor": -2.0}, "factor of the linear rotary embedding"),
        ("qwen2", {"rope_freqs.weight": [1.0, 3.0, 9.0, 27.0]}, {}, "qwen2: .*'longrope' is not b"),
        ("gpt2", {}, {"type": "linear"}, "gpt2.rope.scaling.type = 'linear' is not built"),
        ("granite", {}, {"finetuned": False}, "granite.rope.scaling.finetuned = False is not b"),
    ],
)  # fmt: skip
def test_ropes_that_are_not_built_are_refused_by_name(
    tmp_path, monkeypatch, family, tensors, keys, message
):
    arch, metadata, change, shape = CASES[family]
    keys = {f"rope.scaling.{key}": value for key, value in keys.items()}
    monkeypatch.setitem(CASES, family, (arch, lambda c: metadata(c) | keys, change, shape))
    extra = {name: torch.tensor(value) for name, value in tensors.items()}
    with pytest.raises(ValueError, match=message):
        read_model(converted(tmp_path, family, extra, tie_word_embeddings=True)[1])


@pytest.mark.parametrize(
    ("keys", "tensors"),
    [
        ({"type": "none", "factor": 8.0}, {}),
        ({"finetuned": True, "original_context_length": 7}, {}),
        ({"yarn_log_multiplier": 0.0, "attn_factor": 1.0}, {}),
        ({}, {"rope_freqs.weight": torch.ones(4)}),
    ],
)
def test_keys_that_scale_nothing_are_read(tmp_path, monkeypatch, keys, tensors):
    arch, metadata, change, shape = CASES["llama"]
    keys = {f"rope.scaling.{key}": value for key, value in keys.items()}
    monkeypatch.setitem(CASES, "llama", (arch, lambda c: metadata(c) | keys, change, shape))
    theirs, file = converted(tmp_path, "llama", tensors)
    ours = read_model(file)
    assert ours.config.rope_scaling is None
    ids = some_ids(ours, 2, 9)
    with torch.no_grad():
        assert_close(ours(ids), theirs(ids).logits)


def test_a_base_that_is_no_number_is_refused_by_name(tmp_path, monkeypatch):
    arch, metadata, *rest = CASES["llama, llama3"]
    key = {"rope.freq_base": "4"}
    monkeypatch.setitem(CASES, "llama, llama3", (arch, lambda c: metadata(c) | key, *rest))
    with pytest.raises(ValueError, match="rope_theta must be a number above 0, found '4'"):
        read_model(converted(tmp_path, "llama, llama3")[1])


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "llama", "phi3"])
@pytest.mark.parametrize("heads", [0, [4, 4], "4"])
def test_numbers_that_cannot_be_are_refused_by_name(tmp_path, monkeypatch, family, heads):
    arch, metadata, *rest = CASES[family]
    key = {"attention.head_count": heads}
    monkeypatch.setitem(CASES, family, (arch, lambda c: metadata(c) | key, *rest))
    with pytest.raises(ValueError, match="num_attention_heads must be an integer above 0"):
        read_model(converted(tmp_path, family, tie_word_embeddings=True)[1])
