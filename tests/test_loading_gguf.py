"""GGUF files, judged by the gguf package and by transformers; the real SmolLM2."""

import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import read_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers import LlamaConfig as TheirConfig

import minilora
from minilora.loading import gguf_reader
from minilora.loading.fetching import fetch
from minilora.loading.gguf_file import open_gguf
from minilora.loading.gguf_reader import read_gguf, read_tensor
from minilora.loading.gguf_types import OTHER_TYPES, TYPES
from minilora.loading.model import load_model
from minilora.loading.source import make_model
from minilora.models.blocks import KVCache
from minilora.quantization import Quantization
from minilora.text.tokenizer import Tokenizer

F32 = 1e-5  # two f32 computations in another order, relative to the largest value
KINDS = gguf.GGMLQuantizationType
WRITTEN = [KINDS.F32, KINDS.F16, KINDS.BF16, KINDS.Q4_0, KINDS.Q4_1, KINDS.Q5_0, KINDS.Q5_1]
WRITTEN += [KINDS.Q8_0]  # by the gguf package
BLOCKS = {kind.name: number for number, kind in TYPES.items() if kind.weights > 1}

PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _theirs(**changes):
    shape = {
        "vocab_size": 53,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 48,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(TheirConfig(**{**shape, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def _interleaved(weight, heads):
    """llama.cpp's conversion: rows i and i + head_dim / 2 of each head come side by side."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _tensors(model, interleaved=True):
    """A transformers model's tensors by GGUF name, as llama.cpp's converter writes them."""
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    out = {}
    for name, parameter in model.named_parameters():
        value, (stem, leaf) = parameter.detach().numpy(), name.rsplit(".", 1)
        if stem.startswith("model.layers."):
            block, part = stem.removeprefix("model.layers.").split(".", 1)
            if interleaved and PARTS[part] in heads:
                value = _interleaved(value, heads[PARTS[part]])
            out[f"blk.{block}.{PARTS[part]}.{leaf}"] = value
        else:
            whole = {
                "model.embed_tokens": "token_embd",
                "model.norm": "output_norm",
                "lm_head": "output",
            }
            out[f"{whole[stem]}.{leaf}"] = value
    return out


def _metadata(config, head_dim=None):
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "rope.dimension_count": head_dim or config.head_dim,
    }


def _write(file, tensors, metadata, kind=KINDS.F32, architecture="llama"):
    writer = gguf.GGUFWriter(file, architecture)
    for name, value in metadata.items():
        key = name if name.startswith("general.") else f"{architecture}.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, value in tensors.items():
        if value.ndim == 2 and kind not in (KINDS.F32, KINDS.F16):
            writer.add_tensor(name, quantize(value, kind), raw_dtype=kind)
        elif value.ndim == 2 and kind == KINDS.F16:
            writer.add_tensor(name, value.astype(np.float16))
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def file(tmp_path):
    """A small f32 model as a GGUF file."""
    theirs = _theirs()
    return _write(tmp_path / "small.gguf", _tensors(theirs), _metadata(theirs.config))


def _ids():
    return torch.arange(20).reshape(2, 10)


def _close(found, wanted):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= F32 * wanted.abs().max()


# --- models -------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 8},
        {"attention_bias": True, "mlp_bias": True},
        {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32},
    ],
)
def test_reading_equals_the_model_that_was_converted(tmp_path, shape):
    theirs = _theirs(**shape)
    metadata = _metadata(theirs.config)
    if "head_dim" in shape:
        metadata |= {"attention.key_length": 32, "attention.value_length": 32}
    file = _write(tmp_path / "a.gguf", _tensors(theirs), metadata)
    ours = read_model(file)
    assert not ours.training
    assert ours.name_or_path == str(file)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    with torch.no_grad():
        _close(ours(_ids()), theirs(_ids()).logits)


@pytest.mark.parametrize("kind", WRITTEN, ids=lambda kind: kind.name)
def test_reading_decodes_each_type_to_the_bits_of_the_gguf_package(tmp_path, kind):
    tensors = {
        "a": np.random.default_rng(0).normal(size=(6, 96)).astype(np.float32),
        "b": np.linspace(-3e4, 6e4, 64, dtype=np.float32).reshape(2, 32),
        "zero": np.zeros((1, 32), np.float32),
    }
    source = read_gguf(_write(tmp_path / "a.gguf", tensors, {}, kind))
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert {tensor.tensor_type for tensor in reader.tensors} == {kind}
    for tensor in reader.tensors:
        wanted = dequantize(tensor.data, tensor.tensor_type)
        found = read_tensor(source, tensor.name).float().numpy()
        assert found.shape == tensors[tensor.name].shape
        assert np.array_equal(found, wanted)
        assert np.abs(found - tensors[tensor.name]).max() <= np.abs(tensors[tensor.name]).max() / 7


def test_types_are_those_of_the_gguf_package():
    for kind in KINDS:
        known = TYPES[kind].name if kind in TYPES else OTHER_TYPES[kind]
        assert known == kind.name
        if kind in TYPES:
            assert (TYPES[kind].weights, TYPES[kind].size) == gguf.GGML_QUANT_SIZES[kind]


def _same_bits(found, wanted):
    same = found.view(np.int32) == wanted.view(np.int32)
    return (same | np.isnan(found) & np.isnan(wanted)).all()


@pytest.mark.parametrize("name", BLOCKS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_blocks_of_any_bytes_decode_to_the_bits_of_the_gguf_package(name, data):
    """Scales may be zero, subnormal, infinite or no number."""
    kind, count = TYPES[BLOCKS[name]], data.draw(st.integers(1, 3))
    raw = data.draw(st.binary(min_size=kind.size * count, max_size=kind.size * count))
    blocks = np.frombuffer(raw, np.uint8).reshape(count, kind.size).copy()
    with np.errstate(all="ignore"):
        wanted = dequantize(blocks, KINDS(BLOCKS[name]))
    found = torch.full((count, kind.weights), torch.nan)
    kind.decode(torch.from_numpy(blocks), found)
    assert _same_bits(found.numpy(), wanted)


@pytest.mark.parametrize("name", BLOCKS)
def test_many_blocks_are_read_piece_by_piece_to_the_same_bits(tmp_path, name):
    """Rows of two blocks, more than fit into a piece, in a file."""
    kind = TYPES[BLOCKS[name]]
    rows = gguf_reader._PIECE // kind.weights // 2 + 3
    blocks = np.random.default_rng(0).integers(0, 256, (rows, 2 * kind.size), dtype=np.uint8)
    file = _write_raw(tmp_path / "a.gguf", {"a": (blocks, KINDS(BLOCKS[name]))})
    with np.errstate(all="ignore"):
        wanted = dequantize(blocks, KINDS(BLOCKS[name]))
    found = read_tensor(read_gguf(file), "a")
    assert found.shape == (rows, 2 * kind.weights)
    assert _same_bits(found.numpy(), wanted)


def _write_raw(file, tensors):
    """Write blocks as they are."""
    writer = gguf.GGUFWriter(file, "llama")
    for name, (blocks, kind) in tensors.items():
        writer.add_tensor(name, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _mixed(theirs, file, metadata):
    """Write a model in Q4_K, Q6_K, Q5_0, Q8_0 and F32, of random codes under small scales."""
    random = np.random.default_rng(0)
    kinds = {"attn_v": KINDS.Q6_K, "ffn_down": KINDS.Q5_0, "token_embd": KINDS.Q8_0}
    writer = gguf.GGUFWriter(file, "llama")
    for key, value in metadata.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(
            f"llama.{key}", value
        )
    for name, value in _tensors(theirs, interleaved=False).items():
        if value.ndim == 1:
            writer.add_tensor(name, value)
            continue
        kind = next((kind for part, kind in kinds.items() if part in name), KINDS.Q4_K)
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        shape = (value.shape[0], value.shape[1] // weights * size)
        blocks = random.integers(0, 256, shape, dtype=np.uint8).reshape(-1, size)
        halves = {KINDS.Q4_K: (0, 2), KINDS.Q6_K: (208,)}.get(kind, (0,))
        for at in halves:
            blocks[:, at : at + 2] = np.full(1, 2e-4, np.float16).view(np.uint8)
        writer.add_tensor(name, blocks.reshape(shape), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.peers
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_file_of_mixed_types_equals_transformers(tmp_path, quantize):
    """Q4_K with Q6_K and F32, as Q4_K_M files have, through the whole path."""
    theirs = _theirs(
        hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2
    )
    metadata = {**_metadata(theirs.config), "vocab_size": theirs.config.vocab_size}
    _mixed(theirs, tmp_path / "a.gguf", metadata)
    kinds = {tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert len(kinds) == 5
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="a.gguf", dtype=torch.float32
    ).eval()
    ours = read_model(tmp_path / "a.gguf")
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    with torch.no_grad():
        _close(ours(_ids()), model(_ids()).logits)
    if quantize is not None:
        small = make_model(
            open_gguf(read_gguf(tmp_path / "a.gguf")),
            None,
            "cpu",
            Quantization(quantize),
            ("all-linear", (), None),
        )
        plain = minilora.quantize(ours, quantize)
        for name, tensor in plain.state_dict().items():
            assert torch.equal(small.state_dict()[name], tensor), name


def test_decoding_takes_little_memory_beside_the_result(tmp_path):
    """Of a tensor of 134 MB, of which 19 MB are stored: in a process that may take no more."""
    file = _write_raw(
        tmp_path / "a.gguf", {"a": (np.zeros((4096, 32 * 144), np.uint8), KINDS.Q4_K)}
    )
    script = (
        "import os, pathlib, resource, torch; torch.set_num_threads(1); "
        "from minilora.loading.gguf_reader import *; "
        f"file = read_gguf(pathlib.Path({str(file)!r})); "
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096; "
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**27 + 2**24,) * 2); "
        "print(read_tensor(file, 'a').shape)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )
    assert run.stdout.strip() == "torch.Size([4096, 8192])", run.stderr


# --- shards -------------------------------------------------------------------------------------


def _write_shards(folder, theirs):
    """Write a model as three files, m-00001-of-00003.gguf and so on."""
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=8)
    for key, value in _metadata(theirs.config).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(
            f"llama.{key}", value
        )
    for name, value in _tensors(theirs).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("m-*.gguf"))


@pytest.fixture
def shards(tmp_path):
    """A small f32 model in three files, and what it is made of."""
    theirs = _theirs()
    return _write_shards(tmp_path, theirs), theirs


def test_any_shard_opens_the_model(shards):
    files, theirs = shards
    assert [file.name for file in files] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for file in files:
        ours = read_model(file)
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor), name


def test_missing_shards_are_named(shards):
    files, _ = shards
    files[0].unlink()
    files[2].unlink()
    message = r"one of 3 shards, .* found no m-00001-of-00003\.gguf, m-00003-of-00003\.gguf; fetch"
    with pytest.raises(ValueError, match=message):
        read_model(files[1])


def test_a_shard_under_another_name_is_refused(shards):
    files, _ = shards
    with pytest.raises(ValueError, match=r"other.gguf' is one of 3 shards .*NAME-00001-of-00003"):
        read_model(files[0].rename(files[0].with_name("other.gguf")))
    renamed = files[1].rename(files[1].with_name("m-00002-of-00004.gguf"))
    with pytest.raises(ValueError, match=r"a name that does not say so"):
        read_model(renamed)


def test_shards_that_do_not_belong_together_are_refused(shards):
    files, _ = shards
    raw = [file.read_bytes() for file in files]
    files[2].write_bytes(raw[1])
    with pytest.raises(ValueError, match=r"00003.gguf' must state split.no = 2, .* found 1"):
        read_model(files[0])
    number = struct.pack("<Q", 8) + b"split.no" + struct.pack("<I", 2)
    assert raw[1].count(number) == 1
    at = raw[1].index(number) + len(number)
    files[2].write_bytes(raw[1][:at] + struct.pack("<H", 2) + raw[1][at + 2 :])
    with pytest.raises(ValueError, match=r"each tensor once, found .* a second time in 'm-00003"):
        read_model(files[0])
    key = struct.pack("<Q", 19) + b"split.tensors.count" + struct.pack("<I", 5)
    at = raw[0].index(key) + len(key)
    files[2].write_bytes(raw[2])
    files[0].write_bytes(raw[0][:at] + struct.pack("<i", 99) + raw[0][at + 4 :])
    with pytest.raises(ValueError, match=r"must hold 99 tensors \(split.tensors.count\), found 21"):
        read_model(files[1])


def test_reading_takes_a_dtype(file):
    assert read_model(file, dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16
    assert read_model(file).lm_head.weight.dtype == torch.float32


def test_reading_weights_are_apart_from_the_file(file):
    ours = read_model(file)
    wanted = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.write(bytes(size))
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, wanted[name])


def test_metadata_equals_that_of_the_gguf_package(tmp_path):
    metadata = {
        "general.name": "ünï 🙂",
        "general.flag": True,
        "general.count": 7,
        "general.ratio": 0.5,
        "general.words": ["a", "", "ü"],
        "general.numbers": [1, -2, 3],
    }
    file = _write(tmp_path / "a.gguf", {"a": np.ones((2, 2), np.float32)}, metadata)
    found = read_gguf(file).metadata
    for key, field in gguf.GGUFReader(file).fields.items():
        if not key.startswith("GGUF."):
            assert found[key] == field.contents(), key
    assert found.keys() >= metadata.keys()


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.sliding_window", 512),
        ("expert_count", 8),
        ("logit_scale", 0.5),
        ("something.new", "1"),
    ],
)
def test_reading_refuses_options_by_name(tmp_path, key, value):
    theirs = _theirs()
    metadata = {**_metadata(theirs.config), key: value}
    file = _write(tmp_path / "a.gguf", _tensors(theirs), metadata)
    with pytest.raises(ValueError, match=f"llama.{key} = .* is not built"):
        read_model(file)


def test_reading_reads_options_that_say_nothing(tmp_path):
    theirs = _theirs()
    nothing = {"rope.scaling.type": "none", "expert_count": 0, "rope.scale_linear": 0.0}
    file = _write(tmp_path / "a.gguf", _tensors(theirs), _metadata(theirs.config) | nothing)
    with torch.no_grad():
        _close(read_model(file)(_ids()), theirs(_ids()).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope.dimension_count": 4}, r"llama\.rope\.dimension_count must be .* 8, found 4"),
        ({"attention.value_length": 16}, r"llama\.attention\.value_length must be .* found 16"),
        ({"attention.head_count": [8, 8]}, "num_attention_heads must be an integer"),
        ({"block_count": 10**7}, "num_hidden_layers must be at most 1,024, found 10000000"),
        ({"block_count": 22}, r"found 22 blocks in the configuration and 21 tensors in '.*a.gguf'"),
        ({"block_count": 0}, "num_hidden_layers must be an integer above 0"),
        ({"block_count": 3}, r"missing: model\.layers\.2\.input_layernorm\.weight"),
        ({"block_count": 1}, r"unexpected: model\.layers\.1\.input_layernorm\.weight"),
        ({"vocab_size": 54}, r"of another shape: lm_head\.weight \[53, 64\] instead of \[54, 64\]"),
    ],
)
def test_reading_refuses_metadata_that_does_not_fit(tmp_path, changes, message):
    theirs = _theirs()
    metadata = {**_metadata(theirs.config), **changes}
    file = _write(tmp_path / "a.gguf", _tensors(theirs), metadata)
    with pytest.raises(ValueError, match=message):
        read_model(file)


def test_reading_refuses_missing_metadata(tmp_path):
    theirs = _theirs()
    metadata = _metadata(theirs.config)
    del metadata["embedding_length"]
    file = _write(tmp_path / "a.gguf", _tensors(theirs), metadata)
    with pytest.raises(ValueError, match=r"must state llama\.embedding_length"):
        read_model(file)


def test_reading_refuses_a_file_without_embedding(tmp_path):
    theirs = _theirs()
    tensors = _tensors(theirs)
    del tensors["token_embd.weight"]
    file = _write(tmp_path / "a.gguf", tensors, _metadata(theirs.config))
    with pytest.raises(ValueError, match=r"must hold token_embd\.weight"):
        read_model(file)


def test_reading_refuses_tensors_it_does_not_know(tmp_path):
    theirs = _theirs()
    tensors = {**_tensors(theirs), "blk.0.ffn_magic.weight": np.ones(4, np.float32)}
    file = _write(tmp_path / "a.gguf", tensors, _metadata(theirs.config))
    with pytest.raises(ValueError, match=r"unexpected: blk\.0\.ffn_magic\.weight"):
        read_model(file)


def test_reading_refuses_another_architecture_by_name(tmp_path):
    file = _write(tmp_path / "a.gguf", {"a": np.ones(4, np.float32)}, {}, architecture="gemma3n")
    message = (
        r"is built \(.*\), found 'gemma3n'; nearest: gemma3; load the model's folder or its nam"
    )
    with pytest.raises(ValueError, match=message):
        read_model(file)


@pytest.mark.parametrize("kind", [KINDS.IQ2_XXS, KINDS.TQ1_0, KINDS.MXFP4, KINDS.I32])
def test_reading_refuses_other_types_by_name(tmp_path, kind):
    _, size = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((2, size), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = (
        rf"tensor blk\.0\.attn_q\.weight has type {kind.name}, which is not built; the types read "
        r"are F32, .*Q4_K, .*BF16; fetch another file of the model"
    )
    with pytest.raises(ValueError, match=message):
        read_model(tmp_path / "a.gguf")


# --- damaged files ------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"GGU", b"GGML" + bytes(100), b'{"a": 1}'])
def test_reading_refuses_what_is_no_gguf(tmp_path, content):
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.gguf' must be a GGUF file, found one that does not"):
        read_model(tmp_path / "a.gguf")


@pytest.mark.parametrize("at", ["header", "data", "last"])
def test_reading_names_a_truncated_file(file, at):
    raw = file.read_bytes()
    keep = {"header": 200, "data": len(raw) // 2, "last": len(raw) - 64}[at]
    file.write_bytes(raw[:keep])
    where = "its header" if at == "header" else "tensor"
    with pytest.raises(ValueError, match=rf"small\.gguf' must be a whole .* the middle of {where}"):
        read_model(file)


def test_a_file_that_is_cut_short_while_it_is_read_is_named(file):
    opened = read_gguf(file)
    file.write_bytes(file.read_bytes()[:-4096])
    with pytest.raises(ValueError, match=r"must stay as it is while .* found it cut short in tens"):
        for name in opened.tensors:
            read_tensor(opened, name)


def test_reading_of_every_truncated_header_is_one_kind_of_error(file):
    raw = file.read_bytes()
    for keep in range(4, 1500, 7):
        file.write_bytes(raw[:keep])
        with pytest.raises(ValueError, match=r"small\.gguf' must be a whole GGUF file"):
            read_model(file)


def _header(*values, version=3):
    """A GGUF file of key-value pairs given as raw bytes."""
    return b"GGUF" + struct.pack("<IQQ", version, 0, len(values)) + b"".join(values)


def _key(text, kind):
    return struct.pack("<Q", len(text)) + text.encode() + struct.pack("<I", kind)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (_header(version=1), "it has version 1"),
        (_header(version=3 << 24), r"or is big-endian"),
        (_header(_key("a", 99)), "unknown type 99"),
        (_header(_key("a", 9) + struct.pack("<IQ", 9, 2**40)), "middle of its header"),
        (_header(_key("a", 9) + struct.pack("<IQ", 8, 2**60)), "middle of its header"),
        (_header(_key("a", 9) + struct.pack("<IQ", 4, 2**63)), "middle of its header"),
        (_header(_key("a", 9) + struct.pack("<IQIQ", 9, 1, 4, 0)), "unknown type 9"),
        (_header(_key("a", 8) + struct.pack("<Q", 2**64 - 1)), "middle of its header"),
        (_header(_key("a", 8) + struct.pack("<Q", 2) + b"x"), "middle of its header"),
        (_header(_key("a", 8) + struct.pack("<Q", 1) + b"\xff"), "codec can't decode"),
        (_header(*[_key("a", 0) + b"\1"] * 2), "it states a twice"),
        (_header(_key("general.alignment", 4) + struct.pack("<I", 24)), "is no power of two"),
    ],
)
def test_reading_refuses_hostile_headers(tmp_path, raw, message):
    (tmp_path / "a.gguf").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        read_model(tmp_path / "a.gguf")


def _with_tensor(shape, kind=0, offset=0, times=1):
    info = struct.pack("<Q", 1) + b"t" + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    info += struct.pack("<IQ", kind, offset)
    return b"GGUF" + struct.pack("<IQQ", 3, times, 0) + info * times + bytes(4096)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (_with_tensor([2**32, 2**32, 2**32]), "middle of tensor t"),
        (_with_tensor([4], offset=2**63), "middle of tensor t"),
        (_with_tensor([4], times=2), "tensor t is listed twice"),
        (_with_tensor([1] * 5), "or has 5 dimensions"),
        (_with_tensor([0]), r"tensor t has shape \[0\], which F32 cannot store"),
        (_with_tensor([]), r"tensor t has shape \[\]"),
        (_with_tensor([4], offset=32), "tensor t begins at byte 32 .* end at 0: they overlap or"),
        (_with_tensor([4]), "it goes on for .* bytes after the last of its 1 tensors"),
        (_with_tensor([33], kind=3), r"tensor t has shape \[33\], which Q4_1 cannot store"),
    ],
)
def test_reading_refuses_hostile_tensors(tmp_path, raw, message):
    (tmp_path / "a.gguf").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        read_model(tmp_path / "a.gguf")


# --- the real SmolLM2 ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm():
    """The file, the model in f32 and the tokenizer."""
    file = fetch("smollm2-135m")
    return file, *load_model(file, dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs(smollm):
    return AutoModelForCausalLM.from_pretrained(
        smollm[0].parent, gguf_file=smollm[0].name, dtype=torch.float32
    ).eval()


@pytest.mark.real_model
@pytest.mark.peers
def test_smollm_weights_and_logits_equal_transformers(smollm, theirs):
    _, ours, tokenizer = smollm
    wanted = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    text = "Low-rank adaptation freezes the weights and trains two thin matrices beside each."
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        _close(ours(ids), theirs(ids).logits)
        _close(ours.loss(ids, ids), theirs(ids, labels=ids).loss)


@pytest.mark.real_model
@pytest.mark.peers
def test_smollm_greedy_text_is_what_transformers_would_write(smollm, theirs):
    _, ours, tokenizer = smollm
    prompt = torch.tensor([tokenizer.encode("def fibonacci(n):\n")])
    cache = KVCache(ours, 1, prompt.shape[1] + 24)
    found, step = prompt, prompt
    with torch.no_grad():
        for _ in range(24):
            step = ours(step, cache=cache, last=1).argmax(-1)
            found = torch.cat((found, step), dim=1)
        wanted = theirs(found[:, :-1]).logits.argmax(-1)  # each next token, given ours before it
    assert torch.equal(found[:, prompt.shape[1] :], wanted[:, prompt.shape[1] - 1 :])


@pytest.mark.real_model
def test_smollm_knows_the_capital_of_france(smollm):
    _, ours, tokenizer = smollm
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    step = torch.tensor([tokenizer.encode_chat(messages)])
    cache, answer = KVCache(ours, 1, step.shape[1] + 20), []
    with torch.no_grad():
        for _ in range(20):
            step = ours(step, cache=cache, last=1).argmax(-1)
            if int(step) in tokenizer.stop_ids:
                break
            answer.append(int(step))
    assert "Paris" in tokenizer.decode(answer)
    assert int(step) in tokenizer.stop_ids  # and it ends by itself


@pytest.mark.real_model
def test_load_model_reads_the_file_in_the_asked_dtype(smollm):
    model, tokenizer = load_model("smollm2-135m", dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.model.norm.weight, smollm[1].model.norm.weight.bfloat16())
    assert isinstance(tokenizer, Tokenizer)
    assert model.config.vocab_size == tokenizer.vocab_size == 49152


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.nan, None, "layers.0.mlp.up_proj.weight must be finite, found NaN or Inf"),
        (np.inf, torch.bfloat16, "layers.0.mlp.up_proj.weight must be finite, found NaN or Inf"),
        (7e4, torch.float16, "must be finite in torch.float16, found values up to 7e"),
    ],
)
def test_weights_that_are_not_finite_are_refused(tmp_path, value, dtype, message):
    theirs = _theirs()
    tensors = _tensors(theirs)
    tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"].copy()
    tensors["blk.0.ffn_up.weight"][3, 1] = value
    _write(tmp_path / "m.gguf", tensors, _metadata(theirs.config))
    with pytest.raises(ValueError, match=message):
        read_model(tmp_path / "m.gguf", dtype=dtype)
