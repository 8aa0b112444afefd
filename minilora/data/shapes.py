"""The shapes that records come in: a new one is a check, an encoding and an entry of `SHAPES`.

Shapes of other programs' files are conversions to one of these: `foreign_shapes.py`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from minilora.data.encoder import Encoder, Row
from minilora.data.examples import as_example
from minilora.data.turns import MARKS
from minilora.files import parse_json, short

ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's names of roles, and those that its followers added.
_SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
}

# Messages as Python prints them, or numpy.
_OF_PYTHON = re.compile(
    r"\[?\{('[^{}]*)?'(role|from)': '(system|developer|user|assistant|tool|human|gpt)'"
)

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """One shape of records."""

    keys: tuple[str, ...]  # that a record of it has
    check: Callable[[Record], None]  # raises ValueError with what is wrong
    # Returns the examples of a record, cut, those without anything to learn too.
    encode: Callable[[Encoder, Record, str], list[Row]]
    more: tuple[str, ...] = ()  # keys that it may have, and reads
    # Whether a record with these keys is of it, where keys alone don't tell.
    fits: Callable[[Record], bool] = lambda record: True


def _note_system(encoder: Encoder, name: str) -> None:
    if encoder.options.system is not None:
        encoder.note("the system message is not put before what is no conversation (--chat)", name)


def _check_text(record: Record) -> None:
    for key in ("text", "document"):
        if key in record:
            check_string(record[key], key, may_be_empty=False)


def _encode_text(encoder: Encoder, record: Record, name: str) -> list[Row]:
    _note_system(encoder, name)
    encoder.ignore(record, ("text",))
    return [encoder.text([record["text"]], name, encoder.options.max_length)]


def _encode_document(encoder: Encoder, record: Record, name: str) -> list[Row]:
    """Cut into windows that share one token, so that every token but the first is learned once."""
    _note_system(encoder, name)
    encoder.ignore(record, ("document",))
    whole = encoder.text([record["document"]], name, sys.maxsize)
    rows, length = [], encoder.options.max_length
    for i in range(0, whole.count - 1, length - 1):
        rows.append(row := Row(length))
        row.add(whole.ids[i : i + length], whole.labels[i : i + length])
    encoder.note(f"{whole.count} tokens in {len(rows)} windows of up to {length}", name)
    return rows


def _check_completion(record: Record) -> None:
    record = _with_messages(record)
    if isinstance(record["prompt"], list):
        MESSAGES.check(_joined(record))
        return
    check_string(record["prompt"], "prompt", may_be_empty=True)
    check_said(record["completion"], "completion")


def _encode_completion(encoder: Encoder, record: Record, name: str) -> list[Row]:
    record = _with_messages(record)
    asked, answer = record["prompt"], record["completion"]
    if isinstance(asked, list):
        joined = _joined(record)
        return encoder.chat(joined["messages"], joined, name, len(asked))
    if encoder.options.chat_prompts:
        turns = (("user", asked), ("assistant", answer))
        messages = [{"role": role, "content": content} for role, content in turns]
        return encoder.chat(messages, record, name)
    encoder.ignore(record, ("prompt", "completion"))
    _note_system(encoder, name)
    return [encoder.text([asked, answer], name, encoder.options.max_length)]


def _with_messages(record: Record) -> Record:
    """Return a record with its messages as lists, where a table holds them as JSON text."""
    if (asked := messages_in(record["prompt"])) is None:
        return record
    answer = messages_in(record["completion"])
    return {**record, "prompt": asked, "completion": answer or record["completion"]}


def messages_in(text: Any) -> list[Any] | None:
    """Return the messages that a text is, written as JSON, or None where it is another text."""
    if not isinstance(text, str) or not text.lstrip().startswith(("[", "{")):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        whole = text.strip()
        if _OF_PYTHON.match(whole) and whole.endswith("}" if whole[0] == "{" else "}]"):
            raise ValueError(
                f"messages in a text must be JSON, found Python's own form, as pandas writes it: "
                f"{short(text)}; put json.dumps(messages) there"
            ) from None
        return None
    found = found if isinstance(found, list) else [found]
    return [*map(spoken, found)] if found and all(map(_is_message, found)) else None


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    speaker, said = value.get("from", value.get("role")), {"content", "tool_calls"}
    said = {"value"} if "from" in value else said
    return speaker in (*ROLES, *_SPEAKERS) and not said.isdisjoint(value)


def spoken(turn: Any) -> Any:
    """Return one of ShareGPT's turns as a message; anything else as it is."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    speaker = turn["from"]
    role = _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
    return {**rest, "role": role, "content": turn.get("value")}


