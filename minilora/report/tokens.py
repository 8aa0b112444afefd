"""The loss of single tokens with and without an adapter, and what follows from it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minilora.data import IGNORE, Example
from minilora.running import FEWEST, TOO_FEW, summed, t975

CONTEXT = 12  # tokens shown before the one in question


@dataclass(frozen=True)
class Measured:
    """A mean loss in nats per token, before and after the adapter."""

    before: float
    after: float
    change: float  # after − before
    error: float  # standard error of the change, from the differences between examples; inf for one
    tokens: int
    examples: int

    @property
    def few(self) -> bool:
        """Whether the examples are too few for any uncertainty to mean something."""
        return self.examples < FEWEST

    @property
    def caveat(self) -> str:
        """Say so where they are."""
        return f"; {TOO_FEW}" if self.few else ""

    @property
    def half(self) -> float:
        """Half of the 95 % interval of the change, by Student's t."""
        return t975(max(1, self.examples - 1)) * self.error

    @property
    def clear(self) -> bool:
        """Whether the 95 % interval excludes 0, on enough examples for one."""
        return not self.few and abs(self.change) > self.half


@dataclass(frozen=True)
class TokenEffect:
    """A token, where its loss changed most, and what came of all its occurrences."""

    token: str
    context: str  # the text before it there
    before: float  # its loss there, in nats
    after: float
    example: int  # where that is
    position: int
    times: int  # how often it occurs among the learned tokens
    total: float  # the change summed over all of these, in nats


@dataclass(frozen=True)
class ShownExample:
    """An example token by token; the losses are None where nothing was learned."""

    tokens: tuple[str, ...]
    before: tuple[float | None, ...]
    after: tuple[float | None, ...]


def measured(before: Sequence[Tensor], after: Sequence[Tensor]) -> Measured:
    """Return the means over all tokens, and how sure their difference is."""
    tokens = sum(len(b) for b in before)
    old, new = math.fsum(summed(before)), math.fsum(summed(after))
    change = (new - old) / tokens
    sums = [float((a - b).double().sum()) for b, a in zip(before, after, strict=True)]
    spread = math.fsum((s - change * len(b)) ** 2 for s, b in zip(sums, before, strict=True))
    count = len(before)
    error = math.sqrt(spread * count / (count - 1)) / tokens if count > 1 else math.inf
    return Measured(old / tokens, new / tokens, change, error, tokens, count)


@dataclass(frozen=True)
class Gap:
    """Training against held-out data, which tells learning from memorising."""

    train: Measured
    valid: Measured
    growth: float  # how much the gap (held-out − training loss) grew, in nats per token
    error: float  # its standard error

    @property
    def overfitted(self) -> bool:
        """Whether, beyond the 95 % interval, held-out data gained less than half or suffered."""
        suffered = self.valid.clear and self.valid.change > 0
        low, _ = self._short_of_half
        return not self.few and self.train.change < 0 and (suffered or low > 0)

    @property
    def verdict(self) -> str:
        """What that comes to in words, "can't tell" among them."""
        if self.overfitted:
            return "over-fitted"
        gained = self.train.change < self.train.half  # or may have
        _, high = self._short_of_half
        sure = not self.few and (high <= 0 or not gained)
        return "not over-fitted" if sure else "over-fitted or not, can't tell"

    @property
    def _short_of_half(self) -> tuple[float, float]:
        """The 95 % interval of what held-out data lacks to half of the gain on training data."""
        half = math.hypot(self.valid.half, self.train.half / 2)
        lacks = self.valid.change - self.train.change / 2
        return lacks - half, lacks + half

    @property
    def few(self) -> bool:
        """Whether either has too few examples to tell."""
        return self.train.few or self.valid.few


def gap(train: Measured, valid: Measured) -> Gap:
    """Return how the gap between held-out and training loss grew."""
    return Gap(train, valid, valid.change - train.change, math.hypot(train.error, valid.error))


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text of each token; without a tokenizer its number in angle brackets.

    A token that holds a part of a character shows as the replacement sign. Each is read behind
    another token, because some tokenizers drop the space that a text begins with.
    """
    if tokenizer is None:
        return [f"<{i}>" for i in ids]
    anchor = encode(tokenizer, "a")[-1:]
    before = decode(tokenizer, anchor)
    texts = {}
    for i in set(ids):
        text = decode(tokenizer, [*anchor, i])
        texts[i] = text[len(before) :] if text.startswith(before) else decode(tokenizer, [i])
    return [texts[i] for i in ids]


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text without those that begin or end one, for tokenizers of any make."""
    try:
        return list(tokenizer.encode(text, special=False))
    except TypeError:  # transformers' name for it
        return list(tokenizer.encode(text, add_special_tokens=False))


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of ids, control tokens included, for tokenizers of any make."""
    try:
        return tokenizer.decode(list(ids), skip_special=False)
    except TypeError:
        return tokenizer.decode(list(ids), skip_special_tokens=False)


def effects(
    examples: Sequence[Example],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    tokenizer: Any,
    count: int,
) -> tuple[tuple[TokenEffect, ...], tuple[TokenEffect, ...]]:
    """Return the tokens whose loss fell and rose most in all, at most `count` of each."""
    positions = [
        (i, position)
        for i, example in enumerate(examples)
        for position, label in enumerate(example.labels)
        if position and label != IGNORE
    ]
    old, new = torch.cat(list(before)).double(), torch.cat(list(after)).double()
    changes = (new - old).tolist()
    by_token: dict[int, list[int]] = {}
    for flat, (i, position) in enumerate(positions):
        by_token.setdefault(examples[i].labels[position], []).append(flat)
    totals = {token: math.fsum(changes[f] for f in flats) for token, flats in by_token.items()}

    def effect(token: int, sign: int) -> TokenEffect:
        flat = max(by_token[token], key=lambda f: sign * changes[f])
        i, position = positions[flat]
        context = pieces(tokenizer, examples[i].input_ids[max(0, position - CONTEXT) : position])
        return TokenEffect(
            pieces(tokenizer, [token])[0], "".join(context), float(old[flat]), float(new[flat]),
            i, position, len(by_token[token]), totals[token],
        )  # fmt: skip

    order = sorted(totals, key=lambda token: totals[token])
    helped = [effect(token, -1) for token in order[:count] if totals[token] < 0]
    hurt = [effect(token, 1) for token in order[::-1][:count] if totals[token] > 0]
    return tuple(helped), tuple(hurt)


def shown(example: Example, before: Tensor, after: Tensor, tokenizer: Any) -> ShownExample:
    """Put an example's losses beside its tokens."""
    learned = [position > 0 and label != IGNORE for position, label in enumerate(example.labels)]
    sides = [
        tuple(next(rest) if here else None for here in learned)
        for rest in (iter(before.tolist()), iter(after.tolist()))
    ]
    return ShownExample(tuple(pieces(tokenizer, example.input_ids)), *sides)
