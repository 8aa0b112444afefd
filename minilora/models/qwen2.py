"""Qwen2 and Qwen2.5: the numbers of Hugging Face's `Qwen2ForCausalLM`.

A Llama whose queries, keys and values have biases (Yang et al. 2024, "Qwen2 Technical Report",
section 2.2.1). With `use_sliding_window`, layers from `max_window_layers` on have a window.
"""

from dataclasses import dataclass
from typing import ClassVar

from minilora.models.causal import CausalLM
from minilora.models.config import DecoderConfig
from minilora.models.gguf_names import DECODER_NAMES


@dataclass(frozen=True)
class Qwen2Config(DecoderConfig):
    """Hold the numbers that define a Qwen2 model; the fields are `DecoderConfig`'s."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    left_out = ("attention_bias", "mlp_bias")
    defaults: ClassVar = {"sliding_window": 4096}
    qkv_bias = window_switch = True

    max_position_embeddings: int = 32768


class Qwen2(CausalLM):
    """Compute next-token logits as Hugging Face's `Qwen2ForCausalLM` does; see `CausalLM`."""

    config_class = Qwen2Config
    gguf = DECODER_NAMES._replace(architecture="qwen2", biases={})
