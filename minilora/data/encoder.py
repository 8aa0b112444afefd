"""Encode texts and conversations to ids and labels, and remember what there is to say of them."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

from minilora.data.examples import IGNORE, Example, learned_labels
from minilora.data.problems import check_skip_bad, joined
from minilora.data.turns import MARKS, learned_texts, left_out
from minilora.text import REASONING, Conversation, Tokenizer, as_tokenizer, name_pattern

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
_INSIDE = (
    "an answer begins inside a token of its prompt, so it is learned behind other tokens than it "
    "will be asked with; let it begin where a word does"
)
_PARSED_CALLS = (
    "the arguments of calls are JSON as text, and are read as objects, since the chat template "
    "writes them as JSON"
)
_LEFT_OUT = "answers that are marked (weight, train, …) are not learned"


@dataclass(frozen=True)
class Encoding:
    """How records become examples; each option is explained in `read_data`."""

    max_length: int
    completion_only: bool = True
    chat_prompts: bool = False
    parse_special: bool | None = None
    skip_bad: int = 0
    fields: Mapping[str, str] | None = None
    system: str | None = None
    last_turn: bool = False

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, found {self.max_length}")
        if self.last_turn and not self.completion_only:
            raise ValueError(
                "--last-turn learns one answer alone, found --all-tokens too, which learns all; "
                "leave one out (in Python: last_turn=True, completion_only=False)"
            )
        check_skip_bad(self.skip_bad)


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Encode the beginning of a document: after the token the model wants there, if any."""
    tokenizer = as_tokenizer(tokenizer)
    return _begin(tokenizer) + tokenizer.encode(text, special=False)


def warn_of_control(tokenizer: Tokenizer, text: str, name: str) -> None:
    """Warn where a text that is encoded as plain text begins as the chat template's texts do."""
    first = name_pattern(tokenizer.control).match(text.lstrip())
    if first and first[0] in _openers(tokenizer)[0]:
        warnings.warn(
            f"{name} begins with the name of the control token {first[0]!r}, which is read as "
            "text; to read it as the token pass tokenizer.encode(text, special=False, "
            "parse_special=True), or a message and chat=True",
            stacklevel=4,
        )


def _openers(tokenizer: Tokenizer) -> tuple[set[str], tuple[str, ...]]:
    """Return the control tokens that the chat template writes, and words that it begins with."""
    if tokenizer.chat_template is None:
        return set(), ()
    begins = []
    turns = [{"role": role, "content": "qqprobeqq"} for role in ("system", "user", "assistant")]
    text = tokenizer.chat_template  # of one that wants more than these
    for start in (0, 1):
        with contextlib.suppress(ValueError):  # as of a template without system messages
            text = tokenizer.render(turns[start:], add_generation_prompt=False)
            begins.append(text.partition("qqprobeqq")[0].strip())
    names = name_pattern(tokenizer.control)
    words = [begin for begin in begins if begin and not names.match(begin)]
    return set(names.findall(text)), tuple(words)


def _begin(tokenizer: Tokenizer) -> list[int]:
    begin = tokenizer.encode("")[:1]
    return begin if begin == [tokenizer.bos_id] else []


