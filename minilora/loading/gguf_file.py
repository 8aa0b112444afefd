"""GGUF files: metadata, tensors, and the model that they describe.

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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minilora.files import one_line, short
from minilora.loading.source import Source
from minilora.models import FAMILIES, CausalLM, GGUFNames, ModelConfig


class _Type(NamedTuple):
    """A tensor's type: weights and bytes of a block, and of its head of scales."""

    name: str
    weights: int
    size: int
    head: int = 0


_TYPES = {
    0: _Type("F32", 1, 4),
    1: _Type("F16", 1, 2),
    2: _Type("Q4_0", 32, 18, 2),
    3: _Type("Q4_1", 32, 20, 4),
    8: _Type("Q8_0", 32, 34, 2),
    30: _Type("BF16", 1, 2),
}
_OTHER_TYPES = {6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K"}
_OTHER_TYPES |= {14: "Q6_K", 15: "Q8_K", 20: "IQ4_NL", 23: "IQ4_XS", 28: "F64", 39: "MXFP4"}

_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # struct letters
_STRING, _ARRAY = 8, 9


class StoredTensor(NamedTuple):
    """Where a tensor's blocks lie in the file; `shape` is PyTorch's order."""

    type: _Type
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

    def values(self, letter: str, count: int = 1) -> tuple[Any, ...]:
        start = self.skip(count * struct.calcsize("<" + letter))
        return struct.unpack_from(f"<{count}{letter}", self.buffer, start)

    def scalar(self, letter: str) -> Any:
        return self.values(letter)[0]

    def string(self) -> str:
        size = self.scalar("Q")
        start = self.skip(size)
        return self.buffer[start : start + size].decode("utf-8")

    def value(self, type_id: int, nested: bool = False) -> Any:
        if type_id == _STRING:
            return self.string()
        if type_id == _ARRAY and not nested:
            inner, count = self.scalar("I"), self.scalar("Q")
            if inner in _SCALARS:
                return list(self.values(_SCALARS[inner], count))
            if count > len(self.buffer) - self.at:
                raise ValueError("it ends in the middle of its header")
            return [self.value(inner, nested=True) for _ in range(count)]
        if type_id not in _SCALARS:
            raise ValueError(f"a metadata value has the unknown type {type_id}")
        return self.scalar(_SCALARS[type_id])


def read_gguf(path: Path) -> GGUF:
    """Map a little-endian GGUF file of version 2 or 3 and read its header.

    Raises:
        ValueError: no GGUF, a damaged or truncated one, or a tensor type that is not built, by
            name.
    """
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
    listed: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensor_count):
        name, dims = cursor.string(), cursor.scalar("I")
        if name in listed or dims > 4:
            raise ValueError(
                f"tensor {one_line(name, 80)} is listed twice or has {dims} dimensions"
            )
        shape = cursor.values("Q", dims)[::-1]
        listed[name] = (shape, cursor.scalar("I"), cursor.scalar("Q"))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {short(alignment)}, which is no power of two")
    data = -(-cursor.at // alignment) * alignment
    stored = {
        name: _stored(one_line(name, 80), shape, type_id, data + offset)
        for name, (shape, type_id, offset) in listed.items()
    }
    for name, tensor in stored.items():
        if tensor.start + tensor.size > len(cursor.buffer):
            raise ValueError(f"it ends in the middle of tensor {one_line(name, 80)}")
    return metadata, stored


def _stored(name: str, shape: tuple[int, ...], type_id: int, start: int) -> StoredTensor:
    if type_id not in _TYPES:
        raise ValueError(
            f"tensor {name} has type {_OTHER_TYPES.get(type_id, type_id)}, which is not built; the "
            f"types read are {', '.join(known.name for known in _TYPES.values())}"
        )
    found = _TYPES[type_id]
    if not shape or 0 in shape or shape[-1] % found.weights:
        raise ValueError(f"tensor {name} has shape {list(shape)}, which {found.name} cannot store")
    return StoredTensor(found, shape, start, math.prod(shape) // found.weights * found.size)


def read_tensor(file: GGUF, name: str) -> Tensor:
    """Decode one tensor to f32, contiguous and in its own memory.

    Per block of 32 with nibbles or bytes q, scale d and offset m (f16):
    Q4_0 d·(q − 8), Q4_1 d·q + m, Q8_0 d·q, all computed in f32.
    """
    place = file.tensors[name]
    raw = np.frombuffer(file.buffer, np.uint8, place.size, place.start)
    kind, blocks = place.type.name, raw.reshape(-1, place.type.size)
    if kind == "BF16":
        values = torch.from_numpy(raw.view("<i2").astype(np.int16)).view(torch.bfloat16).float()
    elif place.type.weights == 1:
        values = _floats(raw, "<f4" if kind == "F32" else "<f2")
    elif kind == "Q8_0":
        values = torch.from_numpy(blocks[:, 2:].view(np.int8).astype(np.float32))
    else:
        packed = blocks[:, place.type.head :]
        codes = np.empty((len(blocks), 32), np.float32)
        codes[:, :16], codes[:, 16:] = packed & 15, packed >> 4
        values = torch.from_numpy(codes)
        if kind == "Q4_0":
            values.sub_(8)
    if place.type.head:
        values.mul_(_floats(blocks[:, :2], "<f2"))
    if place.type.head == 4:
        values.add_(_floats(blocks[:, 2:4], "<f2"))
    return values.view(place.shape)


def _floats(raw: np.ndarray, form: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(raw).view(form).astype(np.float32))


def open_gguf(file: GGUF) -> Source:
    """Return the model that a file holds.

    Raises:
        ValueError: an architecture or an option that is not built, by name.
    """
    family, names = _family(file)
    config = _config(file, family, names)
    stored = {_fqn(name, names, family.blocks_name): name for name in file.tensors}
    shapes = {fqn: file.tensors[name].shape for fqn, name in stored.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for fqn, name in stored.items():
            yield fqn, names.restored(fqn, read_tensor(file, name), config)

    return Source(
        file.path, family, config, shapes, tensors(), torch.float32, metadata=file.metadata
    )


def read_metadata(path: Path, metadata: dict[str, Any], tensors: list[str]) -> ModelConfig:
    """Return the configuration that a file with this metadata and these tensors would have."""
    vague: Any = dict.fromkeys(tensors)
    file = GGUF(path, metadata, vague, None)  # type: ignore[arg-type]
    return _config(file, *_family(file))


def _family(file: GGUF) -> tuple[type[CausalLM], GGUFNames]:
    built = {f.gguf.architecture: (f, f.gguf) for f in FAMILIES.values() if f.gguf is not None}
    found = _need(file, "general.architecture")
    if not isinstance(found, str) or found not in built:
        raise ValueError(
            f"'{file.path}' must hold an architecture that is built ({', '.join(sorted(built))}), "
            f"found {short(found)}"
        )
    return built[found]


def _need(file: GGUF, key: str) -> Any:
    if key not in file.metadata:
        raise ValueError(f"'{file.path}' must state {key}, found no such metadata")
    return file.metadata[key]


def _config(file: GGUF, family: type[CausalLM], names: GGUFNames) -> ModelConfig:
    """Read the configuration from the metadata; refuse by name what is not built."""
    prefix = f"{names.architecture}."
    given = {
        key.removeprefix(prefix): value
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    known = names.required | names.optional | names.equal
    for key, value in given.items():
        if key not in known and not (key in names.neutral and value == names.neutral[key]):
            raise ValueError(
                f"'{file.path}': {prefix}{one_line(key, 80)} = {short(value)} is not built"
            )
    if "rope_freqs.weight" in file.tensors:
        raise ValueError(
            f"'{file.path}' scales its rotary frequencies (rope_freqs.weight), which is not built"
        )
    entries = {field: _need(file, prefix + key) for key, field in names.required.items()}
    entries |= {field: given[key] for key, field in names.optional.items() if key in given}
    if not entries.get("vocab_size"):
        if "token_embd.weight" not in file.tensors:
            raise ValueError(f"'{file.path}' must hold token_embd.weight, found no such tensor")
        entries["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    entries |= {field: tensor in file.tensors for tensor, field in names.biases.items()}
    for field, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        entries[f"{field}_token_id"] = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    entries["tie_word_embeddings"] = "output.weight" not in file.tensors
    entries["model_type"] = family.config_class.model_type
    config = family.config_class.from_dict(names.completed(entries))
    for key, field in names.equal.items():
        wanted = getattr(config, field)
        if given.get(key, wanted) != wanted:
            raise ValueError(
                f"'{file.path}': {prefix}{key} must be {field}, {wanted}, found "
                f"{short(given[key])}; anything else is not built"
            )
    return config


def _fqn(name: str, names: GGUFNames, blocks: str) -> str:
    """Return the name in the model; one that is none of the architecture's stays as it is."""
    stem, _, leaf = name.rpartition(".")
    if stem in names.whole:
        return f"{names.whole[stem]}.{leaf}"
    block, _, part = stem.removeprefix("blk.").partition(".")
    if stem.startswith("blk.") and block.isascii() and block.isdigit() and part in names.parts:
        return f"{blocks}.{int(block)}.{names.parts[part]}.{leaf}"
    return name
