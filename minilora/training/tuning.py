"""Find a learning rate: short runs that are compared, and of which the better ones go on.

Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943). A trial is a run of `fit` in a
folder of its own, paused and resumed: all share one model, and each lies whole on the disk.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from minilora.data import Stream, as_examples
from minilora.files import number, one_line, print_line
from minilora.lora import Survey
from minilora.running import Difference, paired_difference, require_unpacked
from minilora.training.config import TrainConfig
from minilora.training.lock import FolderLock, check_free, to_resume
from minilora.training.messages import DivergedError
from minilora.training.progress import planned_steps
from minilora.training.result import FitResult
from minilora.training.trials import RATES, Trial, Tuning, cost, rungs, trials_of
from minilora.training.tuning_chart import CHART_FILE, draw_rates
from minilora.training.tuning_record import Record
from minilora.training.tuning_runs import InterruptedTuningError, Runs


def tune(
    model: nn.Module,
    train: Iterable[Any],
    valid: Iterable[Any],
    out: str | Path,
    *,
    rates: Sequence[float] = RATES,
    adapters: Sequence[Mapping[str, Any]] = ({},),
    config: TrainConfig | None = None,
    budget: float | None = None,
    resume: bool = False,
    pad_id: int = 0,
    quiet: bool = False,
) -> Tuning:
    """Train at several learning rates, drop the worse ones early, and finish the best run.

    >>> print(minilora.tune(model, train, valid, "out/tuned"))

    All runs see the same batches in the same order, at the rates of a whole run: what is dropped
    early is a run's true beginning, and the chosen one ends with the bits of `fit` at its rate.
    Trials are compared by their held-out loss, example by example: one leaves when the 95 %
    interval of its difference from the best excludes 0, and at most half of them stay.

    Args:
        model: without adapters; afterwards it holds the chosen run's, active (none after an error).
        train, valid: examples, as for `fit`; valid decides.
        out: folder for the runs, a folder each, and `tune.json` and `tune.png`.
        rates: peak learning rates to try.
        adapters: keywords of `inject`; each is tried with each rate.
        config: settings of a whole run, its lr aside.
        budget: minutes that the whole should take at most; a few timed steps decide how many steps
            that allows, and no run has more. None: as config says.
        resume: go on with the tuning that was stopped in `out`.
        pad_id: as for `fit`.
        quiet: print nothing.

    Returns:
        A `Tuning`, which prints as a table.

    Raises:
        ValueError: fewer than two trials, too few steps or minutes, no held-out example, settings
            that a tuning does not know, a model with adapters, a folder in use.
        RuntimeError: all trials diverged; or as `fit`.
    """
    begin = time.perf_counter()
    config = config or TrainConfig()
    trials = trials_of(rates, adapters, config)
    _check(model, config, budget)
    if isinstance(train, Stream):
        raise TypeError("tune() needs a list of examples, found a Stream; read it first")
    rows, held = list(train), list(valid)
    if not rows or not held:
        raise ValueError(
            f"tune() compares by held-out examples, found {len(rows)} to train on and {len(held)} "
            f"held out; pass both (--data, --valid)"
        )
    rows, held = as_examples(rows), as_examples(held)
    require_unpacked(held)
    folder = Path(out)
    record = Record(folder, trials, config)
    check_free(folder)
    record.check_folder(resume)
    lock = FolderLock(folder)
    runs = Runs(model, rows, held, folder, config, pad_id, quiet)
    try:
        record.check_folder(resume, lock.left)
        return _Race(runs, record, trials).run(budget, begin)
    except BaseException:
        runs.drop()
        raise
    finally:
        lock.release()


def _check(model: nn.Module, config: TrainConfig, budget: float | None) -> None:
    """Refuse what a tuning can't do."""
    if Survey(model).layers:
        raise ValueError(
            "tune() injects the adapters it tries, found a model with adapters; pass it without "
            "(minilora.eject(model)), and what to inject as adapters=[{'r': 8}]"
        )
    for name in ("max_minutes", "patience", "parallel"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"tune() compares runs of the same steps on one process, found {name}="
                f"{getattr(config, name)!r}; leave it out (a limit on time is budget, --budget)"
            )
    if config.loss != "ce":
        raise ValueError(
            f"tune() compares the loss of the next token, found loss={config.loss!r}; leave it out"
        )
    above = number("a number of minutes above 0", lambda x: x > 0, none=True)
    above(budget, "budget")


