"""What this machine is and does, measured in a few seconds: memory, rates, and a few real steps."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.data import Batch, Example, pad
from minilora.evaluation import token_loss
from minilora.injection import inject, places_of
from minilora.kernels import (
    hand_back_freed_memory,
    hardware,
    integer_way,
    is_slow,
    keep_freed_memory,
)
from minilora.layers import is_conv1d
from minilora.models import GPT2Config, LlamaConfig
from minilora.planning import constants
from minilora.planning.memory import Settings
from minilora.planning.shapes import Config, Shape
from minilora.quantization import QuantizedLinear, Spec, check_spec, layout
from minilora.selection import matrix_shape, select_targets

_SECONDS = 1.5  # a timed step is made smaller above this
_REPEATS = 2.0  # seconds to go on repeating a short one
_VOCABULARY = 2**25  # weights of a timed head at most
_DEPTHS = (1, 3)
Clock = Callable[[], float]


@dataclass(frozen=True)
class Calibration:
    """Measured figures of this machine.

    Attributes:
        memory: bytes a process may use: the smaller of what is free and a container's limit.
        rates: FLOP/s of a large product by dtype name; `int8` in operations.
        bandwidth: bytes/s of a copy, read and written.
        integer: how INT8 and INT4 are multiplied as integers here, see `integer_way`.
        process: bytes of a process that trained a model of no size.
        busy: share of the processor that other work took meanwhile; 0 where that is not known.
    """

    memory: int
    rates: dict[str, float]
    bandwidth: float
    integer: str | None
    process: int
    busy: float = 0.0


@functools.cache
def calibrate() -> Calibration:
    """Measure this machine once per process, in about five seconds."""
    before = _processor_seconds()
    found = hardware()
    rates = {n: getattr(found, n) * 1e9 for n in ("float32", "bfloat16", "int8")}
    rates["float16"] = rates["bfloat16"]
    if is_slow(torch.bfloat16):  # linears multiply it in float32
        rates["bfloat16"] = rates["float32"]
    bandwidth, process = _bandwidth(), process_bytes()
    busy = _others(before, _processor_seconds())
    return Calibration(free_memory(), rates, bandwidth, integer_way(), process, busy)


def _processor_seconds() -> tuple[float, float, float]:
    """Seconds of all processors: in all, at work, and at work for this process and its children."""
    lines = Path("/proc/stat").read_text().splitlines() if Path("/proc/stat").exists() else [""]
    ticks = [int(n) for n in lines[0].split()[1:9]] or [0] * 8  # user to steal
    idle, own = ticks[3] + ticks[4], os.times()
    each = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 1.0
    mine = own.user + own.system + own.children_user + own.children_system
    return sum(ticks) * each, (sum(ticks) - idle) * each, mine


def _others(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    """Return the share of the processors' time between two readings that went to other work."""
    total, work, mine = (b - a for a, b in zip(before, after, strict=True))
    return min(1.0, max(0.0, work - mine) / total) if total > 0 else 0.0


def free_memory() -> int:
    """Return the bytes a process may still use, a container's limit included."""
    free = 0
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and limit.read_text().strip().isdigit():
        left = int(limit.read_text()) - int(used.read_text())
        free = min(free, left) if free else left
    return free


def _bandwidth() -> float:
    """Bytes/s of the best of a few copies of 256 MB, larger than any cache."""
    source = torch.ones(2**26)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(4):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


_TINY = """
import minilora, torch
from minilora.models import Llama, LlamaConfig
from minilora.planning.calibration import peak_bytes
model = Llama(LlamaConfig(64, 64, 64, 2, 2, 1, 32, 64), device="meta", dtype=torch.bfloat16)
model = minilora.inject(model.to_empty(device="cpu"), r=4)
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.02)
rows = [{"input_ids": [1] * 32, "labels": [1] * 32}] * 4
minilora.fit(model, rows, config=minilora.TrainConfig(max_steps=2, batch_size=2), quiet=True)
print(peak_bytes())
"""


def _python(code: str) -> list[str]:
    """Return the command that runs code isolated: nothing comes from the current folder.

    What this process imports from elsewhere (a user's site-packages, `PYTHONPATH`) is found too.
    """
    here = Path.cwd()
    known = [str(Path(folder).resolve()) for folder in sys.path if folder]
    known = [folder for folder in known if Path(folder) != here]
    home = str(Path(__file__).resolve().parents[2])  # of minilora, which has been imported from it
    start = f"import sys; sys.path += {[*known, home]!r}\n"
    return [sys.executable, "-I", "-c", start + code]


@functools.cache
def process_bytes() -> int:
    """Measure in a process of its own what training takes beside its tensors."""
    try:
        done = subprocess.run(
            _python(_TINY), capture_output=True, text=True, check=True, timeout=120
        )
        return int(done.stdout.split()[-1]) or constants.PROCESS
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return constants.PROCESS


# --- a few real steps


def random_model(shape: Shape, settings: Settings) -> Any:
    """Return the model with random weights or codes, and adapters: no file is read.

    Codes are drawn, not quantized: it takes a hundredth of the time, and neither memory nor speed
    depend on their values.
    """
    dtype = torch.float32 if settings.autocast else settings.dtype
    model = shape.empty(dtype)
    if settings.format is not None:
        spec = check_spec(settings.format, settings.block_size, settings.double_quant)
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


