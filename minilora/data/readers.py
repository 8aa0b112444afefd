"""Read records from one file of any kind; a new kind of file is a function and a line of `READERS`.

A reader takes an open binary file at its beginning. It yields the position of each record, as in
":3" for a line, and the record, or the ValueError that says what is wrong with it.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from minilora.data.recognition import resolve
from minilora.files import import_extra, unique_keys

_MARK = b"\xef\xbb\xbf"  # the byte order mark of UTF-8
_OTHERS = {  # how files of other kinds begin, what they are, and what to do
    b"PAR1": ("a Parquet file", "let its name end in .parquet"),
    b"\x1f\x8b": ("a compressed file", "let its name end in .gz, as in .jsonl.gz"),
    b"PK\x03\x04": ("a zip file or an Excel workbook", "unzip it, or save the sheet as CSV UTF-8"),
    b"\xd0\xcf\x11\xe0": ("an old Excel workbook", "save the sheet as CSV UTF-8"),
}
_TABLES = ("data", "rows", "records", "examples", "items", "train")  # in JSON, beside other keys
_LARGEST_FIELD = 2**31 - 1  # of a CSV file; Python's own limit is 131,072 characters

# Where it stands, and a record, the ValueError that says what is wrong, or a UserWarning to say.
Row = tuple[str, Any]
Reader = Callable[[BinaryIO], Iterator[Row]]


def rows_of(file: Path) -> Iterator[Row]:
    """Yield the rows of a file with their places."""
    file.stat()  # what is not there is said first
    suffix, packed = suffix_of(file), file.suffix.lower() == ".gz"
    if suffix not in READERS:
        known = ", ".join(READERS)
        more = "; save the sheet as CSV UTF-8" if suffix.startswith((".xls", ".ods")) else ""
        raise ValueError(
            f"must be a file whose name ends in one of {known} (or that and .gz){more}"
        )
    with open(file, "rb") as stored:
        opened: Any = io.BufferedReader(gzip.GzipFile(fileobj=stored)) if packed else stored
        try:
            head = opened.peek(4)[:4]
            _check_kind(head, suffix)
            if encoding := _other_encoding(head):
                raise ValueError(f"must be UTF-8, found {encoding}; save it as UTF-8")
            opened.read(len(_MARK) if head.startswith(_MARK) else 0)
            empty = True
            for line, row in READERS[suffix](opened):
                empty = False
                yield f"{file}{line}", row
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"must be a whole gzip file, found: {error}") from None
        if empty:
            raise ValueError("must hold text, found none")


def suffix_of(file: Path) -> str:
    """Return what a file's name ends in, before `.gz`, in small letters."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return "".join((suffixes[:-1] if suffixes[-1:] == [".gz"] else suffixes)[-1:])


def _check_kind(head: bytes, suffix: str) -> None:
    """Refuse a file that begins as those of another kind do."""
    for begin, (found, to_do) in _OTHERS.items():
        if head.startswith(begin) and (suffix, begin) != (".parquet", b"PAR1"):
            raise ValueError(f"must be what its name says ({suffix}), found {found}; {to_do}")


def _not_utf8(error: UnicodeDecodeError) -> str:
    """Say what a byte that is not UTF-8 most likely is."""
    byte = error.object[error.start : error.start + 1]
    letter = byte.decode("cp1252", "replace")
    read_as = f", which is {letter!r} in Windows' cp1252" if letter.isalpha() else ""
    return (
        f"must be UTF-8, found the byte {byte.hex()} ({error.reason}){read_as}; save it as UTF-8 "
        "(in Excel: CSV UTF-8)"
    )


