"""Messages in one line of readable length, whatever the values they quote."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path

LONGEST = 600  # characters of a message


def short(value: object, limit: int = 80) -> str:
    """Return a value's `repr`, cut where it is longer than `limit` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits, a list in itself
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def one_line(message: object, limit: int = LONGEST) -> str:
    """Return a message without line breaks and control characters, cut at `limit` characters."""
    text = " ".join(str(message)[: 8 * limit].split())
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def said(error: BaseException) -> str:
    """Return what an error says; of a file that can't be used, without the system's number."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return (
            f"{error.filename} must be a file or folder that can be used, found: {error.strerror}"
        )
    return str(error)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 example, 2 examples."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Within the block, what a library makes of damaged content is a ValueError that names it.

    ValueErrors with words of ours, and RuntimeErrors of the environment, pass unchanged.
    """
    try:
        yield
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        if isinstance(error, (UnicodeError, JSONDecodeError, RecursionError)):
            raise _damaged(what, error) from None
        raise
    except Exception as error:
        raise _damaged(what, error) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust; Ctrl-C is another
            raise
        raise _damaged(what, error) from None


def _damaged(what: str, error: BaseException) -> ValueError:
    found = one_line(error, 200) or "no reason given"
    return ValueError(f"{what} must be whole, found otherwise: {type(error).__name__}, {found}")


def nearest_file(path: str | Path, before: str = "; nearest: ") -> str:
    """Return words and the name most like a file or folder that is not there, or nothing."""
    wanted = Path(path)
    try:
        there = {each.stem: each for each in sorted(wanted.parent.iterdir(), reverse=True)}
    except OSError:
        return ""
    found = difflib.get_close_matches(wanted.stem, list(there), n=1, cutoff=0.5)
    return f"{before}{there[found[0]]}" if found else ""


def folder_below(folder: Path, *names: str) -> str:
    """Name, as a question, the first folder in another that holds a file of a name, or nothing."""
    below = sorted(file.parent for name in names for file in folder.glob(f"*/{name}"))
    return f"; did you mean {below[0]}?" if below else ""
