"""`fit(..., plan=True)`: planned figures before the first step, measured ones after the last."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from minilora.data import Batches, common_prefix
from minilora.files import counted
from minilora.kernels import hand_back_freed_memory, hardware
from minilora.lora import lora_layers
from minilora.planning.batches import (
    BatchShape,
    Step,
    coming_steps,
    epoch_steps,
    heaviest_batch,
    mean_batch,
)
from minilora.planning.machines import calibrate, forget_peak, peak_bytes, resident
from minilora.planning.memory import Counted, Memory, count_memory, memory_table
from minilora.planning.shapes import Settings, read_shape
from minilora.planning.timing import Timing, timed_step_apart
from minilora.running import CompileClock, shares_prefix

_EARLY = 6  # steps after which a plan is held against the run
_FAR = 1.25  # factor of time above which the run says so


def settings_of(model: nn.Module, autocast: torch.dtype | None) -> dict[str, Any]:
    """Return what an injected model settles of a run's `Settings`."""
    layers = lora_layers(model)
    bases = [layer.view for layer in layers.values()]
    active = [layer.adapters[name] for layer in layers.values() for name in layer.active]
    quantized = [base.module for base in bases if base.is_quantized]
    plain = bases[0].dtype
    return {
        "dtype": autocast or plain,
        "autocast": autocast is not None and plain == torch.float32,
        "r": max([1, *(factors.rank for factors in active)]),
        "dropout": max([0.0, *(factors.dropout for factors in active)]),
        "targets": list(layers),
        **(quantized[0].spec.stored if quantized else {}),
    }


