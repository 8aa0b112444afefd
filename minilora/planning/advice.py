"""Which machine and which settings: what fits with a margin, as a command, and why or why not here.

Settings are given up in the order of what they cost: the micro-batch is split first (accumulation
gives the same gradient), then blocks are recomputed (a third more time), then the base is stored in
8 and in 4 bits (a change in quality).
"""

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from minilora.kernels import fastest_dtype, hardware
from minilora.models import ModelConfig
from minilora.planning.batches import usual_pass_tokens
from minilora.planning.machines import DEVICES, HERE, Calibration, Device, this_machine
from minilora.planning.memory import MARGIN, Memory, count_memory
from minilora.planning.shapes import Settings, Shape
from minilora.planning.speed import Speed, count_work, duration, from_rates, on_device, run_speed
from minilora.planning.timing import Timing, timed_step

LONGEST = 12.0  # hours: a run that is done overnight
_FEW = 10_000  # examples up to which a CPU is worth a thought
_SMALL = 0.5e9  # parameters up to which it is, too


def best_dtype(device: Device) -> torch.dtype:
    """Return what `dtype="auto"` means there, as `minilora.hardware` decides it."""
    if device.local and device.gpu:
        return fastest_dtype(torch.device(device.name))
    wide, narrow = device.tflops["float32"], device.tflops["bfloat16"]
    return torch.bfloat16 if narrow > 1.25 * wide else torch.float32


@dataclass(frozen=True)
class Data:
    """The data's size."""

    examples: int  # rows
    mean: int  # their mean length in tokens, as they are padded
    longest: int
    epochs: float = 1.0  # passes over them
    learned: float = 1.0  # share of the predicted tokens that enters the loss, in (0, 1]
    shared: int = 0  # first tokens that all rows share, where computing them once saves much


@dataclass(frozen=True)
class Option:
    """One way to run: a machine, settings, and what they come to."""

    device: Device
    settings: Settings
    memory: Memory  # of each process there
    fits: bool  # whether the peak leaves the margin free
    speed: Speed | None = None  # None where it does not fit
    cost: float | None = None  # of the run, None where it does not fit or there is no price


@dataclass
class Planner:
    """Makes options for one model and one data set."""

    shape: Shape
    data: Data
    here: Calibration
    prices: Mapping[str, float]  # of an hour, by device name
    timed: bool = True  # whether to time blocks here
    auto: bool = False  # whether each machine computes in what is fastest there
    # By format: what was timed, and how much longer it took than by the measured rates.
    anchors: dict[str | None, tuple[Settings, Timing, float]] = field(default_factory=dict)

    def memory(self, settings: Settings, device: Device) -> Memory:
        """Plan the bytes of one process there, for rows of any length up to the settings'."""
        return self._memory(self._in_passes(settings, device).fullest, device)

    def _memory(self, settings: Settings, device: Device) -> Memory:
        local = device.name == HERE
        return count_memory(
            self.shape,
            settings,
            gpu=device.gpu,
            integer=self.here.integer if local else None,
            process=self.here.process if local else None,
        )

    def _in_passes(self, settings: Settings, device: Device) -> Settings:
        """Return the settings with the passes that `fit` makes there."""
        foreign = bool(self.shape.foreign) or not isinstance(self.shape.config, ModelConfig)
        most = usual_pass_tokens(device.gpu, settings.parallel, foreign)
        ropes = getattr(self.shape.config, "ropes", ())
        by_length = any(rope and rope.scaling and rope.scaling.by_length for rope in ropes)
        apart = foreign or by_length or settings.dropout or settings.parallel == "fsdp"
        shared = 0 if apart else self.data.shared
        return dataclasses.replace(settings, pass_tokens=most, shared=shared)

    def fits(self, memory: Memory, settings: Settings, device: Device) -> bool:
        """Return whether the peak leaves the margin free; ranks on a CPU share its memory."""
        together = memory.peak if device.gpu else memory.peak * settings.ranks
        return together <= device.memory * (1 - MARGIN)

    def option(self, settings: Settings, device: Device) -> Option:
        """Plan memory, and where it fits time and cost."""
        memory = self.memory(settings, device)
        if not self.fits(memory, settings, device):
            return Option(device, settings, memory, False)
        speed = self._speed(settings, device)
        price = self.prices.get(device.name)
        cost = None if price is None else speed.hours * price
        return Option(device, settings, memory, True, speed, cost)

    def _speed(self, settings: Settings, device: Device) -> Speed:
        """Rows are as long as the mean: batches of similar lengths hold little padding."""
        usual = dataclasses.replace(
            self._in_passes(settings, device), length=self.data.mean, learned=self.data.learned
        )
        memory = self._memory(usual, device)
        work = count_work(self.shape, usual, memory, device.gpu)
        size = self.data.examples, self.data.epochs
        if device.name != HERE:
            how = "rates measured here" if device.local else "datasheet"
            return run_speed(on_device(work, memory, usual, device), how, usual, *size)
        seconds = from_rates(work, usual, self.here)
        if not self.timed:
            return run_speed(seconds, "rates measured here", usual, *size)
        if usual.format not in self.anchors:  # others of this format are scaled from it
            alone = dataclasses.replace(usual, ranks=1, parallel=None)  # ranks share the processor
            timing = timed_step(self.shape, alone)
            self.anchors[usual.format] = usual, timing, timing.seconds / seconds
        timed, timing, ratio = self.anchors[usual.format]
        if usual == timed:
            return run_speed(timing.seconds, "timed here", usual, *size, timing)
        return run_speed(seconds * ratio, "scaled from the timed", usual, *size)

    def best(self, settings: Settings, device: Device) -> Option:
        """Return the first variant of the settings that fits there, else the one of least need."""
        if self.auto:
            settings = dataclasses.replace(settings, dtype=best_dtype(device))
        for one in variants(settings, device):
            if self.fits(self.memory(one, device), one, device):
                break
        return self.option(one, device)


