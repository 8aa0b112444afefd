"""GGUF files of the llama architecture: metadata, tensors, and a `Llama` made of them.

Read here and not through the `gguf` package, which takes seconds for a vocabulary.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the blocks (`block_q4_0`,
`block_q4_1`, `block_q8_0`): ggml-common.h of the same project.
"""

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minilora.files import one_line, short
from minilora.loading.folder import check_blocks, check_names_and_shapes, fill, resolve_dtype
from minilora.models import Llama, LlamaConfig, Prepare, Transform

# type id → name, weights per block, bytes per block
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    30: ("BF16", 1, 2),
}
_OTHER_TYPES = {6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K"}
_OTHER_TYPES |= {14: "Q6_K", 15: "Q8_K", 20: "IQ4_NL", 23: "IQ4_XS", 28: "F64", 39: "MXFP4"}

_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # struct letters
_STRING, _ARRAY = 8, 9

_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

# llama.* keys whose meaning is built, and keys that must say "nothing of the kind". Any other key
# of the architecture may change the maths and is refused by name.
_BUILT = {
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
}
_NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scale_linear": 1.0,
    "attention.causal": True,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's blocks lie in the file; `shape` is PyTorch's order."""

    kind: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class GGUF:
    """A file's metadata (plain Python values) and its tensors by GGUF name, over a mapped file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    buffer: mmap.mmap

    def need(self, key: str) -> Any:
        """Return a metadata value or raise by its name."""
        if key not in self.metadata:
            raise ValueError(f"'{self.path}' must state {key}, found no such metadata")
        return self.metadata[key]


class _Cursor:
    """Reads little-endian values one after another and never past the end."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self.buffer, self.at = buffer, 0

    def skip(self, size: int) -> int:
        """Move on by `size` bytes and return where they start."""
        start = self.at
        if size > len(self.buffer) - start:
            raise ValueError("it ends in the middle of its header")
        self.at += size
        return start

    def scalar(self, letter: str) -> Any:
        form = "<" + letter
        return struct.unpack_from(form, self.buffer, self.skip(struct.calcsize(form)))[0]

    def string(self) -> str:
        size = self.scalar("Q")
        start = self.skip(size)
        return self.buffer[start : start + size].decode("utf-8")

    def value(self, kind: int, nested: bool = False) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY and not nested:
            inner, count = self.scalar("I"), self.scalar("Q")
            if inner in _SCALARS:
                form = f"<{count}{_SCALARS[inner]}"
                size = count * struct.calcsize("<" + _SCALARS[inner])
                return list(struct.unpack_from(form, self.buffer, self.skip(size)))
            if count > len(self.buffer) - self.at:
                raise ValueError("it ends in the middle of its header")
            return [self.value(inner, nested=True) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"a metadata value has the unknown type {kind}")
        return self.scalar(_SCALARS[kind])


def read_gguf(file: str | Path) -> GGUF:
    """Map a GGUF file and read its header.

    Args:
        file: path of a little-endian GGUF file, version 2 or 3.

    Returns:
        Metadata and tensor places; the weights are not read.

    Raises:
        ValueError: no file, no GGUF, a damaged or truncated one, or a tensor type that is not
            built, by name.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"a GGUF file must lie at '{path}', found none")
    with path.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(f"'{path}' must be a GGUF file, found one that does not start so")
        buffer = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        metadata, tensors = _header(_Cursor(buffer))
    except (ValueError, OverflowError, MemoryError, struct.error) as error:
        raise ValueError(
            f"'{path}' must be a whole GGUF file of supported types, found otherwise: {error}"
        ) from error
    return GGUF(path, metadata, tensors, buffer)


