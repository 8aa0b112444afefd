"""A few real steps of few blocks, timed here, and what a whole model's take by them."""

import dataclasses
import pickle
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from minilora.data import IGNORE, Batch, Example, pad
from minilora.kernels import hand_back_freed_memory, hardware, integer_way, keep_freed_memory
from minilora.lora import Survey
from minilora.planning.machines import forget_peak, peak_bytes, resident, run_apart
from minilora.planning.memory import count_memory, count_planned
from minilora.planning.saved import copied
from minilora.planning.shapes import Settings, Shape, planned_model
from minilora.running import compiled, only_watches, token_loss

AGREE = 1.25  # factor within which the middle half of the repeats must lie
_REPEATS, _MOST = 5, 15  # timed steps, and how many where they disagree
_SECONDS = 1.5  # a timed step has fewer rows above this
_VOCABULARY = 2**25  # weights of a timed head at most
_DEPTH = 3  # blocks of a timed model
Clock = Callable[[], float]


def random_model(shape: Shape, settings: Settings, blocks: int | None = None) -> Any:
    """Return the model with adapters and random weights or codes: no file is read.

    Codes are drawn, not quantized: it takes a hundredth of the time, and neither memory nor speed
    depend on their values. `blocks` is how many of every sort it has at most; None: all.
    """
    return copied(planned_model(shape, settings, blocks)[0], _drawn)


def _drawn(name: str, like: torch.Tensor) -> torch.Tensor:
    if like.dtype == torch.int32:  # bits of scales
        return torch.full(like.shape, 1e-3, dtype=torch.float32).view(torch.int32)
    if like.dtype == torch.int8:
        return torch.randint(-127, 128, like.shape, dtype=torch.int8)
    if like.dtype == torch.uint8:
        return torch.randint(1, 18 if name == "steps" else 256, like.shape, dtype=torch.uint8)
    if not like.is_floating_point():  # masks and positions, among the buffers of transformers
        return torch.ones(like.shape, dtype=like.dtype)
    value = torch.empty(like.shape, dtype=like.dtype)
    return value.fill_(1.0) if value.dim() == 1 else value.uniform_(-0.02, 0.02)