def _random_codes(module: Any, spec: Spec, dtype: torch.dtype) -> QuantizedLinear:
    N, K = matrix_shape(module)
    parts = {}
    for name, (size, kind) in layout(spec, N, K).items():
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


def _shallow(shape: Shape, layers: int) -> Shape:
    """The same widths with fewer blocks and, if it is large, a smaller vocabulary."""
    config = shape.config
    vocabulary = min(config.vocab_size, max(1024, _VOCABULARY // config.hidden_size))
    changed: Config
    if isinstance(config, GPT2Config):
        changed = dataclasses.replace(config, n_layer=layers, vocab_size=vocabulary)
    else:
        changed = dataclasses.replace(config, num_hidden_layers=layers, vocab_size=vocabulary)
    return dataclasses.replace(shape, config=changed)


def _step(
    model: Any, batch: Batch, optimizer: torch.optim.Optimizer, settings: Settings, clock: Clock
) -> float:
    start = clock()
    with torch.autocast("cpu", dtype=settings.dtype, enabled=settings.autocast):
        total, count = token_loss(model, batch)
    total.backward()
    for group in optimizer.param_groups:
        torch._foreach_div_([p.grad for p in group["params"]], count)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return clock() - start


def _seconds(shape: Shape, settings: Settings, layers: int, rows: int, clock: Clock) -> float:
    """Time a step of a shallow model: the best of three to eight, after one that warms up."""
    keep_freed_memory()  # as `fit` does: steps are slower where freed pages are cleared again
    shallow = _shallow(shape, layers)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = random_model(shallow, settings).train()
        model.gradient_checkpointing = settings.checkpointing
        ids = torch.randint(0, shallow.config.vocab_size, (rows, settings.length)).tolist()
        batch = pad([Example(row, row) for row in ids], 0)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5)
        step = functools.partial(_step, model, batch, optimizer, settings, clock)
        step()
        found = [step() for _ in range(3)]
        while sum(found) < _REPEATS and len(found) < 8:  # others' work shows in short steps most
            found.append(step())
        return min(found)


_known: dict[str, tuple[float, float, float]] = {}


def _timed(shape: Shape, settings: Settings, clock: Clock) -> tuple[float, float, float]:
    """Seconds of the rest and of a block at a number of rows, and how many times more there are."""
    p = settings.one_pass
    flops = sum(one.numel() for one in _shallow(shape, _DEPTHS[1]).empty().parameters())
    rate = hardware().float32 if settings.dtype == torch.float32 else hardware().bfloat16
    most = _SECONDS * rate * 1e9 / (6 * flops * settings.length)
    rows = max(1, min(p.B, int(most)))
    low, high = (_seconds(shape, settings, depth, rows, clock) for depth in _DEPTHS)
    hand_back_freed_memory()
    block = max(0.0, (high - low) / (_DEPTHS[1] - _DEPTHS[0]))
    return max(0.0, low - _DEPTHS[0] * block), block, p.B / rows


def timed_step(shape: Shape, settings: Settings, clock: Clock = time.perf_counter) -> float:
    """Foretell the seconds of an optimizer step here from steps of 1 and of 3 real blocks.

    The difference of the two is two blocks; the rest is embedding, head and loss. Both are scaled:
    blocks to the model's depth, rows and vocabulary to their size where they were cut. `clock` is
    for measurements on a busy machine, which may count the processor's seconds.
    """
    one = dataclasses.replace(settings, accumulate=1)
    key = repr((shape.config, one, torch.get_num_threads(), clock))
    if key not in _known:
        _known[key] = _timed(shape, one, clock)
    rest, block, larger = _known[key]
    rest *= shape.config.vocab_size / _shallow(shape, 1).config.vocab_size
    seconds = (rest + block * shape.config.num_hidden_layers) * larger
    return seconds * settings.accumulate


def timed_step_apart(shape: Shape, settings: Settings) -> float | None:
    """As `timed_step`, in a process of its own, so that this one's memory stays as it is."""
    code = (
        "import json, sys; from minilora.planning.calibration import _timed_from; "
        "print(_timed_from(json.load(sys.stdin)))"
    )
    asked = {
        "kind": shape.kind,
        "config": dataclasses.asdict(shape.config),
        "settings": dataclasses.asdict(settings),
    }
    try:
        done = subprocess.run(
            _python(code), input=json.dumps(asked, default=str),
            capture_output=True, check=True, timeout=300, text=True,
        )  # fmt: skip
        return float(done.stdout.split()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


def _timed_from(asked: dict[str, Any]) -> float:
    """Time what `timed_step_apart` wrote down."""
    kinds: dict[str, Any] = {"gpt2": GPT2Config, "llama": LlamaConfig}
    settings = asked["settings"]
    for key in ("dtype", "adapter_dtype"):
        settings[key] = getattr(torch, settings[key].removeprefix("torch."))
    shape = Shape("", kinds[asked["kind"]](**asked["config"]), "")
    return timed_step(shape, Settings(**settings))


def peak_bytes() -> int:
    """Return the most memory this process has held, in bytes; 0 where that is not known."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def forget_peak() -> bool:
    """Begin to measure the peak anew, where the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


__all__ = [
    "Calibration", "calibrate", "forget_peak", "free_memory", "peak_bytes", "process_bytes",
    "random_model", "timed_step", "timed_step_apart",
]  # fmt: skip
