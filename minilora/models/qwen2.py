"""Qwen2 and Qwen2.5: the numbers of Hugging Face's `Qwen2ForCausalLM`.

A Llama whose queries, keys and values have biases (Yang et al. 2024, "Qwen2 Technical Report",
section 2.2.1). Of its sliding windows only none is built.
"""

from dataclasses import dataclass

from minilora.models.causal import Decoder
from minilora.models.config import DecoderConfig
from minilora.models.gguf_names import DECODER_NAMES


@dataclass(frozen=True)
class Qwen2Config(DecoderConfig):
    """Hold the numbers that define a Qwen2 model; the fields are `DecoderConfig`'s."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    left_out = ("attention_bias", "mlp_bias")
    qkv_bias = True

    max_position_embeddings: int = 32768


class Qwen2(Decoder):
    """Compute next-token logits as Hugging Face's `Qwen2ForCausalLM` does; see `Decoder`."""

    config_class = Qwen2Config
    gguf = DECODER_NAMES._replace(architecture="qwen2", biases={})
