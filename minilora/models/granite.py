"""Granite 3: the numbers of Hugging Face's `GraniteForCausalLM`.

    h = m_e · E[ids]
    per layer:  h += m_r · O·attention(norm(h));  h += m_r · MLP(norm(h))
    logits = head(norm(h)) / s

A Llama with four multipliers: of the embeddings (m_e), of attention scores in place of
1 / sqrt(head_dim), of what is added to the residual stream (m_r), and of the logits (1 / s), by
which a model's best learning rate doesn't depend on its width (Yang et al. 2022, "Tensor Programs
V", appendix B).
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from minilora.models.blocks import DecoderLayer, Mask, Rotation, Slot
from minilora.models.causal import CausalLM, is_plain_linear
from minilora.models.config import DecoderConfig
from minilora.models.llama import Llama


@dataclass(frozen=True)
class GraniteConfig(DecoderConfig):
    """Hold the numbers that define a Granite model; names and defaults are Hugging Face's.

    Args:
        embedding_multiplier: of the embeddings.
        attention_multiplier: of a query times a key.
        residual_multiplier: of what attention and MLP add to the residual stream.
        logits_scaling: what the logits are divided by. The other fields are `DecoderConfig`'s.
    """

    model_type = "granite"
    architecture = "GraniteForCausalLM"

    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0

    attention_scale = property(lambda self: self.attention_multiplier)


class GraniteLayer(DecoderLayer):
    """Add attention and then the SwiGLU block, both scaled, to the residual stream."""

    def __init__(self, config: GraniteConfig, *args: Any, **made: Any) -> None:
        super().__init__(config, *args, **made)
        self.multiplier = config.residual_multiplier

    def forward(self, x: Tensor, rotation: Rotation, mask: Mask, slot: Slot | None) -> Tensor:
        """Return `[B, T, hidden]`."""
        attended = self.self_attn(self.input_layernorm(x), rotation, mask, slot)
        x = x + attended * self.multiplier
        return x + self.mlp(self.post_attention_layernorm(x)) * self.multiplier


class Granite(CausalLM):
    """Compute next-token logits as Hugging Face's `GraniteForCausalLM` does; see `CausalLM`.

    What the head reads is divided by `logits_scaling`, and so are the logits, wherever they are
    formed.
    """

    config_class, layer_class = GraniteConfig, GraniteLayer
    gguf = Llama.gguf._replace(
        architecture="granite",
        required=Llama.gguf.required
        | {
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        neutral=Llama.gguf.neutral | {"rope.scaling.finetuned": (True,)},  # else nothing is rotated
    )

    def begin(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Any]:
        """Embed the ids and scale that; every block takes the rotation at the positions."""
        x, beside = super().begin(ids, positions)
        return x * self.config.embedding_multiplier, beside

    def end(self, x: Tensor) -> Tensor:
        """Return what the head reads."""
        return x / self.config.logits_scaling

    def logits(self, x: Tensor) -> Tensor:
        """Return what the head makes of what `hidden` returns."""
        if is_plain_linear(self.lm_head):
            return super().logits(x)
        scaling = self.config.logits_scaling  # a bias that an adapter brings is divided, too
        return super().logits(x * scaling) / scaling
