"""Which of several adapters is better on held-out data, with how sure that is.

All are measured on the same examples, so differences count, example by example: intervals from a
paired bootstrap (Efron and Tibshirani 1993, chapter 13), answers by McNemar's exact test.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minilora.data import IGNORE, Example, as_examples
from minilora.files import short, write_json
from minilora.lora import Survey
from minilora.report.tokens import decode, token_losses
from minilora.running import BASE, generate

RESAMPLES = 10_000
SHOWN = 3  # examples that gained, and that lost, most
Check = Callable[[str, str], bool]  # the answer written, and the one in the data


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
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        found = f"{self.change:+.4f} nats a token, 95 % {self.low:+.4f} to {self.high:+.4f}"
        if self.clear:
            better, worse = (self.first, self.second)[:: 1 if self.change > 0 else -1]
            return f"{better} is better than {worse}: {found}"
        more = f"; about {self.more} more examples would" if self.more is not None else ""
        return f"{self.first} or {self.second}, can't tell{more}: {found}"


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
        gained, lost: examples whose loss fell and rose most, from the first contender to the last.
    """

    losses: Mapping[str, float]
    differences: tuple[Difference, ...]
    outside: tuple[Difference, ...] = ()
    gaps: Mapping[str, float] = dataclasses.field(default_factory=dict)
    right: Mapping[str, int] = dataclasses.field(default_factory=dict)
    answers: tuple[AnswerDifference, ...] = ()
    lengths: Mapping[str, float] = dataclasses.field(default_factory=dict)
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
            f"{name}: {right} of {one.examples} answers right, {self.lengths[name]:.1f} tokens each"
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
            greedily, and count what is right: `"exact"` (the learned text, white space at the ends
            left out), a regular expression whose first group, or match, must be the same in both,
            or a function of the answer and the learned text. Needs a tokenizer.
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
    judge = None if right is None else _judge(right, tokenizer)
    sets = {"data": data, "outside": outside, "train": train}
    examples = {key: as_examples(some) for key, some in sets.items() if some is not None}
    if any(not some for some in examples.values()):
        raise ValueError("data must hold at least one example, found none")
    losses: dict[str, dict[str, list[Tensor]]] = {key: {} for key in examples}
    answers: dict[str, list[list[int]]] = {}
    with survey.switched():
        for name in names:
            survey.activate(() if name == BASE else (name,))
            for key, some in examples.items():
                losses[key][name] = token_losses(model, some, batch_size=batch_size)
            if judge is not None:
                answers[name] = _answers(
                    model, examples["data"], tokenizer, max_new_tokens, batch_size
                )
    draws = _Bootstrap(seed, resamples)
    found = {key: draws.differences(names, each) for key, each in losses.items()}
    change = _per_example(losses["data"][names[0]], losses["data"][names[-1]])
    order = sorted(range(len(change)), key=lambda i: (change[i], i))
    shown = [ShownChange(i, _text(examples["data"][i], tokenizer), change[i]) for i in order]
    gaps = {}
    for held, trained in zip(found["data"], found.get("train", ()), strict=False):
        gaps[held.second] = held.change - trained.change
    told = {}
    if judge is not None:
        told = _told(names, answers, examples["data"], tokenizer, judge)
    return Contest(
        {name: _mean(each) for name, each in losses["data"].items()},
        found["data"],
        found.get("outside", ()),
        gaps,
        gained=tuple(each for each in shown[:SHOWN] if each.change < 0),
        lost=tuple(each for each in shown[::-1][:SHOWN] if each.change > 0),
        **told,
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
        low, high = (float(q) for q in np.quantile(means, (0.025, 0.975)))
        more = None
        if low <= 0 <= high and change != 0:  # the interval narrows with the root of the number
            half = max(high - change, change - low)
            more = max(1, math.ceil(number * ((half / abs(change)) ** 2 - 1)))
        return Difference(first, second, change, low, high, number, int(counts.sum()), more)


# --- answers --------------------------------------------------------------------------------------


def _judge(right: str | Check, tokenizer: Any) -> Check:
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


def _start(example: Example) -> int:
    """Return where the first learned token stands."""
    return next(i for i, label in enumerate(example.labels) if i and label != IGNORE)


def _answers(
    model: nn.Module, examples: Sequence[Example], tokenizer: Any, most: int, batch_size: int
) -> list[list[int]]:
    prompts = [list(example.input_ids[: _start(example)]) for example in examples]
    stops = sorted(tokenizer.stop_ids)
    found = []
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        found += generate(model, rows, max_new_tokens=most, stop=stops)
    return found


def _told(
    names: Sequence[str],
    answers: Mapping[str, list[list[int]]],
    examples: Sequence[Example],
    tokenizer: Any,
    judge: Check,
) -> dict[str, Any]:
    """Return what the answers say of the contenders."""
    wanted = []
    for example in examples:
        ids = [i for i in example.labels[_start(example) :] if i != IGNORE]
        while ids and ids[-1] in tokenizer.stop_ids:
            ids.pop()
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


def _text(example: Example, tokenizer: Any) -> str:
    if tokenizer is None:
        return " ".join(f"<{i}>" for i in example.input_ids)
    return decode(tokenizer, example.input_ids)
