"""From a path or name to a model and its tokenizer, and back to the disk."""

from minilora.loading.fetching import fetch
from minilora.loading.model import load_model, read_config, read_tokenizer
from minilora.loading.saving import save_pretrained

__all__ = [
    "fetch",
    "load_model",
    "read_config",
    "read_tokenizer",
    "save_pretrained",
]
