"""Put examples into batches in an order that can be resumed."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from minilora.data.batch import Batch, pad
from minilora.data.examples import Example, Pair, as_examples

POOL = 50  # length grouping sorts pools of this many batches


class Batches:
    """Iterate over padded batches in an order that depends on seed and epoch alone.

    Each epoch holds every example once; iterating to the end moves on to the next, breaking off
    and iterating again starts over. `state_dict` inside the loop counts the batch in hand as
    done: loading it gives exactly the rest.

    Args:
        examples: whatever `as_examples` takes.
        batch_size: examples per batch, ≥ 1.
        shuffle: a new order each epoch; False keeps the given one (within pools sorted by length
            when `group_by_length`).
        group_by_length: put examples of similar length together, to pad less: pools of 50
            batches are sorted by length and cut, then the batches are shuffled.
        seed: with the epoch, decides the order; the global random state is not touched.
        pad_id: token id in the padding.
        drop_last: leave out what does not fill a batch.
        part: (rank, world): yield only every world-th row of each batch from the rank-th on. The
            order does not depend on it. A batch may then have no row.

    Raises:
        ValueError, TypeError: bad examples, or no batch to make.
    """

    def __init__(
        self,
        examples: Iterable[Any],
        *,
        batch_size: int,
        shuffle: bool = True,
        group_by_length: bool = True,
        seed: int | str = 0,
        pad_id: int = 0,
        drop_last: bool = False,
        part: tuple[int, int] = (0, 1),
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}")
        self.examples = as_examples(examples, pairs=True)
        if drop_last and len(self.examples) < batch_size:
            found = f"found {len(self.examples)} for batches of {batch_size}"
            raise ValueError(f"drop_last needs examples to fill one batch, {found}")
        self.batch_size, self.shuffle, self.group_by_length = batch_size, shuffle, group_by_length
        self.seed, self.pad_id, self.drop_last = seed, pad_id, drop_last
        self._rank, self._world = part
        self.epoch = 0
        self._start = self._index = 0  # batches of this epoch done before iterating, done by now
        self.digest = _digest(self.examples)

    def __len__(self) -> int:
        extra = 0 if self.drop_last else self.batch_size - 1
        return (len(self.examples) + extra) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        order, epoch = self.order(self.epoch), self.epoch
        for done, batch in enumerate(order[self._start :], self._start + 1):
            self._index = done
            yield pad([self.examples[i] for i in batch[self._rank :: self._world]], self.pad_id)
        self.set_epoch(epoch + 1)

    def order(self, epoch: int) -> list[list[int]]:
        """Return the batches of an epoch as indices into `examples`."""
        rng = random.Random(f"{self.seed}/{epoch}")
        indices = list(range(len(self.examples)))
        if self.shuffle:
            rng.shuffle(indices)
        if self.drop_last:
            del indices[len(self) * self.batch_size :]
        if self.group_by_length:
            pools = _cut(indices, self.batch_size * POOL)
            indices = [i for pool in pools for i in sorted(pool, key=self._length)]
        batches = _cut(indices, self.batch_size)
        if self.shuffle and self.group_by_length:
            rng.shuffle(batches)
        return batches

    def _length(self, index: int) -> int:
        return len(self.examples[index].input_ids)

    def any_batch(self) -> Batch:
        """Return one row, to try something out."""
        return pad(self.examples[:1], self.pad_id)

    def about(self) -> str:
        """Say how much there is to learn from."""
        tokens = sum(len(example.input_ids) for example in self.examples)
        rows = f"{len(self.examples)} examples"
        if isinstance(first := self.examples[0], Pair):
            what = "pairs of answers" if first.wanted is None else "labelled answers"
            rows = f"{len(self.examples)} {what}"
        elif any(example.lengths for example in self.examples):
            packed = sum(max(1, len(example.lengths)) for example in self.examples)
            rows = f"{packed} documents packed in {len(self.examples)} rows"
        return f"{rows}, {tokens} tokens, {100 * self.padding_share():.1f} % padding"

    def padding_share(self) -> float:
        """Return the share of padding among the positions of the current epoch, in [0, 1)."""
        batches = [[self._length(i) for i in batch] for batch in self.order(self.epoch)]
        return 1 - sum(map(sum, batches)) / sum(max(batch) * len(batch) for batch in batches)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; keep the position if it is the current one."""
        if epoch != self.epoch:
            self.epoch, self._start, self._index = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position as JSON-able values: batches done and what defines them."""
        return {"epoch": self.epoch, "index": self._index, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken.

        Args:
            state: what `state_dict` returned, for the same examples and options.

        Raises:
            ValueError: data or options differ, or a value is missing; nothing is changed.
        """
        check_same(state, self._identity(), "loader")
        epoch, index = state.get("epoch"), state.get("index")
        if not (isinstance(epoch, int) and isinstance(index, int) and 0 <= index <= len(self)):
            raise ValueError(
                f"the state must hold an epoch and an index of 0 to {len(self)}, found "
                f"epoch = {epoch!r}, index = {index!r}"
            )
        self.epoch, self._start, self._index = epoch, index, index

    def _identity(self) -> dict[str, Any]:
        keys = ("batch_size", "shuffle", "group_by_length", "seed", "drop_last", "digest")
        return {"examples": len(self.examples)} | {key: getattr(self, key) for key in keys}


def _cut(values: list[int], size: int) -> list[list[int]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def check_same(state: Mapping[str, Any], identity: Mapping[str, Any], what: str) -> None:
    """Raise ValueError unless a state comes from the data and options of a loader or stream."""
    for key, here in identity.items():
        if state.get(key) != here:
            raise ValueError(
                f"the state must come from the same data and options, found {key} = "
                f"{state.get(key)!r} where this {what} has {here!r}; to train an adapter on, begin "
                "a new run with load(..., trainable=True) or --adapter"
            )


def _digest(examples: Sequence[Example]) -> str:
    """Fingerprint ids, labels, lengths, and which answers are wanted."""
    found = hashlib.sha256()
    for example in examples:
        found.update(array("q", [len(example.input_ids), *example.input_ids, *example.labels]))
        if example.lengths:
            found.update(array("q", [-len(example.lengths), *example.lengths]))
        if isinstance(example, Pair):
            found.update(repr(example.wanted).encode())
    return found.hexdigest()[:16]