def _narrow(shape: Shape) -> Shape:
    """Return the shape with a smaller vocabulary, where it is large."""
    config = shape.config
    vocabulary = min(config.vocab_size, max(1024, _VOCABULARY // config.hidden_size))
    return dataclasses.replace(shape, config=config.replace(vocab_size=vocabulary))


class _Inner:
    """Measure the blocks after the first within a step, forward and backward, through hooks."""

    def __init__(self, model: Any, clock: Clock):
        blocks = list(Survey(model).blocks.values())
        self.clock, self.count = clock, len(blocks) - 1
        self.at: dict[str, float] = {}
        if self.count:
            before = only_watches(lambda _, inputs: self._note("enter", inputs[0]))
            after = only_watches(lambda _, __, output: self._note("leave", output))
            blocks[1].register_forward_pre_hook(before)
            blocks[-1].register_forward_hook(after)

    def _note(self, name: str, x: Any) -> None:
        x = x[0] if isinstance(x, tuple) else x  # blocks of transformers may return more
        if name in self.at or not torch.is_grad_enabled():  # a block that is run again, or tried
            return
        self.at[name] = self.clock()
        if x.requires_grad:
            x.register_hook(lambda _: self.at.update({f"{name} back": self.clock()}))

    def take(self, end: float) -> float:
        """Return the seconds of a step that ended, all those blocks together, and begin anew."""
        at, self.at = self.at, {}
        if not self.count:
            return 0.0
        back = at.get("enter back", end) - at["leave back"]
        return at["leave"] - at["enter"] + back


def _step(
    model: Any, batch: Batch, optimizer: torch.optim.Optimizer, settings: Settings, inner: _Inner
) -> tuple[float, float]:
    """Return the seconds of a step, and those of the blocks after the first in it."""
    start = inner.clock()
    with torch.autocast("cpu", dtype=settings.dtype, enabled=settings.autocast):
        total, count = token_loss(model, batch)
    total.backward()
    blocks = inner.take(inner.clock())
    for group in optimizer.param_groups:
        torch._foreach_div_([p.grad for p in group["params"]], count)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return inner.clock() - start, blocks


def _steps(
    shape: Shape, settings: Settings, rows: int, clock: Clock
) -> Iterator[tuple[float, float]]:
    """Time steps of a shallow model without end, after one that warms up: the rest, and a block."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = random_model(shape, settings, _DEPTH).train()
        ids = torch.randint(0, shape.config.vocab_size, (rows, settings.length))
        ids[:, : settings.shared] = ids[0, : settings.shared]
    if settings.checkpointing and hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.gradient_checkpointing = settings.checkpointing
    silent = settings.length - max(1, round(settings.learned * (settings.length - 1)))
    silent = max(silent, settings.shared + 1)
    batch = pad([Example(row, [IGNORE] * silent + row[silent:]) for row in ids.tolist()], 0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    inner = _Inner(model, clock)
    with compiled(model, settings.compile):
        _step(model, batch, optimizer, settings, inner)
        while True:
            total, blocks = _step(model, batch, optimizer, settings, inner)
            block = blocks / inner.count if inner.count else 0.0
            yield max(0.0, total - blocks - block), block or total


@dataclass(frozen=True)
class Timing:
    """Seconds of an optimizer step, forecast several times over."""

    seconds: float  # the median
    low: float  # where the middle half of the repeats begins
    high: float  # and ends
    repeats: int
    # Bytes at the peak above those planned for the timed steps, which a whole model takes too (what
    # this machine's libraries hold for products); 0 where that is not known.
    beyond: int = 0

    @property
    def steady(self) -> bool:
        """Whether the middle half agrees within a factor of `AGREE`."""
        return self.high <= AGREE * self.low

    def __str__(self) -> str:
        return (
            f"{self.seconds:.3g} s a step ({self.low:.3g} to {self.high:.3g} in the middle half of "
            f"{self.repeats} repeats)"
        )

    def doubt(self) -> str:
        """Say that the repeats disagree."""
        return (
            f"timings disagree by a factor of {self.high / self.low:.2g} (above {AGREE}) after "
            f"{self.repeats} repeats; take the time as rough, and plan again on a quiet machine"
        )

    def times(self, factor: float) -> "Timing":
        """Return it for so much more work."""
        return dataclasses.replace(
            self, seconds=self.seconds * factor, low=self.low * factor, high=self.high * factor
        )


def _summed_up(found: list[float], beyond: int = 0) -> Timing:
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return Timing(middle, low, high, len(found), beyond)


_known: dict[str, Timing] = {}


def _timed(shape: Shape, settings: Settings, clock: Clock) -> Timing:
    """Forecast a step from each of a few, and from more where these disagree."""
    keep_freed_memory()  # as `fit` does: steps are slower where freed pages are cleared again
    hand_back_freed_memory()
    held = resident() if forget_peak() else 0
    narrow, depth = _narrow(shape), shape.config.num_hidden_layers
    few = count_planned(narrow, settings, _DEPTH)
    flops = few.weights + few.head[0] * few.head[1]
    rate = hardware().float32 if settings.dtype == torch.float32 else hardware().bfloat16
    timed = max(1, min(settings.rows, int(_SECONDS * rate * 1e9 / (6 * flops * settings.length))))
    spared = settings.shared * (settings.rank_rows - settings.passes)
    whole = settings.rank_rows * settings.length - spared
    times = whole / (timed * settings.length - settings.shared * (timed - 1))
    larger = shape.config.vocab_size / narrow.config.vocab_size
    found: list[float] = []
    for rest, block in _steps(narrow, settings, timed, clock):
        found.append((rest * larger + block * depth) * times)
        if len(found) >= _MOST or (len(found) >= _REPEATS and _summed_up(found).steady):
            break
    beyond = 0
    if held:
        run = dataclasses.replace(settings, batch_size=timed, ranks=1, parallel=None)
        planned = count_memory(narrow, run, integer=integer_way(), process=held, counted=few)
        beyond = peak_bytes() - planned.peak
    hand_back_freed_memory()
    return _summed_up(found, beyond)


def timed_step(shape: Shape, settings: Settings, clock: Clock = time.perf_counter) -> Timing:
    """Forecast the seconds of an optimizer step here from real steps of a model of few blocks.

    Every repeat makes a forecast alone: what its inner blocks took is scaled to the model's depth,
    the rest (embedding, head, loss) stands as it is; rows and vocabulary are scaled where they were
    cut. `clock` is for measurements on a busy machine, which may count the processor's seconds.
    """
    one = dataclasses.replace(settings, accumulate=1)
    key = repr((shape.config, one, torch.get_num_threads(), clock))
    if key not in _known:
        _known[key] = _timed(shape, one, clock)
    return _known[key].times(settings.accumulate)


def timed_step_apart(shape: Shape, settings: Settings) -> Timing | None:
    """As `timed_step`, in a process of its own, so that this one's memory stays as it is."""
    code = (
        "import dataclasses, json, pickle, sys; import torch; "
        "from minilora.planning.timing import timed_step; "
        "threads, *asked = pickle.load(sys.stdin.buffer); torch.set_num_threads(threads); "
        "print(json.dumps(dataclasses.asdict(timed_step(*asked))))"
    )
    found = run_apart(code, 300, pickle.dumps((torch.get_num_threads(), shape, settings)))
    return None if found is None else Timing(**found)