class _Race:
    """Bring trials up to the comparisons and drop the worse ones."""

    def __init__(self, runs: Runs, record: Record, trials: list[Trial]):
        self.runs, self.record, self.trials = runs, record, trials
        self.left: dict[str, str] = {}
        self.against: dict[str, dict[int, Difference]] = {trial.name: {} for trial in trials}
        self.chosen: str | None = None

    def run(self, budget: float | None, begin: float) -> Tuning:
        """Try, compare, and train the best one to its end."""
        result, order = None, list(self.trials)
        try:
            self._plan(budget)
            self.runs.start(self.trials)
            for rung in rungs(self.record.steps, len(self.trials)):
                order = self._compared(order, rung)
            result = self._finished(order)
        except InterruptedTuningError:
            self._say(f"stopped; go on with {to_resume(self.runs.out)}")
        found = self._told(result, (time.perf_counter() - begin) / 60)
        try:
            draw_rates(found)
        except Exception as error:  # whatever it is: the runs are whole without it
            self._say(one_line(f"{CHART_FILE} could not be drawn: {error}"))
        return found

    def _plan(self, budget: float | None) -> None:
        """Settle how many steps a run has, and measure the base; or take up what was settled."""
        record, runs, number = self.record, self.runs, len(self.trials)
        if not record.read():
            steps = planned_steps(runs.config, len(runs.rows)) or 0
            rungs(steps, number)  # checks
            for trial in self.trials:
                runs.hold(trial.adapter)  # what can't be injected is found before anything is done
            record.steps = steps if budget is None else runs.affordable(budget, self.trials, steps)
            record.write()
        runs.config = replace(runs.config, max_steps=record.steps)
        self._say(
            f"{number} trials of {record.steps} steps, at most {cost(record.steps, number)[0]} "
            f"steps in all"
        )

    def _compared(self, order: list[Trial], rung: int) -> list[Trial]:
        """Bring trials up to a step and return those that stay, the best one first."""
        if len(order) == 1:  # nothing is left to compare with
            return order
        losses, diverged = self.record.losses, self.record.diverged
        for trial in order:
            if rung not in losses[trial.name] and trial.name not in diverged:
                self._measured(trial, rung)
        here = [trial for trial in order if rung in losses[trial.name]]  # else it diverged
        if not here:
            raise RuntimeError(
                f"all {len(order)} trials diverged by step {rung} (a loss or gradient that is not "
                f"finite); try lower rates than {min(trial.lr for trial in order):g}"
            )
        here.sort(key=lambda trial: math.fsum(losses[trial.name][rung]))  # equal ones as given
        best, stay = here[0], [here[0]]
        for trial in here[1:]:
            first, second = (losses[one.name][rung] for one in (best, trial))
            found = paired_difference(best.name, trial.name, first, second, self.runs.counts)
            self.against[trial.name][rung] = found
            gap = f"{found.change:+.4f}, 95 % {found.low:+.4f} to {found.high:+.4f}"
            if found.clear:
                self.left[trial.name] = f"left at step {rung}: worse than {best.name} ({gap})"
            elif len(stay) == max(1, len(order) // 2):
                self.left[trial.name] = f"left at step {rung}: halved, can't tell ({gap})"
            else:
                stay.append(trial)
        self._say(f"step {rung}: {', '.join(trial.name for trial in stay)} of {len(order)} stay")
        return stay

    def _measured(self, trial: Trial, rung: int) -> None:
        """Bring one trial up to a step and keep its held-out losses."""
        result = self._train(trial, rung)
        if result is None:
            return
        if result.steps != rung:
            raise ValueError(
                f"{trial.name} must be compared after step {rung}, but {self.runs.out} has it "
                f"at step {result.steps}: its run went on by itself; remove the folder "
                f"{trial.name} and the tuning trains it anew"
            )
        losses = self.runs.losses()
        mean = math.fsum(losses) / sum(self.runs.counts)
        if not math.isfinite(mean):
            self._diverge(trial, f"its held-out loss is {mean} after {rung} steps")
            return
        self.record.losses[trial.name][rung] = losses
        self.record.write()
        self._say(f"{trial.name}: step {rung} of {self.record.steps}, held-out loss {mean:.4f}")

    def _train(self, trial: Trial, until: int | None) -> FitResult | None:
        """Go on with a trial's run; return None where it diverges."""
        try:
            result = self.runs.train(trial, until)
        except DivergedError as error:
            self._diverge(trial, str(error).partition(";")[0])
            return None
        if result.before is not None:  # the same for all of an adapter's trials
            self.record.before = result.before.loss
        return result

    def _diverge(self, trial: Trial, why: str) -> None:
        self.record.diverged[trial.name] = why
        self.runs.holds = None  # its values may be infinite
        self.record.write()
        self._say(f"{trial.name} diverged: {why}")

    def _finished(self, order: list[Trial]) -> FitResult:
        """Train the best trial to its end; should it diverge, the next best."""

        def rank(trial: Trial) -> tuple[int, float]:
            losses = self.record.losses[trial.name]
            return (-max(losses), math.fsum(losses[max(losses)])) if losses else (0, 0.0)

        rest = sorted((trial for trial in self.trials if trial not in order), key=rank)
        for trial in [*order, *rest]:
            if trial.name in self.record.diverged:
                continue
            self._say(f"{trial.name} goes on to its end, step {self.record.steps}")
            result = self._train(trial, None)
            if result is None:
                continue
            self.left.pop(trial.name, None)
            self.chosen = trial.name
            return result
        raise RuntimeError(
            "all trials diverged (a loss or gradient that is not finite); try lower rates"
        )

    def _told(self, result: FitResult | None, minutes: float) -> Tuning:
        """Return what was found."""
        tokens, trials = sum(self.runs.counts), []
        for trial in self.trials:
            losses = {
                step: math.fsum(some) / tokens
                for step, some in self.record.losses[trial.name].items()
            }
            left = self.left.get(trial.name)
            if trial.name in self.record.diverged:
                left = f"diverged: {self.record.diverged[trial.name]}"
            against = self.against[trial.name]
            trials.append(replace(trial, losses=losses, against=against, left=left))
        chosen = next((trial for trial in trials if trial.name == self.chosen), None)
        return Tuning(
            tuple(trials), chosen, self.runs.out, self.record.steps, self.record.before,
            len(self.runs.held), tokens, result, minutes,
        )  # fmt: skip

    def _say(self, line: str) -> None:
        if not self.runs.quiet:
            print_line(line)
