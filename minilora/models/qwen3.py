"""Qwen3: the numbers of Hugging Face's `Qwen3ForCausalLM`.

A Llama that norms the queries and the keys of each head before they are rotated (Yang et al. 2025,
"Qwen3 Technical Report", section 2). With `use_sliding_window`, layers from `max_window_layers` on
have a window.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minilora.models.blocks import Attention, DecoderLayer, RMSNorm
from minilora.models.causal import CausalLM
from minilora.models.config import DecoderConfig
from minilora.models.gguf_names import DECODER_NAMES


@dataclass(frozen=True)
class Qwen3Config(DecoderConfig):
    """Hold the numbers that define a Qwen3 model; the fields are `DecoderConfig`'s."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    left_out = ("mlp_bias",)
    defaults: ClassVar = {"head_dim": 128, "sliding_window": 4096}
    window_switch = True

    max_position_embeddings: int = 32768


class NormedAttention(Attention):
    """Attend with queries and keys of unit mean square, times a weight."""

    norm_class: ClassVar[type[RMSNorm]] = RMSNorm

    def __init__(self, config: DecoderConfig, *, dtype=None, device=None) -> None:
        super().__init__(config, dtype=dtype, device=device)
        made = {"dtype": dtype, "device": device}
        self.q_norm = self.norm_class(self.head_dim, config.rms_norm_eps, **made)
        self.k_norm = self.norm_class(self.head_dim, config.rms_norm_eps, **made)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return unrotated queries `[B, heads, T, head_dim]`, and keys and values of `kv_heads`."""
        q, k, v = super().heads(x)
        return self.q_norm(q), self.k_norm(k), v


class Qwen3Layer(DecoderLayer):
    """Add attention and then the SwiGLU block to the residual stream, each after a norm."""

    attention_class = NormedAttention


class Qwen3(CausalLM):
    """Compute next-token logits as Hugging Face's `Qwen3ForCausalLM` does; see `CausalLM`."""

    config_class, layer_class = Qwen3Config, Qwen3Layer
    gguf = DECODER_NAMES._replace(
        architecture="qwen3",
        biases={},
        parts=DECODER_NAMES.parts
        | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
    )
