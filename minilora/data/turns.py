"""Which characters of a conversation's text are learned, under any chat template."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from minilora.data.examples import alike
from minilora.text import Conversation

MARKS = ("weight", "train", "trainable", "training", "loss", "loss_mask")  # 0 or false: not learned

Text = tuple[str, list[int]]  # and where what is learned begins, ends, begins again, …

SPLIT = "the chat template rewrites earlier turns, so each answer is an example of its own"
CHANGED = "the chat template leaves out or changes part of an answer"


def left_out(message: Mapping[str, Any]) -> bool:
    """Whether a message is marked as not to be learned."""
    return any(message.get(key) is not None and not message[key] for key in MARKS)


def learned_texts(
    talk: Conversation, messages: Sequence[Mapping[str, Any]], completion_only: bool
) -> tuple[list[Text], list[str]]:
    """Return a conversation's texts and what there is to say of them.

    An answer is learned from where its generation prompt ends to where the turn ends. One text
    holds them all, unless the template writes earlier turns otherwise once a conversation goes on:
    then each answer gets a text of its own, as it will be asked for. Without `completion_only` all
    is learned but the turns that are marked.
    """
    if not completion_only:
        text, ranges = _everything(talk, messages)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return [(text, ranges)], _changed(talk, answers, text)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and not left_out(m)]
    if not turns:
        return [], []
    stages = [stage for i in turns for stage in (talk.text(i, prompt=True), talk.text(i + 1))]
    if all(b.startswith(a) for a, b in itertools.pairwise(stages)):
        return [(stages[-1], [len(s) for s in stages])], _changed(talk, turns, stages[-1])
    texts = [_answer(talk, i) for i in turns]
    notes = [SPLIT] if len(turns) > 1 else []
    for i, (text, _) in zip(turns, texts, strict=True):
        notes += _changed(talk, [i], text)
    return texts, notes


def _changed(talk: Conversation, turns: Sequence[int], text: str) -> list[str]:
    """Return a note if the text lacks what an answer says; white space does not count."""
    written = "".join(text.split())
    lacking = any("".join(talk.content(i).split()) not in written for i in turns)
    return [CHANGED] if lacking else []


def _answer(talk: Conversation, turn: int) -> Text:
    """Return the text that ends with one answer, which alone is learned.

    Where the template begins an answer in the prompt ("<think>") and cuts that part out of finished
    turns, the answer follows the prompt as it will be generated.
    """
    before, after = talk.text(turn, prompt=True), talk.text(turn + 1)
    if after.startswith(before):
        return after, [len(before), len(after)]
    begun, content = before[alike(before, after) :], talk.content(turn).lstrip()
    if not begun.strip() or not content.startswith(begun.strip()):
        raise ValueError(
            f"messages[{turn}]: an answer must go on from the prompt that the chat "
            f"template writes, which ends with {begun[-40:]!r}, found {content[:40]!r}; begin the "
            f"content with that, or use another template"
        )
    rest = content[len(begun.strip()) :]
    rest = rest.lstrip() if begun != begun.rstrip() else rest
    text = before + rest + talk.ending(turn)
    return text, [len(before), len(text)]


def _everything(talk: Conversation, messages: Sequence[Mapping[str, Any]]) -> Text:
    """Return the whole text, learned but for the turns that are marked."""
    text = talk.text()
    if messages[-1]["role"] == "assistant":
        with contextlib.suppress(ValueError):  # no prompt to go on from: as the template writes it
            text = _answer(talk, len(messages) - 1)[0]
    ranges = [-1]
    for i, message in enumerate(messages):
        if left_out(message):
            before = talk.text(i, prompt=message["role"] == "assistant") if i else ""
            after = talk.text(i + 1) if i + 1 < len(messages) else text
            if not (after.startswith(before) and text.startswith(after)):
                raise ValueError(
                    f"messages[{i}]: a turn that is marked must keep its place in the "
                    "text, found that the chat template rewrites it later; learn answers alone "
                    "(completion_only=True)"
                )
            ranges += [len(before), len(after)]
    return text, [*ranges, len(text)]
