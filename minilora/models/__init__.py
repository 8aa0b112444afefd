"""Llama and GPT-2 in plain PyTorch: reading, writing, tokenizing, fetching. Knows no LoRA."""

from .conversation import Conversation
from .decoder import KVCache
from .fetching import fetch
from .foreign_tokenizer import as_tokenizer
from .gpt2 import GPT2, Conv1D
from .gpt2_config import GPT2Config
from .llama import Llama
from .llama_config import LlamaConfig
from .loading import load_model
from .saving import save_pretrained
from .tokenizer import Tokenizer

__all__ = [
    "GPT2",
    "Conv1D",
    "Conversation",
    "GPT2Config",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "Tokenizer",
    "as_tokenizer",
    "fetch",
    "load_model",
    "save_pretrained",
]
