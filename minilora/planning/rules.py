"""Three rules of thumb that people quote, beside the computed figure, with where each misleads."""

from dataclasses import dataclass

import torch

from minilora.lora import sizes
from minilora.planning.memory import Memory, Settings, count_memory
from minilora.planning.shapes import Shape

_GB = 1e9


@dataclass(frozen=True)
class Rule:
    """A rule, what it says for this model, and what is computed.

    Attributes:
        rule: in words.
        says: bytes.
        computed: bytes of what the rule is quoted for.
        of: what that is.
        misleads: where.
    """

    rule: str
    says: int
    computed: int
    of: str
    misleads: str

    def __str__(self) -> str:
        says, computed = _size(self.says), _size(self.computed)
        return f"{self.rule}: {says}; computed {computed} ({self.of}). {self.misleads}"


def _size(count: int) -> str:
    return f"{count / _GB:.1f} GB" if count >= _GB else f"{count / 1e6:.0f} MB"


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
