"""Which batches a run will see, step by step, and how many of their rows it computes at once.

Data, seed and position decide it beforehand.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from minilora.data import Batches, learned_labels, worth_sharing

# On a CPU more tokens in a pass take memory and hardly less time for each: SmolLM2-135M in bf16 on
# two threads of a Xeon with AMX takes 0.9 ms a token and 0.6 s a pass (benchmarks/NOTES.md).
PASS_TOKENS = 3072


def usual_pass_tokens(gpu: bool, parallel: str | None, foreign: bool) -> int | None:
    """Return how many tokens a pass has at most if nobody says, None for any number.

    `gpu` is whether another device than a CPU computes, `foreign` whether the model or its loss is
    not ours, so that more may follow from a batch. Ranks under `"fsdp"` compute in step.
    """
    return None if gpu or parallel == "fsdp" or foreign else PASS_TOKENS


def pass_rows(rows: int, length: int, tokens: int | None, shared: int = 0) -> int:
    """Return how many of the rows a pass has at most: as few passes as hold them, all about alike.

    `length` counts the tokens of a row, `tokens` those that a pass may have (None: any number),
    `shared` those that are computed once for all rows. Of these a row still keeps what attention
    does, taken for a tenth.
    """
    if tokens is None or not rows:
        return rows
    once = min(shared, length - 1) * 9 // 10
    most = max(1, (tokens - once) // (length - once))
    return math.ceil(rows / math.ceil(rows / most))


class BatchShape(NamedTuple):
    """The shape of a batch."""

    rows: int  # over all ranks
    length: int  # tokens that each row is padded to
    learned: int  # labels that enter the loss
    shared: int = 0  # first tokens that are computed once for all rows

    @property
    def tokens(self) -> int:
        """Tokens that are computed, padding included."""
        return self.rows * self.length - (self.rows - 1) * self.shared

    @property
    def share(self) -> float:
        """Share of the predicted tokens that is learned, in (0, 1]."""
        return min(1.0, self.learned / max(1, self.rows * (self.length - 1)))


Step = list[BatchShape]


def coming_steps(
    batches: Batches, accumulate: int, shared: int, position: tuple[int, int] | None = None
) -> Iterator[Step]:
    """Return each optimizer step's batches as `fit` makes them, epoch after epoch, without end.

    An epoch's last step may have fewer than `accumulate`. `shared` first tokens of all rows are
    computed once for a batch. `position` is the epoch and how many batches of it are done; None:
    where `batches` is now.
    """
    state = batches.state_dict()  # now, as the loader reads ahead
    return _steps(batches, accumulate, shared, *(position or (state["epoch"], state["index"])))


def _steps(batches: Batches, accumulate: int, shared: int, epoch: int, done: int) -> Iterator[Step]:
    sizes = [(len(one.input_ids), learned_labels(one.labels)) for one in batches.examples]
    for number in itertools.count(epoch):
        shapes = []
        for rows in batches.order(number)[done if number == epoch else 0 :]:
            lengths, learned = zip(*(sizes[i] for i in rows), strict=True)
            once = worth_sharing(len(rows), max(lengths), shared)
            shapes.append(BatchShape(len(rows), max(lengths), sum(learned), once))
        yield from (shapes[i : i + accumulate] for i in range(0, len(shapes), accumulate))


def epoch_steps(batches: Batches, accumulate: int, shared: int) -> list[Step]:
    """Return the steps of a whole epoch, the one that `batches` is in."""
    steps = math.ceil(len(batches) / accumulate)
    coming = coming_steps(batches, accumulate, shared, (batches.epoch, 0))
    return list(itertools.islice(coming, steps))


def heaviest_batch(steps: Iterable[Step], pass_tokens: int | None, ranks: int) -> BatchShape:
    """Return the batch whose passes have the most tokens, which decides the peak."""

    def tokens(batch: BatchShape) -> tuple[int, int]:
        of_rank = math.ceil(batch.rows / ranks)
        rows = pass_rows(of_rank, batch.length, pass_tokens, batch.shared)
        return batch._replace(rows=rows).tokens, batch.tokens

    return max((batch for step in steps for batch in step), key=tokens)


def mean_batch(steps: Iterable[Step]) -> BatchShape:
    """Return a batch of the usual number of rows and of the mean length, whose time is the mean."""
    shapes = [batch for step in steps for batch in step]
    rows, all_rows = max(one.rows for one in shapes), sum(one.rows for one in shapes)
    length = max(2, math.ceil(sum(one.rows * one.length for one in shapes) / all_rows))
    learned = math.ceil(rows * sum(one.learned for one in shapes) / all_rows)
    shared = sum(one.rows * one.shared for one in shapes) // all_rows
    return BatchShape(rows, length, learned, shared)
