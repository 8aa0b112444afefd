"""Llama: the numbers of Hugging Face's `LlamaForCausalLM`.

    h = E[ids]
    per layer:  h += O·attention(norm(h));  n = norm(h);  h += down(silu(gate(n)) ⊙ up(n))
    logits = head(norm(h))

The architecture: Touvron et al. 2023, "LLaMA", section 2.2.
"""

from dataclasses import dataclass

from torch import Tensor

from minilora.models.causal import CausalLM
from minilora.models.config import DecoderConfig
from minilora.models.gguf_names import DECODER_NAMES


@dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """Hold the numbers that define a Llama model; the fields are `DecoderConfig`'s."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    neutral = DecoderConfig.neutral | {"pretraining_tp": (None, 1)}


def _half_rotation(fqn: str, rows: Tensor, config: LlamaConfig) -> Tensor:
    """Undo llama.cpp's conversion, which puts rows i and i + head_dim/2 of a head side by side."""
    if ".q_proj." not in fqn and ".k_proj." not in fqn:
        return rows
    pairs = rows.view(-1, config.head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def _side_by_side(fqn: str, rows: Tensor, config: LlamaConfig) -> Tensor:
    """Do as llama.cpp's conversion does."""
    if ".q_proj." not in fqn and ".k_proj." not in fqn:
        return rows
    halves = rows.view(-1, 2, config.head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


class Llama(CausalLM):
    """Compute next-token logits as Hugging Face's `LlamaForCausalLM` does; see `CausalLM`."""

    config_class = LlamaConfig
    gguf = DECODER_NAMES._replace(
        architecture="llama",
        restored=_half_rotation,
        stored=_side_by_side,
        ropes=("linear", "yarn", "llama3", "longrope"),
    )