def variants(settings: Settings, device: Device) -> Iterator[Settings]:
    """Yield the settings, then ones that need less memory, in the order of what they cost."""
    formats: list[str | None] = [settings.format]
    if settings.format in (None, "int8"):
        formats += [one for one in ("int8", "nf4") if one != settings.format]
    spread: list[tuple[int, str | None]] = [(settings.ranks, settings.parallel)]
    batch = settings.batch_size
    if min(device.count, batch) > 1 and settings.ranks == 1:
        spread = [(min(device.count, batch), parallel) for parallel in ("ddp", "fsdp")]
    again = [settings.checkpointing] if settings.checkpointing else [False, True]
    for format in formats:
        for ranks, parallel in spread:
            if parallel == "fsdp" and format is not None:
                continue  # `minilora train` shards plain weights only
            # Each rank keeps a row.
            splits = [n for n in range(1, batch + 1) if batch % n == 0 and batch // n >= ranks]
            for checkpointing in again:
                for split in splits:
                    yield dataclasses.replace(
                        settings,
                        format=format,
                        ranks=ranks,
                        parallel=parallel,
                        checkpointing=checkpointing,
                        batch_size=batch // split,
                        accumulate=settings.accumulate * split,
                    )


def command(shape: Shape, settings: Settings, data: Data, device: Device) -> str:
    """Return the `minilora train` command of an option."""
    several, format = settings.ranks > 1, settings.format
    blocks = settings.spec is not None and settings.spec.storage.block_sizes
    name = shape.name if shape.stored else f"path/to/{shape.name.rpartition('/')[2]}"
    words: list[object] = ["minilora", "train", name, "--data", "train.jsonl", "--out", "out/v1"]
    if several:
        words[:1] = ["torchrun", "--nproc-per-node", settings.ranks, "-m", "minilora"]
    place = (device.name if device.local else "cuda") if device.gpu else None
    if device.name == HERE and torch.cuda.is_available():
        place = "cpu"
    auto = hardware().dtype if device.name == HERE else best_dtype(device)
    narrow = not device.local or settings.dtype != auto
    flags: list[tuple[str, object]] = [
        ("--parallel", settings.parallel),
        ("--device", place),
        ("--rank" if several else "--r", settings.r),  # torchrun has options that begin with --r
        ("--batch-size", settings.batch_size),
        ("--accumulate", settings.accumulate if settings.accumulate > 1 else None),
        ("--max-length", settings.length),
        ("--epochs", f"{data.epochs:g}"),
        ("--quantize", format),
        ("--block-size", settings.block_size if blocks and settings.block_size != 64 else None),
        ("--dtype", str(settings.dtype).removeprefix("torch.") if narrow else None),
        ("--targets", None if settings.targets == "all-linear" else settings.targets),
        ("--exclude", settings.exclude or None),
        ("--dropout", f"{settings.dropout:g}" if settings.dropout else None),
    ]
    for flag, value in flags:
        if value is not None:
            words += [flag, *(value if isinstance(value, (list, tuple)) else [value])]
    words += [f"--{name}" for name in ("checkpointing", "compile") if getattr(settings, name)]
    return shlex.join(map(str, words))


@dataclass(frozen=True)
class Advice:
    """What to do."""

    option: Option | None  # the smallest machine that fits; None if none of the known ones does
    command: str  # what to type there, or ""
    cpu: bool  # whether the CPU at hand is the right choice
    why: str  # in sentences


def advise(planner: Planner, options: list[Option]) -> Advice:
    """Choose the GPU here, else the CPU if it is done overnight, else the smallest that fits."""
    shape, data = planner.shape, planner.data
    # `minilora train` shards plain weights only.
    runs = [one for one in options if one.speed is not None
            and (one.settings.parallel != "fsdp" or one.settings.format is None)]  # fmt: skip
    here = next((one for one in runs if one.device.name == HERE), None)
    hours = here.speed.hours if here is not None and here.speed is not None else None
    size = f"{shape.parameters / 1e9:.2g}B parameters"
    gpu = next((one for one in runs if one.device.gpu and one.device.local), None)
    if gpu is not None and gpu.speed is not None:
        why = (
            f"The GPU here is the right choice: {gpu.memory.peak / 1e9:.1f} of "
            f"{gpu.device.memory / 1e9:.1f} GB, done in about {duration(gpu.speed.hours)} ({size}, "
            f"{data.examples:,} examples)."
        )
        return Advice(gpu, command(shape, gpu.settings, data, gpu.device), False, why)
    if here is not None and hours is not None and hours <= LONGEST:
        plain = str(here.settings.dtype).removeprefix("torch.")
        why = (
            f"The CPU here is the right choice: {here.memory.peak / 1e9:.1f} of "
            f"{here.device.memory / 1e9:.1f} GB, done in {duration(hours)} ({size} "
            f"({'small' if shape.parameters <= _SMALL else 'not small'}), {data.examples:,} "
            f"examples ({'under' if data.examples < _FEW else 'above'} {_FEW:,}), a base in "
            f"{here.settings.format or plain}). A larger machine would only be done sooner."
        )
        return Advice(here, command(shape, here.settings, data, here.device), True, why)
    if hours is None:
        reason = f"{size} do not fit into {planner.here.memory / 1e9:.1f} GB here, not even in nf4"
    else:
        reason = (
            f"it fits here, but {size} over {data.examples:,} examples take {duration(hours)} (a "
            f"CPU is right up to {LONGEST:g} h)"
        )
    why = f"The CPU here is the wrong choice: {reason}. "
    others = [one for one in runs if one.device.name != HERE]
    smallest = sorted(
        others, key=lambda one: (not one.device.gpu, one.device.memory * one.device.count)
    )
    if not smallest:
        why += "No machine in the table fits either: shorten rows, or take a smaller model."
        return Advice(here, "", False, why)
    chosen = smallest[0]
    assert chosen.speed is not None
    why += f"The smallest machine in the table that fits is {chosen.device.name}: about "
    why += f"{duration(chosen.speed.hours)}."
    return Advice(chosen, command(shape, chosen.settings, data, chosen.device), False, why)


def u_shape(options: list[Option]) -> str:
    """Say where cost is least among the machines that fit, slowest to fastest."""
    priced = [(one.speed.hours, one.cost, one.device.name) for one in options
              if one.cost is not None and one.speed is not None]  # fmt: skip
    if len(priced) < 3:
        return ""
    priced.sort(key=lambda each: -each[0])
    _, _, least = min(priced, key=lambda each: each[1])
    for end, which in ((priced[0], "slowest"), (priced[-1], "fastest")):
        if least == end[2]:
            return f"Over machines cost is least at the {which} that is compared, {least}."
    return (
        f"Over machines cost is U-shaped: slower ones work longer than they are cheaper, faster "
        f"ones cost more than they save; the least is at {least}."
    )


def all_options(planner: Planner, settings: Settings, chosen: Device) -> list[Option]:
    """Return the asked settings on the asked machine, then the best that fits on each machine.

    On the machine here the first that fits is advised: what keeps the format comes before others.
    """
    asked = [settings]
    if chosen.local:
        asked.append(planner.best(settings, chosen).settings)
        asked += [dataclasses.replace(settings, format=one) for one in (None, "int8", "nf4")]
    options = [planner.option(one, chosen) for one in {repr(one): one for one in asked}.values()]
    # The asked machine's memory may be the user's.
    machines = {HERE: this_machine(planner.here), **DEVICES, chosen.name: chosen}
    alone = dataclasses.replace(settings, ranks=1, parallel=None)
    for device in machines.values():
        best = planner.best(alone, device)
        there = [one.settings for one in options if one.device.name == device.name]
        if best.settings not in there and (best.fits or not there):
            options.append(best)
    return options
