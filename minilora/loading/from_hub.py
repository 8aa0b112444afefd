"""Models of the Hugging Face hub: of a repository, the files alone that loading reads."""

from pathlib import Path

from minilora.files import HubName, download
from minilora.loading.folder import CONFIG, INDEX, WEIGHTS, weight_map
from minilora.loading.gguf_reader import shard_names
from minilora.loading.quantized import LAYERS, QUANTIZED

# Never pickles (.bin, .pt) and never code (.py).
TOKENIZER_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja",
    "vocab.txt", "spiece.model", "tekken.json", "additional_chat_templates/tool_use.jinja",
)  # fmt: skip


def fetch_model(name: HubName) -> Path:
    """Return the folder of a model, or its GGUF file, in huggingface_hub's cache.

    The other shards of a GGUF file lie beside it.
    """
    if name.file:
        return download(name, (), shard_names(name.file)) / name.file
    folder = download(name, (*TOKENIZER_FILES, WEIGHTS, INDEX, LAYERS, QUANTIZED), [CONFIG])
    if (folder / WEIGHTS).is_file() or (folder / QUANTIZED).is_file():
        return folder
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"'{name}' must hold {WEIGHTS} or {INDEX}, found neither on the hub or, without a "
            f"network, in the cache; pickles are not read, and of GGUF files name one, such as "
            f"{name}:model.gguf"
        )
    shards = sorted({s for s in weight_map(folder).values() if s.endswith(".safetensors")})
    return download(name._replace(revision=folder.name), (), shards)


def fetch_tokenizer(name: HubName) -> Path:
    """Return the folder of a model without its weights, or its GGUF file."""
    return fetch_model(name) if name.file else download(name, TOKENIZER_FILES, [CONFIG])


def fetch_config(name: HubName) -> Path:
    """Return a model's config.json, or its GGUF file."""
    return fetch_model(name) if name.file else download(name, (), [CONFIG]) / CONFIG
