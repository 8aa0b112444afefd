"""Examples: token ids, and labels at the position of their own token.

The loss shifts labels: the one at index t is predicted from the tokens before t, so the label at
index 0 never counts. -100 is not learned.
"""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minilora.data.problems import renaming
from minilora.files import short

IGNORE = -100
_MASKS = ("loss_mask", "completion_mask", "assistant_masks")  # 1: learned
_WEIGHTS = ("weight", "weights", "loss_weight", "loss_weights", "sample_weight")

NOT_ONE_TEXT = {  # by whether it has a label
    False: "a preference pair; train on it with --loss dpo (in Python: TrainConfig(loss='dpo')), "
    f"or read one answer alone: {renaming({'prompt': 'prompt', 'completion': 'chosen'})}",
    True: "an answer with a label; train on it with --loss kto (in Python: "
    "TrainConfig(loss='kto')), or leave the label unread: "
    f"{renaming({'prompt': 'prompt', 'completion': 'completion'})}",
}

Get = Callable[[str], Any]


@dataclass(frozen=True)
class Example:
    """Hold one token sequence and its labels.

    Attributes:
        input_ids: T ≥ 1 token ids.
        labels: T ids, -100 where nothing is to be learned.
        lengths: of the documents packed into it one after another (`minilora.data.pack`), () for a
            single one.
        source: number that examples of one record have in common, None where it gave but this one.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    lengths: Sequence[int] = ()
    source: int | None = field(default=None, kw_only=True, compare=False, repr=False)

    @property
    def own_ids(self) -> tuple[int, ...]:
        """The ids by which it is the same as another."""
        return tuple(self.input_ids)

    @property
    def group(self) -> int:
        """Number that is equal for what must be held out together, made from the content."""
        return number(self.own_ids) if self.source is None else self.source


def number(ids: Sequence[int]) -> int:
    """Return a number below 2⁶⁰ for token ids: the beginning of their SHA-256."""
    return int(hashlib.sha256(repr(tuple(ids)).encode()).hexdigest()[:15], 16)


@dataclass(frozen=True)
class Pair(Example):
    """Hold two answers to one prompt in one row: the prompt, the first answer, the second one.

    Attributes:
        lengths: tokens of the three parts. Nothing of the prompt is learned.
        wanted: None where the first answer is better than the second. Otherwise whether the first
            one is wanted; the second is then an answer to another prompt (for KTO).
    """

    wanted: bool | None = None

    @property
    def longest(self) -> int:
        """Count the tokens of the prompt with the longer answer."""
        prompt, first, second = self.lengths
        return prompt + max(first, second)

    @property
    def own_ids(self) -> tuple[int, ...]:
        """The ids without a second answer that is to another prompt."""
        end = None if self.wanted is None else sum(self.lengths[:2])
        return tuple(self.input_ids[:end])

    @property
    def group(self) -> int:
        """The prompt's number; a first token may be no prompt but what every text begins with."""
        prompt = self.lengths[0]
        return number(self.input_ids[:prompt] if prompt > 1 else self.own_ids)


