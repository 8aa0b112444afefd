"""Which of several adapters is better on held-out data, with how sure that is.

All are measured on the same examples, so differences count, example by example: intervals from
`running.paired_difference`, answers by McNemar's exact test.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.data import Example, as_examples, common_prefix, first_learned
from minilora.files import short, write, write_json
from minilora.lora import Survey
from minilora.report.answers import AnswerDifference, Check, answers_of, judge_of, told
from minilora.report.tokens import decode
from minilora.running import (
    BASE,
    FEWEST,
    RESAMPLES,
    TOO_FEW,
    Difference,
    paired_difference,
    summed,
    token_losses,
)
from minilora.text import as_tokenizer

BEFORE = 24  # tokens shown of an example before and after where learning begins
SHOWN = 3  # examples that gained, and that lost, most


@dataclass(frozen=True)
class ShownChange:
    """An example whose loss changed much."""

    example: int  # its number in the data
    text: str  # what is learned first, and a little of what precedes it
    change: float  # from the first contender to the last, in nats per token
    # What each contender wrote, where answers were asked for.
    answers: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Gap:
    """How much of an advantage on training data is missing on held-out data: over-fitting."""

    change: float  # in nats per token; above 0 some of it is missing
    low: float  # of the 95 % interval; the two sets of examples are independent of each other
    high: float
    examples: int  # of the smaller set

    @classmethod
    def between(cls, held: Difference, trained: Difference) -> Gap:
        """Return the gap of two differences between the same contenders."""
        change = held.change - trained.change
        below = math.hypot(held.change - held.low, trained.high - trained.change)
        above = math.hypot(held.high - held.change, trained.change - trained.low)
        fewer = min(held.examples, trained.examples)
        return cls(change, change - below, change + above, fewer)

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0, on enough examples for one."""
        return self.examples >= FEWEST and (self.low > 0 or self.high < 0)

    @property
    def caveat(self) -> str:
        """Say where the interval means nothing."""
        return f"; {TOO_FEW}" if self.examples < FEWEST else ""


