"""Hugging Face model folders; `saving` writes them.

The format: `config.json`, and `model.safetensors` or `model.safetensors.index.json` with the shards
it names (https://huggingface.co/docs/safetensors).
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minilora.files import Checksums, leads_out, read_json, tensor_file
from minilora.loading.source import HEAD, Source, family_of, some

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
_MAPPED = 2**24  # bytes of a file read through one mapping
FLOAT_NAMES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


class Place(NamedTuple):
    """Where a tensor is stored, and what the file's header says of it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


Places = dict[str, Place]  # by a tensor's name in the model


def open_folder(folder: Path, dtype: torch.dtype | None) -> Source:
    """Read a folder's configuration and headers; without a `dtype` all are stored in the same."""
    entries = read_json(folder / CONFIG)
    family = family_of(entries, folder / CONFIG)
    config: Any = family.config_class.from_dict(entries)
    places = folder_tensors(folder, family.stored_fqn)
    for fqn, place in places.items():
        if place.dtype not in FLOAT_NAMES:
            raise ValueError(not_floating(fqn, place))
    stored = sorted({place.dtype for place in places.values()})
    if dtype is None and len(stored) > 1:
        raise ValueError(
            f"dtype=None needs weights stored in one dtype, found {', '.join(stored)} in "
            f"'{folder}'; name a dtype, such as dtype=torch.float32"
        )
    embedding = f"{family.embedding_name}.weight" if config.tie_word_embeddings else None
    tensors = _with_tied_head(folder, places, embedding)
    shapes = {fqn: place.shape for fqn, place in places.items()}
    return Source(folder, family, config, shapes, tensors, FLOAT_NAMES[next(iter(stored), "F32")])


def not_floating(fqn: str, place: Place) -> str:
    """Say that a tensor is of a type that is not read."""
    return (
        f"{fqn} in '{place.file}' must be stored in a floating-point type of 16 bits or more, "
        f"found {place.dtype}; use an unquantized copy of the model"
    )


def folder_tensors(folder: Path, fqn_of: Callable[[str], str | None]) -> Places:
    """Return where a folder's tensors are stored; its index must agree with the files."""
    places = find_tensors(_weight_files(folder), fqn_of)
    if not (folder / WEIGHTS).is_file():
        _check_index(folder, places, fqn_of)
    return places


def find_tensors(files: Iterable[Path], fqn_of: Callable[[str], str | None]) -> Places:
    """Return where tensors are stored, by their names in the model."""
    found: Places = {}
    for file in files:
        with tensor_file(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                fqn = fqn_of(name)
                if fqn in found:
                    before = found[fqn]
                    raise ValueError(
                        f"{fqn} must be stored once, found {before.name} in '{before.file}' and "
                        f"{name} in '{file}'; fetch the folder again"
                    )
                if fqn is not None:
                    header = opened.get_slice(name)
                    shape, dtype = tuple(header.get_shape()), header.get_dtype()
                    found[fqn] = Place(file, name, shape, dtype)
    return found


def stored_tensors(places: Places) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors one by one. Files are mapped anew now and then: read pages don't pile up."""
    for file in dict.fromkeys(place.file for place in places.values()):
        left = [(fqn, place.name) for fqn, place in places.items() if place.file == file][::-1]
        while left:
            with tensor_file(file) as opened:
                sums, read = Checksums(file, opened.metadata() or {}), 0
                while left and read < _MAPPED:
                    fqn, name = left.pop()
                    tensor = opened.get_tensor(name)
                    sums.check(name, tensor)
                    read += tensor.nbytes
                    yield fqn, tensor


def _with_tied_head(
    folder: Path, places: Places, embedding: str | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors; first see that a head stored beside a tied embedding equals it."""
    if embedding is not None and HEAD in places:
        pair = dict(stored_tensors({name: places[name] for name in (HEAD, embedding)}))
        if not torch.equal(pair[HEAD], pair[embedding]):
            raise ValueError(
                f"tie_word_embeddings is true in '{folder / CONFIG}', found an lm_head.weight that "
                f"differs from {embedding}; set it to false to keep both"
            )
    yield from stored_tensors(places)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        others = sorted(
            file.name for form in ("*.bin", "*.safetensors") for file in folder.glob(form)
        )
        raise ValueError(
            f"a model folder must hold {WEIGHTS} or {INDEX}, found {others or 'neither'} in "
            f"'{folder}'; only safetensors are read"
        )
    return [_inside(folder, name) for name in sorted(set(weight_map(folder).values()))]


def weight_map(folder: Path) -> dict[str, str]:
    """Read the file that an index names for each tensor."""
    entries = read_json(folder / INDEX).get("weight_map")
    if not isinstance(entries, dict) or not all(isinstance(v, str) for v in entries.values()):
        raise ValueError(f"'{folder / INDEX}' must map tensor names to files under 'weight_map'")
    return entries


def _inside(folder: Path, name: str) -> Path:
    """Return a shard's path; refuse one that leads out of the folder."""
    pure, file = PurePosixPath(name), folder / name
    absolute = pure.is_absolute() or Path(name).is_absolute()
    if absolute or ".." in pure.parts or leads_out(folder, file):
        raise ValueError(
            f"'{folder / INDEX}' must name files inside its folder, found {name!r}, which leads "
            f"out of it; do not use this folder"
        )
    if not file.is_file():
        raise ValueError(f"'{folder / INDEX}' names {name!r}, found no such file in the folder")
    return file


def _check_index(folder: Path, places: Places, fqn_of: Callable[[str], str | None]) -> None:
    """Raise unless an index says of every tensor the file that holds it."""
    entries = weight_map(folder).items()
    mapped = {name: folder / file for name, file in entries if fqn_of(name) is not None}
    held = {place.name: place.file for place in places.values()}
    wrong = sorted(name for name in mapped.keys() | held if mapped.get(name) != held.get(name))
    if wrong:
        raise ValueError(
            f"'{folder / INDEX}' must agree with the files it names, found it wrong about "
            f"{some(wrong)}; fetch the folder again"
        )
