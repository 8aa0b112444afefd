"""Batches from any iterable, of no known length, in an order and position that can be resumed."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from minilora.data.batch import Batch, pad
from minilora.data.batches import POOL, Batches, check_same
from minilora.data.examples import Example, as_examples
from minilora.data.packing import pack


@dataclass(frozen=True)
class Stream:
    """Examples that are read as they are needed; give one to `minilora.fit` as `train`.

    Attributes:
        source: any iterable that starts over whenever it is iterated (an epoch each), in the same
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
                f"source must start over whenever it is iterated, found "
                f"{type(self.source).__name__}, which is used up after one pass; pass an object "
                f"whose __iter__ returns a new iterator"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, found {self.window}")
        if self.pack is not None and self.pack < 2:
            raise ValueError(f"pack must be at least 2 tokens, found {self.pack}")


class StreamBatches:
    """Iterate over padded batches of a stream; the same interface as `Batches`.

    A window of examples is read, shuffled with (seed, epoch, position), grouped by length and cut
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
        self.stream, self.check = stream, check
        self.window = stream.window or batch_size * POOL
        self._order = {"batch_size": batch_size, "shuffle": shuffle}
        self._order["group_by_length"] = group_by_length
        self._seed, self._pad_id, self._part = seed, pad_id, part
        self.epoch = self._read = self._index = 0  # items before the window, batches done in it
        self._digest: str | None = None  # of the window in hand

    def __iter__(self) -> Iterator[Batch]:
        items = iter(self.stream.source)
        passed = sum(1 for _ in islice(items, self._read))
        if passed < self._read:
            raise _changed(f"it ended after {passed} items, where {self._read} were read")
        nothing_yet = self._read == 0
        while True:
            examples, read = self._next(items)
            if not examples:
                break
            nothing_yet = False
            window = self._batches(examples)
            if self._index and self._digest not in (None, window.digest):
                raise _changed(f"the items from {self._read} on are others")
            self._digest = window.digest
            window.load_state_dict(
                window.state_dict() | {"epoch": self._read, "index": self._index}
            )
            for done, batch in enumerate(window, self._index + 1):
                self._index = done
                yield batch
            self._read, self._index, self._digest = self._read + read, 0, None
        if nothing_yet:
            raise _empty("; is its source empty, or was everything left out?")
        self.epoch, self._read, self._index = self.epoch + 1, 0, 0

    def _batches(self, examples: list[Example]) -> Batches:
        """Return the loader of a window, whose epoch is the window's position."""
        rest: Any = {**self._order, "pad_id": self._pad_id, "part": self._part}
        return Batches(examples, seed=f"{self._seed}/{self.epoch}", **rest)

    def _next(self, items: Iterator[Any]) -> tuple[list[Example], int]:
        """Read a window; return its examples, packed or not, and how many items they took."""
        examples: list[Example] = []
        read = 0
        for item in items:
            name = f"item {self._read + read} of the stream"
            read += 1
            examples += self._checked(name, _with_pairs, self._encoded(item))
            if len(examples) >= self.window:
                break
        if self.stream.pack is None or not examples:
            return examples, read
        name = f"items {self._read} to {self._read + read - 1} of the stream"
        return self._checked(f"a packed row of {name}", pack, examples, self.stream.pack), read

    def _checked(self, name: str, make: Callable[..., list[Example]], *what: Any) -> list[Example]:
        """Return what is made of items, by whose name an error begins."""
        try:
            examples = make(*what) if what[0] else []
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        for example in examples:
            self.check(example, name)
        return examples

    def _encoded(self, item: Any) -> list[Any]:
        """Return what becomes of an item, in a list."""
        encoded = item if self.stream.encode is None else self.stream.encode(item)
        if self.stream.encode is not None and isinstance(encoded, list):
            return encoded
        return [] if encoded is None else [encoded]

    def any_batch(self) -> Batch:
        """Return one row, to try something out."""
        for item in self.stream.source:
            if encoded := self._encoded(item):
                return pad(_with_pairs(encoded)[:1], self._pad_id)
        raise _empty()

    def about(self) -> str:
        """Say how much there is to learn from."""
        packed = f", packed into rows of {self.stream.pack} tokens" if self.stream.pack else ""
        return f"a stream of examples, in windows of {self.window}{packed}"

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream as JSON-able values."""
        position = {"epoch": self.epoch, "read": self._read, "index": self._index}
        return {**position, "window_digest": self._digest, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; that the items are the same is seen when read.

        Raises:
            ValueError: other options, or a value is missing; nothing is changed.
        """
        check_same(state, self._identity(), "stream")
        position = [state.get(key) for key in ("epoch", "read", "index")]
        if not all(isinstance(value, int) and value >= 0 for value in position):
            raise ValueError(
                f"the state must hold an epoch, the items read and an index, found {position}"
            )
        self.epoch, self._read, self._index = position  # type: ignore[assignment]
        self._digest = state.get("window_digest")

    def _identity(self) -> dict[str, Any]:
        rest = {"seed": self._seed, "window": self.window}
        return {"stream": True, "pack": self.stream.pack, **self._order, **rest}


def _with_pairs(items: list[Any]) -> list[Example]:
    return as_examples(items, pairs=True)


def _changed(how: str) -> ValueError:
    return ValueError(
        f"a resumed run must read the same stream, but {how}; give it the same source, or start "
        f"again in another folder"
    )


def _empty(hint: str = "") -> ValueError:
    return ValueError(f"the stream must yield at least one example, found none to learn from{hint}")
