"""Language models in plain PyTorch, one file a family. Knows no LoRA.

A new family is a file here and its entry in `FAMILIES`.
"""

from minilora.models.blocks import KVCache
from minilora.models.causal import CausalLM, is_plain_linear
from minilora.models.config import ModelConfig
from minilora.models.gemma2 import Gemma2, Gemma2Config
from minilora.models.gemma3 import Gemma3, Gemma3Config
from minilora.models.gguf_names import GGUFNames
from minilora.models.gguf_rope import (
    ROPE_TENSORS,
    is_rope_key,
    read_scaling,
    rotates_alike,
    unread_scaling,
    written_scaling,
)
from minilora.models.gpt2 import GPT2, GPT2Config
from minilora.models.gpt_blocks import Conv1D
from minilora.models.gpt_neox import GPTNeoX, GPTNeoXConfig
from minilora.models.granite import Granite, GraniteConfig
from minilora.models.llama import Llama, LlamaConfig
from minilora.models.mistral import Mistral, MistralConfig
from minilora.models.not_built import NotBuiltError
from minilora.models.olmo2 import Olmo2, Olmo2Config
from minilora.models.phi3 import Phi3, Phi3Config
from minilora.models.qwen2 import Qwen2, Qwen2Config
from minilora.models.qwen3 import Qwen3, Qwen3Config
from minilora.models.rope import SCALINGS
from minilora.models.smollm3 import SmolLM3, SmolLM3Config

FAMILIES: dict[str, type[CausalLM]] = {  # by config.json's model_type
    family.config_class.model_type: family
    for family in (
        GPT2,
        Gemma2,
        Gemma3,
        GPTNeoX,
        Granite,
        Llama,
        Mistral,
        Olmo2,
        Phi3,
        Qwen2,
        Qwen3,
        SmolLM3,
    )
}

__all__ = [
    "FAMILIES",
    "GPT2",
    "ROPE_TENSORS",
    "SCALINGS",
    "CausalLM",
    "Conv1D",
    "GGUFNames",
    "GPT2Config",
    "GPTNeoX",
    "GPTNeoXConfig",
    "Gemma2",
    "Gemma2Config",
    "Gemma3",
    "Gemma3Config",
    "Granite",
    "GraniteConfig",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "Mistral",
    "MistralConfig",
    "ModelConfig",
    "NotBuiltError",
    "Olmo2",
    "Olmo2Config",
    "Phi3",
    "Phi3Config",
    "Qwen2",
    "Qwen2Config",
    "Qwen3",
    "Qwen3Config",
    "SmolLM3",
    "SmolLM3Config",
    "is_plain_linear",
    "is_rope_key",
    "read_scaling",
    "rotates_alike",
    "unread_scaling",
    "written_scaling",
]
