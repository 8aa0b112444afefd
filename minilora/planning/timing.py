"""A few real steps of few blocks, timed here, and what they foretell of a whole model's."""

import dataclasses
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minilora.data import IGNORE, Batch, Example, pad
from minilora.kernels import hand_back_freed_memory, hardware, integer_way, keep_freed_memory
from minilora.lora import inject, is_conv1d, matrix_shape, places_of, select_targets
from minilora.models import GPT2Config, LlamaConfig
from minilora.planning.calibration import forget_peak, isolated, peak_bytes, resident
from minilora.planning.memory import Settings, count_memory
from minilora.planning.shapes import Config, Shape
from minilora.quantization import Quantization, QuantizedLinear
from minilora.running import token_loss

AGREE = 1.25  # factor within which the middle half of the repeats must lie
_REPEATS, _MOST = 5, 15  # timed steps, and how many where they disagree
_SECONDS = 1.5  # a timed step has fewer rows above this
_VOCABULARY = 2**25  # weights of a timed head at most
_DEPTH = 3  # blocks of a timed model
Clock = Callable[[], float]


def random_model(shape: Shape, settings: Settings) -> Any:
    """Return the model with random weights or codes, and adapters: no file is read.

    Codes are drawn, not quantized: it takes a hundredth of the time, and neither memory nor speed
    depend on their values.
    """
    dtype = torch.float32 if settings.autocast else settings.dtype
    model = shape.empty(dtype)
    if settings.format is not None:
        spec = Quantization(settings.format, settings.block_size, settings.double_quant)
        modules = dict(model.named_modules())
        for name in select_targets(model):
            small = _random_codes(modules[name], spec, dtype)
            for parent, child in places_of(model, modules[name]):
                parent._modules[child] = small
    drawn: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in drawn:
                    value = torch.empty(parameter.shape, dtype=parameter.dtype)
                    value = value.fill_(1.0) if value.dim() == 1 else value.uniform_(-0.02, 0.02)
                    drawn[id(parameter)] = nn.Parameter(value, requires_grad=False)
                module._parameters[name] = drawn[id(parameter)]
    return inject(
        model,
        settings.r,
        targets=settings.targets,
        exclude=settings.exclude,
        dropout=settings.dropout,
        dtype=settings.adapter_dtype,
    )


def _random_codes(module: Any, spec: Quantization, dtype: torch.dtype) -> QuantizedLinear:
    N, K = matrix_shape(module)
    parts = {}
    for name, (size, kind) in spec.layout(N, K).items():
        if kind == torch.int32:
            parts[name] = torch.full(size, 1e-3).view(torch.int32)
        elif kind == torch.int8:
            parts[name] = torch.randint(-127, 128, size, dtype=kind)
        else:
            top = 18 if name == "steps" else 256
            parts[name] = torch.randint(1, top, size, dtype=kind)
    bias = None if module.bias is None else torch.zeros(N, dtype=dtype)
    plain = type(module) if is_conv1d(module) else nn.Linear
    return QuantizedLinear(parts, K, N, spec, bias=bias, dtype=dtype, plain=plain)


