"""From a path or name to a model and its tokenizer, and back to the disk."""

from minilora.loading.fetching import NAMES, fetch
from minilora.loading.foreign_config import ForeignConfig
from minilora.loading.from_hub import TOKENIZER_FILES
from minilora.loading.gguf_writing import FILE_TYPES, export_gguf, save_gguf
from minilora.loading.model import base_name, load_model, read_config, read_tokenizer
from minilora.loading.quantized import is_quantized
from minilora.loading.saving import save_pretrained

__all__ = [
    "FILE_TYPES",
    "NAMES",
    "TOKENIZER_FILES",
    "ForeignConfig",
    "base_name",
    "export_gguf",
    "fetch",
    "is_quantized",
    "load_model",
    "read_config",
    "read_tokenizer",
    "save_gguf",
    "save_pretrained",
]
