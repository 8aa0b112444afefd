"""Which machine and which settings: what fits with a margin, as a command, and why or why not here.

Settings are given up in the order of what they cost: the micro-batch is split first (accumulation
gives the same gradient), then blocks are recomputed (a third more time), then the base is stored in
8 and in 4 bits (a change in quality).
"""

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from minilora.kernels import hardware
from minilora.planning import constants
from minilora.planning.calibration import Calibration
from minilora.planning.devices import DEVICES, Device
from minilora.planning.memory import Memory, Settings, count_memory
from minilora.planning.shapes import Shape
from minilora.planning.speed import Speed, duration, foretell, run_of
from minilora.quantization import FORMATS

HERE = "here"
LONGEST = 12.0  # hours: a run that is done overnight
_FEW = 10_000  # examples up to which a CPU is worth a thought
_SMALL = 0.5e9  # parameters, likewise


def this_machine(here: Calibration) -> Device:
    """Describe the machine at hand as a device."""
    tflops = {name: rate / 1e12 for name, rate in here.rates.items()}
    name = hardware().name
    bandwidth = here.bandwidth / 1e9
    return Device(HERE, name, False, 1, here.memory, tflops, bandwidth, 1.0, 1.0, "measured")


def best_dtype(device: Device) -> torch.dtype:
    """Return what `dtype="auto"` means there, as `minilora.hardware` decides it."""
    wide, narrow = device.tflops["float32"], device.tflops["bfloat16"]
    return torch.bfloat16 if narrow > 1.25 * wide else torch.float32


@dataclass(frozen=True)
class Data:
    """The data's size.

    Attributes:
        examples: rows.
        mean: their mean length in tokens, as they are padded.
        longest: their largest.
        epochs: passes over them.
        learned: share of the predicted tokens that enters the loss, in (0, 1].
    """

    examples: int
    mean: int
    longest: int
    epochs: float = 1.0
    learned: float = 1.0


@dataclass(frozen=True)
class Option:
    """One way to run: a machine, settings, and what they come to.

    Attributes:
        device: the machine.
        settings: of the run.
        memory: of each process there.
        fits: whether the peak leaves the margin free.
        speed: None where it does not fit.
        cost: of the run, None where it does not fit or the machine has no price.
    """

    device: Device
    settings: Settings
    memory: Memory
    fits: bool
    speed: Speed | None = None
    cost: float | None = None


class Planner:
    """Makes options for one model and one data set.

    Args:
        shape: of the model.
        data: its size.
        here: this machine's figures.
        prices: of an hour, by device name.
        timed: whether to time blocks here.
        auto: whether each machine computes in what is fastest there, not in what is asked for.
    """

    def __init__(
        self,
        shape: Shape,
        data: Data,
        here: Calibration,
        prices: Mapping[str, float],
        timed: bool = True,
        auto: bool = False,
    ):
        self.shape, self.data, self.here, self.prices = shape, data, here, prices
        self.timed, self.auto = timed, auto
        self.anchors: dict[str | None, tuple[Settings, Speed, float]] = {}  # by format

    def memory(self, settings: Settings, device: Device) -> Memory:
        """Plan the bytes of one process there."""
        local = device.name == HERE
        return count_memory(
            self.shape,
            settings,
            gpu=device.gpu,
            integer=self.here.integer if local else None,
            process=self.here.process if local else None,
        )

    def fits(self, memory: Memory, settings: Settings, device: Device) -> bool:
        """Tell whether the peak leaves the margin free; ranks on a CPU share its memory."""
        together = memory.peak if device.gpu else memory.peak * settings.ranks
        return together <= device.memory * (1 - constants.MARGIN)

    def option(self, settings: Settings, device: Device) -> Option:
        """Plan memory, and where it fits time and cost."""
        memory = self.memory(settings, device)
        if not self.fits(memory, settings, device):
            return Option(device, settings, memory, False)
        speed = self._speed(settings, memory, device)
        price = self.prices.get(device.name)
        cost = None if price is None else speed.hours * price
        return Option(device, settings, memory, True, speed, cost)

    def _speed(self, settings: Settings, memory: Memory, device: Device) -> Speed:
        """Rows are as long as the mean: batches of similar lengths hold little padding."""
        usual = dataclasses.replace(settings, length=self.data.mean, learned=self.data.learned)
        rows, epochs = self.data.examples, self.data.epochs
        if device.name != HERE:
            return foretell(
                self.shape, usual, memory, examples=rows, epochs=epochs, device=device
            )  # fmt: skip
        by_rates = self._by_rates(usual, memory)
        if not self.timed:
            return by_rates
        if settings.format not in self.anchors:  # others of this format are scaled from it
            found = foretell(self.shape, usual, memory, examples=rows, epochs=epochs)
            ratio = found.step_seconds / by_rates.step_seconds
            self.anchors[settings.format] = (usual, found, ratio)
            return found
        timed, found, ratio = self.anchors[settings.format]
        if usual == timed:
            return found
        seconds = by_rates.step_seconds * ratio
        tokens = usual.batch_size * usual.accumulate * usual.length
        return run_of(seconds, "scaled from the timed", tokens, usual, rows, epochs)

    def _by_rates(self, settings: Settings, memory: Memory) -> Speed:
        return foretell(
            self.shape, settings, memory, examples=self.data.examples, epochs=self.data.epochs,
            here=self.here, timed=False,
        )  # fmt: skip

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
    if device.count > 1 and settings.ranks == 1:
        spread = [(device.count, "ddp"), (device.count, "fsdp")]
    again = [settings.checkpointing] if settings.checkpointing else [False, True]
    for format in formats:
        for ranks, parallel in spread:
            if parallel == "fsdp" and format is not None:
                continue  # `minilora train` shards plain weights only
            for checkpointing in again:
                for split in _splits(settings.batch_size, ranks):
                    yield dataclasses.replace(
                        settings,
                        format=format,
                        ranks=ranks,
                        parallel=parallel,
                        checkpointing=checkpointing,
                        batch_size=settings.batch_size // split,
                        accumulate=settings.accumulate * split,
                    )


