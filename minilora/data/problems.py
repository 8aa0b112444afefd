"""Say which rows are bad: each reason once, with the rows it applies to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from minilora.files import one_line

_ROWS, _REASONS = 10, 5  # how many are named in one message
_REASON, _LENGTH = 320, 360  # characters: of one reason, and of them together

Problem = tuple[str, str]  # where, and what is wrong there


class BadRowsError(ValueError):
    """Rows that are bad, more than may be left out."""

    def __init__(self, message: str, problems: Sequence[Problem]) -> None:
        super().__init__(message)
        self.problems = problems


def check_skip_bad(skip_bad: int) -> None:
    """Refuse a number of rows that is none."""
    if type(skip_bad) is not int or skip_bad < 0:
        raise ValueError(f"skip_bad must be a whole number of at least 0, found {skip_bad!r}")


def refuse(
    problems: Sequence[Problem], what: str, skip_bad: int | None = None, rows: int | None = None
) -> None:
    """Raise BadRowsError if there are more problems than may be skipped; None: than none.

    Of `rows` in all, it is not proposed to leave out every one.
    """
    if len(problems) > (skip_bad or 0):
        said = f"{what}: {listed(problems)}"
        if skip_bad is not None and len(problems) != rows:
            leave_out = f"--skip-bad {len(problems)} (in Python: skip_bad={len(problems)})"
            said += f"; mend these rows, or leave them out with {leave_out}"
        raise BadRowsError(said, problems)


def renaming(fields: Mapping[str, str]) -> str:
    """Write names for fields as the command takes them, and as Python does."""
    flags = " ".join(f"{name}={field}" for name, field in fields.items())
    return f"--map {flags} (in Python: fields={dict(fields)})"


def listed(problems: Sequence[Problem]) -> str:
    """Say each reason once, after the rows it applies to."""
    rows: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for where, reason in problems:
        alike = re.sub(r"\d+|'[^']*'|--map [^(]*", "", reason)
        reasons.setdefault(alike, one_line(reason, _REASON))
        rows.setdefault(alike, []).append(where)
    said = list(rows)[:_REASONS]
    while len(said) > 1 and sum(len(reasons[each]) for each in said) > _LENGTH:
        said.pop()
    shown = [f"{joined(rows[each])}: {reasons[each]}" for each in said]
    more = len(rows) - len(said)
    return "; ".join([*shown, *([f"and {more} other kinds of fault"] if more > 0 else [])])


def joined(rows: Sequence[str], most: int = _ROWS) -> str:
    """Join the first names of rows; of several lines of one file only the first says the file."""
    shown, last = [], None
    for row in rows[:most]:
        file, colon, line = row.rpartition(":")
        shown.append(line if colon and file == last else row)
        last = file if colon else None
    more = len(rows) - most
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
