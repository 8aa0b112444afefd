"""Read training records from files; a new kind of file is a function and a line of `READERS`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from minilora.data.problems import Problem, listed, refuse
from minilora.data.shapes import shape_of
from minilora.files import unique_keys

_MARK = b"\xef\xbb\xbf"  # the byte order mark of UTF-8

Row = tuple[str, Any]  # where it stands, and a record, or the ValueError that says what is wrong


def read_rows(
    paths: Sequence[str | Path], skip_bad: int
) -> tuple[list[tuple[str, dict[str, Any]]], list[Problem]]:
    """Return the records of files with their places, and the rows that were left out.

    Raises:
        ValueError: more bad rows than `skip_bad`, by place and reason, or a file of another kind.
        FileNotFoundError: a file is missing.
    """
    rows: list[tuple[str, dict[str, Any]]] = []
    problems: list[Problem] = []
    unreadable: list[Problem] = []
    for file in map(Path, paths):
        try:
            for where, row in _rows(file):
                if isinstance(row, ValueError):
                    problems.append((where, str(row)))
                else:
                    rows.append((where, row))
        except ValueError as error:
            unreadable.append((str(file), str(error)))
    refuse(unreadable, "cannot read the data")
    refuse(problems, "cannot read the data", skip_bad)
    return rows, problems


class StreamedFiles:
    """The records of `.jsonl` files, read one by one, from the first file on by every iteration.

    A warning names each bad row; the one beyond `skip_bad` raises ValueError when it is reached.
    """

    def __init__(self, files: Sequence[str | Path], skip_bad: int = 0) -> None:
        check_streamed(files)
        self._files, self._skip_bad = files, skip_bad

    def __iter__(self) -> Iterator[dict[str, Any]]:
        problems: list[Problem] = []
        for file in map(Path, self._files):
            try:
                for where, row in _rows(file):
                    if not isinstance(row, ValueError):
                        yield row
                        continue
                    problems.append((where, str(row)))
                    if len(problems) > self._skip_bad:
                        break
                    left_out = listed(problems[-1:])
                    warnings.warn(f"a bad row was left out: {left_out}", stacklevel=2)
            except ValueError as error:
                refuse([(str(file), str(error))], "cannot read the data")
            refuse(problems, "cannot read the data", self._skip_bad)


def check_streamed(files: Sequence[str | Path]) -> None:
    """Raise ValueError unless all files are there and can be read line by line."""
    for file in map(Path, files):
        if file.suffix != ".jsonl":
            raise ValueError(f"{file}: only .jsonl files can be streamed; leave --stream away")
        if not file.is_file():
            raise ValueError(f"{file}: must be a file, found none there")


def _rows(file: Path) -> Iterator[Row]:
    """Yield the rows of a file; ValueError if the whole of it can't be read."""
    if file.is_dir() or file.suffix not in READERS:
        raise ValueError(f"must be a file whose name ends in {' or '.join(READERS)}")
    with open(file, "rb") as opened:
        head = opened.peek(4)[:4]
        if encoding := _other_encoding(head):
            raise ValueError(f"must be UTF-8, found {encoding}; save it as UTF-8")
        opened.read(len(_MARK) if head.startswith(_MARK) else 0)
        empty = True
        for line, row in READERS[file.suffix](opened):
            empty = False
            yield f"{file}{line}", row
        if empty:
            raise ValueError("must hold text, found none")


def _other_encoding(head: bytes) -> str | None:
    """Return which other encoding of Unicode a file's first four bytes show, or None."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (len(head) > 1 and 0 in head[:2]):
        return "UTF-16"
    return None


def _json_lines(file: BinaryIO) -> Iterator[Row]:
    for number, line in enumerate(file, 1):  # only newlines end lines, JSON may hold U+2028
        if line.strip():
            try:
                text = line.removesuffix(b"\n").decode("utf-8")
                record = json.loads(text, object_pairs_hook=unique_keys)
                shape_of(record).check(record)
                yield f":{number}", record
            except UnicodeDecodeError as error:
                yield f":{number}", ValueError(f"must be UTF-8: {error.reason}")
            except json.JSONDecodeError as error:
                reason = f"must be JSON: {error.msg} (column {error.colno})"
                yield f":{number}", ValueError(reason)
            except (ValueError, RecursionError) as error:
                yield f":{number}", ValueError(str(error))


def _document(file: BinaryIO) -> Iterator[Row]:
    content = file.read()
    try:
        if content.strip():
            yield "", {"document": content.decode("utf-8").replace("\r\n", "\n")}
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield f":{line}", ValueError(f"must be UTF-8: {error.reason}")


# A reader takes an open binary file at its beginning. It yields the position of each record, as in
# ":3" for a line, and the record, checked by its shape, or the ValueError that says what is wrong.
READERS: dict[str, Callable[[BinaryIO], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".txt": _document,
}
