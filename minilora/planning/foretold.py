"""`fit(..., plan=True)`: planned figures before the first step, measured ones after the last."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.kernels import hardware
from minilora.lora_layer import lora_layers, rank_of, weight_dtype
from minilora.planning.calibration import (
    calibrate,
    forget_peak,
    peak_bytes,
    timed_step_apart,
)
from minilora.planning.memory import Settings, count_memory
from minilora.planning.shapes import Linear, read_shape
from minilora.planning.speed import count_steps
from minilora.planning.verb import memory_table
from minilora.quantization import QuantizedLinear
from minilora.selection import matrix_shape
from minilora.sizes import sizes
from minilora.wrappers import named_modules


class Foretold:
    """Say what a run will take, and what it took.

    Args:
        model: a Llama or GPT2 of minilora.models, with adapters.
        lengths: of the examples, in tokens.
        autocast: the dtype of autocast, None without.
        batch_size: rows of a micro-batch, over all ranks.
        accumulate: micro-batches of a step.
        checkpointing: whether blocks are recomputed.
        ranks: processes.
        parallel: None, `"ddp"` or `"fsdp"`.
        say: takes a line.
    """

    def __init__(
        self,
        model: nn.Module,
        lengths: list[int],
        autocast: torch.dtype | None,
        batch_size: int,
        accumulate: int,
        checkpointing: bool,
        ranks: int,
        parallel: str | None,
        say: Callable[[str], None],
    ):
        self.say = say
        shape = read_shape(model)
        linears, settings = self.read_model(model, autocast)
        settings |= {
            "batch_size": min(batch_size, len(lengths)),
            "accumulate": accumulate,
            "checkpointing": checkpointing,
            "ranks": ranks,
            "parallel": parallel if ranks > 1 else None,
        }
        self.cuda = next(model.parameters()).device.type == "cuda"
        base = sizes(model)
        process = 0 if self.cuda else max(0, resident() - base.total)
        integer = None if self.cuda else calibrate().integer
        self.memory = count_memory(
            shape,
            Settings(**settings, length=max(lengths)),  # type: ignore[arg-type]
            gpu=self.cuda,
            integer=integer,
            process=process,
            linears=linears,
            base=base,
        )
        for line in memory_table(self.memory).splitlines():
            say(f"plan: {line}")
        mean = max(2, math.ceil(sum(lengths) / len(lengths)))
        usual = Settings(**settings, length=mean)  # type: ignore[arg-type]
        self.seconds = None if self.cuda or ranks > 1 else timed_step_apart(shape, usual)
        if self.seconds is not None:
            tokens = usual.batch_size * accumulate * mean
            steps = count_steps(len(lengths), 1, usual)
            say(
                f"plan: {self.seconds:.3g} s a step, {tokens / self.seconds:,.0f} tokens/s, "
                f"{self.seconds * steps / 60:.1f} minutes an epoch of {steps:,} steps"
            )
        self.fresh = forget_peak() if not self.cuda else True
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

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

    def after(self, seconds: float, steps: int) -> dict[str, float]:
        """Say what was measured beside what was planned; return the figures."""
        peak = torch.cuda.max_memory_allocated() if self.cuda else peak_bytes()
        found = {"planned_bytes": float(self.memory.peak), "measured_bytes": float(peak)}
        if peak:
            since = "" if self.fresh else " since the process began"
            self.say(
                f"measured: peak {peak / 1e6:,.1f} MB{since}, planned {self.memory.peak / 1e6:,.1f}"
                f" ({self.memory.peak / peak - 1:+.1%})"
            )
        if steps and self.seconds is not None:
            one = seconds / steps
            found |= {"planned_seconds": self.seconds, "measured_seconds": one}
            self.say(
                f"measured: {one:.3g} s a step over {steps} steps, planned {self.seconds:.3g} "
                f"({self.seconds / one - 1:+.1%}) on {hardware().name}"
            )
        return found


def resident() -> int:
    """Return the bytes this process holds now, 0 where that is not known."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    for line in status.read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0
