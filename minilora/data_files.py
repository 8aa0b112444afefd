"""Data files, read before the model and encoded after it: rows, documents, or a stream."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minilora.data import Example
from minilora.records import encode_records, iter_records, read_records
from minilora.streaming import Stream
from minilora.token_cache import cached


class DataFiles:
    """Data files, read before the model and encoded after it."""

    def __init__(self, files: Sequence[str], max_length: int, all_tokens: bool):
        self.files, self.max_length, self.all_tokens = files, max_length, all_tokens
        rows = [file for file in files if not file.endswith(".txt")]
        self.texts = [file for file in files if file.endswith(".txt")]
        self.rows = read_records(rows) if rows else []
        self.documents = read_records(self.texts) if self.texts else []

    def examples(
        self, tokenizer: Any, cache: Path | None = None
    ) -> tuple[list[Example], list[str]]:
        """Encode, or take from the cache; return the examples and a report."""
        if cache is None:
            examples, report = self._encode(tokenizer)
        else:
            decides = {"max_length": self.max_length, "all_tokens": self.all_tokens}
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
        return examples, report

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
            )
            rows = [file for file in self.files if file not in self.texts]
            lines.append(f"{', '.join(rows)}: {report}")
        for file, document in zip(self.texts, self.documents, strict=True):
            (whole,), _ = encode_records([document], tokenizer, max_length=sys.maxsize)
            cut = _windows(whole, self.max_length)
            lines.append(
                f"{file}: {len(whole.input_ids)} tokens in {len(cut)} windows of up to "
                f"{self.max_length}"
            )
            examples += cut
        return examples, lines


class _Records:
    """The records of files, read anew by every iteration."""

    def __init__(self, files: Sequence[str]):
        self.files = files

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter_records(self.files)


def check_streamed(files: Sequence[str]) -> None:
    """Raise ValueError unless all files are there and can be streamed."""
    for file in files:
        if not file.endswith(".jsonl"):
            raise ValueError(f"{file}: only .jsonl files can be streamed; leave --stream away")
        if not Path(file).is_file():
            raise ValueError(f"{file}: must be a file, found none there")


def streamed(
    files: Sequence[str], tokenizer: Any, max_length: int, all_tokens: bool, packed: bool = False
) -> Stream:
    """Return the files' records as a stream that is encoded, and packed, in the background."""

    def encode(record: dict[str, Any]) -> Example | None:
        found, _ = encode_records(
            [record],
            tokenizer,
            max_length=max_length,
            completion_only=not all_tokens,
        )
        return found[0] if found else None

    return Stream(_Records(files), encode, pack=max_length if packed else None)


def _windows(whole: Example, length: int) -> list[Example]:
    """Cut into windows that share one token, so that every token but the first is learned once."""
    ids, labels = whole.input_ids, whole.labels
    return [
        Example(ids[i : i + length], labels[i : i + length])
        for i in range(0, len(ids) - 1, length - 1)
    ]
