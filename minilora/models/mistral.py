"""Mistral: the numbers of Hugging Face's `MistralForCausalLM`.

A Llama with one window for all layers or none (Jiang et al. 2023, "Mistral 7B", section 2). Its
GGUF files say they are a Llama's, know no window, and are read as one.
"""

from dataclasses import dataclass
from typing import ClassVar

from minilora.models.causal import CausalLM
from minilora.models.config import DecoderConfig
from minilora.models.llama import Llama


@dataclass(frozen=True)
class MistralConfig(DecoderConfig):
    """Hold the numbers that define a Mistral model; the fields are `DecoderConfig`'s."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    left_out = ("attention_bias", "mlp_bias", "layer_types")
    defaults: ClassVar = {"num_key_value_heads": 8, "sliding_window": 4096}

    max_position_embeddings: int = 131072
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    sliding_window: int | None = 4096


class Mistral(CausalLM):
    """Compute next-token logits as Hugging Face's `MistralForCausalLM` does; see `CausalLM`."""

    config_class = MistralConfig
    gguf = Llama.gguf._replace(
        biases={}, completed=lambda entries: entries | {"sliding_window": None}
    )
