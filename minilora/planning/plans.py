"""The verb: plan a run before it begins."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from minilora.data import Batches, Example, as_examples, common_prefix, learned_labels
from minilora.files import is_number, short, whole
from minilora.lora import as_dtype, check_dropout, sizes
from minilora.planning.advice import (
    Advice,
    Data,
    Option,
    Planner,
    advise,
    all_options,
    best_dtype,
    u_shape,
)
from minilora.planning.batches import epoch_steps, mean_batch
from minilora.planning.machines import (
    HERE,
    Calibration,
    Device,
    calibrate,
    called,
    device,
    name_of,
    this_gpu,
    this_machine,
)
from minilora.planning.memory import Memory, count_memory, memory_table
from minilora.planning.shapes import COUNT, Settings, Shape, read_shape
from minilora.planning.speed import duration, usual_epochs
from minilora.quantization import Quantization

_ROWS = whole(1, 10**12)
BUSY = 0.2  # share of the processor above which times are worth a warning


@dataclass(frozen=True)
class Rule:
    """A rule of thumb that people quote, beside what is computed of what it is quoted for."""

    rule: str
    says: int  # bytes
    computed: int  # bytes
    of: str
    misleads: str

    def __str__(self) -> str:
        says, computed = _size(self.says), _size(self.computed)
        return f"{self.rule}: {says}; computed {computed} ({self.of}). {self.misleads}"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def rules_of_thumb(shape: Shape, settings: Settings, memory: Memory) -> list[Rule]:
    """Apply the three rules to a model, beside this plan."""
    parameters = shape.parameters
    small = sizes(shape.empty(torch.bfloat16), "nf4")
    narrow = Settings(
        r=settings.r, targets=settings.targets, exclude=settings.exclude,
        batch_size=settings.batch_size, length=settings.length,
    )  # fmt: skip
    full = count_memory(shape, narrow, gpu=True)
    trained = full.adapters + full.gradients + full.optimizer
    return [
        Rule(
            "1 GB per 1B parameters, and 20 %",
            int(1.2 * parameters),
            memory.peak,
            "this run's peak",
            "It is a rule for serving in 8 bits: it knows neither the format (2 GB per 1B in "
            "bf16) nor batch and length, and for small models the process alone is larger.",
        ),
        Rule(
            "LoRA needs a tenth (70B in 14 GB)",
            int(0.2 * parameters),
            full.weights + trained,
            f"bf16 base {_size(full.weights)} + trained state {_size(trained)}",
            "LoRA shrinks gradients and optimizer, not the frozen weights: these stay, whole, "
            "unless they are quantized or shared out.",
        ),
        Rule(
            "4 bits are half a GB per 1B (7B in 3.5 GB)",
            int(0.5 * parameters),
            small.total,
            "nf4 base alone",
            "Scales come on top, head and embeddings stay in 16 bits, and training adds "
            "activations, adapters and the loss.",
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class Plan(Option):
    """What will happen, before it happens: the option that was asked for; prints as tables.

    Attributes:
        shape: of the model.
        data: its size.
        rules: rules of thumb beside the computed figures.
        options: other ways to run; the first is this one.
        advice: what to do, with a command.
        busy: share of the processor here that other work took while the plan was made.
    """

    shape: Shape
    data: Data
    rules: list[Rule]
    options: list[Option]
    advice: Advice
    busy: float = 0.0

    def __str__(self) -> str:
        parts = [self._head(), memory_table(self.memory, self.device.memory), self._time()]
        parts.append("Rules of thumb\n" + "\n".join(f"- {rule}" for rule in self.rules))
        parts.append("Options\n" + option_table(self.options))
        told = [self.advice.why, u_shape(self.options), f"    {self.advice.command}"]
        if self.shape.foreign:
            told.append(
                f"transformers' own model is trained: {self.shape.foreign}. These figures are of "
                f"the same shapes, and rougher."
            )
        parts.append("Advice\n" + "\n".join(line for line in told if line.strip()))
        return "\n\n".join(parts)

    def _head(self) -> str:
        s = self.settings
        dtype, again = _plain(s.dtype), "on" if s.checkpointing else "off"
        base = dtype if s.format is None else f"{s.format} (rest {dtype})"
        return (
            f"{self.shape.name}: {self.shape.parameters / 1e9:.3f}B parameters "
            f"({self.shape.source}); r={s.r}, base {base}, {s.batch_size} × {s.accumulate} rows"
            f" of up to {s.length} tokens a step, checkpointing {again}"
            f"{', compiled' if s.compile else ''}"
            f"{f', {s.ranks} ranks ({s.parallel})' if s.parallel else ''}; {self.data.examples:,} "
            f"examples of {self.data.mean} tokens, {self.data.epochs:g} "
            f"epoch{'' if self.data.epochs == 1 else 's'}; on "
            f"{called(self.device.name)} ({self.device.what})"
        )

    def _time(self) -> str:
        if self.speed is None:
            return "Time: not planned, since it does not fit"
        how = self.speed.how
        if how == "datasheet":
            how = (
                f"{self.device.source}, taking {self.device.share(self.settings.compile):.0%} of "
                f"peak and "
                f"{self.device.moving:.0%} of bandwidth"
            )
        timing = self.speed.timing
        step = timing or f"{self.speed.step_seconds:.3g} s a step"
        text = (
            f"Time: {step}, {self.speed.tokens_per_second:,.0f} tokens/s, "
            f"{self.speed.steps:,} steps, "
            f"{duration(self.speed.hours)} ({how})"
        )
        if self.device.name == HERE and self.busy > BUSY:
            text += (
                f"\n  Other work took {self.busy:.0%} of the processor while this was measured; a "
                f"quiet machine is faster"
            )
        if timing is not None and not timing.steady:
            text += f"\n  {timing.doubt()}"
        if self.cost is not None:
            text += f"\nCost: {_money(self.cost)}"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-able values; bytes, seconds, hours."""
        options = [
            {"device": one.device.name, "settings": one.settings, "peak": one.memory.peak}
            | {name: getattr(one, name) for name in ("fits", "speed", "cost")}
            for one in self.options
        ]
        advice = {name: getattr(self.advice, name) for name in ("cpu", "why", "command")}
        found = {"model": self.shape.name, "parameters": self.shape.parameters}
        found |= {"device": self.device.name, "settings": self.settings, "data": self.data}
        found |= {"memory": self.memory.components() | {"peak": self.memory.peak}}
        found |= {name: getattr(self, name) for name in ("fits", "speed", "cost", "busy", "rules")}
        return _plain(found | {"options": options, "advice": advice})


