"""`fit(..., plan=True)`: planned figures before the first step, measured ones after the last."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from minilora.data import Batches
from minilora.kernels import hand_back_freed_memory, hardware
from minilora.lora import lora_layers, matrix_shape, named_modules, rank_of, sizes, weight_dtype
from minilora.planning.calibration import calibrate, forget_peak, peak_bytes, resident
from minilora.planning.memory import Memory, Settings, count_memory
from minilora.planning.met import Met, Step, epoch_met, largest_batch, mean_batch, steps_met
from minilora.planning.plans import memory_table
from minilora.planning.shapes import Linear, read_shape
from minilora.planning.timing import Timing, timed_step_apart
from minilora.quantization import QuantizedLinear

_EARLY = 6  # steps after which a plan is held against the run
_FAR = 1.5  # factor of time above which the run says so


class Foretold:
    """Say what a run will take, soon whether it does, and what it took.

    Planned is what the run will meet: the batches of its steps, in their order. Where a whole epoch
    takes more, that is said too.

    Args:
        model: a Llama or GPT2 of minilora.models, with adapters.
        batches: of the run, at its place in the data.
        autocast: the dtype of autocast, None without.
        accumulate: micro-batches of a step.
        checkpointing: whether blocks are recomputed.
        ranks: processes.
        parallel: None, `"ddp"` or `"fsdp"`.
        say: takes a line.
        steps: that are left, None where time alone limits the run.
        minutes: that are left, None without a limit.
        elapsed: seconds that the run has taken before.
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
        steps: int | None = None,
        minutes: float | None = None,
        elapsed: float = 0.0,
    ):
        self.say = say
        self.shape = read_shape(model)
        self.linears, self.settings = self.read_model(model, autocast)
        self.settings |= {
            "accumulate": accumulate,
            "checkpointing": checkpointing,
            "ranks": ranks,
            "parallel": parallel if ranks > 1 else None,
        }
        self.cuda = next(model.parameters()).device.type == "cuda"
        self.base = sizes(model)
        hand_back_freed_memory()  # what loading left is no part of what the process needs
        self.process = 0 if self.cuda else max(0, resident() - self.base.total)
        epoch = epoch_met(batches, accumulate)
        ahead = steps_met(batches, accumulate)  # of a longer run only the first are looked at
        met = list(itertools.islice(ahead, min(steps or len(epoch), len(epoch))))
        self.usual = mean_batch(met)
        self.timing = self._time()
        if minutes is not None and self.timing is not None:
            met, reached = self._within(60 * minutes, met)
            steps = min(steps or reached, reached)
        self._say_memory(met, epoch, steps)
        self._say_time(met, epoch, steps)
        self.elapsed = elapsed
        self.ahead = steps_met(batches, accumulate)
        self.pairs: list[tuple[float, float]] = []  # seconds of each step: measured, planned
        self.fresh = forget_peak() if not self.cuda else True
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def _settings(self, batch: Met) -> Settings:
        return Settings(
            **self.settings, batch_size=batch.rows, length=batch.length, learned=batch.share
        )

    def _memory(self, batch: Met) -> Memory:
        found = count_memory(
            self.shape,
            self._settings(batch),
            gpu=self.cuda,
            integer=None if self.cuda else calibrate().integer,
            process=self.process,
            linears=self.linears,
            base=self.base,
        )
        beyond = 0 if self.timing is None else self.timing.beyond
        return dataclasses.replace(found, heap=max(0, found.heap + beyond))

    def _time(self) -> Timing | None:
        """Time the run's usual batch; None on a GPU, and with several processes."""
        if self.cuda or self.settings["ranks"] > 1:
            return None
        one = dataclasses.replace(self._settings(self.usual), accumulate=1)
        return timed_step_apart(self.shape, one)

    def _seconds(self, step: Step) -> float:
        """Foretell a step's seconds by its tokens."""
        assert self.timing is not None
        return self.timing.seconds * sum(batch.tokens for batch in step) / self.usual.tokens

    def _within(self, seconds: float, met: list[Step]) -> tuple[list[Step], int]:
        """Return those of the steps that begin within a time, and how many do if more follow."""
        ends = list(itertools.accumulate(map(self._seconds, met)))
        reached = 1 + sum(end < seconds for end in ends)
        more = max(0.0, seconds - ends[-1]) * len(met) / ends[-1]
        return met[:reached], min(reached, len(met)) + math.ceil(more)

    def _say_memory(self, met: list[Step], epoch: list[Step], steps: int | None) -> None:
        most, longest = largest_batch(met), largest_batch(epoch)
        self.memory = self._memory(most)
        for line in memory_table(self.memory).splitlines():
            self.say(f"plan: {line}")
        among = "an epoch" if steps is None else f"this run's {steps:,} steps"
        self.say(f"plan: the largest batch of {among} is {most.rows} × {most.length} tokens")
        if longest.tokens > most.tokens:
            self.say(
                f"plan: a full epoch of {len(epoch):,} steps meets {longest.rows} × "
                f"{longest.length} tokens: peak {self._memory(longest).peak / 1e6:,.1f} MB"
            )

    def _say_time(self, met: list[Step], epoch: list[Step], steps: int | None) -> None:
        if self.timing is None:
            if not self.cuda and self.settings["ranks"] == 1:
                self.say("plan: no time, as real blocks could not be run in a process of their own")
            return
        of_step = self.timing.times(self.settings["accumulate"])
        self.minutes = sum(map(self._seconds, epoch)) / 60
        run = ""
        if steps is not None:
            minutes = sum(map(self._seconds, met)) / len(met) * steps / 60
            run = f"{minutes:.1f} minutes for this run's {steps:,} steps, "
        self.say(
            f"plan: {of_step}, {self.usual.tokens / self.timing.seconds:,.0f} tokens/s at "
            f"{self.usual.rows} × {self.usual.length}; {run}{self.minutes:.1f} minutes an epoch of "
            f"{len(epoch):,} steps"
        )
        if not self.timing.steady:
            self.say(f"plan: {self.timing.doubt()}")

    def on_step(self, row: Mapping[str, Any]) -> None:
        """Note a step, and say once, early in the run, if the time planned is far off."""
        if self.timing is None:
            return
        took, planned = row["elapsed_s"] - self.elapsed, self._seconds(next(self.ahead))
        self.elapsed = row["elapsed_s"]
        self.pairs.append((took, planned))
        if len(self.pairs) != _EARLY:
            return
        far = statistics.median(took / planned for took, planned in self.pairs[1:])
        if not 1 / _FAR < far < _FAR:
            self.say(
                f"note: steps 2 to {_EARLY} took {far:.2g} times what was planned; at this pace an "
                f"epoch takes {self.minutes * far:.1f} minutes"
            )

    @staticmethod
    def read_model(
        model: nn.Module, autocast: torch.dtype | None
    ) -> tuple[dict[str, Linear], dict]:
        """Read an injected model's linears with the ranks of the active adapters, and settings."""
        linears, format, dropout, block = {}, None, 0.0, 64
        layers = lora_layers(model)
        for name, layer in layers.items():
            factors: list[Any] = [layer.adapters[one] for one in layer.active]
            N, K = matrix_shape(layer.base)
            linears[name] = Linear(name, N, K, sum(rank_of(one) for one in factors))
            dropout = max([dropout, *(one.dropout for one in factors)])
            if isinstance(layer.base, QuantizedLinear):
                format, block = layer.base.spec.format, layer.base.spec.block_size
        for name, module in named_modules(model):
            plain = name.removesuffix(".base")
            if isinstance(module, (nn.Linear, QuantizedLinear)) and plain not in linears:
                linears[name] = Linear(name, *matrix_shape(module), 0)
        largest = max((one.r for one in linears.values()), default=1)
        base = weight_dtype(next(iter(layers.values())).base)
        return linears, {
            "format": format,
            "dtype": autocast or base,
            "autocast": autocast is not None and base == torch.float32,
            "r": max(1, largest),
            "dropout": dropout,
            "block_size": block,
        }

    def after(self) -> dict[str, float]:
        """Say what was measured beside what was planned for these steps; return the figures."""
        peak = torch.cuda.max_memory_allocated() if self.cuda else peak_bytes()
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
            self.say(
                f"measured: {one:.3g} s a step over {len(self.pairs)} steps, planned {planned:.3g} "
                f"({planned / one - 1:+.1%}) on {hardware().name}"
            )
        return found
