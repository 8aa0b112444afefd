"""From a path or name to a model and its tokenizer, and back to the disk."""

from minilora.loading.fetching import NAMES, fetch, known_name
from minilora.loading.foreign_config import ForeignConfig
from minilora.loading.from_hub import TOKENIZER_FILES
from minilora.loading.gguf_writing import FILE_TYPES, export_gguf, save_gguf
from minilora.loading.model import load_model, read_config, read_tokenizer
from minilora.loading.saving import save_pretrained

__all__ = [
    "FILE_TYPES",
    "NAMES",
    "TOKENIZER_FILES",
    "ForeignConfig",
    "export_gguf",
    "fetch",
    "known_name",
    "load_model",
    "read_config",
    "read_tokenizer",
    "save_gguf",
    "save_pretrained",
]
