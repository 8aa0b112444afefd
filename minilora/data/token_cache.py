"""Keep encoded examples beside the next run: same files, tokenizer and options, same tokens."""

import contextlib
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from minilora.data.docstrings import built_in
from minilora.data.encoder import Encoding
from minilora.data.examples import Example, Pair
from minilora.data.records import EncodeReport
from minilora.files import CHECKSUMS, UnwritableError, read_tensors, tensor_content, write

_VERSION = 7


def cached(
    folder: str | Path,
    files: Sequence[str | Path],
    tokenizer: Any,
    options: Encoding,
    make: Callable[[], tuple[list[Example], EncodeReport]],
) -> tuple[list[Example], EncodeReport]:
    """Return what `make` makes of files, from the cache where it has been made before.

    The key is the files' contents and how their names end, the tokenizer's files and the options. A
    damaged entry is made again; a cache that can't be written is done without.
    """
    key = {
        "version": _VERSION,
        "files": [_file_hash(Path(file)) for file in files],
        "suffixes": [Path(file).suffixes[-2:] for file in files],  # .jsonl.gz is not .txt.gz
        "tokenizer": [_tokenizer_hash(tokenizer), sorted(tokenizer.stop_ids)],
        "options": dataclasses.asdict(options),
    }
    text = json.dumps(key, sort_keys=True)
    entry = Path(folder) / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    if (found := _read(entry)) is not None:
        examples, report = found
        return examples, dataclasses.replace(report, notes=(*report.notes, "from the cache"))
    examples, report = make()
    _write(entry, examples, report)
    return examples, report


def _file_hash(file: Path) -> str:
    if str(file).startswith("@"):
        return hashlib.sha256(repr(list(built_in(str(file)))).encode()).hexdigest()
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _tokenizer_hash(tokenizer: Any) -> str:
    found = hashlib.sha256()
    with tempfile.TemporaryDirectory() as name:
        tokenizer.save(Path(name))
        for file in sorted(Path(name).iterdir()):
            found.update(f"{file.name}:{_file_hash(file)};".encode())
    return found.hexdigest()


def _write(entry: Path, examples: list[Example], report: EncodeReport) -> None:
    tensors = {
        "ids": torch.tensor([i for example in examples for i in example.input_ids]),
        "labels": torch.tensor([i for example in examples for i in example.labels]),
        "lengths": torch.tensor([len(example.input_ids) for example in examples]),
        "sources": torch.tensor([-1 if e.source is None else e.source for e in examples]),
    }
    pairs = [example for example in examples if isinstance(example, Pair)]
    if pairs and len(pairs) < len(examples):
        return  # no run takes them together
    if pairs:
        tensors["parts"] = torch.tensor([pair.lengths for pair in pairs])
        labels = [-1 if pair.wanted is None else int(pair.wanted) for pair in pairs]
        tensors["wanted"] = torch.tensor(labels)
    # A full disk must not keep anyone from training.
    with contextlib.suppress(OSError, UnwritableError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        write(entry, tensor_content(tensors, {"report": json.dumps(dataclasses.asdict(report))}))


def _read(entry: Path) -> tuple[list[Example], EncodeReport] | None:
    """Return an entry, or None where there is none that is whole."""
    try:
        tensors, metadata = read_tensors(entry)
        if CHECKSUMS not in metadata:
            return None
        stored = json.loads(metadata["report"])
        texts = {name: tuple(stored[name]) for name in ("notes", "shapes")}
        report = EncodeReport(**{**stored, **texts})
        sizes = tensors["lengths"].tolist()
        ids, labels = (tensors[key].split(sizes) for key in ("ids", "labels"))
        sources = [None if source < 0 else source for source in tensors["sources"].tolist()]
    except (KeyError, TypeError, ValueError, RuntimeError):
        return None
    examples = [
        Example(tuple(a.tolist()), tuple(b.tolist()), source=source)
        for a, b, source in zip(ids, labels, sources, strict=True)
    ]
    if "parts" in tensors:
        known = zip(tensors["parts"].tolist(), tensors["wanted"].tolist(), strict=True)
        examples = [
            Pair(one.input_ids, one.labels, tuple(parts), None if wanted < 0 else wanted > 0)
            for one, (parts, wanted) in zip(examples, known, strict=True)
        ]
    return examples, report
