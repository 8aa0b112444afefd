"""FLOPs and bytes of one training step on shapes: what has to be multiplied and moved.

Per token, N·K summed over the linears of the blocks, r the rank, T tokens of a row, q = heads ·
head_dim, h width, V vocabulary; ×3/2 of the first two terms under checkpointing (blocks run again):

    base       4 · Σ N·K              forward and input gradient; a frozen weight has no gradient
    adapters   6 · Σ r·(N + K)        forward, and both gradients of both factors' products
    attention  7 · T · q · layers     causal: half of 2 · 2·T·q, and 2.5 times that backward
    head       4 · h · V              of those that enter the loss
"""

from dataclasses import dataclass

from minilora.planning.memory import Memory, Settings, linears_of
from minilora.planning.shapes import Shape

_MOVES = 4  # times that what autograd keeps is written or read, its gradients included


@dataclass(frozen=True)
class Work:
    """What one optimizer step takes, over all ranks.

    Attributes:
        tokens: processed.
        base: FLOPs with the frozen weights of the blocks.
        adapters: FLOPs with the factors.
        attention: FLOPs of scores and values.
        head: FLOPs of head and loss.
        bytes: moved: weights in each pass, and activations.
        decoded: weights decoded or cast, each time one is multiplied.
    """

    tokens: int
    base: int
    adapters: int
    attention: int
    head: int
    bytes: int
    decoded: int

    @property
    def flops(self) -> int:
        """All FLOPs."""
        return self.base + self.adapters + self.attention + self.head


def count_work(shape: Shape, settings: Settings, memory: Memory) -> Work:
    """Count a step's work; `memory` is the plan for the same settings."""
    config = shape.config
    linears = linears_of(shape, settings)
    blocks = [one for name, one in linears.items() if name != "lm_head"]
    weights = sum(one.N * one.K for one in blocks)
    factors = sum(one.r * (one.N + one.K) for one in blocks)
    tokens = settings.batch_size * settings.accumulate * settings.length
    runs = 3 if settings.checkpointing else 2  # passes of 2 FLOPs a weight
    passes = runs * settings.accumulate * settings.ranks
    q = config.num_attention_heads * config.head_dim
    attention = 2 * settings.length * q * config.num_hidden_layers
    kept = memory.activations + memory.recomputed * config.num_hidden_layers
    return Work(
        tokens=tokens,
        base=tokens * 2 * runs * weights,
        adapters=tokens * (4 + 2 * (runs - 1)) * factors,
        attention=int(tokens * attention * (runs - 1 + 2.5)),
        head=int(tokens * settings.learned) * 4 * config.hidden_size * config.vocab_size,
        bytes=passes * memory.weights * (settings.ranks if settings.parallel == "fsdp" else 1)
        + _MOVES * kept * settings.accumulate * settings.ranks,
        decoded=passes * weights if settings.format else 0,
    )
