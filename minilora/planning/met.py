"""Which batches a run meets, step by step: data, seed and place decide it before the run begins."""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from minilora.data import Batches, learned_labels


class Met(NamedTuple):
    """A batch's shape.

    Attributes:
        rows: over all ranks.
        length: tokens that each row is padded to.
        learned: labels that enter the loss.
    """

    rows: int
    length: int
    learned: int

    @property
    def tokens(self) -> int:
        """Count the tokens, padding included."""
        return self.rows * self.length

    @property
    def share(self) -> float:
        """Return the share of the predicted tokens that is learned, in (0, 1]."""
        return min(1.0, self.learned / max(1, self.tokens - self.rows))


Step = list[Met]


def steps_met(
    batches: Batches, accumulate: int, place: tuple[int, int] | None = None
) -> Iterator[Step]:
    """Return each optimizer step's batches as `fit` makes them, epoch after epoch, without end.

    Args:
        batches: of the run.
        accumulate: micro-batches of a step; an epoch's last step may have fewer.
        place: epoch and batches of it that are done; None: where `batches` is now.
    """
    state = batches.state_dict()
    return _ahead(batches, accumulate, *(place or (state["epoch"], state["index"])))


def _ahead(batches: Batches, accumulate: int, epoch: int, done: int) -> Iterator[Step]:
    sizes = [(len(one.input_ids), learned_labels(one.labels)) for one in batches.examples]
    for number in itertools.count(epoch):
        met = []
        for rows in batches.order(number)[done if number == epoch else 0 :]:
            lengths, learned = zip(*(sizes[i] for i in rows), strict=True)
            met.append(Met(len(rows), max(lengths), sum(learned)))
        yield from (met[i : i + accumulate] for i in range(0, len(met), accumulate))


def epoch_met(batches: Batches, accumulate: int) -> list[Step]:
    """Return the steps of a whole epoch, the one that `batches` is in."""
    place = (batches.epoch, 0)
    steps = math.ceil(len(batches) / accumulate)
    return list(itertools.islice(steps_met(batches, accumulate, place), steps))


def largest_batch(steps: Iterable[Step]) -> Met:
    """Return the batch of the most tokens, which decides the peak."""
    return max((batch for step in steps for batch in step), key=lambda met: met.tokens)


def mean_batch(steps: Iterable[Step]) -> Met:
    """Return a batch of the usual number of rows and of the mean length, whose time is the mean."""
    met = [batch for step in steps for batch in step]
    rows, all_rows = max(batch.rows for batch in met), sum(batch.rows for batch in met)
    length = max(2, math.ceil(sum(batch.tokens for batch in met) / all_rows))
    return Met(rows, length, math.ceil(rows * sum(batch.learned for batch in met) / all_rows))