def _joined(record: Record) -> Record:
    """Return the messages of a conversation that is cut in a prompt and a completion, as in TRL."""
    asked, answer = as_messages(record["prompt"]), record["completion"]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    answer = as_messages(answer)
    rest = {key: value for key, value in record.items() if key not in ("prompt", "completion")}
    return {**rest, "messages": asked + answer if isinstance(answer, list) else answer}


def _check_messages(record: Record) -> None:
    messages = as_messages(record["messages"])
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{i}] must be an object, found {type(message).__name__}")
        role = message.get("role")
        if role not in ROLES:
            allowed = ", ".join(ROLES)
            raise ValueError(f"messages[{i}]: role must be one of {allowed}, not {role!r:.60}")
        if role != "assistant" or message.get("tool_calls"):
            check_string(message.get("content"), f"messages[{i}].content", may_be_empty=True)
        else:
            check_said(message.get("content"), f"messages[{i}].content")
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
    return encoder.chat(as_messages(record["messages"]), record, name)


def as_messages(messages: Any) -> Any:
    """Return messages with each content as one text, whatever of these it was written as.

    A list of messages as JSON text, as tables hold it; content in parts of text, as OpenAI has it;
    no content beside calls of tools.
    """
    if isinstance(messages, str):
        messages = parse_json(messages, "messages")
    if not isinstance(messages, list):
        return messages
    return [_as_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _as_message(message: Any, name: str) -> Any:
    if not isinstance(message, dict):
        return message
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return {**message, "content": ""}
    if not isinstance(content, list):
        return message
    texts = []
    for i, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
        if not isinstance(text, str):
            raise ValueError(
                f"{name}.content[{i}] must be a text, as images and sounds are not read, found "
                f"{short(part)}"
            )
        texts.append(text)
    return {**message, "content": "".join(texts)}


def _check_question(record: Record) -> None:
    check_said(record["question"], "question")
    check_said(record["answer"], "answer")
    if record.get("system") is not None:
        check_string(record["system"], "system", may_be_empty=True)


def _encode_question(encoder: Encoder, record: Record, name: str) -> list[Row]:
    """Encode a turn of the user's and the answer; as text where there is no chat template."""
    question, answer = record["question"], record["answer"]
    rest = {key: value for key, value in record.items() if key not in ("question", "answer")}
    if encoder.tokenizer.chat_template is not None:
        turns = (("system", rest.pop("system", None)), ("user", question), ("assistant", answer))
        messages = [{"role": role, "content": each} for role, each in turns if each]
        return encoder.chat(messages, rest, name)
    encoder.note(_NO_TEMPLATE, name)
    encoder.ignore(rest, ("system",))
    system = rest.get("system") or encoder.options.system
    asked = ALPACA.format(system=f"{system}\n\n" if system else "", question=question)
    return [encoder.text([asked, answer], name, encoder.options.max_length)]


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


def check_string(value: Any, name: str, may_be_empty: bool) -> None:
    """Raise ValueError unless a value is text, and not empty where that is asked for."""
    if not isinstance(value, str):
        found = "null" if value is None else type(value).__name__
        found += f" {value!r:.20}; write it as text" if isinstance(value, (int, float)) else ""
        raise ValueError(f"{name} must be a string, found {found}")
    if not value and not may_be_empty:
        raise ValueError(f"{name} must not be empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be text, found half a surrogate pair at character {error.start}"
        ) from None


def check_said(value: Any, name: str) -> None:
    """Raise ValueError unless a value is text that says something, as a question or an answer."""
    check_string(value, name, may_be_empty=False)
    if not value.strip():
        raise ValueError(f"{name} must say something, found only white space")


# What a question becomes without a chat template: the form of Stanford's Alpaca.
ALPACA = "{system}### Instruction:\n{question}\n\n### Response:\n"
_NO_TEMPLATE = (
    "the tokenizer has no chat template, so a question is written as '### Instruction:', line, "
    "'### Response:', line, answer; ask so when generating"
)

TOKENS = Shape(("input_ids",), _check_tokens, _encode_tokens)
QUESTION = Shape(("question", "answer"), _check_question, _encode_question, ("system",))
MESSAGES = Shape(("messages",), _check_messages, _encode_messages)
COMPLETION = Shape(("prompt", "completion"), _check_completion, _encode_completion)
SHAPES = (
    Shape(("text",), _check_text, _encode_text),
    Shape(("document",), _check_text, _encode_document),
    COMPLETION,
    MESSAGES,
    QUESTION,
    TOKENS,
)
