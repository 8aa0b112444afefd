"""Seconds and hours: from steps timed here, from rates measured here, or from a datasheet."""

import dataclasses
import math
from dataclasses import dataclass

from minilora.planning.calibration import Calibration, calibrate
from minilora.planning.devices import Device
from minilora.planning.memory import Memory, Settings
from minilora.planning.shapes import Shape
from minilora.planning.timing import Timing, timed_step
from minilora.planning.work import Work, count_work
from minilora.quantization import FORMATS

# Where nothing was timed: shares of the measured rates that real steps reach on a CPU, and the
# nanoseconds in which a weight is decoded.
_PRODUCTS, _MOVING, _DECODE = 0.35, 0.5, 0.6e-9


@dataclass(frozen=True)
class Speed:
    """How fast a run goes.

    Attributes:
        step_seconds: of one optimizer step.
        tokens_per_second: over all ranks, padding counted.
        steps: of the whole run.
        hours: of the whole run, without evaluations.
        how: `"timed here"`, `"rates measured here"` or `"datasheet"`.
        timing: the repeats behind it, where it was timed here.
    """

    step_seconds: float
    tokens_per_second: float
    steps: int
    hours: float
    how: str
    timing: Timing | None = None


def count_steps(examples: int, epochs: float, settings: Settings) -> int:
    """Return the optimizer steps of a run, as `fit` counts them."""
    batches = math.ceil(examples / settings.batch_size)
    return max(1, round(math.ceil(batches / settings.accumulate) * epochs))


def on_device(work: Work, memory: Memory, settings: Settings, device: Device) -> float:
    """Return seconds of a step: products at the stated efficiency, then what has to be moved."""
    ranks = settings.ranks
    moved = work.bytes + 2 * work.decoded * settings.dtype.itemsize
    seconds = work.flops / (ranks * device.rate(settings.dtype))
    seconds += moved / (ranks * device.bandwidth * 1e9 * device.moving)
    if settings.parallel == "fsdp" and device.link:
        passes = (3 if settings.checkpointing else 2) * settings.accumulate
        seconds += passes * memory.weights * (ranks - 1) / (device.link * 1e9)
    return seconds


def from_rates(work: Work, settings: Settings, here: Calibration) -> float:
    """Return seconds of a step by this machine's rates, without running one."""
    name = str(settings.dtype).removeprefix("torch.")
    rate = here.rates[name] * _PRODUCTS
    integer = settings.format and FORMATS[settings.format].integer and here.integer
    seconds = work.base / (here.rates["int8"] * _PRODUCTS if integer else rate)
    seconds += (work.flops - work.base) / rate
    seconds += work.bytes / (here.bandwidth * _MOVING)
    return seconds + (0 if integer else work.decoded * _DECODE)


def foretell(
    shape: Shape,
    settings: Settings,
    memory: Memory,
    *,
    examples: int,
    epochs: float,
    device: Device | None = None,
    here: Calibration | None = None,
    timed: bool = True,
) -> Speed:
    """Say how fast a run will go.

    Args:
        shape: of the model.
        settings: of the run.
        memory: the plan for them.
        examples: rows of the data.
        epochs: passes over them.
        device: a named machine; None is this one.
        here: this machine's figures, where `device` is None.
        timed: whether to time real blocks here (a few seconds).
    """
    work, timing = count_work(shape, settings, memory), None
    if device is not None:
        seconds, how = on_device(work, memory, settings, device), "datasheet"
    elif timed:
        timing = timed_step(shape, settings)
        seconds, how = timing.seconds, "timed here"
    else:
        seconds, how = from_rates(work, settings, here or calibrate()), "rates measured here"
    found = run_of(seconds, how, work.tokens, settings, examples, epochs)
    return dataclasses.replace(found, timing=timing)


def duration(hours: float) -> str:
    """Write a time in the unit that suits it."""
    if hours < 1 / 60:
        return f"{hours * 3600:.2g} s"
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:,.1f} days"


def run_of(
    seconds: float, how: str, tokens: int, settings: Settings, examples: int, epochs: float
) -> Speed:
    """Extend a step's seconds to a run."""
    steps = count_steps(examples, epochs, settings)
    rows = settings.batch_size * settings.accumulate
    hours = seconds * max(1.0, examples * epochs / rows) / 3600  # a tail's step is shorter
    return Speed(seconds, tokens / seconds, steps, hours, how)
