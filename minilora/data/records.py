"""Encode training records into examples that say what is learned."""

from __future__ import annotations

import functools
import json
import re
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from minilora.data.batches import IGNORE, Example, learned_labels
from minilora.data.record_files import (
    MARKS,
    check_skip_bad,
    indexed,
    iter_records,
    joined,
    listed,
    read_records,
    refuse,
)
from minilora.data.turns import learned_texts
from minilora.text import Conversation, Tokenizer, as_tokenizer, name_pattern

__all__ = ["EncodeReport", "encode_prompt", "encode_records", "iter_records", "read_records"]

_ENDLESS = (
    "no stop token is learned, so generation will not end by itself: the chat template writes none "
    "after an answer"
)
_PARSED = (
    "names of control tokens are read as tokens, as the text begins like the chat template's "
    "(parse_special=False keeps them text)"
)
_NAMED = (
    "names of control tokens are read as text (parse_special=True reads them as tokens, in text, "
    "prompt and completion)"
)


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
        notes: what else to know: fields that were ignored, bad records left out, …
    """

    documents: int
    tokens: int
    learned_tokens: int
    truncated: int
    fully_masked: int
    longest: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        kept = self.documents - self.fully_masked
        counts = (
            f"{kept} of {self.documents} documents kept: {self.tokens} tokens, "
            f"{self.learned_tokens} learned; {self.truncated} truncated (the longest had "
            f"{self.longest}), {self.fully_masked} dropped with nothing left to learn"
        )
        return "; ".join([counts, *(f"note: {note}" for note in self.notes)])


def encode_records(
    records: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int,
    completion_only: bool = True,
    chat_prompts: bool = False,
    parse_special: bool | None = None,
    skip_bad: int = 0,
) -> tuple[list[Example], EncodeReport]:
    """Encode records into examples whose labels say what is learned.

    A text is learned whole, and of a prompt and completion the completion; both end with the
    end-of-text token. Of messages the assistant turns are learned, each with the marker that
    ends it; what follows the last of them is left out, and so is a turn with `weight`, `train`,
    `trainable`, `training`, `loss` or `loss_mask` of 0 or false. Row keys that the chat template
    reads (`tools`, `documents`, `enable_thinking`, …, or inside `chat_template_kwargs`) go to it;
    the report names the fields that nothing reads. Where a template rewrites earlier turns, a
    conversation gives an example for each answer.

    Args:
        records: as `read_records` returns them.
        tokenizer: a `minilora.models.Tokenizer`, or one of transformers'.
        max_length: tokens kept of a record, ≥ 2; the rest is cut off and counted.
        completion_only: False learns prompts, system and user turns too.
        chat_prompts: put prompt and completion through the chat template as two turns.
        parse_special: read names of control tokens in texts, prompts and completions as those
            tokens; None does where the text begins as the chat template's texts do. In messages
            they stay text, as in generation.
        skip_bad: bad records to leave out at most; the report names them.

    Returns:
        The examples, without those in which nothing is left to learn, and the counts.

    Raises:
        ValueError: bad records (all of them at once), a tokenizer without an end-of-text token,
            an answer that does not go on from the prompt that the chat template writes.
        TypeError: another tokenizer.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, found {max_length}")
    check_skip_bad(skip_bad)
    encoder = _Encoder(
        as_tokenizer(tokenizer), max_length, completion_only, chat_prompts, parse_special
    )
    good, problems = indexed(records)
    what = "cannot encode the records"
    refuse(problems, what, skip_bad)
    examples: list[Example] = []
    truncated = longest = masked = 0
    for name, record in good:
        try:
            rows = encoder.rows(record, name)
        except ValueError as error:
            problems.append((name, str(error)))
            continue
        found = [Example(tuple(row.ids), tuple(row.labels)) for row in rows if row.learns()]
        examples += found
        masked += not found
        truncated += any(row.count > max_length for row in rows)
        longest = max([longest, *(row.count for row in rows)])
    refuse(problems, what, skip_bad)
    return examples, EncodeReport(
        documents=len(good),
        tokens=sum(len(example.input_ids) for example in examples),
        learned_tokens=sum(learned_labels(example.labels) for example in examples),
        truncated=truncated,
        fully_masked=masked,
        longest=longest,
        notes=(*encoder.said(), *([f"left out: {listed(problems)}"] if problems else [])),
    )


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Encode the beginning of a document: after the token the model wants there, if any."""
    tokenizer = as_tokenizer(tokenizer)
    return _begin(tokenizer) + tokenizer.encode(text, special=False)


def warn_of_control(tokenizer: Tokenizer, text: str, name: str) -> None:
    """Warn where a text that is encoded as plain text begins as the chat template's texts do."""
    control = name_pattern(tokenizer.control)
    first = control.match(text.lstrip())
    if first and first[0] in _openers(tokenizer):
        warnings.warn(
            f"{name} begins with the name of the control token {first[0]!r}, which is read as "
            "text; to read it as the token pass tokenizer.encode(text, special=False, "
            "parse_special=True), or a message and chat=True",
            stacklevel=4,
        )


