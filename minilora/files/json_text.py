"""JSON from outside: whole, and without a key that is given twice."""

import json
from pathlib import Path
from typing import Any

from minilora.files.wording import one_line, short


def parse_json(text: str | bytes, what: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is no JSON, an object has a key twice, or it is nested too deeply.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} must be JSON, found otherwise: {one_line(error, 200)}") from None


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a model folder.

    Raises:
        ValueError: there is no such file, it holds something else, or what `parse_json` refuses.
    """
    if not file.is_file():
        raise ValueError(f"a model folder must hold {file.name}, found none in '{file.parent}'")
    entries = parse_json(file.read_bytes(), f"'{file}'")
    if not isinstance(entries, dict):
        raise ValueError(f"'{file}' must hold a JSON object, found {type(entries).__name__}")
    return entries


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs; JSON's readers take the last of two with one key.

    Raises:
        ValueError: a key is given twice.
    """
    entries = dict(pairs)
    if len(entries) < len(pairs):
        seen: set[str] = set()
        twin = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {short(twin)} is given twice")
    return entries