def _splits(batch: int, ranks: int) -> list[int]:
    """Return into how many micro-batches a batch can be split, each rank keeping a row."""
    found = [n for n in range(1, batch + 1) if batch % n == 0 and batch // n >= ranks]
    return found or [1]


def command(shape: Shape, settings: Settings, data: Data, device: Device) -> str:
    """Return the `minilora train` command of an option, "" where it does not read the model."""
    if shape.foreign:
        return ""
    name = shape.name if shape.stored else f"path/to/{shape.name.rpartition('/')[2]}"
    words = ["minilora", "train", name, "--data", "train.jsonl", "--out", "out/v1"]
    if settings.ranks > 1:
        words[:1] = ["torchrun", "--nproc-per-node", str(settings.ranks), "-m", "minilora"]
        words += ["--parallel", str(settings.parallel)]
    if device.gpu:
        words += ["--device", "cuda"]
    rank = "--r" if settings.ranks == 1 else "--rank"  # torchrun has options that begin with --r
    words += [rank, str(settings.r), "--batch-size", str(settings.batch_size)]
    if settings.accumulate > 1:
        words += ["--accumulate", str(settings.accumulate)]
    words += ["--max-length", str(settings.length), "--epochs", f"{data.epochs:g}"]
    if settings.format is not None:
        words += ["--quantize", settings.format]
    if settings.format and FORMATS[settings.format].block_sizes and settings.block_size != 64:
        words += ["--block-size", str(settings.block_size)]
    if device.name != HERE or settings.dtype != hardware().dtype:
        words += ["--dtype", str(settings.dtype).removeprefix("torch.")]
    if settings.checkpointing:
        words.append("--checkpointing")
    for flag, value in (("--targets", settings.targets), ("--exclude", settings.exclude)):
        if value != "all-linear" and value:
            words += [flag, *([value] if isinstance(value, str) else map(str, value))]  # type: ignore[call-overload]
    if settings.dropout:
        words += ["--dropout", f"{settings.dropout:g}"]
    return shlex.join(words)


@dataclass(frozen=True)
class Advice:
    """What to do.

    Attributes:
        option: the smallest machine with settings that fit; None if none of the known ones does.
        command: what to type there, or "".
        cpu: whether the CPU at hand is the right choice.
        why: in sentences.
    """

    option: Option | None
    command: str
    cpu: bool
    why: str


def advise(planner: Planner, options: list[Option]) -> Advice:
    """Choose this machine if it is done overnight, else the smallest other one that fits."""
    shape, data = planner.shape, planner.data
    here = next((one for one in options if one.device.name == HERE and one.fits), None)
    others = [one for one in options if one.device.name != HERE and one.fits and _trains(one)]
    overnight = here is not None and here.speed is not None and here.speed.hours <= LONGEST
    size = f"{shape.parameters / 1e9:.2g}B parameters"
    if here is not None and here.speed is not None and overnight:
        traits = [f"{size} ({'small' if shape.parameters <= _SMALL else 'not small'})"]
        few = "under" if data.examples < _FEW else "above"
        traits.append(f"{data.examples:,} examples ({few} {_FEW:,})")
        traits.append(f"a base in {here.settings.format or _plain(here.settings)}")
        why = (
            f"The CPU here is the right choice: {_gb(here.memory.peak)} of "
            f"{_gb(here.device.memory)} GB, done in {duration(here.speed.hours)} "
            f"({', '.join(traits)})"
            f". A larger machine would only be done sooner."
        )
        text = command(shape, here.settings, data, here.device)
        return Advice(here, text, True, why)
    gpus = sorted(
        (one for one in others if one.device.gpu),
        key=lambda one: one.device.memory * one.device.count,
    )
    chosen = (gpus or others or [None])[0]  # type: ignore[list-item]
    if here is None or here.speed is None:
        reason = f"{size} do not fit into {_gb(planner.here.memory)} GB here, not even in nf4"
    else:
        reason = f"it fits here, but {size} over {data.examples:,} examples take "
        reason += f"{duration(here.speed.hours)} (a CPU is right up to {LONGEST:g} h)"
    why = f"The CPU here is the wrong choice: {reason}. "
    if chosen is None:
        why += "No machine in the table fits either: shorten rows, or take a smaller model."
        return Advice(here, "", False, why)
    if chosen.speed is not None:
        why += f"The smallest machine in the table that fits is {chosen.device.name}: about "
        why += f"{duration(chosen.speed.hours)}."
    return Advice(chosen, command(shape, chosen.settings, data, chosen.device), False, why)


def _trains(option: Option) -> bool:
    """Tell whether `minilora train` can do it: it shards plain weights only."""
    return option.settings.parallel != "fsdp" or option.settings.format is None


def u_shape(options: list[Option]) -> str:
    """Say where cost is least among the machines that fit, slowest to fastest."""
    priced = [
        (one.cost, one.speed.hours, one.device.name)
        for one in options
        if one.cost is not None and one.speed is not None
    ]
    if len(priced) < 3:
        return ""
    priced.sort(key=lambda each: -each[1])
    at = min(range(len(priced)), key=lambda i: priced[i][0])
    least = priced[at][2]
    if at in (0, len(priced) - 1):
        which = "slowest" if at == 0 else "fastest"
        return f"Over machines cost is least at the {which} that is compared, {least}."
    return (
        f"Over machines cost is U-shaped: slower ones work longer than they are cheaper, faster "
        f"ones cost more than they save; the least is at {least}."
    )


def all_options(planner: Planner, settings: Settings, chosen: Device) -> list[Option]:
    """Return the asked settings on the asked machine, then the best that fits on each machine."""
    options = [planner.option(settings, chosen)]
    if chosen.name == HERE:
        for format in (None, "int8", "nf4"):
            one = dataclasses.replace(settings, format=format)
            if one != settings:
                options.append(planner.option(one, chosen))
    # The asked machine's memory may be the user's.
    machines = {HERE: this_machine(planner.here), **DEVICES, chosen.name: chosen}
    for device in machines.values():
        best = planner.best(_single(settings), device)
        if not best.fits and any(one.device.name == device.name for one in options):
            continue
        if not any(
            (best.device.name, best.settings) == (one.device.name, one.settings) for one in options
        ):
            options.append(best)
    return options


def _single(settings: Settings) -> Settings:
    return dataclasses.replace(settings, ranks=1, parallel=None)


def _plain(settings: Settings) -> str:
    return str(settings.dtype).removeprefix("torch.")


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}"


__all__ = [
    "HERE", "LONGEST", "Advice", "Data", "Option", "Planner", "advise", "all_options",
    "best_dtype", "command", "this_machine", "u_shape", "variants",
]  # fmt: skip
