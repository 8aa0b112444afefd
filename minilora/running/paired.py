"""Losses example by example, and how sure a difference between two lists of them is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.data import IGNORE, Example, pad
from minilora.files import ticking
from minilora.lora import Survey, inference
from minilora.running.evaluation import device_of
from minilora.running.loss import forward_logits

CHUNK = 2**24  # logits widened at a time
RESAMPLES = 10_000
FEWEST = 10  # examples from which an interval means something
TOO_FEW = f"fewer than {FEWEST} examples are too few to tell"
MANY = 1_000_000  # examples that nobody has


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
        return f"{self.verdict}: {found}"

    @property
    def verdict(self) -> str:
        """Say that it is not clear, and what would make it so."""
        more = ""
        if self.more is not None:
            count = f"about {self.more:,}" if self.more <= MANY else f"more than {MANY:,}"
            more = f"; {count} more examples would tell"
        if self.examples < FEWEST:
            more = f"; {TOO_FEW}"
        return f"can't tell whether {self.first} or {self.second} is better{more}"


def token_losses(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_id: int = 0,
    progress: bool = False,
    who: str = "",
) -> list[Tensor]:
    """Return −log p of each learned token, an f32 tensor per example, in the order given.

    Args:
        model: as it is now; without dropout and gradients.
        examples: each with a label that counts.
        batch_size: examples at a time; they are sorted by length first.
        pad_id: token id in the padding.
        progress: show on stderr how far it is, and the time left.
        who: is measured, to be shown too.

    Raises:
        ValueError: packed rows, whose documents this would not keep apart.
        RuntimeError: a block of `mixed` is open, whose rows sorting would exchange.
    """
    Survey(model).require_unmixed("a verb that sorts examples by length")
    require_unpacked(examples)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    found: list[Tensor] = [torch.empty(0)] * len(examples)
    device = device_of(model)
    every = sum(len(example.input_ids) for example in examples)
    with inference(model), ticking(f"measuring {who}".strip(), every, "tokens", progress) as tick:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = pad([examples[i] for i in rows], pad_id).to(device)
            logits = forward_logits(model, batch.input_ids, batch.attention_mask)[:, :-1]
            labels = batch.labels[:, 1:]
            counts = labels != IGNORE
            chosen, wanted = logits[counts], labels[counts]
            size = max(1, CHUNK // logits.shape[-1])
            parts = [
                F.cross_entropy(c.float(), w, reduction="none")
                for c, w in zip(chosen.split(size), wanted.split(size), strict=True)
            ]
            losses = torch.cat(parts).cpu().split(counts.sum(1).tolist())
            for i, loss in zip(rows, losses, strict=True):
                found[i] = loss
            tick(sum(len(examples[i].input_ids) for i in rows))
    return found


def require_unpacked(examples: Sequence[Example]) -> None:
    """Raise ValueError where several documents lie in one row."""
    packed = next((i for i, each in enumerate(examples) if len(each.lengths) > 1), None)
    if packed is not None:
        raise ValueError(
            f"held-out examples are told apart by their rows, so each must hold one document, "
            f"found {len(examples[packed].lengths)} packed into example {packed}; do not pack them"
        )


def summed(losses: Sequence[Tensor]) -> list[float]:
    """Return the summed loss of each example."""
    return [float(each.double().sum()) for each in losses]


def paired_difference(
    first: str,
    second: str,
    before: Sequence[float],
    after: Sequence[float],
    counts: Sequence[int],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """Return how one mean loss per token differs from another on the same examples.

    The interval is from a paired bootstrap: examples are drawn with replacement, with all their
    tokens (Efron and Tibshirani 1993, chapter 13). Equal seeds give equal numbers.

    Args:
        first, second: names of the two.
        before, after: their summed loss on each example.
        counts: learned tokens of each example.
        seed, resamples: of the bootstrap.
    """
    sums = np.array(after) - np.array(before)
    tokens = np.array(counts, dtype=np.float64)
    change, number = float(sums.sum() / tokens.sum()), len(sums)
    draw = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        rows = draw.integers(0, number, number)
        means[i] = sums[rows].sum() / tokens[rows].sum()
    # Percentiles are too narrow for few examples, by about these two factors.
    wide = t975(max(1, number - 1)) / 1.96 * math.sqrt(number / max(1, number - 1))
    ends = np.quantile(means, (0.025, 0.975))
    low, high = (change + wide * (float(end) - change) for end in ends)
    more = None
    if low <= 0 <= high and change != 0:  # the interval narrows with the root of the number
        half = max(high - change, change - low)
        more = max(1, math.ceil(number * ((half / abs(change)) ** 2 - 1)))
    return Difference(first, second, change, low, high, number, int(tokens.sum()), more)


def t975(degrees: int) -> float:
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
