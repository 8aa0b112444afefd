"""What training will see of examples: lengths, what is learned, and rows that occur again."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from minilora.data.examples import IGNORE, Example, Pair, alike, learned_labels
from minilora.data.pairs import cut
from minilora.data.problems import joined
from minilora.files import counted

_COLORS = ("\033[2m", "\033[1;32m", "\033[0m")  # given, learned, end
_ENDING = 5  # tokens: the one that ends an answer, and what templates write after it
_MARKS = ("", "⟦", "⟧")  # where there are no colours
_ALIKE = 0.8  # of the words of two rows that either has, so many stand in both
_COMMON = 0.1  # words in more rows than this share say nothing of a row, as those of a prompt
_LEAST = 4  # words: of fewer, one makes another row
_FEW = 10  # rows in which any word may occur

Place = tuple[str, int]  # a set and the number of an example in it


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
        if sizes[0] == sizes[-1]:
            parts.append(f"{middle} {word}")
        else:
            span = f"{sizes[0]} to {sizes[-1]} {word}"
            parts.append(f"{span} (median {middle}, 95 % at most {most})")
    return "; ".join(parts)


def endless(examples: Sequence[Example], stop_ids: Collection[int]) -> int:
    """Count the examples in whose last learned tokens, or an answer's, none ends a text."""
    return sum(
        any(set(stop_ids).isdisjoint(text.labels[-_ENDING:]) for text in _learned(example))
        for example in examples
    )


def _learned(example: Example) -> Sequence[Example]:
    """Return the texts that are learned: of a pair both, of an answer with a label that one."""
    if not isinstance(example, Pair):
        return [example]
    return cut(example)[: 2 if example.wanted is None else 1]


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
            upto = len(whole) if i == len(known) else alike(whole, so_far)
            part, done = whole[done:upto], max(done, upto)
            if part:
                text += f"{begin}{part}{end}" if known[start] else f"{before}{part}{end * colors}"
            start = i
    return text


def duplicates(sets: Mapping[str, Sequence[Example]], tokenizer: Any) -> list[str]:
    """Say which examples occur more than once, the same or nearly, in one set or in two.

    The same is what differs at most in case and white space. Nearly the same are two whose words
    (but for those in over a tenth of all rows) are four fifths the same, in any order.

    Args:
        sets: examples by the name that is said of them.
        tokenizer: decodes them.

    Returns:
        A line for each set with duplicates, and for each two sets that share an example, with the
        first five pairs of their numbers, from 0.
    """
    texts: dict[str, list[Place]] = defaultdict(list)
    words: list[tuple[Place, set[str]]] = []  # of each text's first place
    for name, examples in sets.items():
        for i, example in enumerate(examples):
            text = tokenizer.decode(example.input_ids).casefold()
            key = "".join(text.split())
            if key not in texts:
                words.append(((name, i), set(re.findall(r"\w+", text))))
            texts[key].append((name, i))
    return [*_same(texts, list(sets)), *_near(words, list(sets))]


def _same(texts: Mapping[str, list[Place]], names: list[str]) -> list[str]:
    said = []
    places = [
        {key: [i for set_, i in found if set_ == name] for key, found in texts.items()}
        for name in names
    ]
    for name, rows in zip(names, places, strict=True):
        again = [f"{found[0]} = {found[-1]}" for found in rows.values() if len(found) > 1]
        more = sum(len(found) - 1 for found in rows.values() if found)
        if again:
            verb = "occurs" if more == 1 else "occur"
            said.append(f"{name}: {counted(more, 'example')} {verb} again: {joined(again, 5)}")
    for a, b in itertools.combinations(range(len(names)), 2):
        both = [key for key in texts if places[a][key] and places[b][key]]
        pairs = sorted((places[a][key][0], places[b][key][0]) for key in both)
        if pairs:
            listed = joined([f"{i} = {j}" for i, j in pairs], 5)
            many = counted(len(pairs), "example")
            said.append(f"{names[a]} and {names[b]} share {many}: {listed}")
    return said


def _near(rows: list[tuple[Place, set[str]]], names: list[str]) -> list[str]:
    found: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for (first, i), (second, j) in near_pairs(rows):
        found[first, second].append((i, j))
    said = []
    for (first, second), pairs in sorted(found.items(), key=lambda e: [*map(names.index, e[0])]):
        listed = joined([f"{i} ~ {j}" for i, j in sorted(pairs)], 5)
        where = first if first == second else f"{first} and {second}"
        many = counted(len(pairs), "pair")
        said.append(f"{where}: {many} of rows that are nearly the same: {listed}")
    return said


def near_pairs(rows: Sequence[tuple[Place, set[str]]]) -> Iterator[tuple[Place, Place]]:
    """Yield the places of rows whose words are nearly the same, the earlier first.

    Two such sets share one of the rarest words of each, so only rows that do are compared
    (prefix filtering: Chaudhuri, Ganti and Kaushik 2006).
    """
    counts = Counter(word for _, words in rows for word in words)
    most = max(_FEW, _COMMON * len(rows))
    by_word: dict[str, list[int]] = defaultdict(list)
    kept: list[set[str]] = []
    for i, (place, words) in enumerate(rows):
        kept.append(own := {word for word in words if counts[word] <= most})
        if len(own) < _LEAST:
            continue
        rarest = sorted(own, key=lambda word: (counts[word], word))
        rarest = rarest[: len(own) - math.ceil(_ALIKE * len(own)) + 1]
        for j in sorted({j for word in rarest for j in by_word[word]}):
            if len(own & kept[j]) >= _ALIKE * len(own | kept[j]):
                yield rows[j][0], place
        for word in rarest:
            by_word[word].append(i)
