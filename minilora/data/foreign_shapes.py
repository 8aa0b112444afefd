"""Shapes of other programs' records: conversions to `SHAPES`, each a line of `FOREIGN`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minilora.data.encoder import Encoder, Row
from minilora.data.shapes import (
    MESSAGES,
    QUESTION,
    Record,
    Shape,
    as_messages,
    check_string,
    spoken,
)
from minilora.files import short


def _foreign(
    note: str,
    to: Shape,
    convert: Callable[[Record], Record],
    keys: tuple[str, ...],
    more: tuple[str, ...] = (),
) -> Shape:
    """Return the shape of records that `convert` makes records of the shape `to`."""

    def encode(encoder: Encoder, record: Record, name: str) -> list[Row]:
        encoder.note(note, name)
        return to.encode(encoder, convert(record), name)

    return Shape(keys, lambda record: to.check(convert(record)), encode, more)


def _question(asked: str, answer: str, beside: str = "") -> Shape:
    """Return the shape of a question (with what belongs to it in another field) and an answer."""

    def convert(record: Record) -> Record:
        question, more = record[asked], record.get(beside)
        if more is not None:
            check_string(more, beside, may_be_empty=True)
        if isinstance(question, str) and isinstance(more, str):
            question = "\n\n".join(part for part in (question, more) if part.strip())
        rest = {k: v for k, v in record.items() if k not in (asked, answer, beside)}
        return {**rest, "question": question, "answer": record[answer]}

    both = f"{asked} and {beside}" if beside else asked
    note = f"read as the user's turn and the answer: {both}; {answer}"
    more = (beside, "system") if beside else ("system",)
    return _foreign(note, QUESTION, convert, (asked, answer), more)


_SYSTEM = ("system", "developer")


def _conversation(key: str) -> Shape:
    """Return the shape of ShareGPT's conversations: a list of {"from", "value"}, or of messages."""

    def convert(record: Record) -> Record:
        turns: Any = record[key]
        if isinstance(turns, str):
            turns = as_messages(turns)
        if isinstance(turns, list):
            turns = as_messages([spoken(turn) for turn in turns])
            turns = _with_system(record.get("system"), turns)
        rest = {k: v for k, v in record.items() if k not in (key, "system")}
        return {**rest, "messages": turns}

    return _foreign(f"{key}: read as messages", MESSAGES, convert, (key,), ("system",))


def _with_system(system: Any, turns: list[Any]) -> list[Any]:
    """Return a conversation with the message of a record's field `system`, unless it has it."""
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    if not system or (first.get("role") in _SYSTEM and first.get("content") == system):
        return turns
    if first.get("role") in _SYSTEM:
        raise ValueError(
            f"a conversation must have one system message, found another one in the field system "
            f"({short(system)}) than in the first turn ({short(first.get('content'))}); take one "
            "out"
        )
    return [{"role": "system", "content": system}, *turns]


FOREIGN = (
    _question("instruction", "output", "input"),  # Alpaca
    _question("instruction", "response", "context"),  # Dolly
    _question("prompt", "response"),
    _question("question", "response"),
    _question("question", "output"),
    _question("query", "response"),
    _question("query", "answer"),
    _question("input", "output"),
    _conversation("conversations"),
    _conversation("conversation"),
)
