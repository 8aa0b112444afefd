"""The shapes that records come in: a new one is a check, an encoding and an entry of `SHAPES`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from minilora.data.encoder import Encoder, Row
from minilora.data.examples import as_example
from minilora.data.turns import MARKS

ROLES = ("system", "user", "assistant")

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """One shape of records.

    Attributes:
        keys: that a record of it has.
        check: raises ValueError with what is wrong.
        encode: returns the examples of a record, cut, those without anything to learn too.
    """

    keys: tuple[str, ...]
    check: Callable[[Record], None]
    encode: Callable[[Encoder, Record, str], list[Row]]


def shape_of(record: Any) -> Shape:
    """Return the shape whose keys a record has; ValueError where it is none, or two at once."""
    if not isinstance(record, Mapping):
        raise ValueError(f"a record must be an object, found {type(record).__name__}")
    shapes = [shape for shape in SHAPES if any(key in record for key in shape.keys)]
    shapes = [shape for shape in shapes if shape is not TOKENS] or shapes  # tokens kept beside text
    if len(shapes) != 1 or any(key not in record for key in shapes[0].keys):
        known = ", or ".join(" and ".join(f'"{key}"' for key in shape.keys) for shape in SHAPES)
        found = ", ".join(map(str, record)) or "nothing"
        raise ValueError(f"a record must have {known}, found {found:.100}")
    return shapes[0]


def _check_text(record: Record) -> None:
    for key in ("text", "document"):
        if key in record:
            _check_string(record[key], key, may_be_empty=False)


def _encode_text(encoder: Encoder, record: Record, name: str) -> list[Row]:
    encoder.ignore(record, ("text",))
    return [encoder.text([record["text"]], name, encoder.options.max_length)]


def _encode_document(encoder: Encoder, record: Record, name: str) -> list[Row]:
    """Cut into windows that share one token, so that every token but the first is learned once."""
    encoder.ignore(record, ("document",))
    whole, length = (
        encoder.text([record["document"]], name, sys.maxsize),
        encoder.options.max_length,
    )
    rows = []
    for i in range(0, whole.count - 1, length - 1):
        rows.append(row := Row(length))
        row.add(whole.ids[i : i + length], whole.labels[i : i + length])
    encoder.note(f"{whole.count} tokens in {len(rows)} windows of up to {length}", name)
    return rows


def _check_completion(record: Record) -> None:
    _check_string(record["prompt"], "prompt", may_be_empty=True)
    _check_string(record["completion"], "completion", may_be_empty=False)


def _encode_completion(encoder: Encoder, record: Record, name: str) -> list[Row]:
    asked, answer = record["prompt"], record["completion"]
    if encoder.options.chat_prompts:
        turns = (("user", asked), ("assistant", answer))
        messages = [{"role": role, "content": content} for role, content in turns]
        return encoder.chat(messages, record, name)
    encoder.ignore(record, ("prompt", "completion"))
    return [encoder.text([asked, answer], name, encoder.options.max_length)]


def _check_messages(record: Record) -> None:
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{i}] must be an object, found {type(message).__name__}")
        role = message.get("role")
        if role not in ROLES:
            allowed = ", ".join(ROLES)
            raise ValueError(f"messages[{i}]: role must be one of {allowed}, not {role!r:.60}")
        _check_string(message.get("content"), f"messages[{i}].content", role != "assistant")
        for key in MARKS:
            if message.get(key) not in (None, 0, 1):
                raise ValueError(
                    f"messages[{i}].{key} must be 0 or 1, true or false, found {message[key]!r:.60}"
                )
    if messages[0]["role"] == "assistant":
        raise ValueError("messages must begin with a system or user message, found assistant")
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("messages must hold an assistant message, found none")


def _encode_messages(encoder: Encoder, record: Record, name: str) -> list[Row]:
    return encoder.chat(record["messages"], record, name)


def _check_tokens(record: Record) -> None:
    try:
        packed = len(as_example(record, "a row").lengths)
    except TypeError as error:
        raise ValueError(str(error)) from None
    if packed > 1:
        raise ValueError(f"input_ids must be of one document, found {packed}; pack them with pack")


def _encode_tokens(encoder: Encoder, record: Record, name: str) -> list[Row]:
    row = Row(encoder.options.max_length)
    example = as_example(record, name)
    row.add(example.input_ids, example.labels)
    return [row]


def _check_string(value: Any, name: str, may_be_empty: bool) -> None:
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


TOKENS = Shape(("input_ids",), _check_tokens, _encode_tokens)
SHAPES = (
    Shape(("text",), _check_text, _encode_text),
    Shape(("document",), _check_text, _encode_document),
    Shape(("prompt", "completion"), _check_completion, _encode_completion),
    Shape(("messages",), _check_messages, _encode_messages),
    TOKENS,
)
