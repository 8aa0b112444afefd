"""What training will see of examples: lengths, duplicates, and which tokens are learned."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from minilora.data.examples import IGNORE, Example, Pair, learned_labels
from minilora.data.pairs import cut
from minilora.data.problems import joined

_COLORS = ("\033[2m", "\033[1;32m", "\033[0m")  # given, learned, end
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


def duplicates(sets: Mapping[str, Sequence[Example]], tokenizer: Any) -> list[str]:
    """Say which examples occur more than once, in one set or in two.

    Args:
        sets: examples by the name that is said of them.
        tokenizer: decodes them; case and white space do not count.

    Returns:
        A line for each set with duplicates, and for each two sets that share an example, with the
        first five pairs of their numbers, from 0.
    """
    places = {name: _by_text(examples, tokenizer) for name, examples in sets.items()}
    said = []
    for name, rows in places.items():
        again = [f"{found[0]} = {found[-1]}" for found in rows.values() if len(found) > 1]
        more = sum(len(found) - 1 for found in rows.values())
        if again:
            said.append(f"{name}: {more} examples occur again: {joined(again, 5)}")
    names = list(places)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            shared = places[first].keys() & places[second].keys()
            pairs = sorted((places[first][t][0], places[second][t][0]) for t in shared)
            if pairs:
                listed = joined([f"{a} = {b}" for a, b in pairs], 5)
                said.append(f"{first} and {second} share {len(pairs)} examples: {listed}")
    return said


def _by_text(examples: Sequence[Example], tokenizer: Any) -> dict[str, list[int]]:
    found = defaultdict(list)
    for i, example in enumerate(examples):
        found["".join(tokenizer.decode(example.input_ids).casefold().split())].append(i)
    return found


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
    text = ""
    known = [False, *(label != IGNORE for label in example.labels[1:])]
    start = 0
    for i in range(1, len(known) + 1):
        if i == len(known) or known[i] != known[start]:
            part = tokenizer.decode(example.input_ids[start:i], skip_special=False)
            text += f"{begin}{part}{end}" if known[start] else f"{before}{part}{end * colors}"
            start = i
    return text
