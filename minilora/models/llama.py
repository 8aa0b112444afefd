"""Llama: the numbers of Hugging Face's `LlamaForCausalLM`.

    h = E[ids]
    per layer:  h += O·attention(norm(h));  n = norm(h);  h += down(silu(gate(n)) ⊙ up(n))
    logits = head(norm(h))

The architecture: Touvron et al. 2023, "LLaMA", section 2.2.
"""

from dataclasses import dataclass
from typing import Any

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


def _paired(undone: bool) -> Any:
    """Put rows i and i + head_dim/2 of a head side by side, as llama.cpp does, or apart again."""

    def change(fqn: str, rows: Tensor, config: LlamaConfig) -> Tensor:
        if ".q_proj." not in fqn and ".k_proj." not in fqn:
            return rows
        half = config.head_dim // 2
        groups = (half, 2) if undone else (2, half)
        return rows.view(-1, *groups, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)

    return change


class Llama(CausalLM):
    """Compute next-token logits as Hugging Face's `LlamaForCausalLM` does; see `CausalLM`."""

    config_class = LlamaConfig
    gguf = DECODER_NAMES._replace(
        architecture="llama",
        restored=_paired(undone=True),
        stored=_paired(undone=False),
        ropes=("linear", "yarn", "llama3", "longrope"),
    )
