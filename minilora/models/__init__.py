"""Language models in plain PyTorch, one file a family. Knows no LoRA."""

from minilora.models.blocks import KVCache
from minilora.models.causal import Prepare, Transform
from minilora.models.gpt2 import GPT2, Conv1D, stored_fqn
from minilora.models.gpt2_config import ACTIVATIONS, GPT2Config
from minilora.models.llama import Llama
from minilora.models.llama_config import LlamaConfig

__all__ = [
    "ACTIVATIONS",
    "GPT2",
    "Conv1D",
    "GPT2Config",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "Prepare",
    "Transform",
    "stored_fqn",
]
