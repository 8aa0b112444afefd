"""Data files, read before the model and encoded after it: rows, documents, or a stream."""

import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minilora.data.batches import Example
from minilora.data.record_files import iter_records, listed, read_rows
from minilora.data.records import encode_records
from minilora.data.streaming import Stream
from minilora.data.token_cache import cached
from minilora.text import as_tokenizer


class DataFiles:
    """Data files, read before the model and encoded after it.

    Args:
        files: `.jsonl` and `.txt` files.
        max_length, all_tokens, parse_special: as for `encode_records`.
        skip_bad: bad rows to leave out at most, while reading and while encoding together.
    """

    def __init__(
        self,
        files: Sequence[str],
        max_length: int,
        all_tokens: bool,
        skip_bad: int = 0,
        parse_special: bool | None = None,
    ):
        self.files, self.max_length, self.all_tokens = files, max_length, all_tokens
        self.parse_special = parse_special
        rows = [file for file in files if not file.endswith(".txt")]
        self.texts = [file for file in files if file.endswith(".txt")]
        self.rows, bad = read_rows(rows, skip_bad) if rows else ([], [])
        self.skip_bad = skip_bad - len(bad)
        self.left_out = [f"left out: {listed(bad)}"] if bad else []
        self.documents = read_rows(self.texts, 0)[0] if self.texts else []

    def examples(
        self, tokenizer: Any, cache: Path | None = None
    ) -> tuple[list[Example], list[str]]:
        """Encode, or take from the cache; return the examples and a report."""
        tokenizer = as_tokenizer(tokenizer)
        if cache is None:
            examples, report = self._encode(tokenizer)
        else:
            keys = ("max_length", "all_tokens", "skip_bad", "parse_special")
            decides = {key: getattr(self, key) for key in keys}
            examples, report, known = cached(
                cache, self.files, tokenizer, decides, lambda: self._encode(tokenizer)
            )
            report = [f"{line} (from the cache)" if known else line for line in report]
        if not examples:
            raise ValueError(
                f"{', '.join(self.files)} must hold something to learn, found none within the "
                f"first {self.max_length} tokens of any record; raise --max-length, or pass "
                f"--all-tokens to learn prompts too"
            )
        return examples, self.left_out + report

    def _encode(self, tokenizer: Any) -> tuple[list[Example], list[str]]:
        """Encode: rows are cut at --max-length, documents into windows of it."""
        examples: list[Example] = []
        lines: list[str] = []
        if self.rows:
            examples, report = encode_records(
                self.rows,
                tokenizer,
                max_length=self.max_length,
                completion_only=not self.all_tokens,
                parse_special=self.parse_special,
                skip_bad=self.skip_bad,
            )
            rows = [file for file in self.files if file not in self.texts]
            lines.append(f"{', '.join(rows)}: {report}")
        for file, document in zip(self.texts, self.documents, strict=True):
            (whole,), report = encode_records(
                [document], tokenizer, max_length=sys.maxsize, parse_special=self.parse_special
            )
            cut = _windows(whole, self.max_length)
            lines.append(
                f"{file}: {len(whole.input_ids)} tokens in {len(cut)} windows of up to "
                f"{self.max_length}" + "".join(f"; note: {note}" for note in report.notes)
            )
            examples += cut
        return examples, lines


class _Records:
    """The records of files, read anew by every iteration."""

    def __init__(self, files: Sequence[str], skip_bad: int):
        self.files, self.skip_bad = files, skip_bad

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter_records(self.files, skip_bad=self.skip_bad)


def check_streamed(files: Sequence[str]) -> None:
    """Raise ValueError unless all files are there and can be streamed."""
    for file in files:
        if not file.endswith(".jsonl"):
            raise ValueError(f"{file}: only .jsonl files can be streamed; leave --stream away")
        if not Path(file).is_file():
            raise ValueError(f"{file}: must be a file, found none there")


def streamed(
    files: Sequence[str],
    tokenizer: Any,
    max_length: int,
    all_tokens: bool,
    packed: bool = False,
    skip_bad: int = 0,
    parse_special: bool | None = None,
) -> Stream:
    """Return the files' records as a stream that is encoded, and packed, in the background.

    What there is to say of the records is a warning, once each.
    """
    tokenizer = as_tokenizer(tokenizer)
    said: set[str] = set()

    def encode(record: dict[str, Any]) -> list[Example]:
        found, report = encode_records(
            [record],
            tokenizer,
            max_length=max_length,
            completion_only=not all_tokens,
            parse_special=parse_special,
        )
        for each in report.notes:
            note = each.replace(" (record 0)", "")
            if note not in said:
                said.add(note)
                warnings.warn(f"in a record of the stream: {note}", stacklevel=2)
        return found

    return Stream(_Records(files, skip_bad), encode, pack=max_length if packed else None)


def _windows(whole: Example, length: int) -> list[Example]:
    """Cut into windows that share one token, so that every token but the first is learned once."""
    ids, labels = whole.input_ids, whole.labels
    return [
        Example(ids[i : i + length], labels[i : i + length])
        for i in range(0, len(ids) - 1, length - 1)
    ]