@dataclass(frozen=True)
class AdapterComparison:
    """What `minilora.compare` found; prints as text.

    Attributes:
        losses: mean loss of each contender on the data.
        differences: of every later contender from the first.
        among: of the later contenders from each other.
        outside: of the later contenders from the first, on text outside the task.
        gaps: the over-fitting of each later contender, where training data was given.
        right: answers that each got right, where they were asked for.
        answers: how the later contenders' answers differ from the first's.
        lengths: mean tokens of each contender's answers.
        cut: answers of each that were cut off at `max_new_tokens`.
        gained, lost: examples whose loss fell and rose most, from the first contender to the last.
    """

    losses: Mapping[str, float]
    differences: tuple[Difference, ...]
    among: tuple[Difference, ...] = ()
    outside: tuple[Difference, ...] = ()
    gaps: Mapping[str, Gap] = dataclasses.field(default_factory=dict)
    right: Mapping[str, int] = dataclasses.field(default_factory=dict)
    answers: tuple[AnswerDifference, ...] = ()
    lengths: Mapping[str, float] = dataclasses.field(default_factory=dict)
    cut: Mapping[str, int] = dataclasses.field(default_factory=dict)
    gained: tuple[ShownChange, ...] = ()
    lost: tuple[ShownChange, ...] = ()

    def __str__(self) -> str:
        one = self.differences[0]
        width = max(map(len, self.losses))
        lines = [f"loss over {one.tokens} tokens of {one.examples} examples:"]
        lines += [f"  {name:<{width}}  {loss:.4f}" for name, loss in self.losses.items()]
        lines += map(str, (*self.differences, *self.among))
        lines += [f"outside the task: {difference}" for difference in self.outside]
        lines += [
            f"over-fitting: of what {name} gains on training data, {gap.change:+.4f} nats a token "
            f"(95 % {gap.low:+.4f} to {gap.high:+.4f}) are not gained on held-out data"
            f"{gap.caveat}"
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
                lines += [f"  {name} answers {short(text)}" for name, text in each.answers.items()]
        return "\n".join(lines)

    def to_html(self, file: str | Path) -> Path:
        """Write one page with intervals drawn that needs nothing beside it, and return the path."""
        from minilora.report.comparing_page import comparing_page

        return write(file, comparing_page(self))

    def to_json(self, file: str | Path) -> Path:
        """Write everything as JSON and return the path."""
        return write_json(file, dataclasses.asdict(self))


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
    progress: bool = False,
) -> AdapterComparison:
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
        max_new_tokens: of an answer, at most; refused without `right`.
        batch_size: examples at a time; changes no more than rounding.
        seed, resamples: of the bootstrap.
        progress: show on stderr how far it is, and the time left.

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
    if judge is None and max_new_tokens != 64:
        raise ValueError(
            f"max_new_tokens is of answers, which right asks for, found max_new_tokens="
            f"{max_new_tokens!r} without it; pass right, or leave it out"
        )
    tokenizer = None if tokenizer is None else as_tokenizer(tokenizer, model)
    sets = {"data": data, "outside": outside, "train": train}
    examples = {key: as_examples(some) for key, some in sets.items() if some is not None}
    if any(not some for some in examples.values()):
        raise ValueError("data must hold at least one example, found none")
    losses: dict[str, dict[str, list[Tensor]]] = {key: {} for key in examples}
    answers: dict[str, list[list[int]]] = {}
    with survey.switched():
        for name in names:
            how: Any = {"batch_size": batch_size, "progress": progress, "who": name}
            survey.activate(() if name == BASE else (name,))
            if judge is not None:  # first: a context that is too short is found at once
                answers[name] = answers_of(model, examples["data"], tokenizer, max_new_tokens, how)
            for key, some in examples.items():
                losses[key][name] = token_losses(model, some, **how)
    found = {key: _differences(names, each, seed, resamples) for key, each in losses.items()}
    change = _per_example(losses["data"][names[0]], losses["data"][names[-1]])
    order = sorted(range(len(change)), key=lambda i: (change[i], i))
    gaps = {
        held.second: Gap.between(held, trained)
        for held, trained in zip(found["data"], found.get("train", ()), strict=False)
    }
    among = [
        each
        for i in range(1, len(names) - 1)
        for each in _differences(names[i:], losses["data"], seed, resamples)
    ]
    extra: dict[str, Any] = {}
    if judge is not None:
        extra = told(names, answers, examples["data"], tokenizer, judge)
        extra["cut"] = {
            name: sum(len(ids) == max_new_tokens for ids in each) for name, each in answers.items()
        }

    start = common_prefix(examples["data"])  # the same in all, so not shown

    def shown(i: int) -> ShownChange:
        texts = {name: tokenizer.decode(each[i]) for name, each in answers.items()}
        return ShownChange(i, _text(examples["data"][i], start, tokenizer), change[i], texts)

    tokens = found["data"][0].tokens
    return AdapterComparison(
        {name: math.fsum(summed(each)) / tokens for name, each in losses["data"].items()},
        found["data"],
        tuple(among),
        found.get("outside", ()),
        gaps,
        gained=tuple(shown(i) for i in order[:SHOWN] if change[i] < 0),
        lost=tuple(shown(i) for i in order[::-1][:SHOWN] if change[i] > 0),
        **extra,
    )


def _names(survey: Survey, contenders: Sequence[str | None]) -> list[str]:
    names = [BASE if name is None else name for name in contenders]
    if isinstance(contenders, str) or len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"compare() needs two or more different contenders, found {short(contenders)}; name "
            f"another adapter, or compare with the base (None; leave --no-base out)"
        )
    survey.known([name for name in names if name != BASE], "compare")
    return names


def _per_example(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[float]:
    """Return each example's change in nats per token."""
    both = zip(first, second, strict=True)
    return [float((b.double() - a.double()).mean()) for a, b in both]


def _differences(
    names: Sequence[str], losses: Mapping[str, Sequence[Tensor]], seed: int, resamples: int
) -> tuple[Difference, ...]:
    """Return how all but the first contender differ from the first, by the same draws."""
    first = losses[names[0]]
    return tuple(
        paired_difference(names[0], name, summed(first), summed(losses[name]),
                   [len(each) for each in first], seed=seed, resamples=resamples)
        for name in names[1:]
    )  # fmt: skip


def _text(example: Example, alike: int, tokenizer: Any) -> str:
    """Show what is learned first, and a little of what precedes it after so many tokens."""
    start = first_learned(example.labels)
    first = max(alike if alike < start - 1 else 0, start - BEFORE)
    ids = example.input_ids[first : start + BEFORE]
    return " ".join(f"<{i}>" for i in ids) if tokenizer is None else decode(tokenizer, ids)
