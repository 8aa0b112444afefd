"""What training will see of examples: lengths, endings, and which tokens are learned."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from typing import Any

from minilora.data.examples import IGNORE, Example, Pair, learned_labels
from minilora.data.pairs import cut

_COLORS = ("\033[2m", "\033[1;32m", "\033[0m")  # given, learned, end
_ENDING = 5  # tokens: the one that ends an answer, and what templates write after it
_MARKS = ("", "⟦", "⟧")  # where there are no colours


def lengths(examples: Sequence[Example]) -> str:
    """Say how long examples are, and how much of them is learned, in tokens."""
    parts = []
    counts = {
        "long": [len(example.input_ids) for example in examples],
        "learned": [learned_labels(example.labels) for example in examples],
    }
    for word, sizes in counts.items():
        sizes.sort()
        most = sizes[min(len(sizes) - 1, len(sizes) * 95 // 100)]
        middle = statistics.median_low(sizes)
        parts.append(f"{sizes[0]} to {sizes[-1]} {word} (median {middle}, 95 % at most {most})")
    return "; ".join(parts)


def endless(examples: Sequence[Example], stop_ids: Collection[int]) -> int:
    """Count the examples in whose last learned tokens none ends a text."""
    return sum(set(stop_ids).isdisjoint(example.labels[-_ENDING:]) for example in examples)


def shown(example: Example, tokenizer: Any, colors: bool) -> str:
    """Write an example as training sees it, control tokens by name.

    What is learned stands in bold green, or in ⟦⟧ without colours. The first token never is: none
    precedes it. Of a pair both answers are shown after their prompt.
    """
    if isinstance(example, Pair):
        other = "rejected" if example.wanted is None else "an answer to another prompt"
        name = {None: "chosen", True: "wanted", False: "not wanted"}[example.wanted]
        texts = [shown(text, tokenizer, colors) for text in cut(example)]
        return "\n".join(f"{what}: {text}" for what, text in zip((name, other), texts, strict=True))
    before, begin, end = _COLORS if colors else _MARKS
    text, done = "", 0
    whole = tokenizer.decode(example.input_ids, skip_special=False)
    known = [False, *(label != IGNORE for label in example.labels[1:])]
    start = 0
    for i in range(1, len(known) + 1):
        if i == len(known) or known[i] != known[start]:
            # By beginnings of the whole: alone, a part may lose its space or half a character.
            so_far = tokenizer.decode(example.input_ids[:i], skip_special=False)
            upto = len(whole) if i == len(known) else _alike(whole, so_far)
            part, done = whole[done:upto], max(done, upto)
            if part:
                text += f"{begin}{part}{end}" if known[start] else f"{before}{part}{end * colors}"
            start = i
    return text


def _alike(a: str, b: str) -> int:
    """Return how many characters two texts begin with alike."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
