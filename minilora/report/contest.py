"""Which of several adapters is better on held-out data, with how sure that is.

All are measured on the same examples, so differences count, example by example: intervals from a
paired bootstrap (Efron and Tibshirani 1993, chapter 13), answers by McNemar's exact test.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minilora.data import Example, as_examples
from minilora.files import short, write_json
from minilora.lora import Survey
from minilora.report.answers import AnswerDifference, Check, answers_of, judge_of, start_of, told
from minilora.report.tokens import decode, token_losses
from minilora.running import BASE
from minilora.text import as_tokenizer

RESAMPLES = 10_000
FEWEST = 10  # examples from which an interval means something
BEFORE = 24  # tokens shown of an example before and after where learning begins
SHOWN = 3  # examples that gained, and that lost, most


@dataclass(frozen=True)
class Difference:
    """How the mean loss of one contender differs from another's, in nats per learned token.

    Attributes:
        first, second: their names.
        change: second − first; below 0 the second is better.
        low, high: 95 % interval of the change.
        examples, tokens: that it is measured on.
        more: about how many more examples would make the interval exclude 0; None where it does,
            or where the change is 0.
    """

    first: str
    second: str
    change: float
    low: float
    high: float
    examples: int
    tokens: int
    more: int | None

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0, on enough examples for one."""
        return self.examples >= FEWEST and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        found = f"{self.change:+.4f} nats a token, 95 % {self.low:+.4f} to {self.high:+.4f}"
        if self.clear:
            better, worse = (self.first, self.second)[:: 1 if self.change > 0 else -1]
            return f"{better} is better than {worse}: {found}"
        more = f"; about {self.more} more examples would" if self.more is not None else ""
        if self.examples < FEWEST:
            more = f"; fewer than {FEWEST} examples never can"
        return f"{self.first} or {self.second}, can't tell{more}: {found}"


@dataclass(frozen=True)
class ShownChange:
    """An example whose loss changed much: its number, text, and change in nats per token."""

    example: int
    text: str
    change: float


@dataclass(frozen=True)
class Contest:
    """What `minilora.compare` found; prints as text.

    Attributes:
        losses: mean loss of each contender on the data.
        differences: of every later contender from the first.
        outside: the same on text outside the task.
        gaps: how much of each contender's advantage over the first on training data is missing on
            held-out data, in nats per token.
        right: answers that each got right, where they were asked for.
        answers: how the later contenders' answers differ from the first's.
        lengths: mean tokens of each contender's answers.
        cut: answers of each that were cut off at `max_new_tokens`.
        gained, lost: examples whose loss fell and rose most, from the first contender to the last.
    """

    losses: Mapping[str, float]
    differences: tuple[Difference, ...]
    outside: tuple[Difference, ...] = ()
    gaps: Mapping[str, float] = dataclasses.field(default_factory=dict)
    right: Mapping[str, int] = dataclasses.field(default_factory=dict)
    answers: tuple[AnswerDifference, ...] = ()
    lengths: Mapping[str, float] = dataclasses.field(default_factory=dict)
    cut: Mapping[str, int] = dataclasses.field(default_factory=dict)
    gained: tuple[ShownChange, ...] = ()
    lost: tuple[ShownChange, ...] = ()

    def __str__(self) -> str:
        one = self.differences[0]
        width = max(map(len, self.losses))
        lines = [f"held-out loss over {one.tokens} tokens of {one.examples} examples:"]
        lines += [f"  {name:<{width}}  {loss:.4f}" for name, loss in self.losses.items()]
        lines += map(str, self.differences)
        lines += [f"outside the task: {difference}" for difference in self.outside]
        lines += [
            f"over-fitting: of what {name} gains on training data, {gap:+.4f} nats a token are not "
            "gained on held-out data"
            for name, gap in self.gaps.items()
        ]
        lines += [
            f"{name}: {right} of {one.examples} answers right, {self.lengths[name]:.1f} tokens "
            f"each, {self.cut[name]} cut off"
            for name, right in self.right.items()
        ]
        lines += map(str, self.answers)
        for title, examples in (("gained", self.gained), ("lost", self.lost)):
            for each in examples:
                lines.append(f"{title} most, example {each.example}: {each.change:+.3f} a token")
                lines.append(f"  {short(each.text)}")
        return "\n".join(lines)

    def to_json(self, file: str | Path) -> Path:
        """Write everything as JSON and return the path."""
        return write_json(file, json.loads(json.dumps(dataclasses.asdict(self))))


