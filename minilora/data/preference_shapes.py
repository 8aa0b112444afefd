"""Shapes of records that say which answer is better: each is made prompts and answers of `SHAPES`.

Those of TRL (explicit and implicit prompts, texts and messages, answers with a label), of OpenAI's
preference tuning, and of the usual data sets (UltraFeedback, Orca's pairs, ShareGPT with chosen and
rejected).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minilora.data.encoder import Encoder, Row
from minilora.data.examples import alike
from minilora.data.pairs import PairRow
from minilora.data.problems import renaming
from minilora.data.shapes import (
    COMPLETION,
    QUESTION,
    Record,
    Shape,
    as_messages,
    check_said,
    check_string,
    messages_in,
    spoken,
)

_LABELS = {
    **{True: True, "true": True, "1": True, "1.0": True},  # 1 and 1.0 are True here
    **{False: False, "false": False, "0": False, "0.0": False},
}
_ANSWERS = ("chosen", "rejected")
_PROMPTS = ("instruction", "query", "input", "context", "problem", "source", "user")
_IMPLICIT = "the prompt is what chosen and rejected begin with alike"


def _wanted(label: Any) -> bool | None:
    """Return what a label says, None where it is none."""
    key = label.lower() if isinstance(label, str) else label
    return _LABELS.get(key) if isinstance(key, (bool, int, float, str)) else None


def _answer(value: Any, key: str) -> Any:
    """Return an answer as a text or a list of messages."""
    messages = messages_in(value) or ()
    if any(_role(message) == "assistant" for message in messages):
        value = messages
    if isinstance(value, str):
        check_said(value, key)
        return value
    value = as_messages([spoken(value)] if isinstance(value, dict) else value)
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise ValueError(f"{key} must be a text or a list of messages, found {found}")
    return [spoken(message) for message in value]


def _after_prompt(record: Record) -> tuple[Any, list[Any]]:
    """Return the prompt and the two answers of a record with a prompt."""
    prompt = messages_in(record["prompt"]) or record["prompt"]
    answers = [_answer(record[key], key) for key in _ANSWERS]
    if isinstance(prompt, list) or all(isinstance(answer, str) for answer in answers):
        return prompt, answers
    check_string(prompt, "prompt", may_be_empty=True)
    if all(isinstance(a, list) and _role(a[0]) != "assistant" for a in answers):
        return _cut(*answers)  # whole conversations, as UltraFeedback has them
    return [{"role": "user", "content": prompt}], answers


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _implicit(record: Record) -> tuple[Any, list[Any]]:
    """Return what two texts or conversations begin with alike, and the rests."""
    if beside := [key for key in _PROMPTS if record.get(key)]:
        named = {"prompt": beside[0], "chosen": "chosen", "rejected": "rejected"}
        raise ValueError(
            f"the prompt must stand in prompt, or at the head of chosen and rejected, found "
            f"{beside[0]} beside them; name it: {renaming(named)}"
        )
    return _cut(*(_answer(record[key], key) for key in _ANSWERS))


def _cut(first: Any, second: Any) -> tuple[Any, list[Any]]:
    if type(first) is not type(second):
        raise ValueError("chosen and rejected must both be texts or both be messages, found each")
    shared = alike(first, second)
    rests = [first[shared:], second[shared:]]
    if isinstance(first, str) and all(rests):
        if not all(rest[0].isspace() for rest in rests):  # else a word ends for both
            shared = max((i + 1 for i in range(shared) if first[i].isspace()), default=0)
        if first[:shared].endswith(" "):
            shared -= 1  # which belongs to the word that follows
    for key, rest in zip(_ANSWERS, rests, strict=True):
        if isinstance(first, list) and rest and _role(rest[0]) != "assistant":
            raise ValueError(
                f"chosen and rejected must be alike up to an assistant message, found {key} with "
                f"another {_role(rest[0])!r:.60} message at [{shared}]; take out the pair"
            )
    return first[:shared], [first[shared:], second[shared:]]


def _after_messages(key: str) -> Callable[[Record], tuple[Any, list[Any]]]:
    def split(record: Record) -> tuple[Any, list[Any]]:
        asked = as_messages(record[key])
        if not isinstance(asked, list):
            raise ValueError(f"{key} must be a list of messages, found {type(asked).__name__}")
        return [spoken(turn) for turn in asked], [_answer(record[each], each) for each in _ANSWERS]

    return split


def _after_question(record: Record) -> tuple[Any, list[Any]]:
    check_said(record["question"], "question")
    answers = [record[key] for key in _ANSWERS]
    for key, answer in zip(_ANSWERS, answers, strict=True):
        check_said(answer, key)
    return record["question"], answers


def _of_openai(record: Record) -> tuple[Any, list[Any]]:
    """Return the parts of https://platform.openai.com/docs/guides/direct-preference-optimization."""
    asked = record["input"].get("messages") if isinstance(record["input"], dict) else None
    if not isinstance(asked, list):
        raise ValueError("input must hold messages, beside preferred_output, found none")
    outputs = ("preferred_output", "non_preferred_output")
    return asked, [_answer(record[key], key) for key in outputs]


