"""Phi-3 and Phi-4: the numbers of Hugging Face's `Phi3ForCausalLM`.

A Llama whose queries, keys and values come from one projection, and gate and up from another (Abdin
et al. 2024, "Phi-3 Technical Report", section 2), with one window for all layers or none.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from minilora.kernels import swiglu
from minilora.models.blocks import Attention, DecoderLayer
from minilora.models.causal import CausalLM
from minilora.models.config import DecoderConfig
from minilora.models.gguf_names import PART_ROTATED, Entries, joint_parts, rotated_share
from minilora.models.rope import LongRope


@dataclass(frozen=True)
class Phi3Config(DecoderConfig):
    """Hold the numbers that define a Phi-3 model; names and defaults are Hugging Face's.

    Args:
        partial_rotary_factor: share of a head that is rotated. The other fields are
            `DecoderConfig`'s.
    """

    model_type = "phi3"
    architecture = "Phi3ForCausalLM"
    neutral = DecoderConfig.neutral | {"resid_pdrop": (None, 0, 0.0), "embd_pdrop": (None, 0, 0.0)}
    left_out = ("attention_bias", "mlp_bias", "layer_types")
    rope_types: ClassVar = dict.fromkeys(("longrope", "su", "yarn"), LongRope)  # one, renamed

    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 32000
    pad_token_id: int | None = 32000
    partial_rotary_factor: float = 1.0

    rotary_dim = property(lambda self: int(self.head_dim * self.partial_rotary_factor))

    @classmethod
    def _completed(cls, values: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
        return super()._completed(values, {"original_max_position_embeddings": 4096, **entries})

    def _entries(self) -> dict[str, Any]:
        entries = super()._entries()
        entries["rope_parameters"]["partial_rotary_factor"] = self.partial_rotary_factor
        if "rope_scaling" in entries:  # transformers 4 takes no other form
            scaling = entries["rope_scaling"]
            original = scaling.pop("original_max_position_embeddings")
            entries["original_max_position_embeddings"] = original
            entries["rope_scaling"] = {"type": scaling.pop("rope_type"), **scaling}
        return entries


class FusedAttention(Attention):
    """Attend with queries, keys and values that one projection makes."""

    def add_projections(self, size: int, wide: int, narrow: int, **options: Any) -> None:
        """Make the projection to the rows of queries, keys and values, in this order."""
        self.parts = [width // self.head_dim for width in (wide, narrow, narrow)]
        self.qkv_proj = nn.Linear(size, wide + 2 * narrow, **options)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return unrotated queries `[B, heads, T, head_dim]`, and keys and values of `kv_heads`."""
        qkv = self.qkv_proj(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split(self.parts, dim=1)
        return q, k, v


class FusedMLP(nn.Module):
    """Apply the SwiGLU block with a gate and an input that one projection makes."""

    def __init__(self, config: Phi3Config, *, dtype=None, device=None) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        made = {"bias": False, "dtype": dtype, "device": device}
        self.gate_up_proj = nn.Linear(size, 2 * inner, **made)
        self.down_proj = nn.Linear(inner, size, **made)

    def forward(self, x: Tensor) -> Tensor:
        """Return `down(silu(gate(x)) ⊙ up(x))`."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(swiglu(gate, up))


class Phi3Layer(DecoderLayer):
    """Add attention and then the SwiGLU block to the residual stream, each after a norm."""

    attention_class, mlp_class = FusedAttention, FusedMLP


def _of_gguf(entries: Entries) -> Entries:
    """A window of no tokens means none."""
    return rotated_share(entries) | {"sliding_window": entries.get("sliding_window") or None}


class Phi3(CausalLM):
    """Compute next-token logits as Hugging Face's `Phi3ForCausalLM` does; see `CausalLM`."""

    config_class, layer_class = Phi3Config, Phi3Layer
    gguf = PART_ROTATED._replace(
        architecture="phi3",
        optional=PART_ROTATED.optional | {"attention.sliding_window": "sliding_window"},
        biases={},
        parts=joint_parts(
            "input_layernorm",
            "self_attn.qkv_proj",
            "self_attn.o_proj",
            "post_attention_layernorm",
            "mlp.gate_up_proj",
            "mlp.down_proj",
        ),
        completed=_of_gguf,
        ropes=("longrope",),
        windowless=True,
    )
