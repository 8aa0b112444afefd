"""From a path or name to a model and its tokenizer, and back to the disk."""

from minilora.loading.fetching import fetch
from minilora.loading.folder import KINDS, read_folder
from minilora.loading.gguf_file import model_config, read_gguf, read_model
from minilora.loading.model import load_model
from minilora.loading.quantized_models import is_quantized_folder, load_quantized, save_quantized
from minilora.loading.saving import save_pretrained

__all__ = [
    "KINDS",
    "fetch",
    "is_quantized_folder",
    "load_model",
    "load_quantized",
    "model_config",
    "read_folder",
    "read_gguf",
    "read_model",
    "save_pretrained",
    "save_quantized",
]
