"""Seconds and hours of a run: from steps timed here, rates measured here, or a datasheet.

FLOPs per token, N·K summed over the linears of the blocks, r the rank, T tokens of a row, q = heads
· head_dim, h width, V vocabulary; ×3/2 of the first two terms under checkpointing (blocks run
again):

    base       4 · Σ N·K              forward and input gradient; a frozen weight has no gradient
    adapters   6 · Σ r·(N + K)        forward, and both gradients of both factors' products
    attention  7 · T · q · layers     causal: half of 2 · 2·T·q, and 2.5 times that backward
    head       4 · h · V              of those that enter the loss
"""

import math
from dataclasses import dataclass

from minilora.planning.machines import Calibration, Device
from minilora.planning.memory import Memory, count_planned
from minilora.planning.shapes import Settings, Shape
from minilora.planning.timing import Timing

_MOVES = 4  # times that what autograd keeps is written or read, its gradients included
# Where nothing was timed: shares of the measured rates that real steps reach on a CPU, and the
# nanoseconds in which a weight is decoded.
_PRODUCTS, _MOVING, _DECODE = 0.35, 0.5, 0.6e-9


@dataclass(frozen=True)
class Work:
    """What one optimizer step takes, over all ranks: FLOPs by the terms above, and what moves."""

    base: int
    adapters: int
    attention: int
    head: int
    bytes: int  # weights in each pass, and activations
    decoded: int  # weights decoded or cast, each time one is multiplied

    @property
    def flops(self) -> int:
        """All FLOPs."""
        return self.base + self.adapters + self.attention + self.head


def count_work(shape: Shape, settings: Settings, memory: Memory, gpu: bool = False) -> Work:
    """Count a step's work; `memory` is the plan for the same settings, of a GPU or a CPU."""
    counted, config = count_planned(shape, settings, gpu=gpu), shape.config
    a = settings.accumulate
    (V, h), layers = counted.head, counted.blocks
    tokens = settings.ranks * settings.rank_rows * a * settings.length  # the slowest rank's, of all
    spared = a * settings.ranks * (settings.rank_rows - settings.passes) * settings.shared
    runs = 3 if settings.checkpointing else 2  # passes of 2 FLOPs a weight
    parts = a * settings.ranks * settings.passes
    passes = runs * parts
    q = config.num_attention_heads * config.head_dim
    kept = memory.activations + memory.recomputed * layers
    copies = settings.ranks if settings.parallel == "fsdp" else 1
    return Work(
        base=(tokens - spared) * 2 * runs * counted.weights,
        adapters=(tokens - spared) * (4 + 2 * (runs - 1)) * counted.trained,
        attention=int(tokens * 2 * settings.length * q * layers * (runs - 1 + 2.5)),
        head=int(tokens * settings.learned) * 4 * h * V,
        bytes=passes * memory.weights * copies + _MOVES * kept * parts,
        decoded=passes * counted.weights if settings.format else 0,
    )


@dataclass(frozen=True)
class Speed:
    """How fast a run goes."""

    step_seconds: float  # of one optimizer step
    tokens_per_second: float  # over all ranks, padding counted
    steps: int  # of the whole run
    hours: float  # of the whole run, without evaluations
    how: str  # "timed here", "scaled from the timed", "rates measured here" or "datasheet"
    timing: Timing | None = None  # the repeats behind it, where it was timed here


# 50 steps over 40 questions and answers left two of five unlearned (benchmarks/NOTES.md).
ENOUGH_STEPS, MOST_EPOCHS = 100, 20


def count_steps(rows: int, epochs: float, batch_size: int, accumulate: int) -> int:
    """Return the optimizer steps of a run over so many rows."""
    return max(1, round(_epoch_steps(rows, batch_size, accumulate) * epochs))


def usual_epochs(rows: int, batch_size: int, accumulate: int) -> float:
    """Return the passes over so many rows where nobody says how many.

    They are as many as make `ENOUGH_STEPS` steps, from 1 to `MOST_EPOCHS`.
    """
    steps = _epoch_steps(rows, batch_size, accumulate)
    return float(min(MOST_EPOCHS, math.ceil(ENOUGH_STEPS / steps)))


def _epoch_steps(rows: int, batch_size: int, accumulate: int) -> int:
    return math.ceil(math.ceil(rows / batch_size) / accumulate)


def on_device(work: Work, memory: Memory, settings: Settings, device: Device) -> float:
    """Return seconds of a step: products at the stated efficiency, then what has to be moved."""
    ranks = settings.ranks
    moved = work.bytes + 2 * work.decoded * settings.dtype.itemsize
    seconds = work.flops / (ranks * device.rate(settings.dtype, settings.compile))
    seconds += moved / (ranks * device.bandwidth * 1e9 * device.moving)
    if settings.parallel == "fsdp" and device.link:
        passes = (3 if settings.checkpointing else 2) * settings.accumulate
        seconds += passes * memory.weights * (ranks - 1) / (device.link * 1e9)
    return seconds


def from_rates(work: Work, settings: Settings, here: Calibration) -> float:
    """Return seconds of a step by this machine's rates, without running one."""
    name = str(settings.dtype).removeprefix("torch.")
    rate = here.rates[name] * _PRODUCTS
    integer = settings.spec and settings.spec.storage.integer and here.integer
    seconds = work.base / (here.rates["int8"] * _PRODUCTS if integer else rate)
    seconds += (work.flops - work.base) / rate
    seconds += work.bytes / (here.bandwidth * _MOVING)
    return seconds + (0 if integer else work.decoded * _DECODE)


def duration(hours: float) -> str:
    """Write a time in the unit that suits it."""
    if hours < 1 / 60:
        return f"{hours * 3600:.2g} s"
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:,.1f} days"


def run_speed(
    seconds: float,
    how: str,
    settings: Settings,
    examples: int,
    epochs: float,
    timing: Timing | None = None,
) -> Speed:
    """Extend a step's seconds to a run over so many examples."""
    rows = settings.batch_size * settings.accumulate
    hours = seconds * max(1.0, examples * epochs / rows) / 3600  # a tail's step is shorter
    steps = count_steps(examples, epochs, settings.batch_size, settings.accumulate)
    return Speed(seconds, rows * settings.length / seconds, steps, hours, how, timing)
