"""Read training records from text files, and say which rows are none and why."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minilora.files import one_line, unique_keys

ROLES = ("system", "user", "assistant")
KINDS = (("text",), ("prompt", "completion"), ("messages",))
MARKS = ("weight", "train", "trainable", "training", "loss", "loss_mask")  # 0 or false: not learned
PLACES, REASONS = 10, 5  # how many are named in one message

Problem = tuple[str, str]  # where, and what is wrong there


def read_records(
    paths: str | Path | Sequence[str | Path], *, skip_bad: int = 0
) -> list[dict[str, Any]]:
    """Read training records from `.jsonl` and `.txt` files.

    Args:
        paths: a file or several. A `.jsonl` line is {"text"}, {"prompt", "completion"} or
            {"messages": [{"role", "content"}, …]} with the roles system, user, assistant; other
            keys are kept, blank lines skipped. A `.txt` file is one document. Both
            are UTF-8, with or without a byte order mark, with either line ending.
        skip_bad: bad rows to leave out at most; a warning names them.

    Returns:
        The records in the order of the files and lines.

    Raises:
        ValueError: more bad rows than `skip_bad`, by place and reason, or a file of another kind.
        FileNotFoundError: a file is missing.
    """
    records, problems = read_rows(paths, skip_bad)
    if problems:
        warnings.warn(f"bad rows were left out: {listed(problems)}", stacklevel=2)
    return records


def read_rows(
    paths: str | Path | Sequence[str | Path], skip_bad: int
) -> tuple[list[dict[str, Any]], list[Problem]]:
    """Return what `read_records` does, and the rows that were left out."""
    check_skip_bad(skip_bad)
    files = [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]
    if not files:
        raise ValueError("paths must name at least one file, found none")
    records: list[dict[str, Any]] = []
    problems: list[Problem] = []
    unreadable: list[Problem] = []
    for file in files:
        if file.is_dir() or file.suffix not in (".jsonl", ".txt"):
            unreadable.append((str(file), "must be a file whose name ends in .jsonl or .txt"))
            continue
        content = file.read_bytes()
        if encoding := other_encoding(content[:4]):
            unreadable.append((str(file), _not_utf8(encoding)))
            continue
        content = content.removeprefix(b"\xef\xbb\xbf")
        if not content.strip():
            unreadable.append((str(file), "must hold text, found none"))
        elif file.suffix == ".jsonl":  # only newlines end lines, JSON may hold U+2028
            for number, line in enumerate(content.split(b"\n"), 1):
                _read_line(file, number, line, records, problems)
        else:
            _read_text(file, content, records, problems)
    refuse(unreadable, "cannot read the data")
    refuse(problems, "cannot read the data", skip_bad)
    return records, problems


def iter_records(paths: Sequence[str | Path], *, skip_bad: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the records of `.jsonl` files one by one, reading on only as they are asked for.

    Args:
        paths: the files.
        skip_bad: bad rows to leave out at most; a warning names each.

    Raises:
        ValueError: another kind of file, or one bad row too many, with its place, when it is
            reached.
    """
    check_skip_bad(skip_bad)
    problems: list[Problem] = []
    for file in map(Path, paths):
        if file.suffix != ".jsonl":
            raise ValueError(f"{file}: only .jsonl files can be streamed; leave --stream away")
        with open(file, "rb") as opened:
            for number, read in enumerate(opened, 1):
                if number == 1 and (encoding := other_encoding(read[:4])):
                    raise ValueError(f"cannot read the data: {file}: {_not_utf8(encoding)}")
                line = read.removeprefix(b"\xef\xbb\xbf") if number == 1 else read
                found: list[dict[str, Any]] = []
                before = len(problems)
                _read_line(file, number, line, found, problems)
                refuse(problems, "cannot read the data", skip_bad)
                if len(problems) > before:
                    warnings.warn(f"a bad row was left out: {listed(problems[-1:])}", stacklevel=2)
                yield from found


def check_skip_bad(skip_bad: int) -> None:
    """Refuse a number of rows that is none."""
    if type(skip_bad) is not int or skip_bad < 0:
        raise ValueError(f"skip_bad must be a whole number of at least 0, found {skip_bad!r}")


