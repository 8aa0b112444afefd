"""OLMo 2: the numbers of Hugging Face's `Olmo2ForCausalLM`.

    h = E[ids]
    per layer:  h += norm(O·attention(h));  h += norm(down(silu(gate(h)) ⊙ up(h)))
    logits = head(norm(h))

A Llama whose norms stand after attention and MLP instead of before them, with norms over all
queries and over all keys of a token (Team OLMo 2024, "2 OLMo 2 Furious", section 3.3).
"""

from dataclasses import dataclass

from torch import Tensor

from minilora.models.blocks import Attention, DecoderLayer, Mask, RMSNorm, Rotation, Slot
from minilora.models.causal import CausalLM
from minilora.models.config import DecoderConfig
from minilora.models.gguf_names import DECODER_NAMES


@dataclass(frozen=True)
class Olmo2Config(DecoderConfig):
    """Hold the numbers that define an OLMo 2 model; the fields are `DecoderConfig`'s."""

    model_type = "olmo2"
    architecture = "Olmo2ForCausalLM"
    left_out = (*DecoderConfig.left_out, "mlp_bias")

    rms_norm_eps: float = 1e-5
    eos_token_id: int | list[int] | None = 50279
    pad_token_id: int | None = 1


class Olmo2Norm(RMSNorm):
    """Scale each row to unit mean square, times a weight, and round once."""

    offset = 0


class Olmo2Attention(Attention):
    """Attend with queries and keys of unit mean square over all heads, times a weight."""

    def __init__(self, config: Olmo2Config, *, dtype=None, device=None) -> None:
        super().__init__(config, dtype=dtype, device=device)
        wide = config.num_attention_heads * config.head_dim
        narrow = config.num_key_value_heads * config.head_dim
        self.q_norm = Olmo2Norm(wide, config.rms_norm_eps, dtype=dtype, device=device)
        self.k_norm = Olmo2Norm(narrow, config.rms_norm_eps, dtype=dtype, device=device)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return unrotated queries `[B, heads, T, head_dim]`, and keys and values of `kv_heads`."""
        split = (*x.shape[:2], -1, self.head_dim)
        return (
            self.q_norm(self.q_proj(x)).view(split).transpose(1, 2),
            self.k_norm(self.k_proj(x)).view(split).transpose(1, 2),
            self.v_proj(x).view(split).transpose(1, 2),
        )


class Olmo2Layer(DecoderLayer):
    """Add attention and then the SwiGLU block to the residual stream, a norm after each."""

    attention_class, norm_class = Olmo2Attention, Olmo2Norm
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    post_feedforward_layernorm: RMSNorm

    def forward(self, x: Tensor, rotation: Rotation, mask: Mask, slot: Slot | None) -> Tensor:
        """Return `[B, T, hidden]`."""
        x = x + self.post_attention_layernorm(self.self_attn(x, rotation, mask, slot))
        return x + self.post_feedforward_layernorm(self.mlp(x))


class Olmo2(CausalLM):
    """Compute next-token logits as Hugging Face's `Olmo2ForCausalLM` does; see `CausalLM`."""

    config_class, layer_class = Olmo2Config, Olmo2Layer
    gguf = DECODER_NAMES._replace(
        architecture="olmo2",
        biases={"blk.0.attn_q.bias": "attention_bias"},
        parts={name: part for name, part in DECODER_NAMES.parts.items() if "_norm" not in name}
        | {
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        own_head=True,
    )