def _header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    cursor.skip(4)
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise ValueError(f"it has version {version} (or is big-endian); versions 2 and 3 are read")
    tensor_count, value_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"it states {one_line(key, 80)} twice")
        metadata[key] = cursor.value(cursor.scalar("I"))
    places: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensor_count):
        name, dims = cursor.string(), cursor.scalar("I")
        if name in places or dims > 4:
            raise ValueError(
                f"tensor {one_line(name, 80)} is listed twice or has {dims} dimensions"
            )
        shape = tuple(cursor.scalar("Q") for _ in range(dims))[::-1]
        places[name] = (shape, cursor.scalar("I"), cursor.scalar("Q"))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {short(alignment)}, which is no power of two")
    data = -(-cursor.at // alignment) * alignment
    stored = {
        name: _stored(name, shape, kind, data + offset)
        for name, (shape, kind, offset) in places.items()
    }
    for name, tensor in stored.items():
        if tensor.start + tensor.size > len(cursor.buffer):
            raise ValueError(f"it ends in the middle of tensor {one_line(name, 80)}")
    return metadata, stored


def _stored(name: str, shape: tuple[int, ...], kind: int, start: int) -> StoredTensor:
    if kind not in _TYPES:
        raise ValueError(
            f"tensor {one_line(name, 80)} has type {_OTHER_TYPES.get(kind, kind)}, which is not "
            f"built; the types read are {', '.join(known for known, _, _ in _TYPES.values())}"
        )
    label, weights, size = _TYPES[kind]
    if not shape or 0 in shape or shape[-1] % weights:
        raise ValueError(
            f"tensor {one_line(name, 80)} has shape {list(shape)}, which {label} cannot store"
        )
    return StoredTensor(label, shape, start, math.prod(shape) // weights * size)


def read_tensor(source: GGUF, name: str) -> torch.Tensor:
    """Decode one tensor.

    Per block of 32 with nibbles or bytes q, scale d and offset m (f16):
    Q4_0 d·(q − 8), Q4_1 d·q + m, Q8_0 d·q, all computed in f32.

    Args:
        source: an open file.
        name: the tensor's GGUF name.

    Returns:
        Contiguous, its own memory: f32, or f16 or bf16 where stored so.
    """
    place = source.tensors[name]
    raw = np.frombuffer(source.buffer, np.uint8, place.size, place.start)
    if place.kind == "F32":
        return torch.from_numpy(raw.view("<f4").astype(np.float32)).view(place.shape)
    if place.kind in ("F16", "BF16"):
        wanted = torch.float16 if place.kind == "F16" else torch.bfloat16
        return torch.from_numpy(raw.view("<i2").astype(np.int16)).view(wanted).view(place.shape)
    per_block = next(size for label, _, size in _TYPES.values() if label == place.kind)
    blocks = raw.reshape(-1, per_block)
    scale = _halves(blocks[:, 0:2])
    if place.kind == "Q8_0":
        out = torch.from_numpy(blocks[:, 2:].view(np.int8).astype(np.float32)).mul_(scale)
    else:
        head = 4 if place.kind == "Q4_1" else 2
        packed = blocks[:, head:]
        codes = np.empty((len(blocks), 32), np.float32)
        codes[:, :16], codes[:, 16:] = packed & 15, packed >> 4
        out = torch.from_numpy(codes)
        if place.kind == "Q4_0":
            out = out.sub_(8).mul_(scale)
        else:
            out = out.mul_(scale).add_(_halves(blocks[:, 2:4]))
    return out.view(place.shape)


def _halves(pairs: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pairs).view("<f2").astype(np.float32))


def model_config(source: GGUF) -> LlamaConfig:
    """Read the `LlamaConfig` from a file's metadata; refuse by name what is not built."""
    architecture = source.need("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"'{source.path}' must hold the llama architecture, found {short(architecture)}, which "
            f"is not built"
        )
    given = {
        key.removeprefix("llama."): value
        for key, value in source.metadata.items()
        if key.startswith("llama.")
    }
    for key, value in given.items():
        if key not in _BUILT and not (key in _NEUTRAL and value == _NEUTRAL[key]):
            raise ValueError(
                f"'{source.path}': llama.{one_line(key, 80)} = {short(value)} is not built"
            )
    if "rope_freqs.weight" in source.tensors:
        raise ValueError(
            f"'{source.path}' scales its rotary frequencies (rope_freqs.weight), which is not built"
        )
    heads = source.need("llama.attention.head_count")
    hidden = source.need("llama.embedding_length")
    config = LlamaConfig.from_dict(
        {
            "model_type": "llama",
            "vocab_size": given.get("vocab_size") or _embedding_rows(source),
            "hidden_size": hidden,
            "intermediate_size": source.need("llama.feed_forward_length"),
            "num_hidden_layers": source.need("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": given.get("attention.head_count_kv"),
            "head_dim": given.get("attention.key_length"),
            "max_position_embeddings": source.need("llama.context_length"),
            "rms_norm_eps": source.need("llama.attention.layer_norm_rms_epsilon"),
            "rope_theta": given.get("rope.freq_base"),
            "tie_word_embeddings": "output.weight" not in source.tensors,
            "attention_bias": "blk.0.attn_q.bias" in source.tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in source.tensors,
            "bos_token_id": source.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": source.metadata.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": source.metadata.get("tokenizer.ggml.padding_token_id"),
        }
    )
    for key in ("rope.dimension_count", "attention.value_length"):
        if given.get(key, config.head_dim) != config.head_dim:
            raise ValueError(
                f"'{source.path}': llama.{key} must be the head's width {config.head_dim}, found "
                f"{short(given[key])}; anything else is not built"
            )
    return config


def _embedding_rows(source: GGUF) -> int:
    if "token_embd.weight" not in source.tensors:
        raise ValueError(f"'{source.path}' must hold token_embd.weight, found no such tensor")
    return source.tensors["token_embd.weight"].shape[0]


def read_model(
    source: GGUF,
    *,
    dtype: torch.dtype | str | None,
    device: torch.device | str,
    transform: Transform | None,
    prepare: Prepare | None = None,
) -> Llama:
    """Make the model of an open file; `Llama.from_gguf` says what holds."""
    config = model_config(source)
    wanted = resolve_dtype(dtype) or torch.float32
    check_blocks(config, len(source.tensors), source.path)
    names = {_fqn(name): name for name in source.tensors}
    model = Llama(config, device="meta")
    shapes = {fqn: source.tensors[name].shape for fqn, name in names.items()}
    check_names_and_shapes(model, shapes, source.path)

    def stored() -> Iterator[tuple[str, torch.Tensor]]:
        for fqn, name in names.items():
            tensor = read_tensor(source, name)
            if ".q_proj." in fqn:
                tensor = _half_rotation_order(tensor, config.num_attention_heads)
            elif ".k_proj." in fqn:
                tensor = _half_rotation_order(tensor, config.num_key_value_heads)
            yield fqn, tensor

    fill(model, stored(), wanted, device, transform, prepare)
    model.name_or_path = str(source.path)
    return model.eval()


def _fqn(name: str) -> str:
    """Hugging Face's dotted name; a name that is none of the architecture's stays as it is."""
    stem, _, leaf = name.rpartition(".")
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.{leaf}"
    block, _, part = stem.removeprefix("blk.").partition(".")
    if stem.startswith("blk.") and block.isascii() and block.isdigit() and part in _PARTS:
        return f"model.layers.{int(block)}.{_PARTS[part]}.{leaf}"
    return name


def _half_rotation_order(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's conversion, which puts rows i and i + head_dim/2 of a head side by side."""
    pairs = rows.view(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
