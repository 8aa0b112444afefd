"""Gemma 2: the numbers of Hugging Face's `Gemma2ForCausalLM`.

    h = √hidden · E[ids]
    per layer:  h += norm(O·attention(norm(h)))
                n = norm(h);  h += norm(down(gelu(gate(n)) ⊙ up(n)))
    logits = cap(head(norm(h)))

Norms multiply by 1 + weight; attention scores and logits are capped, cap(y) = c·tanh(y / c); every
other layer has a window (Gemma Team 2024, "Gemma 2", section 2).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from minilora.kernels import geglu
from minilora.models.blocks import MLP, DecoderLayer, Mask, RMSNorm, Rotation, Slot
from minilora.models.causal import CausalLM
from minilora.models.config import FULL, SLIDING, DecoderConfig
from minilora.models.gguf_names import DECODER_NAMES

ACTIVATION = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class Gemma2Config(DecoderConfig):
    """Hold the numbers that define a Gemma 2 model; the others are `DecoderConfig`'s.

    Args:
        query_pre_attn_scalar: attention scores are divided by its square root.
        attn_logit_softcapping: what no attention score exceeds, or None.
        final_logit_softcapping: what no logit exceeds, or None.
    """

    model_type = "gemma2"
    architecture = "Gemma2ForCausalLM"
    neutral: ClassVar = DecoderConfig.neutral | {
        "hidden_act": (None, ACTIVATION),
        "hidden_activation": (ACTIVATION,),
        "use_bidirectional_attention": (None, False),
    }
    left_out = ("mlp_bias",)
    defaults: ClassVar = {"sliding_window": 4096, "tie_word_embeddings": True} | {
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256
    }  # fmt: skip

    max_position_embeddings: int = 8192
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 1
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    query_pre_attn_scalar: int = 256
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0

    attention_scale = property(lambda self: self.query_pre_attn_scalar**-0.5)
    attention_cap = property(lambda self: self.attn_logit_softcapping)
    logit_cap = property(lambda self: self.final_logit_softcapping)

    @classmethod
    def _older_types(cls, values: dict[str, Any], entries: dict[str, Any]) -> list[str]:
        return [FULL if i % 2 else SLIDING for i in range(values["num_hidden_layers"])]

    def _entries(self) -> dict[str, Any]:
        entries = {"hidden_act": ACTIVATION, "hidden_activation": ACTIVATION}
        # transformers needs a window even where no layer has one.
        window = self.sliding_window or self.defaults["sliding_window"]
        return super()._entries() | entries | {"sliding_window": window}


class GemmaNorm(RMSNorm):
    """Scale each row to unit mean square, times 1 + weight, and round once."""

    offset = 1


class GemmaMLP(MLP):
    """Apply the GeGLU block."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `down(gelu(gate(x)) ⊙ up(x))`."""
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class Gemma2Layer(DecoderLayer):
    """Add attention and then the GeGLU block to the residual stream, each between two norms."""

    mlp_class, norm_class = GemmaMLP, GemmaNorm
    norms = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )
    pre_feedforward_layernorm: RMSNorm
    post_feedforward_layernorm: RMSNorm

    def forward(
        self, x: Tensor, rotation: Rotation | None, mask: Mask, slot: Slot | None
    ) -> Tensor:
        """Return `[B, T, hidden]`."""
        attended = self.self_attn(self.input_layernorm(x), rotation, mask, slot)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


def _plus(shift: int) -> Any:
    """Store 1 + weight of a norm, as llama.cpp does, or undo it; in f32: bf16 has no 1.003."""
    return lambda name, t, _: t.float() + shift if name.endswith("norm.weight") else t


def scaled(entries: dict[str, Any]) -> dict[str, Any]:
    """Add `query_pre_attn_scalar` as llama.cpp chooses it: the 27B models have a rule of theirs."""
    per_head = entries["hidden_size"] // entries["num_attention_heads"]
    own = per_head if entries["num_hidden_layers"] in (46, 62) else entries["head_dim"]
    return entries | {"query_pre_attn_scalar": own}


class Gemma2(CausalLM):
    """Compute next-token logits as Hugging Face's `Gemma2ForCausalLM` does; see `CausalLM`."""

    config_class, layer_class = Gemma2Config, Gemma2Layer
    gguf = DECODER_NAMES._replace(
        architecture="gemma2",
        required=DECODER_NAMES.required
        | {
            "attention.key_length": "head_dim",
            "attention.sliding_window": "sliding_window",
            **{key: key for key in ("attn_logit_softcapping", "final_logit_softcapping")},
        },
        biases={},
        whole={"token_embd": "model.embed_tokens", "output_norm": "model.norm"},
        parts=DECODER_NAMES.parts
        | {
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        restored=_plus(-1),
        stored=_plus(1),
        completed=scaled,
    )

    def begin(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Any]:
        """Embed the ids, times a √hidden that is rounded to their dtype, and make the rotations."""
        x, beside = super().begin(ids, positions)
        return x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype), beside
