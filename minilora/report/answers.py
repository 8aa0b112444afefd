"""Answers of several contenders to the same questions, judged against what is learned there."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from minilora.data import IGNORE, Example
from minilora.files import short
from minilora.running import generate

Check = Callable[[str, str], bool]  # the answer written, and the one in the data


@dataclass(frozen=True)
class AnswerDifference:
    """Right answers of two contenders to the same questions.

    Attributes:
        only_first, only_second: questions that only one of them answers rightly.
        p: how likely at least so uneven a split is if neither is better (McNemar, two-sided).
    """

    first: str
    second: str
    only_first: int
    only_second: int
    p: float

    def __str__(self) -> str:
        verdict = "can't tell" if self.p > 0.05 else "a clear difference"
        return (
            f"{self.second} answers {self.only_second} rightly that {self.first} does not, and "
            f"{self.only_first} the other way round: p = {self.p:.3g}, {verdict}"
        )


def judge_of(right: str | Check, tokenizer: Any) -> Check:
    """Return the function that `right` means; see `minilora.compare`."""
    if tokenizer is None:
        raise ValueError("right=… compares texts and needs a tokenizer, found None")
    if not isinstance(right, str):
        return right
    if right == "exact":
        return lambda found, wanted: found.strip() == wanted.strip()
    try:
        pattern = re.compile(right)
    except re.error as error:
        raise ValueError(
            f"right must be 'exact', a regular expression or a function, found {short(right)}: "
            f"{error}"
        ) from None

    def same(found: str, wanted: str) -> bool:
        both = [pattern.search(text) for text in (found, wanted)]
        parts = [None if m is None else m[1] if pattern.groups else m[0] for m in both]
        return parts[0] is not None and parts[0] == parts[1]

    return same


def start_of(example: Example) -> int:
    """Return where the first learned token stands."""
    return next(i for i, label in enumerate(example.labels) if i and label != IGNORE)


def answers_of(
    model: nn.Module, examples: Sequence[Example], tokenizer: Any, most: int, batch_size: int
) -> list[list[int]]:
    """Return the ids that a model writes after what precedes the first learned token."""
    prompts = [list(example.input_ids[: start_of(example)]) for example in examples]
    stops = sorted(tokenizer.stop_ids)
    found = []
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        found += generate(model, rows, max_new_tokens=most, stop=stops)
    return found


def told(
    names: Sequence[str],
    answers: Mapping[str, list[list[int]]],
    examples: Sequence[Example],
    tokenizer: Any,
    judge: Check,
) -> dict[str, Any]:
    """Return what the answers say of the contenders."""
    wanted = []
    ends = {IGNORE, *tokenizer.stop_ids}  # the next turn, or where writing ends
    for example in examples:
        learned = example.labels[start_of(example) :]
        ids = list(itertools.takewhile(lambda i: i not in ends, learned))
        wanted.append(tokenizer.decode(ids))
    good = {
        name: [
            bool(judge(tokenizer.decode(ids), text))
            for ids, text in zip(answers[name], wanted, strict=True)
        ]
        for name in names
    }
    first = good[names[0]]
    differences = []
    for name in names[1:]:
        pairs = list(zip(first, good[name], strict=True))
        mine, theirs = pairs.count((True, False)), pairs.count((False, True))
        differences.append(AnswerDifference(names[0], name, mine, theirs, mcnemar(mine, theirs)))
    return {
        "right": {name: sum(each) for name, each in good.items()},
        "answers": tuple(differences),
        "lengths": {name: sum(map(len, answers[name])) / len(examples) for name in names},
    }


def mcnemar(first: int, second: int) -> float:
    """Return the two-sided p of a split of discordant pairs under p = 1/2, exactly."""
    both = first + second
    tail = sum(math.comb(both, k) for k in range(min(first, second) + 1))
    return min(1.0, 2 * tail / 2**both)
