"""Llama models in plain PyTorch: reading, writing, tokenizing, fetching. Knows no LoRA."""

from .decoder import KVCache
from .fetching import fetch
from .folder import save_pretrained
from .llama import Llama
from .llama_config import LlamaConfig
from .loading import load_model
from .tokenizer import Tokenizer

__all__ = [
    "KVCache",
    "Llama",
    "LlamaConfig",
    "Tokenizer",
    "fetch",
    "load_model",
    "save_pretrained",
]