def _with_objects(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return messages with calls' arguments that are JSON objects as text parsed, and the texts."""
    texts: list[str] = []

    def parsed(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        call = {**call, "function": parsed(call["function"])} if "function" in call else call
        with contextlib.suppress(ValueError, RecursionError, TypeError):
            found = json.loads(text := call.get("arguments"))
            if isinstance(found, dict):
                texts.append(text)
                return {**call, "arguments": found}
        return call

    found = []
    for message in messages:
        calls = message.get("tool_calls")
        made = {"tool_calls": [parsed(call) for call in calls]} if isinstance(calls, list) else {}
        found.append({**message, **made})
    return found, texts


def _is_inside(
    start: int, tokens: list[tuple[int, int]], text: str, encode: Callable[[str], Iterator[Any]]
) -> bool:
    """Return whether a text up to `start` has other ids alone than as `tokens` of the whole."""
    alone = [i for ids, _ in encode(text[:start]) for i in ids]
    return alone != [i for i, end in tokens if end <= start]


class Row:
    """Ids and labels of one example, kept up to a limit and counted beyond."""

    def __init__(self, limit: int) -> None:
        self.limit, self.count = limit, 0
        self.ids: list[int] = []
        self.labels: list[int] = []

    def add(self, ids: Sequence[int], labels: Sequence[int] | None = None) -> None:
        """Add ids and their labels; None: they are not learned."""
        self.count += len(ids)
        room = max(0, self.limit - len(self.ids))
        self.labels += [IGNORE] * min(room, len(ids)) if labels is None else labels[:room]
        self.ids += ids[:room]

    def learns(self) -> bool:
        """Whether anything is learned."""
        return learned_labels(self.labels) > 0

    def example(self) -> Example:
        """Return what the row holds."""
        return Example(tuple(self.ids), tuple(self.labels))


class Encoder:
    """Encode one record after another."""

    def __init__(self, tokenizer: Any, options: Encoding) -> None:
        self.tokenizer, self.options = as_tokenizer(tokenizer), options
        self._notes: dict[str, list[str]] = {}  # names of records by what is to say of them
        self._ignored: dict[str, int] = {}
        self._control = name_pattern(self.tokenizer.control)
        self._begin = _begin(self.tokenizer)

    @functools.cached_property
    def _openers(self) -> tuple[set[str], tuple[str, ...]]:
        return _openers(self.tokenizer)

    def said(self) -> list[str]:
        """Return what there is to say of all the records."""
        found = [f"{note} ({joined(names, 3)})" for note, names in self._notes.items()]
        if self._ignored:
            fields = ", ".join(f"{key} ({n})" for key, n in list(self._ignored.items())[:10])
            more = ", …" if len(self._ignored) > 10 else ""
            found.append(f"ignored fields, with how often they occur: {fields}{more}")
        return found

    def ignore(self, fields: Mapping[str, Any], used: Iterable[str] = ()) -> None:
        """Remember fields that nothing reads."""
        for key, value in fields.items():
            if value is not None and key not in used:
                self._ignored[key] = self._ignored.get(key, 0) + 1

    def note(self, what: str, name: str) -> None:
        """Remember what there is to say of a record."""
        names = self._notes.setdefault(what, [])
        if names[-1:] != [name]:  # as of two answers of one record
            names.append(name)

    def text(self, texts: Sequence[str], name: str, limit: int) -> Row:
        """Encode a text, or a prompt and its completion, and keep up to `limit` tokens."""
        tokenizer, whole = self.tokenizer, "".join(texts)
        if tokenizer.eos_id is None:
            raise ValueError("the tokenizer must have an eos_id to end it with, found None")
        parse = self._parses(whole, name)
        only = self.options.completion_only and len(texts) > 1
        row = Row(limit)
        first = self._control.match(whole) if parse else None
        if first is None or [tokenizer.control[first[0]]] != self._begin:
            row.add(self._begin, None if only else self._begin)
        if len(texts) > 1 and tokenizer.joins:
            for text, learned in zip(texts, (not only, True), strict=True):
                for ids, _ in tokenizer.pieces(text, parse_special=parse):
                    row.add(ids, ids if learned else None)
        else:  # as one text: vocabularies that begin each with a space, or mark what goes on
            start = len(texts[0]) if only and texts[0] else -1
            encode = functools.partial(tokenizer.pieces, parse_special=parse)
            tokens: list[tuple[int, int]] = []
            for ids, ends in encode(whole):
                tokens += zip(ids, ends, strict=True)
                row.add(ids, [i if e > start else IGNORE for i, e in zip(ids, ends, strict=True)])
            if start > 0 and _is_inside(start, tokens, whole, encode):
                self.note(_INSIDE, name)
        stops = [text for text, i in tokenizer.control.items() if i in tokenizer.stop_ids]
        if not (parse and whole.rstrip().endswith(tuple(stops))):
            row.add([tokenizer.eos_id], [tokenizer.eos_id])
        return row

    def _parses(self, text: str, name: str) -> bool:
        """Whether names of control tokens in a text are to be read as those tokens."""
        parse = self.options.parse_special
        names = [] if parse else self._control.findall(text)
        if parse is None:
            first = self._control.match(text.lstrip())
            control, begins = self._openers
            formatted = first is not None and first[0] in control and len(names) > 1
            parse = formatted or (names != [] and text.lstrip().startswith(begins))
            if parse:
                self.note(_PARSED, name)
        if names and not parse:
            self.note(_NAMED, name)
        return parse

    def chat(
        self, messages: list[dict[str, Any]], record: Mapping[str, Any], name: str, asked: int = 0
    ) -> list[Row]:
        """Encode a conversation, whose template may read other fields of the record.

        The first `asked` messages are the prompt: their answers are learned as other turns are.
        """
        variables = self._variables(record)
        if variables:
            self.note(f"the chat template reads {', '.join(variables)}", name)
        if any(left_out(m) for m in messages if m["role"] == "assistant"):
            self.note(_LEFT_OUT, name)
        if self.options.completion_only:
            unlearned = [
                {**m, "weight": 0} if m["role"] == "assistant" else m for m in messages[:asked]
            ]
            messages = unlearned + messages[asked:]
        if self.options.system is not None and messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": self.options.system}, *messages]
        if self.options.last_turn:
            last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
            messages = [m if i == last else {**m, "weight": 0} for i, m in enumerate(messages)]
        for message in messages:
            self._ignore_of(message)
        messages = self._objects(messages, variables, name)
        talk = Conversation(self.tokenizer, messages, variables)
        texts, notes = learned_texts(talk, messages, self.options.completion_only)
        for note in [_NAMED] * talk.names_control + notes:
            self.note(note, name)
        rows, ended = [], False
        for text, ranges in texts:
            rows.append(row := Row(self.options.max_length))
            for ids, ends in self._asked(talk, text, ranges, name):
                learned = [bisect_left(ranges, end) % 2 == 1 for end in ends]
                labels = [i if known else IGNORE for i, known in zip(ids, learned, strict=True)]
                ended |= not self.tokenizer.stop_ids.isdisjoint(labels)
                row.add(ids, labels)
        if rows and not ended:
            self.note(_ENDLESS, name)
        return rows

    def _asked(
        self, talk: Conversation, text: str, ranges: Sequence[int], name: str
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Yield the ids of a text and the character after each, each answer's from its own start.

        It will be asked for behind its prompt alone, whose last token must not reach into it.
        """
        starts = ranges[::2] if self.options.completion_only else []
        if self.tokenizer.joins:
            for begin, end in pairwise([0, *starts, len(text)]):
                for ids, ends in talk.pieces(text[begin:end]):
                    yield ids, [begin + each for each in ends]
            return
        tokens: list[tuple[int, int]] = []
        for ids, ends in talk.pieces(text):
            tokens += zip(ids, ends, strict=True)
            yield ids, ends
        ended = {end for _, end in tokens}  # encoding each prompt again takes as long
        if any(_is_inside(s, tokens, text, talk.pieces) for s in starts if s not in ended):
            self.note(_INSIDE, name)

    def _objects(
        self, messages: list[dict[str, Any]], variables: Mapping[str, Any], name: str
    ) -> list[dict[str, Any]]:
        """Parse arguments of calls that are JSON as text, where the template would quote them."""
        parsed, texts = _with_objects(messages)
        if not texts:
            return messages
        try:
            written = self.tokenizer.render(messages, add_generation_prompt=False, **variables)
        except ValueError:
            written = None
        quoted = [json.dumps(text, ensure_ascii=asc) for text in texts for asc in (True, False)]
        if written is not None and not any(each in written for each in quoted):
            return messages
        self.note(_PARSED_CALLS, name)
        return parsed

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
        for fields in (given, dict.fromkeys(more, True)):
            self.ignore(fields, {*found, "messages", "prompt", "completion"})
        return found

    def _ignore_of(self, message: Mapping[str, Any]) -> None:
        """Remember the fields of a message that neither decide what is learned nor are read."""
        source, role = "\n".join(self.tokenizer.template_sources), message["role"]
        for key, value in message.items():
            marks = key in MARKS and (role == "assistant" or not value)
            if not marks and not _is_read(key, source):
                self.ignore({f"messages.{key}{f' of {role} turns' * (key in MARKS)}": value})


def _is_read(key: str, source: str) -> bool:
    """Whether a template reads a field of messages, as far as its source tells."""
    word = re.escape(key)
    if key in REASONING:  # words of prose too, so as fields alone; two of the names are always set
        words = "|".join({word, *REASONING[:2]})
        return bool(re.search(rf"""(\.|\[['"]|get\(['"])({words})\b""", source))
    return key in ("role", "content") or bool(re.search(rf"\b{word}\b", source))
