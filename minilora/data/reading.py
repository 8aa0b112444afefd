"""From files or records to examples: at once, around the loading of a model, or as a stream."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minilora.data.encoder import Encoding
from minilora.data.examples import Example
from minilora.data.problems import listed
from minilora.data.record_files import StreamedFiles, read_rows
from minilora.data.records import EncodeReport, encode_rows
from minilora.data.streaming import Stream
from minilora.data.token_cache import cached
from minilora.text import as_tokenizer


def read_data(
    source: str | Path | Iterable[str | Path] | Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int = 512,
    completion_only: bool = True,
    chat_prompts: bool = False,
    parse_special: bool | None = None,
    skip_bad: int = 0,
) -> tuple[list[Example], EncodeReport]:
    """Read training data and encode it into examples whose labels say what is learned.

        examples, report = minilora.read_data("train.jsonl", tokenizer, max_length=256)

    A record is {"text"}, {"document"}, {"prompt", "completion"}, {"messages": [{"role", "content"},
    …]} with the roles system, user and assistant, or {"input_ids"} and what
    `minilora.data.as_examples` takes beside. A text is learned whole, and so is a document, which
    is cut into windows of max_length that share one token; of a prompt and completion the
    completion is learned. All of these end with the end-of-text token. Of messages the assistant
    turns are learned, each with the marker that ends it; what follows the last of them is left
    out, and so is a turn with `weight`, `train`, `trainable`, `training`, `loss` or `loss_mask` of
    0 or false. Fields that the chat template reads (`tools`, `documents`, `enable_thinking`, …, or
    inside `chat_template_kwargs`) go to it; the report names those that nothing reads. Where a
    template rewrites earlier turns, a conversation gives an example for each answer.

    Args:
        source: records, or a file or several: `.jsonl` with a record a line, or `.txt`, which is
            one document. Both are UTF-8.
        tokenizer: a `minilora.models.Tokenizer`, or one of transformers'.
        max_length: tokens kept of a record, at least 2; the rest is cut off and counted.
        completion_only: False learns prompts, system and user turns too.
        chat_prompts: put prompt and completion through the chat template as two turns.
        parse_special: read names of control tokens in texts, prompts and completions as those
            tokens; None does where the text begins as the chat template's texts do. In messages
            they stay text, as in generation.
        skip_bad: bad records to leave out at most; the report names them.

    Returns:
        The examples, without those in which nothing is left to learn, and the counts, which print
        as one line.

    Raises:
        ValueError: bad records (all of them at once, by place), a tokenizer without an end-of-text
            token, an answer that does not go on from the prompt that the chat template writes.
        FileNotFoundError: a file is missing.
        TypeError: another tokenizer.
    """
    options = Encoding(max_length, completion_only, chat_prompts, parse_special, skip_bad)
    rows: list[Any] = [source] if isinstance(source, (str, Path)) else list(source)
    if rows and all(isinstance(each, (str, Path)) for each in rows):
        return DataFiles(rows, options).encode(tokenizer)
    return encode_rows([(f"record {i}", row) for i, row in enumerate(rows)], tokenizer, options)


class DataFiles:
    """Data files, read before the model and encoded after it.

    Args:
        files: `.jsonl` and `.txt` files.
        options: how to encode them; `skip_bad` counts reading and encoding together.
    """

    def __init__(self, files: Sequence[str | Path], options: Encoding) -> None:
        self.files = [str(file) for file in files]
        self._rows, bad = read_rows(files, options.skip_bad)
        self._notes = (f"left out: {listed(bad)}",) if bad else ()
        self._options = dataclasses.replace(options, skip_bad=options.skip_bad - len(bad))

    def encode(
        self, tokenizer: Any, cache: str | Path | None = None
    ) -> tuple[list[Example], EncodeReport]:
        """Encode, or take from the cache in a folder; return the examples and the report."""
        tokenizer = as_tokenizer(tokenizer)
        make = functools.partial(encode_rows, self._rows, tokenizer, self._options)
        if cache is None:
            examples, report = make()
        else:
            examples, report = cached(cache, self.files, tokenizer, self._options, make)
        return examples, dataclasses.replace(report, notes=(*self._notes, *report.notes))


def streamed(
    files: Sequence[str], tokenizer: Any, options: Encoding, packed: bool = False
) -> Stream:
    """Return the files' records as a stream that is encoded, and packed, in the background.

    What there is to say of the records is a warning, once each.
    """
    tokenizer = as_tokenizer(tokenizer)
    strict = dataclasses.replace(options, skip_bad=0)
    said: set[str] = set()

    def encode(record: dict[str, Any]) -> list[Example]:
        examples, report = encode_rows([("a record", record)], tokenizer, strict)
        for note in (each.removesuffix(" (a record)") for each in report.notes):
            if note not in said:
                said.add(note)
                warnings.warn(f"in a record of the stream: {note}", stacklevel=2)
        return examples

    source = StreamedFiles(files, options.skip_bad)
    return Stream(source, encode, pack=options.max_length if packed else None)
