"""Answers of several contenders to the same questions, judged against what is learned there."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from minilora.data import IGNORE, Example, first_learned
from minilora.files import short, ticking
from minilora.running import FEWEST, generate

Check = Callable[[str, str], bool]  # the answer written, and the one in the data


@dataclass(frozen=True)
class AnswerDifference:
    """Right answers of two contenders to the same questions."""

    first: str
    second: str
    only_first: int  # questions that only the first answers rightly
    only_second: int
    p: float  # how likely at least so uneven a split is if neither is better (McNemar, two-sided)
    # The share of these questions that the second would win if both answers were equally long, and
    # the p of its difference from a half; None with too few of them. See `length_controlled`.
    even: tuple[float, float] | None = None

    def __str__(self) -> str:
        verdict = "can't tell" if self.p > 0.05 else "a clear difference"
        even = ""
        if self.even is not None:
            share, p = self.even
            even = f"\n  with answers of one length it would win {share:.0%} of these: p = {p:.3g}"
        return (
            f"questions that only one gets right: {self.second} {self.only_second}, {self.first} "
            f"{self.only_first}; p = {self.p:.3g}, {verdict}{even}"
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


def answers_of(
    model: nn.Module,
    examples: Sequence[Example],
    tokenizer: Any,
    most: int,
    how: Mapping[str, Any],
) -> list[list[int]]:
    """Return the ids that a model writes after what precedes the first learned token.

    `most` tokens at most; `how` has the batch_size, whether to show the progress, and `who` it is.
    """
    prompts = [list(example.input_ids[: first_learned(example.labels)]) for example in examples]
    stops = sorted(tokenizer.stop_ids)
    found = []
    with ticking(f"{how['who']} answering", len(prompts), "questions", how["progress"]) as tick:
        for start in range(0, len(prompts), how["batch_size"]):
            rows = prompts[start : start + how["batch_size"]]
            found += generate(model, rows, max_new_tokens=most, stop=stops)
            tick(len(rows))
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
        learned = example.labels[first_learned(example.labels) :]
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
        both = zip(pairs, answers[names[0]], answers[name], strict=True)
        apart = [(b, len(after) - len(before)) for (a, b), before, after in both if a != b]
        differences.append(
            AnswerDifference(
                names[0], name, mine, theirs, mcnemar(mine, theirs), length_controlled(apart)
            )
        )
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


def length_controlled(apart: Sequence[tuple[bool, int]]) -> tuple[float, float] | None:
    """Return how often the second of two answers would win if both were equally long, and a p.

    A logistic regression of who wins on the difference of lengths, at no difference, as in Dubois
    et al. 2024 (arXiv:2404.04475); p by the ratio of likelihoods with and without the constant.
    `apart` holds, of each question that one of two answered rightly, whether the second did, and
    how many tokens longer its answer is. None for fewer than 10, or where lengths never differ.
    """
    lengths = np.array([longer for _, longer in apart], dtype=np.float64)
    if len(apart) < FEWEST or not lengths.any():
        return None
    won = np.array([won for won, _ in apart], dtype=np.float64)
    slope = np.tanh(lengths / lengths.std()) if lengths.std() > 0 else np.sign(lengths)
    full, constant = _logistic(np.stack([np.ones_like(slope), slope], 1), won)
    alone, _ = _logistic(slope[:, None], won)
    p = math.erfc(math.sqrt(max(0.0, full - alone)))  # of χ² = 2 (full − alone), 1 degree
    return 1 / (1 + math.exp(-constant)), p


def _logistic(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Fit by Newton's method; return the log-likelihood and the first coefficient.

    A weak penalty keeps coefficients finite where the data would not.
    """
    weights, penalty = np.zeros(x.shape[1]), 0.01 * np.eye(x.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ weights))
        curvature = (x.T * (p * (1 - p))) @ x + penalty
        weights = weights + np.linalg.solve(curvature, x.T @ (y - p) - penalty @ weights)
    z = x @ weights
    return float((y * z - np.logaddexp(0, z)).sum()), float(weights[0])
