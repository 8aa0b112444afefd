"""How far a run is: its counters, its limits, and the learning rate that follows from them."""

from dataclasses import dataclass

from minilora.planning import count_steps, usual_epochs
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
        until: the step after which a call ends before its run does, None for none.
    """

    config: TrainConfig
    total: int | None
    until: int | None = None

    def progress(self) -> float:
        """Return the share of the run that is done, by the limit that is nearest; 1 or above."""
        steps = self.step / self.total if self.total else 0.0
        minutes = self.config.max_minutes
        return max(steps, self.elapsed / 60 / minutes if minutes else 0.0)

    def rate(self) -> float:
        """Return the learning rate of the next step."""
        share = 1 / self.total if self.total else 0.0
        if self.config.max_minutes is not None:
            guess = 0.1 * self.config.warmup or 1e-3
            share = max(share, self.progress() / self.step if self.step else guess)
        return learning_rate(self.config, min(1.0, self.progress()), share)

    def paused(self) -> bool:
        """Return whether this call is to end here, before the run does."""
        return self.until is not None and self.until <= self.step and self.step != self.total

    def out_of_time(self) -> bool:
        """Return whether no further step may begin."""
        minutes = self.config.max_minutes
        return minutes is not None and self.elapsed >= 60 * minutes

    def out_of_patience(self) -> bool:
        """Return whether too many evaluations in a row were not better."""
        return self.config.patience is not None and self.stale >= self.config.patience

    def check_limits(self, total: int | None, minutes: float | None) -> None:
        """Raise ValueError where a limit was lowered below what is done; the old ones are given."""
        found = []
        if self.total not in (None, total) and self.total < self.step:
            found.append(f"{self.total} steps, with {self.step} done")
        limit = self.config.max_minutes
        if limit not in (None, minutes) and 60 * limit < self.elapsed:
            found.append(f"{limit:g} minutes, with {self.elapsed / 60:.3g} spent")
        if found:
            raise ValueError(
                f"the limits of a resumed run must not lie below what it has done, found "
                f"{' and '.join(found)}; give higher ones, or those that it began with"
            )

    def time_left(self) -> float | None:
        """Return the seconds of training left, None before the first step."""
        progress = self.progress()
        return self.elapsed * max(0.0, 1 - progress) / progress if progress else None


def chosen_epochs(config: TrainConfig, rows: int) -> float | None:
    """Return the passes over so many rows, None where nothing but max_steps limits the run.

    Where the config does not say, they are `usual_epochs`; max_minutes may end the run before.
    """
    if config.epochs is not None or config.max_steps is not None:
        return config.epochs
    return usual_epochs(rows, config.batch_size, config.accumulate)


def check_until(until: int | None) -> None:
    """Raise ValueError unless this is a step of a run, or None."""
    if until is not None and (type(until) is not int or until < 0):
        raise ValueError(f"until must be a step of the run, from 0 on, or None, found {until!r}")


def planned_steps(config: TrainConfig, rows: int | None) -> int | None:
    """Return the number of optimizer steps, or None when only the clock limits the run.

    `rows` of an epoch is None for a stream, whose length nobody knows.
    """
    if rows is None:
        if config.epochs is not None:
            raise ValueError(
                f"a stream has no known length, so epochs can't be counted, found epochs="
                f"{config.epochs}; set max_steps or max_minutes"
            )
        if config.max_steps is None and config.max_minutes is None:
            raise ValueError(
                "a stream has no known length, so a run on it needs --max-steps or --minutes "
                "(in Python: max_steps, max_minutes), found neither"
            )
        return config.max_steps
    steps = [] if config.max_steps is None else [config.max_steps]
    epochs = chosen_epochs(config, rows)
    if epochs is not None:
        steps.append(count_steps(rows, epochs, config.batch_size, config.accumulate))
    return min(steps)