@torch.no_grad()
def compare(
    model: nn.Module,
    contenders: Sequence[str | None],
    data: Iterable[Any],
    *,
    outside: Iterable[Any] | None = None,
    train: Iterable[Any] | None = None,
    tokenizer: Any = None,
    right: str | Check | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Contest:
    """Compare adapters, or the base, on the same held-out examples.

    >>> print(minilora.compare(model, [None, "v1", "v2"], examples))

    The mean loss is Σ loss / Σ learned tokens; its interval comes from drawing examples, with all
    their tokens, anew. Equal seeds give equal numbers.

    Args:
        model: holds the adapters, unmerged; left as it was.
        contenders: two or more adapters' names; None or `"base"` is the base. The others are held
            against the first.
        data: held-out examples as for `evaluate`.
        outside: examples outside the task, for what was forgotten.
        train: examples of the training data, for over-fitting.
        tokenizer: to show texts and to write answers.
        right: also let each contender answer what comes before an example's first learned token,
            greedily, and count what is right: `"exact"` (the learned text, of a conversation the
            first learned turn, white space at the ends left out), a regular expression whose first
            group, or match, must be the same in both, or a function of the answer and the learned
            text. Needs a tokenizer.
        max_new_tokens: of an answer, at most.
        batch_size: examples at a time; changes no more than rounding.
        seed, resamples: of the bootstrap.

    Returns:
        Losses, differences with intervals, answers, and the examples that changed most.

    Raises:
        ValueError: fewer than two contenders, one twice or unknown; no data; `right` without a
            tokenizer or no expression.
        RuntimeError: adapters are merged.
    """
    survey = Survey(model)
    survey.require_layers("compare")
    survey.require_unmerged("compare")
    survey.require_finite()
    names = _names(survey, contenders)
    judge = None if right is None else judge_of(right, tokenizer)
    tokenizer = None if tokenizer is None else as_tokenizer(tokenizer)
    sets = {"data": data, "outside": outside, "train": train}
    examples = {key: as_examples(some) for key, some in sets.items() if some is not None}
    if any(not some for some in examples.values()):
        raise ValueError("data must hold at least one example, found none")
    losses: dict[str, dict[str, list[Tensor]]] = {key: {} for key in examples}
    answers: dict[str, list[list[int]]] = {}
    with survey.switched():
        for name in names:
            survey.activate(() if name == BASE else (name,))
            if judge is not None:  # first: a context that is too short is found at once
                answers[name] = answers_of(
                    model, examples["data"], tokenizer, max_new_tokens, batch_size
                )
            for key, some in examples.items():
                losses[key][name] = token_losses(model, some, batch_size=batch_size)
    draws = _Bootstrap(seed, resamples)
    found = {key: draws.differences(names, each) for key, each in losses.items()}
    change = _per_example(losses["data"][names[0]], losses["data"][names[-1]])
    order = sorted(range(len(change)), key=lambda i: (change[i], i))
    shown = [ShownChange(i, _text(examples["data"][i], tokenizer), change[i]) for i in order]
    gaps = {}
    for held, trained in zip(found["data"], found.get("train", ()), strict=False):
        gaps[held.second] = held.change - trained.change
    extra: dict[str, Any] = {}
    if judge is not None:
        extra = told(names, answers, examples["data"], tokenizer, judge)
        extra["cut"] = {
            name: sum(len(ids) == max_new_tokens for ids in each) for name, each in answers.items()
        }
    return Contest(
        {name: _mean(each) for name, each in losses["data"].items()},
        found["data"],
        found.get("outside", ()),
        gaps,
        gained=tuple(each for each in shown[:SHOWN] if each.change < 0),
        lost=tuple(each for each in shown[::-1][:SHOWN] if each.change > 0),
        **extra,
    )


def _names(survey: Survey, contenders: Sequence[str | None]) -> list[str]:
    names = [BASE if name is None else name for name in contenders]
    if isinstance(contenders, str) or len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"compare() needs two or more different contenders, found {short(contenders)}"
        )
    survey.known([name for name in names if name != BASE], "compare")
    return names


def _mean(losses: Sequence[Tensor]) -> float:
    total = math.fsum(float(each.double().sum()) for each in losses)
    return total / sum(len(each) for each in losses)


def _per_example(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[float]:
    """Return each example's change in nats per token."""
    both = zip(first, second, strict=True)
    return [float((b.double() - a.double()).mean()) for a, b in both]


class _Bootstrap:
    """Intervals by drawing examples with replacement, the same draws for all differences."""

    def __init__(self, seed: int, resamples: int) -> None:
        self.seed, self.resamples = seed, resamples

    def differences(
        self, names: Sequence[str], losses: Mapping[str, Sequence[Tensor]]
    ) -> tuple[Difference, ...]:
        """Return how all but the first contender differ from the first."""
        first = losses[names[0]]
        counts = np.array([len(each) for each in first], dtype=np.float64)
        return tuple(
            self._difference(names[0], name, first, losses[name], counts) for name in names[1:]
        )

    def _difference(
        self,
        first: str,
        second: str,
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        counts: np.ndarray,
    ) -> Difference:
        both = zip(before, after, strict=True)
        sums = np.array([float((b.double() - a.double()).sum()) for a, b in both])
        change, number = float(sums.sum() / counts.sum()), len(sums)
        draw = np.random.default_rng(self.seed)
        means = np.empty(self.resamples)
        for i in range(self.resamples):
            rows = draw.integers(0, number, number)
            means[i] = sums[rows].sum() / counts[rows].sum()
        # Percentiles are too narrow for few examples, by about these two factors.
        wide = _t975(max(1, number - 1)) / 1.96 * math.sqrt(number / max(1, number - 1))
        ends = np.quantile(means, (0.025, 0.975))
        low, high = (change + wide * (float(end) - change) for end in ends)
        more = None
        if low <= 0 <= high and change != 0:  # the interval narrows with the root of the number
            half = max(high - change, change - low)
            more = max(1, math.ceil(number * ((half / abs(change)) ** 2 - 1)))
        return Difference(first, second, change, low, high, number, int(counts.sum()), more)


def _t975(degrees: int) -> float:
    """Return Student's t at 0.975; Abramowitz and Stegun 1964, 26.7.5, from 6 degrees on."""
    exact = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706)
    if degrees <= len(exact):
        return exact[degrees - 1]
    z = 1.959964
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def _text(example: Example, tokenizer: Any) -> str:
    """Show what is learned first, and a little of what precedes it."""
    start = start_of(example)
    ids = example.input_ids[max(0, start - BEFORE) : start + BEFORE]
    return " ".join(f"<{i}>" for i in ids) if tokenizer is None else decode(tokenizer, ids)
