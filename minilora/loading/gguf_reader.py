"""GGUF files: metadata and tensors, in one file or in several shards.

Read here and not through the `gguf` package, which takes seconds for a vocabulary.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the shards' names and keys:
llama.cpp's tools/gguf-split.
"""

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minilora.files import one_line, short
from minilora.loading.gguf_types import OTHER_TYPES, TYPES, StoredType

_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # struct letters
_STRING, _ARRAY = 8, 9
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf", re.ASCII)
_PIECE = 2**17  # weights decoded at a time


class StoredTensor(NamedTuple):
    """Where a tensor's blocks lie; `shape` is PyTorch's order."""

    file: Path
    type: StoredType
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class GGUF:
    """A file's metadata (plain Python values), and its tensors by GGUF name; all its shards'."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


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
    """Read the header of a little-endian GGUF file of version 2 or 3, and of its other shards.

    The path may be of any of the shards (`….-00001-of-00003.gguf`), which lie in one folder.
    """
    opened = _read_one(path)
    count = opened.metadata.get("split.count", 1)
    if count in (0, 1):
        return opened
    names = shard_names(path.name)
    if len(names) != count or path.name not in names:
        raise ValueError(
            f"'{path}' is one of {short(count)} shards (split.count), found a name that does not "
            f"say so; call the shards NAME-00001-of-{short(count):0>5}.gguf and so on"
        )
    files = [path.with_name(name) for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"'{path}' is one of {count} shards, which must lie in one folder, found no "
            f"{', '.join(missing[:5])}{more}; fetch what is missing"
        )
    return _joined(path, [_read_one(file) for file in files])


def shard_names(name: str) -> list[str]:
    """Return the names of all shards of a file that is called like one, or its own alone."""
    found = _SHARD.fullmatch(name)
    if found is None:
        return [name]
    return [f"{found[1]}-{i + 1:05}-of-{found[2]}.gguf" for i in range(int(found[2]))]


def _joined(path: Path, shards: list[GGUF]) -> GGUF:
    """Return the tensors of all shards under the metadata of the first."""
    tensors: dict[str, StoredTensor] = {}
    for i, shard in enumerate(shards):
        for key, wanted in (("split.no", i), ("split.count", len(shards))):
            found = shard.metadata.get(key)
            if found != wanted:
                raise ValueError(
                    f"'{shard.path}' must state {key} = {wanted}, as its name says, found "
                    f"{short(found)}; fetch the shards of one model into one folder"
                )
        twice = sorted(tensors.keys() & shard.tensors.keys())
        if twice:
            raise ValueError(
                f"the shards of '{path}' must hold each tensor once, found "
                f"{one_line(twice[0], 80)} a second time in '{shard.path.name}'; fetch them again"
            )
        tensors |= shard.tensors
    metadata = shards[0].metadata
    total = metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise ValueError(
            f"the shards of '{path}' must hold {short(total)} tensors (split.tensors.count), found "
            f"{len(tensors)}; fetch them again"
        )
    return GGUF(path, metadata, tensors)


def _read_one(path: Path) -> GGUF:
    with path.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(f"'{path}' must be a GGUF file, found one that does not start so")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            try:
                return GGUF(path, *_header(path, _Cursor(buffer)))
            except (ValueError, OverflowError, MemoryError, struct.error) as error:
                raise ValueError(
                    f"'{path}' must be a whole GGUF file of supported types, found otherwise: "
                    f"{error}"
                ) from error


def _header(path: Path, cursor: _Cursor) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
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
    stored = {}
    at = -(-cursor.at // alignment) * alignment
    first = at
    for name, (shape, type_id, offset) in listed.items():
        said = one_line(name, 80)
        tensor = _stored(path, said, shape, type_id, first + offset)
        if tensor.start + tensor.size > len(cursor.buffer):
            raise ValueError(f"it ends in the middle of tensor {said}")
        if tensor.start != at:
            raise ValueError(
                f"tensor {said} begins at byte {offset} of the data, found the one before it to "
                f"end at {at - first}: they overlap or leave a gap"
            )
        stored[name] = tensor
        at += -(-tensor.size // alignment) * alignment
    if len(cursor.buffer) > at:
        raise ValueError(
            f"it goes on for {len(cursor.buffer) - at} bytes after the last of its {tensor_count} "
            f"tensors"
        )
    return metadata, stored


def _stored(
    path: Path, name: str, shape: tuple[int, ...], type_id: int, start: int
) -> StoredTensor:
    if type_id not in TYPES:
        raise ValueError(
            f"tensor {name} has type {OTHER_TYPES.get(type_id, type_id)}, which is not built; the "
            f"types read are {', '.join(known.name for known in TYPES.values())}; fetch another "
            f"file of the model, such as its Q4_K_M"
        )
    found = TYPES[type_id]
    if not shape or 0 in shape or shape[-1] % found.weights:
        raise ValueError(f"tensor {name} has shape {list(shape)}, which {found.name} cannot store")
    size = math.prod(shape) // found.weights * found.size
    return StoredTensor(path, found, shape, start, size)


def read_tensor(file: GGUF, name: str) -> Tensor:
    """Decode one tensor to f32, piece by piece: beside the result, a few MB are in use."""
    stored = file.tensors[name]
    kind = stored.type
    weights = torch.empty(stored.size // kind.size, kind.weights, dtype=torch.float32)
    with stored.file.open("rb") as opened:
        opened.seek(stored.start)
        for part in weights.split(_PIECE // kind.weights):
            blocks = torch.empty(len(part), kind.size, dtype=torch.uint8)
            if opened.readinto(blocks.numpy().data) != blocks.numel():
                raise ValueError(
                    f"'{stored.file}' must stay as it is while it is read, found it cut short in "
                    f"tensor {one_line(name, 80)}; fetch or write the file again"
                )
            kind.decode(blocks, part)
    return weights.view(stored.shape)
