"""Loss scaling, so that float16 gradients neither vanish nor overflow."""

from dataclasses import dataclass

import torch

from minilora.lora import LoRALayer

# Losses are summed over tokens, so a token's gradient does not shrink with the batch: 2⁸ here is
# what GradScaler's first 2¹⁶ is to the mean over 256 tokens.
FIRST_SCALE = 2.0**8
_LARGEST, _SMALLEST = 2.0**24, 2.0**-14


@dataclass
class LossScale:
    """The factor on the loss, changed as `torch.amp.GradScaler` changes its own.

    It is halved after a step whose gradient was not finite, and doubled after `growth` good steps
    in a row. Being a power of 2 it takes no bit off any gradient. Unlike GradScaler it judges the
    gradient's norm over all parameters, so that every rank of a sharded run decides alike.

    Attributes:
        value: the factor; 1.0 where nothing is scaled.
        age: good steps in a row since it last changed.
        growth: good steps before it is doubled; 0 never changes the factor.
    """

    value: float = 1.0
    age: int = 0
    growth: int = 0

    def after(self, good: bool) -> None:
        """Note whether a step's gradient was finite."""
        if not self.growth:
            return
        self.age = self.age + 1 if good else 0
        if not good:
            self.value = max(_SMALLEST, self.value / 2)
        elif self.age == self.growth:
            self.value, self.age = min(_LARGEST, self.value * 2), 0

    def may_shrink(self) -> bool:
        """Return whether a gradient that is not finite may be the scale's fault."""
        return bool(self.growth) and self.value > 1


def loss_scale(layers: dict[str, LoRALayer], autocast: torch.dtype | None) -> LossScale:
    """Return the scale to begin with: one that changes where anything is float16."""
    dtypes = {autocast, *(layer.view.dtype for layer in layers.values())}
    return LossScale(FIRST_SCALE, growth=2000) if torch.float16 in dtypes else LossScale()