def _shallow(shape: Shape) -> Shape:
    """The same widths with few blocks and, if it is large, a smaller vocabulary."""
    config, layers = shape.config, min(_DEPTH, shape.config.num_hidden_layers)
    vocabulary = min(config.vocab_size, max(1024, _VOCABULARY // config.hidden_size))
    changed: Config
    if isinstance(config, GPT2Config):
        changed = dataclasses.replace(config, n_layer=layers, vocab_size=vocabulary)
    else:
        changed = dataclasses.replace(config, num_hidden_layers=layers, vocab_size=vocabulary)
    return dataclasses.replace(shape, config=changed)


class _Inner:
    """Measure the blocks after the first within a step, forward and backward, through hooks."""

    def __init__(self, model: Any, clock: Clock):
        blocks = list(model._blocks())
        self.clock, self.count = clock, len(blocks) - 1
        self.at: dict[str, float] = {}
        if self.count:
            blocks[1].register_forward_pre_hook(lambda _, inputs: self._note("enter", inputs[0]))
            blocks[-1].register_forward_hook(lambda _, __, output: self._note("leave", output))

    def _note(self, name: str, x: torch.Tensor) -> None:
        if name in self.at:  # a block that is run again
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
    shallow = _shallow(shape)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = random_model(shallow, settings).train()
        ids = torch.randint(0, shallow.config.vocab_size, (rows, settings.length)).tolist()
    model.gradient_checkpointing = settings.checkpointing
    silent = settings.length - max(1, round(settings.learned * (settings.length - 1)))
    batch = pad([Example(row, [IGNORE] * silent + row[silent:]) for row in ids], 0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    inner = _Inner(model, clock)
    _step(model, batch, optimizer, settings, inner)
    while True:
        total, blocks = _step(model, batch, optimizer, settings, inner)
        block = blocks / inner.count if inner.count else 0.0
        yield max(0.0, total - blocks - block), block or total


@dataclass(frozen=True)
class Timing:
    """Seconds of an optimizer step, foretold several times over.

    Attributes:
        seconds: the median.
        low: where the middle half of the repeats begins.
        high: where it ends.
        repeats: how many there were.
        beyond: bytes at the peak above those planned for the timed steps, which a whole model takes
            too (what this machine's libraries hold for products); 0 where that is not known.
    """

    seconds: float
    low: float
    high: float
    repeats: int
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
        """Say that the repeats disagree, or ""."""
        if self.steady:
            return ""
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
    """Foretell a step from each of a few, and from more where these disagree."""
    keep_freed_memory()  # as `fit` does: steps are slower where freed pages are cleared again
    hand_back_freed_memory()
    held = resident() if forget_peak() else 0
    config, shallow, rows = shape.config, _shallow(shape), settings.one_pass.B
    flops = sum(one.numel() for one in shallow.empty().parameters())
    rate = hardware().float32 if settings.dtype == torch.float32 else hardware().bfloat16
    timed = max(1, min(rows, int(_SECONDS * rate * 1e9 / (6 * flops * settings.length))))
    larger = config.vocab_size / shallow.config.vocab_size
    found: list[float] = []
    for rest, block in _steps(shape, settings, timed, clock):
        found.append((rest * larger + block * config.num_hidden_layers) * rows / timed)
        if len(found) >= _MOST or (len(found) >= _REPEATS and _summed_up(found).steady):
            break
    beyond = 0
    if held:
        run = dataclasses.replace(settings, batch_size=timed, ranks=1, parallel=None)
        planned = count_memory(shallow, run, integer=integer_way(), process=held)
        beyond = peak_bytes() - planned.peak
    hand_back_freed_memory()
    return _summed_up(found, beyond)


def timed_step(shape: Shape, settings: Settings, clock: Clock = time.perf_counter) -> Timing:
    """Foretell the seconds of an optimizer step here from real steps of a model of few blocks.

    Every repeat foretells alone: what its inner blocks took is scaled to the model's depth, the
    rest (embedding, head, loss) stands as it is; rows and vocabulary are scaled where they were
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
        "import json, sys; from minilora.planning.timing import _timed_from; "
        "print(json.dumps(_timed_from(json.load(sys.stdin))))"
    )
    asked = {
        "kind": shape.kind,
        "config": dataclasses.asdict(shape.config),
        "settings": dataclasses.asdict(settings),
        "threads": torch.get_num_threads(),
    }
    try:
        done = subprocess.run(
            isolated(code), input=json.dumps(asked, default=str),
            capture_output=True, check=True, timeout=300, text=True,
        )  # fmt: skip
        return Timing(**json.loads(done.stdout.splitlines()[-1]))
    except (OSError, ValueError, TypeError, IndexError, subprocess.SubprocessError):
        return None


def _timed_from(asked: dict[str, Any]) -> dict[str, float]:
    """Time what `timed_step_apart` wrote down."""
    torch.set_num_threads(asked["threads"])
    kinds: dict[str, Any] = {"gpt2": GPT2Config, "llama": LlamaConfig}
    settings = asked["settings"]
    for key in ("dtype", "adapter_dtype"):
        settings[key] = getattr(torch, settings[key].removeprefix("torch."))
    shape = Shape("", kinds[asked["kind"]](**asked["config"]), "")
    return dataclasses.asdict(timed_step(shape, Settings(**settings)))


__all__ = ["AGREE", "Timing", "random_model", "timed_step", "timed_step_apart"]