def other_encoding(head: bytes) -> str | None:
    """Return which other encoding of Unicode a file's first four bytes show, or None."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (len(head) > 1 and 0 in head[:2]):
        return "UTF-16"
    return None


def _not_utf8(encoding: str) -> str:
    return f"must be UTF-8, found {encoding}; save it as UTF-8"


def _read_line(
    file: Path, number: int, line: bytes, records: list[Any], problems: list[Problem]
) -> None:
    where = f"{file}:{number}"
    try:
        if line.strip():
            records.append(checked(json.loads(line.decode("utf-8"), object_pairs_hook=unique_keys)))
    except UnicodeDecodeError as error:
        problems.append((where, f"must be UTF-8: {error.reason}"))
    except json.JSONDecodeError as error:
        problems.append((where, f"must be JSON: {error.msg} (column {error.colno})"))
    except (ValueError, RecursionError) as error:
        problems.append((where, str(error)))


def _read_text(file: Path, content: bytes, records: list[Any], problems: list[Problem]) -> None:
    try:
        records.append({"text": content.decode("utf-8").replace("\r\n", "\n")})
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        problems.append((f"{file}:{line}", f"must be UTF-8: {error.reason}"))


def refuse(problems: Sequence[Problem], what: str, skip_bad: int | None = None) -> None:
    """Raise ValueError if there are more problems than may be skipped; None: than none."""
    if len(problems) > (skip_bad or 0):
        way_out = "" if skip_bad is None else (
            f"; mend these rows, or leave them out by skip_bad={len(problems)} (--skip-bad)"
        )  # fmt: skip
        raise ValueError(f"{what}: {listed(problems)}{way_out}")


def listed(problems: Sequence[Problem]) -> str:
    """Say each reason once, behind the places where it was found."""
    places: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for where, reason in problems:
        kind = re.sub(r"\d+|'[^']*'", "", reason)
        reasons.setdefault(kind, one_line(reason, 200))
        places.setdefault(kind, []).append(where)
    shown = [f"{joined(places[kind])}: {reasons[kind]}" for kind in list(places)[:REASONS]]
    more = len(places) - REASONS
    return "; ".join([*shown, *([f"and {more} other kinds of fault"] if more > 0 else [])])


def joined(places: Sequence[str], most: int = PLACES) -> str:
    """Join the first places; of several lines of one file only the first says the file."""
    shown, last = [], None
    for place in places[:most]:
        file, colon, line = place.rpartition(":")
        shown.append(line if colon and file == last else place)
        last = file if colon else None
    more = len(places) - most
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def checked(record: Any) -> Any:
    """Return a record of one of the known kinds, or raise ValueError with what is wrong."""
    if not isinstance(record, Mapping):
        raise ValueError(f"a record must be an object, found {type(record).__name__}")
    kinds = [keys for keys in KINDS if any(key in record for key in keys)]
    if len(kinds) != 1 or any(key not in record for key in kinds[0]):
        found = ", ".join(map(str, record)) or "nothing"
        raise ValueError(
            f'a record must have "text", or "prompt" and "completion", or "messages", found '
            f"{found:.100}"
        )
    if "messages" in record:
        _check_messages(record["messages"])
    else:
        for key in kinds[0]:
            _check_text(record[key], key, may_be_empty=key == "prompt")
    return record


def _check_text(value: Any, name: str, may_be_empty: bool) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, found {type(value).__name__}")
    if not value and not may_be_empty:
        raise ValueError(f"{name} must not be empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be text, found half a surrogate pair at character {error.start}"
        ) from None


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{i}] must be an object, found {type(message).__name__}")
        role = message.get("role")
        if role not in ROLES:
            allowed = ", ".join(ROLES)
            raise ValueError(f"messages[{i}]: role must be one of {allowed}, not {role!r:.60}")
        _check_text(message.get("content"), f"messages[{i}].content", role != "assistant")
        for key in MARKS:
            if message.get(key) not in (None, 0, 1):
                raise ValueError(
                    f"messages[{i}].{key} must be 0 or 1, true or false, found {message[key]!r:.60}"
                )
    if messages[0]["role"] == "assistant":
        raise ValueError("messages must begin with a system or user message, found assistant")
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("messages must hold an assistant message, found none")


def indexed(records: Iterable[Any]) -> tuple[list[tuple[str, Any]], list[Problem]]:
    """Check records from elsewhere; return the good ones with their names, and the problems."""
    good, problems = [], []
    for i, record in enumerate(records):
        try:
            good.append((f"record {i}", checked(record)))
        except ValueError as error:
            problems.append((f"record {i}", str(error)))
    return good, problems
