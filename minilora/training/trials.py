"""What a tuning tries, how long, and what it found."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from minilora.files import short, write_json
from minilora.lora import AdapterConfig
from minilora.running import FEWEST, Difference
from minilora.training.config import TrainConfig
from minilora.training.result import FitResult

RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
LAST = 5  # the last comparison comes after this part of the steps
FIRST_STEPS = 3  # steps before the first comparison, at least


@dataclass(frozen=True)
class Trial:
    """A learning rate, and what became of its run.

    Attributes:
        name: of the run's folder.
        lr: the rate.
        adapter: keywords of `inject`.
        losses: held-out loss in nats per token at each comparison, by steps done.
        against: how that differs from the best one's at the same step.
        left: why it left; None for the one that was chosen.
    """

    name: str
    lr: float
    adapter: Mapping[str, Any]
    losses: Mapping[int, float] = field(default_factory=dict)
    against: Mapping[int, Difference] = field(default_factory=dict)
    left: str | None = None


@dataclass(frozen=True)
class Tuning:
    """What `minilora.tune` found; prints as a table.

    Attributes:
        trials: all of them, in the order given.
        chosen: the one whose run went on to its end, None where the tuning was interrupted before.
        out: the tuning's folder; each run has one of its name in it.
        steps: of a whole run.
        before: held-out loss before training, None where the tuning was interrupted before.
        examples, tokens: held-out ones.
        result: of the run that was chosen, with its best evaluation; None before it ended.
        minutes: that this call took.
    """

    trials: tuple[Trial, ...]
    chosen: Trial | None
    out: Path
    steps: int
    before: float | None
    examples: int
    tokens: int
    result: FitResult | None
    minutes: float

    @property
    def stopped(self) -> str:
        """How it ended: as the chosen run did, or `"interrupted"`."""
        return "interrupted" if self.result is None else self.result.stopped

    def __str__(self) -> str:
        done = sorted({step for trial in self.trials for step in trial.losses})
        rows = [("", *(f"step {step}" for step in done), "")]
        for trial in self.trials:
            found = [f"{trial.losses[s]:.4f}" if s in trial.losses else "" for s in done]
            chosen = "chosen" if trial is self.chosen else "in the race"
            rows.append((trial.name, *found, trial.left or chosen))
        wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        before = "" if self.before is None else f", {self.before:.4f} before training"
        lines = [
            f"held-out loss over {self.tokens} tokens of {self.examples} examples{before}, by "
            f"steps of {self.steps}:"
        ]
        for row in rows:
            cells = [f"{cell:>{w}}" for cell, w in zip(row, wide, strict=False)]
            lines.append("  ".join(["", cells[0].strip().ljust(wide[0]), *cells[1:], row[-1]]))
        if self.examples < FEWEST:
            lines.append(
                f"with fewer than {FEWEST} held-out examples no interval means anything: rates "
                f"left by their mean loss alone"
            )
        if self.chosen is not None:
            best = ""
            if self.result is not None and self.result.best is not None:
                best = f", {self.result.best.loss:.4f} after step {self.result.best_step}"
            lines.append(f"chosen: {self.chosen.name}{best}, in {self.out / self.chosen.name}")
        return "\n".join(line.rstrip() for line in lines)

    def to_json(self, file: str | Path) -> Path:
        """Write everything as JSON and return the path."""
        return write_json(file, asdict(self) | {"out": str(self.out), "stopped": self.stopped})


def trials_of(
    rates: Sequence[float], adapters: Sequence[Mapping[str, Any]], config: TrainConfig
) -> list[Trial]:
    """Return what is to be tried, each rate with each adapter; refuse what is no choice."""
    listed = isinstance(rates, Sequence) and isinstance(adapters, Sequence)
    if not listed or isinstance(rates, str) or len(rates) * len(adapters) < 2:
        raise ValueError(
            f"tune() needs two or more rates to choose from, found {short(rates)}; with one, train"
        )
    for rate in rates:
        replace(config, lr=rate)  # checks
    for adapter in adapters:
        AdapterConfig(**adapter)
    varied = {
        key: None
        for adapter in adapters
        for key in adapter
        if any(other.get(key) != adapter[key] for other in adapters)
    }
    found = []
    for adapter in adapters:
        parts = [f"{key}-{_plain(adapter[key])}" for key in varied if key in adapter]
        for rate in rates:
            found.append(Trial("-".join([f"lr-{rate:g}", *parts]), float(rate), dict(adapter)))
    names = [trial.name for trial in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"what tune() tries must differ, found {twice} twice")
    return found


def _plain(value: Any) -> str:
    """Spell a value as part of a folder's name."""
    text = "+".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return "".join(c if c.isalnum() or c in "._+-" else "_" for c in text)


def by_adapter(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Return trials, in the order of `trials_of`, in groups that share their adapter's settings."""
    return [list(group) for _, group in itertools.groupby(trials, lambda trial: trial.adapter)]


def rungs(steps: int, trials: int) -> list[int]:
    """Return after which steps trials are compared: their number halves each time, down to 1.

    The last comparison comes after a fifth of the steps, each one before it after half as many.
    """
    halvings = int(math.log2(trials))
    found = [steps // (LAST * 2**k) for k in reversed(range(halvings))]
    if found[0] < FIRST_STEPS:
        raise ValueError(
            f"{trials} trials are first compared after 1/{LAST * 2 ** (halvings - 1)} of the "
            f"steps, and that must be {FIRST_STEPS} at least, found {steps} steps in all; train "
            f"for {fewest_steps(trials)} or more (epochs, max_steps), or try fewer rates"
        )
    return found


def fewest_steps(trials: int) -> int:
    """Return how many steps a run must have to be tuned among so many."""
    return FIRST_STEPS * LAST * 2 ** (int(math.log2(trials)) - 1)


def cost(
    steps: int, trials: int, adapters: int = 1, eval_every: int | None = None
) -> tuple[int, int]:
    """Return how many training steps and evaluations a tuning does at most.

    An adapter is evaluated before its first step, a trial at each comparison and, within its run,
    every `eval_every` steps, the chosen one at its end.
    """
    every = eval_every or steps
    total, evaluations, left, before = 0, adapters + 1, trials, 0
    for rung in rungs(steps, trials):
        total += left * (rung - before)
        evaluations += left * (1 + rung // every - before // every)
        left, before = max(1, left // 2), rung
    return total + steps - before, evaluations + (steps - 1) // every - before // every
