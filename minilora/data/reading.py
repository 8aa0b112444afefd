"""From files or records to examples: at once, around the loading of a model, or as a stream."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minilora.data.encoder import Encoding
from minilora.data.examples import Example
from minilora.data.problems import BadRowsError, Problem, joined, listed, refuse
from minilora.data.readers import Row
from minilora.data.record_files import check_streamed, checked, files_in, read_rows, unread_in
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
    fields: Mapping[str, str] | None = None,
    system: str | None = None,
    last_turn: bool = False,
) -> tuple[list[Example], EncodeReport]:
    """Read training data and encode it into examples whose labels say what is learned.

        examples, report = minilora.read_data("train.jsonl", tokenizer, max_length=256)

    A record is {"text"}, {"document"}, {"prompt", "completion"}, {"question", "answer"},
    {"messages": [{"role", "content"}, …]}, or {"input_ids"} and what `minilora.data.as_examples`
    takes beside. Other usual shapes are read as one of these, and the report says so: Alpaca's
    {"instruction", "input", "output"}, Dolly's {"instruction", "context", "response"}, {"prompt",
    "response"}, ShareGPT's {"conversations": [{"from", "value"}, …]}, and TRL's prompt and
    completion in messages. Records that say which answer is better ({"prompt", "chosen",
    "rejected"} and others: docs/preference.md) become `minilora.data.Pair`s, for
    `TrainConfig(loss="dpo")`.

    A text is learned whole, and so is a document, which is cut into windows of max_length that
    share one token; of a prompt and completion the completion is learned. All of these end with the
    end-of-text token. A question and its answer are two turns of a conversation; where the
    tokenizer has no chat template they are a prompt and a completion in Alpaca's form.

    Of messages the assistant turns are learned, each with the marker that ends it; what follows the
    last of them is left out, and so is a turn with `weight`, `train`, `trainable`, `training`,
    `loss` or `loss_mask` of 0 or false. Fields that the chat template reads (`tools`, `documents`,
    `enable_thinking`, …, or inside `chat_template_kwargs`) go to it; the report names those that
    nothing reads. Where a template rewrites earlier turns, a conversation gives an example for each
    answer.

    Args:
        source: records, or a file, a folder of files, or several: `.jsonl` with a record a line,
            `.json` with an array of records, `.csv` or `.tsv` whose first line names the fields,
            `.parquet`, `.arrow` (as Hugging Face datasets save it), or `.txt`, which is one
            document. Texts are UTF-8; each may be compressed (`.gz`). `"owner/name"`, or a folder
            in it, is a data set of the Hugging Face hub, of which the training files are read;
            `"@docstrings"` (or `"@docstrings/valid"`, `"@docstrings/test"`) are functions of this
            Python's standard library and what they do.
        tokenizer: a `minilora.text.Tokenizer`, or one of transformers'.
        max_length: tokens kept of a record, at least 2; the rest is cut off and counted.
        completion_only: False learns prompts, system and user turns too.
        chat_prompts: put prompt and completion through the chat template as two turns.
        parse_special: read names of control tokens in texts, prompts and completions as those
            tokens; None does where the text begins as the chat template's texts do. In messages
            they stay text, as in generation.
        skip_bad: bad records to leave out at most; the report names them.
        fields: which of the records' fields are which: {"prompt": "q", "completion": "a"} reads
            the field q as the prompt and a as the completion.
        system: the system message of conversations that have none.
        last_turn: learn only the last assistant turn of a conversation.

    Returns:
        The examples, without those in which nothing is left to learn, and the counts, which print
        as one line.

    Raises:
        ValueError: bad records (all of them at once, by place), a tokenizer without an end-of-text
            token, an answer that does not go on from the prompt that the chat template writes.
        FileNotFoundError: a file is missing.
        TypeError: another tokenizer.
    """
    options = Encoding(
        max_length, completion_only, chat_prompts, parse_special, skip_bad, fields, system,
        last_turn,
    )  # fmt: skip
    rows: list[Any] = [source] if isinstance(source, (str, Path)) else list(source)
    if rows and all(isinstance(each, (str, Path)) for each in rows):
        return DataFiles(rows, options).encode(tokenizer)
    return encode_rows([(f"record {i}", row) for i, row in enumerate(rows)], tokenizer, options)


class DataFiles:
    """Data files, read before the model and encoded after it.

    Args:
        files: files of data, and folders with them.
        options: how to encode them; `skip_bad` counts reading and encoding together.
    """

    def __init__(self, files: Sequence[str | Path], options: Encoding) -> None:
        found = files_in(files)
        self.files = [str(file) for file in found]
        self._rows, bad, notes = read_rows(found, options)
        if unread := unread_in(files, found):
            notes.append(f"not read: {joined(unread)}")
        if bad:
            notes.append(f"left out: {listed(bad)}")
        self._notes = tuple(notes)
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

    What there is to say of the records is a warning, once each. `report` of the stream's source
    counts what became of those that were encoded so far.
    """
    source = _Streamed(files, tokenizer, options)
    return Stream(source, source.encode, pack=options.max_length if packed else None)