def _plain(value: Any) -> Any:
    """Return a value with dataclasses as dicts and dtypes by name."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(one) for one in value]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _money(amount: float) -> str:
    return "under 0.01" if 0 < amount < 0.01 else f"{amount:,.2f}"


def option_table(options: list[Option]) -> str:
    """Return the options as a table."""
    head = ("machine", "base", "rows", "checkpointing", "ranks", "GB", "of", "fits", "tokens/s",
            "time", "cost")  # fmt: skip
    rows = [head]
    for one in options:
        s, speed = one.settings, one.speed
        rows.append((
            one.device.name, s.format or _plain(s.dtype),
            f"{s.batch_size}×{s.accumulate}", "yes" if s.checkpointing else "no",
            f"{s.ranks} {s.parallel}" if s.parallel else "1",
            f"{one.memory.peak / 1e9:.1f}", f"{one.device.memory / 1e9:.0f}",
            "yes" if one.fits else "no",
            f"{speed.tokens_per_second:,.0f}" if speed else "–",
            duration(speed.hours) if speed else "–",
            "–" if one.cost is None else _money(one.cost),
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    cells = [[f"{c:{width}}" for c, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(["", *row]).rstrip() for row in cells)


def data_size(
    data: int | Iterable[Any],
    length: int | None,
    epochs: float | None,
    batch_size: int = 8,
    accumulate: int = 1,
) -> Data:
    """Return the size of a data set, or of one of so many rows."""
    if epochs is not None and (not is_number(epochs) or not 0 < epochs < 1e9):
        raise ValueError(f"epochs must be a finite number above 0, found {short(epochs)}")
    if length is not None and COUNT(length, "length") < 2:
        raise ValueError("length must be at least 2, as a row's first token is never learned")
    if isinstance(data, int):
        rows, longest = _ROWS(data, "data"), 512 if length is None else length
        return Data(rows, longest, longest, epochs or usual_epochs(rows, batch_size, accumulate))
    examples = [
        Example(one.input_ids[:length], one.labels[:length])
        for one in as_examples(data)
        if learned_labels(one.labels[:length])
    ]
    if not examples:
        raise ValueError(
            f"no example has anything to learn within length={length} tokens (--max-length); "
            f"raise it"
        )
    batches = Batches(examples, batch_size=COUNT(batch_size, "batch_size"))
    steps = epoch_steps(batches, 1, common_prefix(examples))
    usual, longest = mean_batch(steps), max(len(one.input_ids) for one in examples)
    epochs = epochs or usual_epochs(len(examples), batch_size, accumulate)
    return Data(len(examples), usual.length, longest, epochs, usual.share, usual.shared)


def plan(
    model: Any,
    data: int | Iterable[Any] = 1000,
    *,
    r: int = 8,
    targets: object = "all-linear",
    exclude: object = (),
    length: int | None = None,
    batch_size: int = 8,
    accumulate: int = 1,
    epochs: float | None = None,
    quantize: str | None = None,
    dtype: torch.dtype | str = "auto",
    checkpointing: bool = False,
    device: str = "auto",
    ranks: int = 1,
    parallel: str | None = None,
    dropout: float = 0.0,
    compile: bool = False,
    block_size: int = 64,
    double_quant: bool = True,
    memory_gb: float | None = None,
    prices: float | Mapping[str, float] | None = None,
    timed: bool = True,
) -> Plan:
    """Say what a run will need before it begins: memory, time, cost, and settings that fit.

    Nothing is loaded: bytes are counted on shapes. On this machine's CPU the process and the rates
    are measured, and a few blocks of the model are timed (seconds, with random weights); of its GPU
    rates and free memory are measured.

    Args:
        model: a preset (`"llama-2-7b"`, …), a folder, a config.json, a .gguf file, a hub name
            (needs huggingface_hub), a configuration, or a model of minilora.models.
        data: examples as `minilora.data.as_examples` takes them, or their number.
        r: rank of the adapters.
        targets: as for `inject`.
        exclude: as for `inject`.
        length: tokens of a row at most; default: the data's longest, 512 for a number of rows.
        batch_size: rows of a micro-batch, over all ranks.
        accumulate: micro-batches of a step.
        epochs: passes over the data; default: as many as `fit` makes.
        quantize: the base's format: `"int8"`, `"nf4"`, `"int4"` or None.
        dtype: of base and computation; `"auto"`: the fastest on each machine that is compared.
        checkpointing: recompute blocks in the backward pass.
        device: `"auto"`: the GPU of this machine that torch can use, else its CPU; `"cuda"` or
            `"cuda:N"`, `"cpu"`; or a name of `DEVICES`, as `"h100-80gb"`.
        ranks: processes.
        parallel: None, `"ddp"` or `"fsdp"`.
        dropout: of the adapters.
        compile: run blocks through `torch.compile` (what they keep is counted by tracing them,
            some ten seconds for a GPU and as long for each dtype of a CPU).
        block_size: of nf4 and int4, compared ones too.
        double_quant: of nf4, compared ones too.
        memory_gb: GB (10⁹) of the machine that may be used; default: what is free, or the table.
        prices: of an hour on that machine, or by device name.
        timed: time blocks here; False takes the measured rates alone (faster, rougher).

    Returns:
        A `Plan`; `print` shows it.

    Raises:
        ValueError: unknown names (the nearest are named), sizes below 1, r above a layer's
            smaller side, rows longer than the context, formats that do not fit a layer.
        TypeError: a model of another type.
        RuntimeError: a hub name that can't be read.
    """
    shape = read_shape(model)
    for name, count in (("batch_size", batch_size), ("accumulate", accumulate)):
        COUNT(count, name)
    size = data_size(data, length, epochs, batch_size, accumulate)
    here = calibrate()
    chosen = _device(device, here, memory_gb)
    if chosen.name == HERE:
        here = dataclasses.replace(here, memory=chosen.memory)
    wanted = best_dtype(chosen) if dtype == "auto" else as_dtype(dtype)
    if quantize is not None:
        Quantization(quantize, block_size, double_quant)  # checks
    settings = Settings(
        quantize, wanted, r, targets, exclude, batch_size, accumulate, size.longest, checkpointing,
        check_dropout(dropout), ranks, parallel, block_size, double_quant, compile=compile,
    )  # fmt: skip
    if chosen.gpu and ranks > chosen.count:
        raise ValueError(
            f"{chosen.name} has {chosen.count} GPUs, found ranks={ranks}; pass at most as many"
        )
    asked = _prices(prices, chosen.name)
    if ranks > batch_size:
        raise ValueError(
            f"batch_size counts the rows of all ranks, so it must be at least ranks, found "
            f"batch_size={batch_size} and ranks={ranks}"
        )
    planner = Planner(shape, size, here, asked, timed, auto=dtype == "auto")
    options = all_options(planner, settings, chosen)
    return Plan(
        **vars(options[0]),
        shape=shape,
        data=size,
        rules=rules_of_thumb(shape, settings, options[0].memory),
        options=options,
        advice=advise(planner, options),
        busy=here.busy,
    )


def _prices(prices: float | Mapping[str, float] | None, name: str) -> dict[str, float]:
    """Return what an hour costs by known device; one number is of the device that is named."""
    if isinstance(prices, Mapping):
        found = {name_of(key): price for key, price in prices.items()}
    else:
        found = {} if prices is None else {name: prices}
    for key, price in found.items():
        if not is_number(price) or price < 0:
            raise ValueError(
                f"the price of an hour on {called(key)} must be at least 0, found {price!r}"
            )
    return found


def _device(name: str, here: Calibration, memory_gb: float | None) -> Device:
    name = name_of(name)
    own = this_gpu if name.startswith("cuda") else device
    found = this_machine(here) if name == HERE else own(name)
    if memory_gb is None:
        return found
    if not is_number(memory_gb) or not 0 < memory_gb < 1e9:
        raise ValueError(f"memory_gb must be a number above 0, found {short(memory_gb)}")
    return dataclasses.replace(found, memory=int(memory_gb * 1e9))
