"""Read training records from text files and encode them into examples that say what is learned."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.data import IGNORE, Example, learned_labels

ROLES = ("system", "user", "assistant")
KINDS = (("text",), ("prompt", "completion"), ("messages",))
SHOWN = 10  # problems listed in one error


@dataclass(frozen=True)
class EncodeReport:
    """Say what became of the records.

    Attributes:
        documents: records read.
        tokens: tokens of the kept examples.
        learned_tokens: labels of theirs that enter the loss.
        truncated: records cut at max_length.
        fully_masked: records dropped because nothing was left to learn.
        longest: tokens of the longest record before the cut.
    """

    documents: int
    tokens: int
    learned_tokens: int
    truncated: int
    fully_masked: int
    longest: int

    def __str__(self) -> str:
        kept = self.documents - self.fully_masked
        return (
            f"{kept} of {self.documents} documents kept: {self.tokens} tokens, "
            f"{self.learned_tokens} learned; {self.truncated} truncated (the longest had "
            f"{self.longest}), {self.fully_masked} dropped with nothing left to learn"
        )


def read_records(paths: str | Path | Sequence[str | Path]) -> list[dict[str, Any]]:
    """Read training records from `.jsonl` and `.txt` files.

    Args:
        paths: a file or several. A `.jsonl` line is {"text"}, {"prompt", "completion"} or
            {"messages": [{"role", "content"}, …]} with the roles system, user, assistant; other
            keys are kept and ignored, blank lines skipped. A `.txt` file is one document. Both
            are UTF-8, with or without a byte order mark, with either line ending.

    Returns:
        The records in the order of the files and lines.

    Raises:
        ValueError: every bad line with its place and reason, the first 10 in full.
        FileNotFoundError: a file is missing.
    """
    files = [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]
    if not files:
        raise ValueError("paths must name at least one file, found none")
    records: list[dict[str, Any]] = []
    problems: list[str] = []
    for file in files:
        if file.is_dir() or file.suffix not in (".jsonl", ".txt"):
            problems.append(f"{file}: must be a file whose name ends in .jsonl or .txt")
            continue
        content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
        if not content.strip():
            problems.append(f"{file}: must hold text, found none")
        elif file.suffix == ".jsonl":
            _read_jsonl(file, content, records, problems)
        else:
            try:
                records.append({"text": content.decode("utf-8").replace("\r\n", "\n")})
            except UnicodeDecodeError as error:
                line = content.count(b"\n", 0, error.start) + 1
                problems.append(f"{file}:{line}: must be UTF-8: {error.reason}")
    _refuse(problems, "cannot read the data")
    return records


def iter_records(paths: Sequence[str | Path]) -> Iterator[dict[str, Any]]:
    """Yield the records of `.jsonl` files one by one, reading on only as they are asked for.

    Raises:
        ValueError: another kind of file, or a bad line, with its place, when it is reached.
    """
    for file in map(Path, paths):
        if file.suffix != ".jsonl":
            raise ValueError(f"{file}: only .jsonl files can be streamed; leave --stream away")
        with open(file, "rb") as opened:
            for number, read in enumerate(opened, 1):
                line = read.removeprefix(b"\xef\xbb\xbf") if number == 1 else read
                found: list[dict[str, Any]] = []
                problems: list[str] = []
                _read_line(file, number, line, found, problems)
                _refuse(problems, "cannot read the data")
                yield from found


def _read_jsonl(file: Path, content: bytes, records: list[Any], problems: list[str]) -> None:
    """Collect a record or a problem per line; only newlines end lines, JSON may hold U+2028."""
    for number, line in enumerate(content.split(b"\n"), 1):
        _read_line(file, number, line, records, problems)


def _read_line(
    file: Path, number: int, line: bytes, records: list[Any], problems: list[str]
) -> None:
    try:
        if line.strip():
            records.append(_checked(json.loads(line.decode("utf-8"))))
    except UnicodeDecodeError as error:
        problems.append(f"{file}:{number}: must be UTF-8: {error.reason}")
    except json.JSONDecodeError as error:
        problems.append(f"{file}:{number}: must be JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:
        problems.append(f"{file}:{number}: {error}")


def _refuse(problems: Sequence[str], what: str) -> None:
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise ValueError("\n  ".join([f"{what}:", *problems[:SHOWN], *more]))


def _checked(record: Any) -> Any:
    """Return a record of one of the known kinds, or raise ValueError with what is wrong."""
    if not isinstance(record, Mapping):
        raise ValueError(f"a record must be an object, found {type(record).__name__}")
    kinds = [keys for keys in KINDS if any(key in record for key in keys)]
    if len(kinds) != 1 or any(key not in record for key in kinds[0]):
        found = ", ".join(map(str, record)) or "nothing"
        raise ValueError(
            f'a record must have "text", or "prompt" and "completion", or "messages", found {found}'
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
    value.encode("utf-8")  # half a surrogate pair is no text: UnicodeEncodeError, a ValueError


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{i}] must be an object, found {type(message).__name__}")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"messages[{i}]: role must be one of {', '.join(ROLES)}, not {role!r}")
        _check_text(message.get("content"), f"messages[{i}].content", role != "assistant")
    if messages[0]["role"] == "assistant":
        raise ValueError("messages must begin with a system or user message, found assistant")
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("messages must hold an assistant message, found none")


def encode_records(
    records: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int,
    completion_only: bool = True,
    chat_prompts: bool = False,
) -> tuple[list[Example], EncodeReport]:
    """Encode records into examples whose labels say what is learned.

    A text is learned whole, and of a prompt and completion the completion; both end with the
    end-of-text token. Of messages the assistant turns are learned, each with the marker that
    ends it; what follows the last of them is left out. Control tokens named inside a record stay
    text, as in generation.

    Args:
        records: as `read_records` returns them.
        tokenizer: a `minilora.models.Tokenizer` or its like.
        max_length: tokens kept of a record, ≥ 2; the rest is cut off and counted.
        completion_only: False learns prompts, system and user turns too.
        chat_prompts: put prompt and completion through the chat template as two turns.

    Returns:
        The examples, without those in which nothing is left to learn, and the counts.

    Raises:
        ValueError: bad records (all of them at once), a tokenizer without an end-of-text token,
            a chat template that does not write a conversation as a prefix of its continuation.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, found {max_length}")
    records, problems = list(records), []
    for i, record in enumerate(records):
        try:
            _checked(record)
        except ValueError as error:
            problems.append(f"record {i}: {error}")
    _refuse(problems, "cannot encode the records")
    examples = []
    truncated = longest = 0
    for i, record in enumerate(records):
        ids, labels = _encode(record, tokenizer, chat_prompts, completion_only, f"record {i}")
        longest = max(longest, len(ids))
        truncated += len(ids) > max_length
        if learned_labels(labels[:max_length]):
            examples.append(Example(tuple(ids[:max_length]), tuple(labels[:max_length])))
    return examples, EncodeReport(
        documents=len(records),
        tokens=sum(len(example.input_ids) for example in examples),
        learned_tokens=sum(learned_labels(example.labels) for example in examples),
        truncated=truncated,
        fully_masked=len(records) - len(examples),
        longest=longest,
    )


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Encode the beginning of a document: after the token the model wants there, if any."""
    begin = tokenizer.encode("")[:1]
    begin = begin if begin == [tokenizer.bos_id] else []
    return begin + tokenizer.encode(text, special=False)


def _encode(
    record: Mapping[str, Any], tokenizer: Any, chat: bool, completion_only: bool, name: str
) -> tuple[list[int], list[int]]:
    """Return the ids and labels of a record."""
    messages = record.get("messages")
    if chat and "prompt" in record:
        turns = (("user", record["prompt"]), ("assistant", record["completion"]))
        messages = [{"role": role, "content": content} for role, content in turns]
    if messages is not None:
        return _encode_chat(messages, tokenizer, completion_only, name)
    if tokenizer.eos_id is None:
        raise ValueError(f"{name}: the tokenizer must have an eos_id to end it with, found None")
    if "text" in record:
        ids = [*encode_prompt(tokenizer, record["text"]), tokenizer.eos_id]
        return ids, ids
    prompt = encode_prompt(tokenizer, record["prompt"])
    completion = [*tokenizer.encode(record["completion"], special=False), tokenizer.eos_id]
    masked = [IGNORE] * len(prompt) if completion_only else prompt
    return prompt + completion, masked + completion


def _encode_chat(
    messages: list[dict[str, Any]], tokenizer: Any, completion_only: bool, name: str
) -> tuple[list[int], list[int]]:
    """Learn from where the generation prompt of a turn ends to where the turn ends."""
    if not completion_only:
        ids = tokenizer.encode_chat(messages, add_generation_prompt=False)
        return ids, ids
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    ids = tokenizer.encode_chat(messages[: turns[-1] + 1], add_generation_prompt=False)
    labels, done = [IGNORE] * len(ids), ""
    for i in turns:
        before = tokenizer.render(messages[:i], add_generation_prompt=True)
        after = tokenizer.render(messages[: i + 1], add_generation_prompt=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise ValueError(
                f"{name}, messages[{i}]: the chat template must write a conversation as a prefix "
                "of its continuation, found that a later turn changes an earlier one; pass "
                "completion_only=False or use another template"
            )
        done = after
        start = _shared(ids, tokenizer.encode_chat(messages[:i], add_generation_prompt=True))
        end = _shared(ids, tokenizer.encode_chat(messages[: i + 1], add_generation_prompt=False))
        labels[start:end] = ids[start:end]  # with a token that straddles the start
    return ids, labels


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the ids both begin with."""
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))
