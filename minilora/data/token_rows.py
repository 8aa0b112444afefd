"""What the fields beside a row's tokens mean: masks, weights and the documents packed into it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from minilora.files import short

IGNORE = -100
MASKS = ("loss_mask", "completion_mask", "assistant_masks")  # 1: learned
WEIGHTS = ("weight", "weights", "loss_weight", "loss_weights", "sample_weight")

Get = Callable[[str], Any]


def masked(labels: tuple[int, ...], get: Get, name: str) -> tuple[int, ...]:
    """Return labels without those that a mask leaves out; warn of weights, which are not used."""
    for key in MASKS:
        if (given := get(key)) is not None:
            given = given.tolist() if hasattr(given, "tolist") else given
            if isinstance(given, (list, tuple)):
                given = [int(v) if type(v) is bool else v for v in given]
            mask = integers(given, f"{name}: {key}")
            if len(mask) != len(labels) or not {0, 1}.issuperset(mask):
                raise ValueError(f"{name}: {key} must hold a 0 or a 1 for each of the input_ids")
            labels = tuple(
                label if learned else IGNORE for label, learned in zip(labels, mask, strict=True)
            )
    if weights := [key for key in WEIGHTS if get(key) is not None]:
        warnings.warn(f"examples have {weights[0]}, which is ignored", stacklevel=4)
    return labels


def document_lengths(get: Get, name: str, count: int) -> tuple[int, ...]:
    """Return the lengths of the documents packed into a row of `count` tokens, () of a single one.

    They are read from `lengths`, `seq_lengths`, `position_ids` that start anew, or an
    `attention_mask` that numbers them from 1; where several are there, they must agree.
    """
    given = {key: get(key) for key in ("lengths", "seq_lengths") if get(key) is not None}
    found = {key: integers(value, f"{name}: {key}") for key, value in given.items()}
    found = {key: lengths for key, lengths in found.items() if lengths}
    for key in ("position_ids", "attention_mask"):
        if get(key) is not None:
            values = integers(get(key), f"{name}: {key}")
            if len(values) != count:
                raise ValueError(f"{name}: {key} must hold a number for each of the input_ids")
            lengths = _runs(values) if key == "attention_mask" else _restarts(values, name)
            if len(lengths) > 1:
                found[key] = lengths
    for key, lengths in found.items():
        if sum(lengths) != count or min(lengths) < 1:
            raise ValueError(
                f"{name}: {key} must be those of its documents, {count} in all and each at "
                f"least 1, found {list(lengths)!s:.60}; pack the row anew"
            )
    if len(set(found.values())) > 1:
        raise ValueError(f"{name}: {' and '.join(found)} must tell of the same documents")
    return next(iter(found.values()), ())


def _runs(mask: Sequence[int]) -> tuple[int, ...]:
    return tuple(len(list(run)) for _, run in itertools.groupby(mask))


def _restarts(positions: Sequence[int], name: str) -> tuple[int, ...]:
    starts = [i for i, position in enumerate(positions) if position == 0]
    lengths = tuple(b - a for a, b in itertools.pairwise([*starts, len(positions)]))
    if tuple(itertools.chain(*map(range, lengths))) != tuple(positions):
        raise ValueError(
            f"{name}: position_ids must count from 0, anew in each document, found "
            f"{list(positions)!s:.60}; leave them out"
        )
    return lengths


def shifted(ids: Sequence[int], labels: Sequence[int]) -> bool:
    """Return whether the labels are the next token's each, as after a shift."""
    if ids == labels:
        return False
    known = [(a, b, c) for a, b, c in zip(ids, ids[1:], labels, strict=False) if c != IGNORE]
    return all(b == c for _, b, c in known) and any(a != c for a, _, c in known)


def integers(values: Any, name: str) -> tuple[int, ...]:
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