def _other_encoding(head: bytes) -> str | None:
    """Return which other encoding of Unicode a file's first four bytes show, or None."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (len(head) > 1 and 0 in head[:2]):
        return "UTF-16"
    return None


def _json_lines(file: BinaryIO) -> Iterator[Row]:
    """Read a record a line, or all of it where the first line begins something longer."""
    for number, line in enumerate(file, 1):  # only newlines end lines, JSON may hold U+2028
        if number == 1 and (line.strip() in (b"[", b"{") or line.lstrip().startswith(b"[{")):
            yield from _values(line + file.read())
            return
        if line.strip():
            yield f":{number}", _parsed(line.removesuffix(b"\n"))


def _json(file: BinaryIO) -> Iterator[Row]:
    """Read an array of records, an object that holds one, a single record, or a record a line."""
    content = file.read()
    first, _, rest = content.strip().partition(b"\n")
    if rest.strip() and isinstance(_parsed(first), dict):
        yield from _json_lines(io.BytesIO(content))  # type: ignore[arg-type]
    else:
        yield from _values(content)


def _values(content: bytes) -> Iterator[Row]:
    if not content.strip():
        return
    value, inside = _parsed(content), ""
    if isinstance(value, ValueError):
        raise value
    if isinstance(value, dict) and not _is_record(value):
        lists = [k for k, v in value.items() if isinstance(v, list) and v and _objects(v)]
        lists = [k for k in lists if len(value) == 1 or k in _TABLES]
        if len(lists) == 1:
            inside = lists[0]
            if rest := [key for key in value if key != inside]:
                yield "", UserWarning(f"{inside} is read, not {', '.join(rest)[:100]}")
            value = value[inside]
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise ValueError(f"must hold an array of records, found {type(value).__name__}")
    for i, record in enumerate(value):
        yield f":{inside}[{i}]", record


def _is_record(value: dict[str, Any]) -> bool:
    with contextlib.suppress(ValueError):
        return bool(resolve(value))
    return False


def _objects(values: list[Any]) -> bool:
    return all(isinstance(value, dict) for value in values)


def _parsed(content: bytes) -> Any:
    """Return the value of JSON, or the ValueError that says why it is none."""
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        return ValueError(_not_utf8(error))
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return ValueError(f"must be JSON: {error.msg} ({line}column {error.colno})")
    except (ValueError, RecursionError) as error:
        return ValueError(str(error))


def _document(file: BinaryIO) -> Iterator[Row]:
    content = file.read()
    try:
        if content.strip():
            yield "", {"document": content.decode("utf-8").replace("\r\n", "\n")}
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield f":{line}", ValueError(_not_utf8(error))


_JOINED = (
    "a quote opens there and closes in line {}, though each line between is a row by its tabs; "
    "write quotes that are only characters twice and in quotes, or convert the file to JSON lines"
)


def _are_rows(lines: list[str], fields: int) -> bool:
    return all(line.count("\t") == fields - 1 for line in lines)


def _csv(file: BinaryIO) -> Iterator[Row]:
    """Read a table whose first line names the fields; commas, semicolons or tabs part them."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    csv.field_size_limit(_LARGEST_FIELD)
    blank, empty = 0, True  # lines above the first one
    number = 1
    try:
        while (first := text.readline()) and not first.strip():
            blank += 1
        if not first:
            return
        part = max("\t;,", key=first.count)  # the rarer in names go first, and last for one column
        lines: list[str] = []  # of the row in hand

        def kept() -> Iterator[str]:
            for line in itertools.chain([first], text):
                lines.append(line)
                yield line

        table = csv.reader(kept(), delimiter=part, strict=True)
        names = [name.strip() for name in next(table)]
        lines.clear()
        if not all(names) or len(set(names)) < len(names):
            raise ValueError(f"its first line must name each field once, found {first.strip()!r}")
        number = blank + table.line_num + 1
        for fields in table:
            empty = False
            if part == "\t" and len(lines) > 1 < len(names) and _are_rows(lines, len(names)):
                yield f":{number}", ValueError(_JOINED.format(blank + table.line_num))
            elif len(fields) == len(names):
                yield f":{number}", dict(zip(names, fields, strict=True))
            elif fields:
                yield (
                    f":{number}",
                    ValueError(
                        f"must have the first line's {len(names)} fields, found {len(fields)}; "
                        "quote a field that holds the separator"
                    ),
                )
            number = blank + table.line_num + 1
            lines.clear()
        if empty:
            raise ValueError(f"must hold a row below its first line, {first.strip()!r}, found none")
    except UnicodeDecodeError:
        file.seek(0)  # the line is only known by reading again
        for i, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"line {i} {_not_utf8(error)}") from None
        raise
    except csv.Error as error:
        found = str(error)
        if found == "unexpected end of data":
            found = "a quote opens there and is never closed"
        raise ValueError(f"must be CSV from line {number} on: {found}") from None
    finally:
        text.detach()


def _parquet(file: BinaryIO) -> Iterator[Row]:
    pyarrow = _pyarrow()
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        yield from _batches(table.schema_arrow.names, table.iter_batches(1024))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"must be a Parquet file, found: {error}") from None


def _arrow(file: BinaryIO) -> Iterator[Row]:
    """Read a file of a folder that Hugging Face datasets saved."""
    pyarrow = _pyarrow()
    try:
        with pyarrow.ipc.open_stream(file) as batches:
            yield from _batches(batches.schema.names, batches)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"must be an Arrow stream, found: {error}") from None


def _pyarrow() -> Any:
    return import_extra("pyarrow", "a Parquet or Arrow file")


def _batches(names: list[str], batches: Any) -> Iterator[Row]:
    if len(set(names)) < len(names):
        raise ValueError(f"must name each column once, found {', '.join(names)[:100]}")
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            yield f"[{number}]", {key: _without_none(value) for key, value in row.items()}
            number += 1


def _without_none(value: Any) -> Any:
    """Leave out the fields that a table has only because other rows have them."""
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_none(each) for each in value]
    return value


READERS: dict[str, Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".txt": _document,
}