class _Streamed:
    """Numbered records of files, read one by one from the first on by each iteration.

    A warning names each bad row; the one beyond `skip_bad` raises ValueError when it is reached.
    """

    def __init__(self, files: Sequence[str], tokenizer: Any, options: Encoding) -> None:
        check_streamed(files)
        self._files, self._options = files_in(files), options
        if unread := unread_in(files, self._files):
            warnings.warn(f"not read: {joined(unread)}", stacklevel=3)
        self._tokenizer = as_tokenizer(tokenizer)
        self._strict = dataclasses.replace(options, skip_bad=0)
        self._bad: dict[str, str] = {}  # what is wrong, by the place
        self._said: set[str] = set()
        self._counted = 0
        self.report = EncodeReport(0, 0, 0, 0, 0, 0)

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        return enumerate(self._records())

    def _records(self) -> Iterator[Row]:
        for file in self._files:
            for where, row in self._rows(file):
                if isinstance(row, ValueError):
                    self._leave_out([(where, str(row))])
                elif isinstance(row, UserWarning):
                    warnings.warn(f"{where}: {row}", stacklevel=2)
                else:
                    yield where, row

    def _rows(self, file: Path) -> Iterator[Row]:
        try:
            yield from checked(file, self._options)
        except ValueError as error:
            refuse([(str(file), str(error))], "cannot read the data")

    def _leave_out(self, problems: Sequence[Problem]) -> None:
        """Count bad rows, each once however often it is read, or raise ValueError at one too many.

        Rows that only encoding finds bad are counted with those that can't be read.
        """
        new = {where: reason for where, reason in problems if where not in self._bad}
        refuse([*self._bad.items(), *new.items()], "cannot read the data", self._options.skip_bad)
        self._bad |= new
        if new:
            left_out = listed(list(new.items()))
            warnings.warn(f"a bad row was left out: {left_out}", stacklevel=2)

    def encode(self, item: tuple[int, Row]) -> list[Example]:
        number, (where, record) = item
        try:
            examples, report = encode_rows([(where, record)], self._tokenizer, self._strict)
        except BadRowsError as error:
            self._leave_out(error.problems)
            return []
        self._say(report, where)
        if number >= self._counted:  # not again in a later epoch
            self._counted = number + 1
            self.report += dataclasses.replace(report, notes=())
        return examples

    def _say(self, report: EncodeReport, where: str) -> None:
        most = self._options.max_length
        dropped = f"a row with nothing left to learn within {most} tokens is dropped ({where})"
        cut = f"a row is cut at {most} tokens ({where})"
        counted = [dropped] * report.fully_masked + [cut] * report.truncated
        for note in (*report.notes, *counted):
            alike = note.removesuffix(f" ({where})")
            if alike not in self._said:
                self._said.add(alike)
                warnings.warn(f"in the stream: {note}", stacklevel=2)
