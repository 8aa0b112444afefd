"""Write the folders of transformers' models: by its own means, or quantized by ours."""

import copy
from pathlib import Path
from typing import Any

from torch import Tensor

from minilora.files import is_new, sync, tensor_content, whole_folder, write, write_json
from minilora.loading.folder import CONFIG, GENERATION
from minilora.loading.foreign_config import quiet
from minilora.loading.quantized import LAYERS, QUANTIZED, layer_rows
from minilora.lora import lora_layers
from minilora.quantization import QuantizedLinear
from minilora.text import Tokenizer


def is_transformers(model: Any) -> bool:
    """Return whether a model is one of transformers'."""
    return hasattr(model, "save_pretrained") and hasattr(
        getattr(model, "config", None), "to_json_string"
    )


def save_foreign(model: Any, folder: Path, tokenizer: Tokenizer | None) -> None:
    """Write a model of transformers; see `save_pretrained`."""
    if lora_layers(model):
        raise ValueError(
            f"save_pretrained writes a plain {type(model).__name__}, in floating point or "
            f"quantized, found adapters; eject adapters (minilora.eject) first"
        )
    if not is_new(folder):
        raise ValueError(
            f"a {type(model).__name__} needs a new or empty folder, found files in '{folder}'; "
            f"choose another one"
        )
    small = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    with whole_folder(folder, last=CONFIG) as made, quiet():
        if small:
            config = copy.deepcopy(model.config)
            config.architectures = [type(model).__name__]
            config.save_pretrained(made)
            tensors = _tensors(model)
            write(made / QUANTIZED, tensor_content(tensors, {"format": "pt"}))
            write_json(made / LAYERS, layer_rows(small))
            if (options := getattr(model, "generation_config", None)) is not None:
                write(made / GENERATION, options.to_json_string())
        else:
            _save_whole(model, made)
        for file in made.iterdir():
            sync(file)
        if tokenizer is not None:
            tokenizer.save(made)


def _save_whole(model: Any, made: Path) -> None:
    """Have transformers write the model; its generation options as they are, which it may refuse.

    `save_pretrained` raises for a folder's own `generation_config.json` where that names options of
    sampling and does not sample.
    """
    options = getattr(model, "generation_config", None)
    if options is None:
        model.save_pretrained(made)
        return
    try:
        model.generation_config = type(options)()
        model.save_pretrained(made)
    finally:
        model.generation_config = options
    write(made / GENERATION, options.to_json_string())


def _tensors(model: Any) -> dict[str, Tensor]:
    """Return what a model stores; of weights that are one, the one that transformers ties to."""
    state = model.state_dict()
    tied = getattr(model, "all_tied_weights_keys", {})
    seen: set[int] = {state[name].data_ptr() for name in state.keys() - tied.keys()}
    left = {name for name in tied.keys() & state.keys() if state[name].data_ptr() in seen}
    return {name: tensor.contiguous() for name, tensor in state.items() if name not in left}