def _openers(tokenizer: Tokenizer) -> set[str]:
    """Return the control tokens that the chat template writes."""
    if tokenizer.chat_template is None:
        return set()
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    try:
        text = tokenizer.render(turns, add_generation_prompt=False)
    except ValueError:  # a template that wants more than these
        text = tokenizer.chat_template
    return set(name_pattern(tokenizer.control).findall(text))


def _begin(tokenizer: Tokenizer) -> list[int]:
    begin = tokenizer.encode("")[:1]
    return begin if begin == [tokenizer.bos_id] else []


class _Row:
    """Ids and labels of one example, kept up to a limit and counted beyond."""

    def __init__(self, limit: int) -> None:
        self.limit, self.count = limit, 0
        self.ids: list[int] = []
        self.labels: list[int] = []

    def add(self, ids: Sequence[int], learned: Sequence[bool] | bool) -> None:
        """Add ids and whether each is learned, or all are."""
        self.count += len(ids)
        ids = ids[: max(0, self.limit - len(self.ids))]
        each = [learned] * len(ids) if isinstance(learned, bool) else learned
        self.labels += [i if known else IGNORE for i, known in zip(ids, each, strict=False)]
        self.ids += ids

    def learns(self) -> bool:
        """Whether anything is learned."""
        return learned_labels(self.labels) > 0