def _preference(
    keys: tuple[str, ...],
    split: Callable[[Record], tuple[Any, list[Any]]],
    note: str | None = None,
    more: tuple[str, ...] = (),
    to: Shape = COMPLETION,
) -> Shape:
    """Return the shape of records that `split` makes a prompt and two answers of."""

    def sides(record: Record) -> list[dict[str, Any]]:
        prompt, answers = split(record)
        if isinstance(prompt, list):
            answers = [
                [{"role": "assistant", "content": a}] if isinstance(a, str) else a for a in answers
            ]
        kept = {key: record[key] for key in more if key in to.more and record.get(key)}
        return [{**kept, **dict(zip(to.keys, (prompt, each), strict=True))} for each in answers]

    def check(record: Record) -> None:
        first, second = sides(record)
        for key, side in zip(_ANSWERS, (first, second), strict=True):
            if not side[to.keys[1]]:
                raise ValueError(f"{key} must go on after the prompt, found nothing there")
            try:
                to.check(side)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
        if first == second:
            raise ValueError("chosen and rejected must differ, found the same answer twice")

    def encode(encoder: Encoder, record: Record, name: str) -> list[Row]:
        if note is not None:
            encoder.note(note, name)
        encoder.ignore({key: record.get(key) for key in more if key not in to.more})
        rest = {k: v for k, v in record.items() if k not in (*keys, *more)}
        known = {*encoder.tokenizer.template_variables, "chat_template_kwargs"}
        read = {k: v for k, v in rest.items() if k in known}  # by the chat template
        first, second = (
            _one(encoder, to, {**beside, **side}, name)
            for side, beside in zip(sides(record), (rest, read), strict=True)
        )
        return [PairRow(first, second)]

    return Shape(keys, check, encode, more)


def _one(encoder: Encoder, shape: Shape, record: Record, name: str) -> Row:
    """Encode a prompt and an answer, which must become one text."""
    if not encoder.options.completion_only:
        raise ValueError(
            "preferences compare answers, so that prompts are not learned, found "
            "--all-tokens (in Python: completion_only=False); leave it out"
        )
    rows = shape.encode(encoder, record, name)
    if len(rows) != 1:
        raise ValueError(
            f"an answer must become one text, found {len(rows)}, as the chat template rewrites "
            f"earlier turns (or all are marked as not learned); give answers of one turn"
        )
    return rows[0]


def _encode_labelled(encoder: Encoder, record: Record, name: str) -> list[Row]:
    rest = {key: value for key, value in record.items() if key != "label"}
    return [PairRow(_one(encoder, COMPLETION, rest, name), wanted=_wanted(record["label"]))]


LABELLED = Shape(
    ("prompt", "completion", "label"),
    COMPLETION.check,
    _encode_labelled,
    fits=lambda record: _wanted(record["label"]) is not None,
)
PREFERENCES = (
    _preference(("prompt", *_ANSWERS), _after_prompt, more=("messages",)),
    _preference(_ANSWERS, _implicit, _IMPLICIT),
    _preference(("messages", *_ANSWERS), _after_messages("messages")),
    _preference(
        ("conversations", *_ANSWERS),
        _after_messages("conversations"),
        "conversations are read as messages",
    ),
    _preference(
        ("question", *_ANSWERS),
        _after_question,
        "the question is read as the user's turn",
        ("system",),
        QUESTION,
    ),
    _preference(
        ("input", "preferred_output", "non_preferred_output"),
        _of_openai,
        "preferred_output and non_preferred_output are read as chosen and rejected",
    ),
    LABELLED,
)
