"""The runs of a tuning: one model in memory, and a folder for each run."""

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from minilora.data import Example, learned_labels
from minilora.files import whole_folder
from minilora.lora import Survey, eject, inject, widened
from minilora.running import device_of, summed, token_losses
from minilora.training.config import TrainConfig
from minilora.training.loop import fit
from minilora.training.prepare import compute_dtype
from minilora.training.result import FitResult
from minilora.training.trials import Trial, by_adapter, cost, fewest_steps
from minilora.training.tuning_record import START

_PROBED = 4  # steps that are timed for a budget, after a first one
_SHARE = 0.9  # of a budget that is planned


class InterruptedTuningError(Exception):
    """Ends a tuning on Ctrl-C."""


class Runs:
    """Train and measure one trial at a time on one model, which holds its adapter.

    `config` is that of a whole run, its lr aside. Only the last run is not quiet.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[Example],
        held: Sequence[Example],
        out: Path,
        config: TrainConfig,
        pad_id: int,
        quiet: bool,
    ):
        self.model, self.rows, self.held, self.out = model, rows, held, out
        self.config, self.pad_id, self.quiet = config, pad_id, quiet
        self.counts = [learned_labels(one.labels) for one in held]
        self.holds: Mapping[str, Any] | None = None  # the adapter that the model has

    def train(self, trial: Trial, until: int | None) -> FitResult:
        """Go on with a trial's run, to a step or to its end."""
        self.hold(trial.adapter)
        config, quiet = replace(self.config, lr=trial.lr), self.quiet or until is not None
        out = self.out / trial.name
        return self._fit(self.held, config, out=out, resume=True, quiet=quiet, until=until)

    def _fit(self, held: Any, config: TrainConfig, quiet: bool = True, **more: Any) -> FitResult:
        more |= {"config": config, "quiet": quiet, "pad_id": self.pad_id}
        result = fit(self.model, self.rows, held, **more)
        if result.stopped == "interrupted":
            raise InterruptedTuningError
        return result

    def hold(self, adapter: Mapping[str, Any]) -> None:
        """Give the model an adapter, as `minilora train` would; its values come with a run."""
        if self.holds == adapter:
            return
        self.drop()
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            inject(self.model, **adapter)
        self.holds = adapter

    def drop(self) -> None:
        """Take the adapter off."""
        self.holds = None
        if Survey(self.model).layers:
            eject(self.model)

    def losses(self) -> list[float]:
        """Return the summed loss of each held-out example, in `fit`'s precision."""
        config, device = self.config, device_of(self.model)
        dtype = compute_dtype(Survey(self.model).layers, config.dtype, device)
        autocast = nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
        with widened(self.model), autocast:
            found = token_losses(
                self.model, self.held, batch_size=config.eval_batch_size or config.batch_size,
                pad_id=self.pad_id,
            )  # fmt: skip
        return summed(found)

    def start(self, trials: Sequence[Trial]) -> None:
        """Make each trial's folder: a run before its first step, once for each adapter, copied."""
        start = self.out / START
        for group in by_adapter(trials):
            new = [trial for trial in group if not (self.out / trial.name).exists()]
            if not new:
                continue
            if start.exists():  # of another adapter, or not whole
                shutil.rmtree(start)
            self.holds = None  # drawn anew, as for a run of its own
            self.hold(group[0].adapter)
            config = replace(self.config, lr=group[0].lr, log=None)
            self._fit(self.held, config, out=start, until=0)
            for trial in new:
                with whole_folder(self.out / trial.name) as made:
                    shutil.copytree(start, made, dirs_exist_ok=True)
        if start.exists():
            shutil.rmtree(start)

    def affordable(self, budget: float, trials: Sequence[Trial], most: int) -> int:
        """Return how many steps a run may have for the whole to take so many minutes."""
        seconds, number = 60 * budget * _SHARE, len(trials)
        step = self._timed(min(trial.lr for trial in trials))
        begin = time.perf_counter()
        self.losses()
        evaluation = time.perf_counter() - begin
        more = len(by_adapter(trials)), self.config.eval_every

        def needed(steps: int) -> float:
            trained, evaluated = cost(steps, number, *more)
            return step * trained + evaluation * evaluated

        least = fewest_steps(number)
        if needed(least) > seconds:
            raise ValueError(
                f"budget must be {needed(least) / 60 / _SHARE:.2g} minutes or more for {number} "
                f"trials ({least} steps each at {step:.2g} s, {evaluation:.2g} s for "
                f"{len(self.held)} held-out examples), found {budget:g}; raise it, or try fewer "
                f"rates"
            )
        return max(n for n in range(least, most + 1) if needed(n) <= seconds)

    def _timed(self, lr: float) -> float:
        """Return the seconds of a step, from a few of a run that is thrown away."""
        elapsed: list[float] = []
        clock = SimpleNamespace(on_step=lambda row: elapsed.append(row["elapsed_s"]))
        config = replace(
            self.config, lr=lr, epochs=None, max_steps=_PROBED + 1, eval_every=None, log=None
        )
        self._fit(None, config, callbacks=[clock])
        return (elapsed[-1] - elapsed[0]) / _PROBED  # the first prepares