def alike(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Count the items that two sequences begin with alike."""
    both = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))


def learned_labels(labels: Sequence[int]) -> int:
    """Count the labels that enter the loss: the first has no token before it."""
    return sum(label != IGNORE for label in labels[1:])


def first_learned(labels: Sequence[int]) -> int:
    """Return where the first label that enters the loss stands, the length if none does."""
    return next((i for i, label in enumerate(labels) if i and label != IGNORE), len(labels))


def common_prefix(examples: Sequence[Example]) -> int:
    """Count the first tokens that all examples share; neither they nor the next one is learned."""
    if not examples or any(example.lengths for example in examples):
        return 0
    ids = [tuple(example.input_ids) for example in examples]
    same = alike(min(ids), max(ids))  # in order; what these two share all have
    if not same:
        return 0
    few = (first_learned(example.labels[: same + 2]) - 1 for example in examples)
    return max(0, min(same, *few))


def hold_out(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Split examples into those to learn and those held out, both in their order.

    The content decides, by its hash: equal examples stay together, so do those of one record and
    pairs to one prompt, and what is held out stays so when others are added or the order changes.

    Args:
        examples: at least two that differ.
        share: of the examples, below 1; or their number, from 1. Those that stay together may make
            it more.

    Raises:
        ValueError: nothing would be left on one of the sides.
    """
    keys = [one.group for one in examples]
    count = max(1, round(share * len(examples))) if share < 1 else int(share)
    last = sorted(keys)[min(count, len(keys)) - 1] if keys else 0
    learned = [one for one, key in zip(examples, keys, strict=True) if key > last]
    held_out = [one for one, key in zip(examples, keys, strict=True) if key <= last]
    if not learned:
        raise ValueError(
            f"holding out {count} of {len(examples)} examples leaves none that differs to learn "
            f"(those of one record, and pairs to one prompt, stay together); hold out less "
            f"(--hold-out), cut long records up, or pass other data to measure on (--valid)"
        )
    return learned, held_out


def as_examples(data: Iterable[Any], pairs: bool = False) -> list[Example]:
    """Check token data of any common shape and return it as examples.

    Args:
        data: `Example`s, or mappings or objects with `input_ids` and, optionally, `labels` (else
            the labels are the ids), each a list or a 1-D integer tensor, unpadded. What is 0 in a
            `loss_mask`, `completion_mask` or `assistant_masks` beside is not learned. A packed row
            has `lengths`, `seq_lengths`, `position_ids` that restart or an `attention_mask`
            that numbers its documents; what begins one of them is not learned.
        pairs: whether they may be `Pair`s, all of them or none.

    Raises:
        TypeError: by index, ids or labels that are missing or not integers in one dimension.
        ValueError: by index, empty or negative ids, lengths that differ, nothing to learn, a `Pair`
            where texts must be.
    """
    if isinstance(data, (str, bytes, Mapping)):
        raise TypeError(f"data must be a sequence of examples, found {type(data).__name__}")
    examples: list[Example] = []
    for i, item in enumerate(data):
        if isinstance(item, Pair) and not pairs:
            found = NOT_ONE_TEXT[item.wanted is not None]
            raise ValueError(f"example {i} must be one text, found {found}")
        examples.append(item if isinstance(item, Pair) else as_example(item, f"example {i}"))
        if isinstance(item, Pair) != isinstance(examples[0], Pair):
            raise ValueError(
                f"examples must be all preference pairs or all texts, found both (examples 0 and "
                f"{i}); train on each in a run of its own"
            )
        if not learned_labels(examples[-1].labels):
            raise ValueError(
                f"example {i}: nothing to learn, every label after the first is {IGNORE}"
            )
    if not examples:
        raise ValueError("data must hold at least one example, found none")
    if all(_shifted(example.input_ids, example.labels) for example in examples[:20]):
        warnings.warn(
            "each label is the token after its own, so that the one after next would be learned; "
            "labels belong at their own token here: leave the shift out",
            stacklevel=2,
        )
    return examples


def as_example(item: Any, name: str) -> Example:
    """Check one row, which may have nothing to learn; see `as_examples`."""
    get: Get = item.get if isinstance(item, Mapping) else lambda key: getattr(item, key, None)
    if get("input_ids") is None:
        raise TypeError(f"{name} must have input_ids, found {type(item).__name__} without them")
    ids = _integers(get("input_ids"), f"{name}: input_ids")
    labels = ids if get("labels") is None else _integers(get("labels"), f"{name}: labels")
    if not ids:
        raise ValueError(f"{name}: input_ids must not be empty")
    if len(labels) != len(ids):
        raise ValueError(
            f"{name}: {len(ids)} input_ids must have as many labels, not {len(labels)}"
        )
    if min(ids) < 0:
        raise ValueError(f"{name}: input_ids must not be negative, found {min(ids)}")
    if bad := [label for label in labels if label < 0 and label != IGNORE]:
        raise ValueError(f"{name}: labels must be token ids or {IGNORE}, found {bad[0]}")
    labels = _masked(labels, get, name)
    lengths = _document_lengths(get, name, len(ids))
    if len(lengths) > 1:  # a document's first token does not follow from the document before
        starts = set(itertools.accumulate(lengths))
        labels = tuple(IGNORE if i in starts else label for i, label in enumerate(labels))
    return Example(ids, labels, lengths)


def _masked(labels: tuple[int, ...], get: Get, name: str) -> tuple[int, ...]:
    """Return labels without those that a mask leaves out; warn of weights, which are not used."""
    for key in _MASKS:
        if (given := get(key)) is not None:
            given = given.tolist() if hasattr(given, "tolist") else given
            if isinstance(given, (list, tuple)):
                given = [int(v) if type(v) is bool else v for v in given]
            mask = _integers(given, f"{name}: {key}")
            if len(mask) != len(labels) or not {0, 1}.issuperset(mask):
                raise ValueError(f"{name}: {key} must hold a 0 or a 1 for each of the input_ids")
            labels = tuple(
                label if learned else IGNORE for label, learned in zip(labels, mask, strict=True)
            )
    if weights := [key for key in _WEIGHTS if get(key) is not None]:
        warnings.warn(f"examples have {weights[0]}, which is ignored", stacklevel=4)
    return labels


def _document_lengths(get: Get, name: str, count: int) -> tuple[int, ...]:
    """Return the lengths of the documents packed into a row of `count` tokens, () of a single one.

    See `as_examples`; where several fields tell of them, they must agree.
    """
    found: dict[str, tuple[int, ...]] = {}
    for key in ("lengths", "seq_lengths", "position_ids", "attention_mask"):
        if get(key) is None:
            continue
        lengths = values = _integers(get(key), f"{name}: {key}")
        if not key.endswith("lengths"):
            if len(values) != count:
                raise ValueError(f"{name}: {key} must hold a number for each of the input_ids")
            lengths = _runs(values, name) if key == "attention_mask" else _restarts(values, name)
        elif lengths and (sum(lengths) != count or min(lengths) < 1):
            raise ValueError(
                f"{name}: {key} must be those of its documents, {count} in all and each at "
                f"least 1, found {list(lengths)!s:.60}; pack the row again"
            )
        if len(lengths) > (0 if key.endswith("lengths") else 1):
            found[key] = lengths
    if len(set(found.values())) > 1:
        raise ValueError(f"{name}: {' and '.join(found)} must tell of the same documents")
    return next(iter(found.values()), ())


def _runs(mask: Sequence[int], name: str) -> tuple[int, ...]:
    if not all(mask):
        raise ValueError(f"{name} must be unpadded, found zeros in its attention_mask")
    return tuple(len(list(run)) for _, run in itertools.groupby(mask))


def _restarts(positions: Sequence[int], name: str) -> tuple[int, ...]:
    starts = [i for i, position in enumerate(positions) if position == 0]
    lengths = tuple(b - a for a, b in itertools.pairwise([*starts, len(positions)]))
    if tuple(itertools.chain(*map(range, lengths))) != tuple(positions):
        raise ValueError(
            f"{name}: position_ids must count from 0, again in each document, found "
            f"{list(positions)!s:.60}; leave them out"
        )
    return lengths


def _shifted(ids: Sequence[int], labels: Sequence[int]) -> bool:
    """Return whether the labels are the next token's each, as after a shift."""
    if ids == labels:
        return False
    known = [(a, b, c) for a, b, c in zip(ids, ids[1:], labels, strict=False) if c != IGNORE]
    return all(b == c for _, b, c in known) and any(a != c for a, _, c in known)


def _integers(values: Any, name: str) -> tuple[int, ...]:
    """Return a list or a 1-D tensor of integers as a tuple, or raise TypeError or ValueError."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} must be a list or a 1-D tensor, found {type(values).__name__}")
    for value in values:
        if type(value) is not int:
            raise TypeError(f"{name} must hold integers in one dimension, found {value!r:.40}")
    if values and max(values, key=abs) not in range(-(2**31), 2**31):  # no vocabulary is larger
        raise ValueError(f"{name} must be below 2³¹, found {short(max(values, key=abs))}")
    return tuple(values)
