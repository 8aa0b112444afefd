"""Hold each pass on a CPU to a limit before it runs: the planned peak decides (`max_memory`).

A CPU that runs out of memory gives no error to catch: the system swaps, or kills the process. So
what a pass will take is planned from shapes (`minilora.planning.memory`), and a micro-batch that
would not fit is split as on a GPU after a real lack of memory.
"""

import bisect
import contextlib
import dataclasses
import functools
from typing import Any

import torch
from torch import nn

from minilora.data import Batch
from minilora.models import ModelConfig
from minilora.planning import (
    Counted,
    Memory,
    Settings,
    count_memory,
    read_shape,
    resident,
    settings_of,
)
from minilora.quantization import quantized_layers
from minilora.running import shares_prefix


class MemoryLimit:
    """Plan the peak of this process for passes of any shape, and compare it with a limit.

    The limit is in 10⁹ bytes, everything in the process counted. `ranks` are those of DDP.
    """

    def __init__(
        self,
        model: nn.Module,
        gigabytes: float,
        autocast: torch.dtype | None,
        checkpointing: bool,
        ranks: int = 1,
    ):
        device = next(model.parameters()).device.type
        if device != "cpu":
            raise ValueError(
                f"max_memory plans for a CPU, found a model on {device}, where a lack of memory is "
                f"noticed as it happens; leave max_memory out"
            )
        if not isinstance(getattr(model, "config", None), ModelConfig):
            raise ValueError(
                f"max_memory needs a model whose memory can be planned, a model of "
                f"minilora.models, found {type(model).__name__}; leave max_memory out"
            )
        self.shape = read_shape(model)
        self.gigabytes, self.ranks = gigabytes, ranks
        self.settings = settings_of(model, autocast)
        self.settings |= {"checkpointing": checkpointing, "ranks": ranks}
        self.settings["parallel"] = "ddp" if ranks > 1 else None
        self.counted, self.shares = Counted(model, autocast), shares_prefix(model)
        self.process = max(0, resident() - self.counted.sizes.total)
        small = [layer.ways for layer in quantized_layers(model).values()]
        self.ways = {None if way == "dequantize" else way for ways in small for way in ways}
        self.planned = functools.cache(self._planned)

    def _planned(self, rows: int, tokens: int, packed: bool, **changed: Any) -> Memory:
        """Plan passes of so many rows; `changed` settings are of another run."""
        settings = Settings(**self.settings | {"batch_size": rows * self.ranks, "length": tokens}
                            | changed)  # fmt: skip
        here = settings.format == self.settings.get("format")
        known: dict[str, Any] = {"counted": self.counted if here else None, "process": self.process}
        plans = [
            count_memory(self.shape, settings, integer=way, **known) for way in self.ways or {None}
        ]
        plan = max(plans, key=lambda plan: plan.peak)
        if not packed:
            return plan
        # Attention of packed rows keeps its mask, in the model's dtype, in every block.
        blocks = 1 if settings.checkpointing else self.shape.config.num_hidden_layers
        masks = (blocks + 1) * rows * tokens**2 * settings.dtype.itemsize
        return dataclasses.replace(plan, activations=plan.activations + masks)

    def fits(self, batch: Batch) -> bool:
        """Return whether a pass stays within the limit."""
        shared = batch.shared if self.shares else 0
        packed = batch.documents is not None
        planned = self.planned(*batch.input_ids.shape, packed, shared=shared)
        return planned.peak <= self.gigabytes * 1e9

    def check_row(self, tokens: int, packed: bool) -> None:
        """Raise ValueError, saying what would fit, unless one row of so many tokens does."""
        memory = self.planned(1, tokens, packed)
        if memory.peak <= self.gigabytes * 1e9:
            return
        parts = sorted(memory.components().items(), key=lambda part: -part[1])[:3]
        largest = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts)
        ways = self._ways(tokens, packed)
        would = f"what would fit: {'; '.join(ways)}; or" if ways else "nothing less does, so"
        raise ValueError(
            f"one row of {tokens} tokens must fit in --max-memory {self.gigabytes:g} GB "
            f"(in Python: max_memory), but {memory.peak / 1e9:.2f} GB are planned (most of it "
            f"{largest}); {would} raise it to {-(-memory.peak // 10**7) / 100:.2f}"
        )

    def _ways(self, tokens: int, packed: bool) -> list[str]:
        """List what would make a row fit, each with its planned peak."""
        limit, ways = self.gigabytes * 1e9, []

        def planned(length: int = tokens, **changed: Any) -> int:
            return self._planned(1, length, packed, **changed).peak

        again = planned(checkpointing=True)
        if again <= limit and not self.settings["checkpointing"]:
            ways.append(f"--checkpointing (in Python: checkpointing=True), {again / 1e9:.2f} GB")
        shorter = bisect.bisect(range(2, tokens), limit, key=planned)
        if shorter:
            ways.append(f"rows of at most {shorter + 1} tokens (--max-length {shorter + 1})")
        if self.settings.get("format") is None:
            with contextlib.suppress(ValueError):  # shapes that NF4 does not take
                small = planned(checkpointing=True, format="nf4")
                if small <= limit:
                    ways.append(
                        f"an NF4 base (--quantize nf4) and checkpointing, {small / 1e9:.2f} GB"
                    )
        return ways