class _Encoder:
    """Encode one record after another and remember what there is to say."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_length: int,
        completion_only: bool,
        chat_prompts: bool,
        parse_special: bool | None,
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.completion_only, self.chat_prompts = completion_only, chat_prompts
        self.parse_special = parse_special
        self.notes: dict[str, list[str]] = {}  # names of records by what is to say of them
        self.ignored: dict[str, int] = {}
        self.control = name_pattern(tokenizer.control)
        self.begin = _begin(tokenizer)

    @functools.cached_property
    def openers(self) -> set[str]:
        """The control tokens that the chat template writes."""
        return _openers(self.tokenizer)

    def said(self) -> list[str]:
        """Return what there is to say of all the records."""
        found = [f"{note} ({joined(names, 3)})" for note, names in self.notes.items()]
        if self.ignored:
            fields = ", ".join(f"{key} ({n})" for key, n in list(self.ignored.items())[:10])
            more = ", …" if len(self.ignored) > 10 else ""
            found.append(f"ignored fields, with how many times they stand there: {fields}{more}")
        return found

    def note(self, what: str, name: str) -> None:
        """Remember something to say of a record."""
        self.notes.setdefault(what, []).append(name)

    def ignore(self, keys: Iterable[str]) -> None:
        """Remember fields that nothing reads."""
        for key in keys:
            self.ignored[key] = self.ignored.get(key, 0) + 1

    def rows(self, record: Mapping[str, Any], name: str) -> list[_Row]:
        """Return the examples of a record, cut, those without anything to learn too."""
        if "messages" in record:
            return self._chat(record["messages"], record, name)
        if self.chat_prompts and "prompt" in record:
            turns = (("user", record["prompt"]), ("assistant", record["completion"]))
            messages = [{"role": role, "content": content} for role, content in turns]
            return self._chat(messages, record, name)
        eos_id = self.tokenizer.eos_id
        if eos_id is None:
            raise ValueError("the tokenizer must have an eos_id to end it with, found None")
        data = ("text",) if "text" in record else ("prompt", "completion")
        self.ignore(k for k, v in record.items() if k not in data and v is not None)
        texts = [record[key] for key in data]
        return [self._document(texts, eos_id, name)]

    def _document(self, texts: Sequence[str], eos_id: int, name: str) -> _Row:
        """Encode a text, or a prompt and its completion."""
        tokenizer, whole = self.tokenizer, "".join(texts)
        parse = self._parses(whole, name)
        only = self.completion_only and len(texts) > 1
        row = _Row(self.max_length)
        first = self.control.match(whole) if parse else None
        if first is None or [tokenizer.control[first[0]]] != self.begin:
            row.add(self.begin, not only)
        if len(texts) > 1 and tokenizer.joins:
            for text, learned in zip(texts, (not only, True), strict=True):
                for ids, _ in tokenizer.pieces(text, parse_special=parse):
                    row.add(ids, learned)
        else:  # as one text: vocabularies that begin each with a space, or mark what goes on
            start = len(texts[0]) if only and texts[0] else -1
            for ids, ends in tokenizer.pieces(whole, parse_special=parse):
                row.add(ids, [end > start for end in ends])
        stops = [text for text, i in tokenizer.control.items() if i in tokenizer.stop_ids]
        if not (parse and whole.rstrip().endswith(tuple(stops))):
            row.add([eos_id], True)
        return row

    def _parses(self, text: str, name: str) -> bool:
        """Whether names of control tokens in a text are to be read as those tokens."""
        if self.parse_special is not None:
            parse = self.parse_special
        else:
            first = self.control.match(text.lstrip())
            parse = first is not None and first[0] in self.openers and self._names(text) > 1
            if parse:
                self.note(_PARSED, name)
        if not parse and self._names(text):
            self.note(_NAMED, name)
        return parse

    def _names(self, text: str) -> int:
        """Count the names of control tokens in a text, up to two."""
        return sum(1 for _ in zip(self.control.finditer(text), range(2), strict=False))

    def _chat(
        self, messages: list[dict[str, Any]], record: Mapping[str, Any], name: str
    ) -> list[_Row]:
        """Encode a conversation."""
        variables = self._variables(record)
        for message in messages:
            self._ignored_of(message)
        talk = Conversation(self.tokenizer, messages, variables)
        if talk.names_control:
            self.note(_NAMED, name)
        texts, notes = learned_texts(talk, messages, self.completion_only)
        for note in notes:
            self.note(note, name)
        rows, ended = [], False
        for text, ranges in texts:
            row = _Row(self.max_length)
            for ids, ends in talk.pieces(text):
                learned = [bisect_left(ranges, end) % 2 == 1 for end in ends]
                row.add(ids, learned)
                stops = self.tokenizer.stop_ids
                ended |= any(i in stops for i, known in zip(ids, learned, strict=True) if known)
            rows.append(row)
        if rows and not ended:
            self.note(_ENDLESS, name)
        return rows

    def _variables(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a record that the chat template reads."""
        given = {k: v for k, v in record.items() if v is not None}
        more = given.pop("chat_template_kwargs", {})
        if not isinstance(more, Mapping):
            raise ValueError(f"chat_template_kwargs must be an object, found {more!r:.60}")
        known = self.tokenizer.template_variables
        found = {k: v for k, v in chain(given.items(), more.items()) if k in known}
        for key in ("tools", "documents"):  # data sets keep these as text
            if isinstance(found.get(key), str):
                try:
                    found[key] = json.loads(found[key])
                except (ValueError, RecursionError) as error:
                    raise ValueError(
                        f"{key} must be JSON, found {found[key]!r:.60}: {error}"
                    ) from None
        data = {"messages", "prompt", "completion"}
        self.ignore(k for k in chain(given, more) if k not in found and k not in data)
        return found

    def _ignored_of(self, message: Mapping[str, Any]) -> None:
        """Remember the fields of a message that neither decide what is learned nor are read."""
        source, role = self.tokenizer.chat_template or "", message["role"]
        for key, value in message.items():
            if value is None or key in ("role", "content"):
                continue
            marks = key in MARKS and (role == "assistant" or not value)
            if not marks and not re.search(rf"\b{re.escape(key)}\b", source):
                self.ignore([f"messages.{key}" + (f" of {role} turns" if key in MARKS else "")])
