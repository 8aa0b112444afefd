"""Batches from any iterable, of no known length, in an order and at a place that can be resumed."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from minilora.data.batches import POOL, Batch, Example, as_examples, digest, grouped, pad
from minilora.data.packing import pack


@dataclass(frozen=True)
class Stream:
    """Examples that are read as they are needed; give one to `minilora.fit` as `train`.

    Attributes:
        source: any iterable whose iteration begins anew each time (an epoch each), in the same
            order: a data set, or an object whose `__iter__` reads files.
        encode: makes an example of an item, a list of them, or None to leave it out; called in the
            background. None: the items are examples.
        window: examples that are shuffled and grouped by length together; None: 50 batches.
        pack: tokens in a row into which each window's examples are packed, first-fit, as
            `minilora.data.pack` does; None packs nothing.

    Raises:
        TypeError: a source that can't be iterated, or only once.
        ValueError: a window below 1 or rows below 2 tokens.
    """

    source: Iterable[Any]
    encode: Callable[[Any], Any] | None = None
    window: int | None = None
    pack: int | None = None

    def __post_init__(self) -> None:
        if not any(hasattr(self.source, name) for name in ("__iter__", "__getitem__")):
            raise TypeError(
                f"source must be something to iterate, found {type(self.source).__name__}; pass an "
                f"object whose __iter__ returns a new iterator"
            )
        if isinstance(self.source, Iterator):
            raise TypeError(
                f"source must begin anew whenever it is iterated, found "
                f"{type(self.source).__name__}, which is used up after once; pass an object whose "
                f"__iter__ returns a new iterator"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, found {self.window}")
        if self.pack is not None and self.pack < 2:
            raise ValueError(f"pack must be at least 2 tokens, found {self.pack}")


class StreamBatches:
    """Iterate over padded batches of a stream; the same interface as `Batches`.

    A window of examples is read, shuffled with (seed, epoch, its place), grouped by length and cut
    into batches, as `Batches` does with all. The position is the number of items read before the
    window and the batches done in it: resuming passes over those items without encoding them.

    Args:
        stream: the source.
        batch_size, shuffle, group_by_length, seed, pad_id, part: as for `Batches`.
        check: called with each example and its number, to refuse it.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        batch_size: int,
        shuffle: bool = True,
        group_by_length: bool = True,
        seed: int = 0,
        pad_id: int = 0,
        part: tuple[int, int] = (0, 1),
        check: Callable[[Example, str], None] = lambda example, name: None,
    ):
        self.stream, self.batch_size, self.pad_id = stream, batch_size, pad_id
        self.shuffle, self.group_by_length, self.seed = shuffle, group_by_length, seed
        self.rank, self.world = part
        self.check = check
        self.window = stream.window or batch_size * POOL
        self.epoch = self._read = self._index = 0
        self._digest: str | None = None  # of the window in hand

    def __iter__(self) -> Iterator[Batch]:
        items = iter(self.stream.source)
        passed = sum(1 for _ in islice(items, self._read))
        if passed < self._read:
            raise _changed(f"it ended after {passed} items, where {self._read} were read")
        found = False
        while True:
            examples, read = self._next(items)
            if not examples:
                break
            found = True
            here = digest(examples)
            if self._index and self._digest not in (None, here):
                raise _changed(f"the items from {self._read} on are others")
            self._digest = here
            start = self._index
            for done, batch in enumerate(self._order(examples)[start:], start + 1):
                self._index = done
                yield pad(batch[self.rank :: self.world], self.pad_id)
            self._read, self._index, self._digest = self._read + read, 0, None
        if not found and self._read == 0:
            raise ValueError(
                "the stream must yield at least one example, found none to learn from; is its "
                "source empty, or was everything left out?"
            )
        self.epoch, self._read, self._index = self.epoch + 1, 0, 0

    def _next(self, items: Iterator[Any]) -> tuple[list[Example], int]:
        """Read a window; return its examples, packed or not, and how many items they took."""
        examples: list[Example] = []
        read = 0
        while len(examples) < self.window:
            try:
                item = next(items)
            except StopIteration:
                break
            name = f"item {self._read + read} of the stream"
            read += 1
            encoded = self._encoded(item)
            try:
                made = as_examples(encoded) if encoded else []
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from None
            for example in made:
                self.check(example, name)
            examples += made
        if self.stream.pack is None or not examples:
            return examples, read
        where = f"items {self._read} to {self._read + read - 1} of the stream"
        try:
            rows = pack(examples, self.stream.pack)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        for row in rows:
            self.check(row, f"a packed row of {where}")
        return rows, read

    def _encoded(self, item: Any) -> list[Any]:
        """Return what becomes of an item, in a list."""
        encoded = item if self.stream.encode is None else self.stream.encode(item)
        if self.stream.encode is not None and isinstance(encoded, list):
            return encoded
        return [] if encoded is None else [encoded]

    def _order(self, examples: list[Example]) -> list[list[Example]]:
        rng = random.Random(f"{self.seed}/{self.epoch}/{self._read}")
        order = grouped(examples, self.batch_size, self.shuffle, self.group_by_length, rng)
        return [[examples[i] for i in batch] for batch in order]

    def any_batch(self) -> Batch:
        """Return one row, for who must compute something."""
        for item in self.stream.source:
            if encoded := self._encoded(item):
                return pad(as_examples(encoded)[:1], self.pad_id)
        raise ValueError("the stream must yield at least one example, found none to learn from")

    def about(self) -> str:
        """Say how much there is to learn from."""
        packed = f", packed into rows of {self.stream.pack} tokens" if self.stream.pack else ""
        return f"a stream of examples, in windows of {self.window}{packed}"

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the stream as JSON-able values."""
        place = {"epoch": self.epoch, "read": self._read, "index": self._index}
        return {**place, "window_digest": self._digest, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; that the items are the same is seen when read.

        Raises:
            ValueError: other options, or a value is missing; nothing is changed.
        """
        for key, here in self._identity().items():
            if state.get(key) != here:
                raise ValueError(
                    "the state must come from the same data and options, found "
                    f"{key} = {state.get(key)!r} where this stream has {here!r}"
                )
        place = [state.get(key) for key in ("epoch", "read", "index")]
        if not all(isinstance(value, int) and value >= 0 for value in place):
            raise ValueError(
                f"the state must hold an epoch, the items read and an index, found {place}"
            )
        self.epoch, self._read, self._index = place  # type: ignore[assignment]
        self._digest = state.get("window_digest")

    def _identity(self) -> dict[str, Any]:
        keys = ("batch_size", "shuffle", "group_by_length", "seed", "window")
        mine = {key: getattr(self, key) for key in keys}
        return {"stream": True, "pack": self.stream.pack} | mine


def _changed(how: str) -> ValueError:
    return ValueError(
        f"a resumed run must read the same stream, but {how}; give it the same source, or start "
        f"anew in another folder"
    )
