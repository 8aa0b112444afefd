"""How far a run is: its counters, its limits, and the learning rate that follows from them."""

import math
from dataclasses import dataclass

from minilora.training.config import TrainConfig, learning_rate


@dataclass(eq=False)
class Counters:
    """How far a run is; the state holds it.

    Attributes:
        step: optimizer steps done; skipped ones count.
        tokens: learned tokens processed.
        skipped: steps skipped for a loss or gradient that was not finite.
        bad: such steps in a row, up to now.
        elapsed: seconds spent in steps.
        evaluated: the step after which the last evaluation was made, -1 before the first.
        best_step: the step after which the best one was made.
        stale: evaluations since the best one.
        lr: the rate of the last step.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    bad: int = 0
    elapsed: float = 0.0
    evaluated: int = -1
    best_step: int = 0
    stale: int = 0
    lr: float = 0.0


class Progress(Counters):
    """Counters under a run's limits.

    Attributes:
        config: the run's settings.
        total: optimizer steps planned, None under a time limit alone.
    """

    config: TrainConfig
    total: int | None

    def progress(self) -> float:
        """Return the share of the run that is done, by the limit that is nearest; 1 or above."""
        steps = self.step / self.total if self.total else 0.0
        minutes = self.config.max_minutes
        return max(steps, self.elapsed / 60 / minutes if minutes else 0.0)

    def rate(self) -> float:
        """Return the learning rate of the next step."""
        share = 1 / self.total if self.total else self.progress() / max(1, self.step)
        if self.step == 0 and not self.total:
            share = 0.1 * self.config.warmup or 1e-3
        return learning_rate(self.config, min(1.0, self.progress()), share)

    def out_of_time(self) -> bool:
        """Return whether no further step may begin."""
        minutes = self.config.max_minutes
        return minutes is not None and self.elapsed >= 60 * minutes

    def out_of_patience(self) -> bool:
        """Return whether too many evaluations in a row were not better."""
        return self.config.patience is not None and self.stale >= self.config.patience

    def time_left(self) -> float | None:
        """Return the seconds of training left, None before the first step."""
        progress = self.progress()
        return self.elapsed * max(0.0, 1 - progress) / progress if progress else None


def planned_steps(config: TrainConfig, batches: int | None) -> int | None:
    """Return the number of optimizer steps, or None when only the clock limits the run.

    `batches` of an epoch is None for a stream, whose length nobody knows.
    """
    epochs = config.epochs
    if batches is None and (config.epochs, config.max_steps, config.max_minutes) == (None,) * 3:
        raise ValueError(
            "a stream has no known length, so a run on it needs max_steps (--max-steps) or "
            "max_minutes (--minutes), found neither"
        )
    if batches is None and epochs is not None:
        raise ValueError(
            f"a stream has no known length, so epochs can't be counted, found epochs={epochs}; set "
            f"max_steps or max_minutes"
        )
    if epochs is None and config.max_steps is None and config.max_minutes is None:
        epochs = 1
    limits = [] if config.max_steps is None else [config.max_steps]
    if epochs is not None and batches is not None:
        per_epoch = math.ceil(batches / config.accumulate)
        limits.append(max(1, round(per_epoch * epochs)))
    return min(limits) if limits else None