class Forecast:
    """Say what a run will take, soon whether it does, and what it took.

    The plan is of the batches that the run's own steps will see. Where a whole epoch takes more,
    that is said too.

    Args:
        model: a model of minilora.models, with adapters.
        batches: of the run, at its position in the data.
        autocast: the dtype of autocast, None without.
        accumulate, checkpointing, ranks, parallel, compile, pass_tokens: as for `Settings`.
        say: takes a line.
        steps: that are left, None where time alone limits the run.
        minutes: that are left, None without a limit.
        elapsed: seconds that the run has taken before.
        clock: of what is compiled during steps, which is no part of a step's time.
        own: whether the loss is the model's own.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        autocast: torch.dtype | None,
        accumulate: int,
        checkpointing: bool,
        ranks: int,
        parallel: str | None,
        say: Callable[[str], None],
        compile: bool = False,
        pass_tokens: int | None = None,
        steps: int | None = None,
        minutes: float | None = None,
        elapsed: float = 0.0,
        clock: CompileClock | None = None,
        own: bool = True,
    ):
        self.say, self.elapsed = say, elapsed
        self.clock, self.compiling = clock or CompileClock(), 0.0
        self.shape = read_shape(model)
        self.settings = settings_of(model, autocast) | {
            "accumulate": accumulate,
            "checkpointing": checkpointing,
            "ranks": ranks,
            "parallel": parallel if ranks > 1 else None,
            "compile": compile,
            "pass_tokens": pass_tokens,
        }
        # Shards are counted on the shape: a model of them can't be copied.
        sharded = self.settings["parallel"] == "fsdp"
        self.device = next(model.parameters()).device
        self.cuda = self.device.type == "cuda"
        self.counted = None if sharded else Counted(model, autocast, compile=compile, gpu=self.cuda)
        hand_back_freed_memory()  # what loading left is no part of what the process needs
        weights = sum(p.nbytes for p in model.parameters())
        self.process = 0 if self.cuda else max(0, resident() - weights)
        shared = common_prefix(batches.examples) if own and shares_prefix(model) else 0
        epoch = epoch_steps(batches, accumulate, shared)
        self.coming = coming_steps(batches, accumulate, shared)
        coming = coming_steps(batches, accumulate, shared)  # of a longer run the first epoch
        run = list(itertools.islice(coming, min(steps or len(epoch), len(epoch))))
        self.usual = mean_batch(run)
        self.sizes = len({(one.rows, one.length) for step in run for one in step})
        self.timing = self._time()
        if minutes is not None and self.timing is not None:
            run, reached = self._within(60 * minutes, run)
            steps = min(steps or reached, reached)
        self._say_memory(run, epoch, steps)
        self._say_time(run, epoch, steps)
        self.pairs: list[tuple[float, float]] = []  # seconds of each step: measured, planned
        self.fresh = self.cuda or forget_peak()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def _settings(self, batch: BatchShape) -> Settings:
        return Settings(
            **self.settings,
            batch_size=batch.rows,
            length=batch.length,
            learned=batch.share,
            shared=batch.shared,
        )

    def _memory(self, batch: BatchShape) -> Memory:
        found = count_memory(
            self.shape,
            self._settings(batch),
            gpu=self.cuda,
            integer=None if self.cuda else calibrate().integer,
            process=self.process,
            counted=self.counted,
        )
        if self.timing is not None:
            found = found.plus(self.timing.beyond)
        if self.cuda or self.sizes == 1:
            return found
        return found.mixed(self._settings(batch).dtype, self.sizes)

    def _time(self) -> Timing | None:
        """Time the run's usual batch; None on a GPU, and with several processes."""
        if self.cuda or self.settings["ranks"] > 1:
            return None
        one = dataclasses.replace(self._settings(self.usual), accumulate=1)
        return timed_step_apart(self.shape, one)

    def _seconds(self, step: Step) -> float:
        """Forecast a step's seconds by its tokens."""
        assert self.timing is not None
        return self.timing.seconds * sum(batch.tokens for batch in step) / self.usual.tokens

    def _within(self, seconds: float, steps: list[Step]) -> tuple[list[Step], int]:
        """Return those of the steps that begin within a time, and how many do if more follow."""
        ends = list(itertools.accumulate(map(self._seconds, steps)))
        reached = 1 + sum(end < seconds for end in ends)
        more = max(0.0, seconds - ends[-1]) * len(steps) / ends[-1]
        return steps[:reached], min(reached, len(steps)) + math.ceil(more)

    def _say_memory(self, run: list[Step], epoch: list[Step], steps: int | None) -> None:
        among = self.settings["pass_tokens"], self.settings["ranks"]
        most, longest = heaviest_batch(run, *among), heaviest_batch(epoch, *among)
        self.memory = self._memory(most)
        for line in memory_table(self.memory).splitlines():
            self.say(f"plan: {line}")
        of = "an epoch" if steps is None else f"this run's {steps:,} steps"
        self.say(f"plan: the batch that needs most memory in {of} is {self._about(most)}")
        beyond = self._memory(longest).peak
        if beyond > self.memory.peak:
            self.say(
                f"plan: a full epoch of {len(epoch):,} steps meets {self._about(longest)}: "
                f"peak {beyond / 1e6:,.1f} MB"
            )

    def _about(self, batch: BatchShape) -> str:
        settings = self._settings(batch)
        whole = settings.rows == settings.rank_rows
        passes = "" if whole else f", in passes of {settings.rows} × {batch.length}"
        return f"{batch.rows} × {batch.length} tokens{passes}"

    def _say_time(self, run: list[Step], epoch: list[Step], steps: int | None) -> None:
        if self.timing is None:
            if not self.cuda and self.settings["ranks"] == 1:
                self.say("plan: no time, as real blocks could not be run in a process of their own")
            return
        of_step, (rows, length, *_) = self.timing.times(self.settings["accumulate"]), self.usual
        self.minutes = sum(map(self._seconds, epoch)) / 60
        this_run = ""
        if steps is not None:
            minutes = sum(map(self._seconds, run)) / len(run) * steps / 60
            this_run = f"{minutes:.1f} minutes for this run's {steps:,} steps, "
        self.say(
            f"plan: {of_step}, {rows * length / self.timing.seconds:,.0f} tokens/s at "
            f"{rows} × {length}; {this_run}{self.minutes:.1f} minutes an "
            f"epoch of {len(epoch):,} steps"
        )
        if not self.timing.steady:
            self.say(f"plan: {self.timing.doubt()}")

    def on_step(self, row: Mapping[str, Any]) -> None:
        """Note a step, and say once, early in the run, if the time planned is far off."""
        if self.timing is None:
            return
        took, planned = row["elapsed_s"] - self.elapsed, self._seconds(next(self.coming))
        compiling, self.compiling = self.clock.seconds - self.compiling, self.clock.seconds
        self.elapsed = row["elapsed_s"]
        self.pairs.append((max(1e-9, took - compiling), planned))
        if len(self.pairs) != _EARLY:
            return
        far = statistics.median(took / planned for took, planned in self.pairs[1:])
        if not 1 / _FAR < far < _FAR:
            self.say(
                f"note: steps 2 to {_EARLY} took {far:.2g} times what was planned; at this pace an "
                f"epoch takes {self.minutes * far:.1f} minutes"
            )

    def after(self) -> dict[str, float]:
        """Say what was measured beside what was planned for these steps; return the figures."""
        peak = torch.cuda.max_memory_allocated(self.device) if self.cuda else peak_bytes()
        found = {"planned_bytes": float(self.memory.peak), "measured_bytes": float(peak)}
        if peak:
            since = "" if self.fresh else " since the process began"
            self.say(
                f"measured: peak {peak / 1e6:,.1f} MB{since}, planned {self.memory.peak / 1e6:,.1f}"
                f" ({self.memory.peak / peak - 1:+.1%})"
            )
        if self.pairs:
            one, planned = (sum(each) / len(self.pairs) for each in zip(*self.pairs, strict=True))
            found |= {"planned_seconds": planned, "measured_seconds": one}
            beside = f" beside {self.compiling:.0f} s of compiling" if self.compiling else ""
            over = counted(len(self.pairs), "step")
            self.say(
                f"measured: {one:.3g} s a step over {over}{beside}, planned "
                f"{planned:.3g} ({planned / one - 1:+.1%}) on {hardware().name}"
            )
        return found
