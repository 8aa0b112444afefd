"""Write model folders: those that transformers loads, and those of quantized models."""

import copy
from pathlib import Path
from typing import Any

from torch import Tensor

from minilora.files import is_new, read_json, sync, tensor_content, whole_folder, write, write_json
from minilora.loading.folder import CONFIG, GENERATION, WEIGHTS
from minilora.loading.foreign_config import quiet
from minilora.loading.quantized import LAYERS, QUANTIZED, layer_rows
from minilora.loading.source import FLOATS, HEAD, some
from minilora.lora import lora_layers
from minilora.models import FAMILIES, CausalLM
from minilora.peft import CONFIG_FILE
from minilora.quantization import QuantizedLinear
from minilora.text import Tokenizer, as_tokenizer, remove_templates

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json")
_FOREIGN = (*_WEIGHTS, CONFIG_FILE)
_MARK = {"written_by": "minilora"}  # in config.json: what save_pretrained may replace


def save_pretrained(model: Any, folder: str | Path, tokenizer: Any = None) -> None:
    """Write a model's folder, with a checksum of every tensor; `minilora.load_model` reads it.

    One in floating point is also read by transformers' `AutoModelForCausalLM`. A new or empty
    folder appears whole, by one rename. Files of an earlier one are replaced after all have been
    written, `config.json` at the end: without it nobody reads the folder.

    Args:
        model: of a family of `minilora.models`, or of transformers, without adapters; its layers
            may be quantized. A head that no longer shares the embedding's memory is stored as its
            own tensor.
        folder: made when missing. Files of an earlier `save_pretrained` are replaced, but a
            quantized model, and one of transformers, need a new or empty folder.
        tokenizer: a `Tokenizer`, or one of transformers', to write beside it, or None.

    Raises:
        ValueError: a model that holds anything but its own parameters, or a folder that holds
            model files written by something else.
        TypeError: another kind of model or tokenizer.
        RuntimeError: the folder can't be written.
    """
    folder = Path(folder)
    tokenizer = None if tokenizer is None else as_tokenizer(tokenizer, model)
    if _is_transformers(model):
        _save_foreign(model, folder, tokenizer)
        return
    if type(model) not in FAMILIES.values():
        raise TypeError(
            f"save_pretrained writes models of transformers and of minilora.models ("
            f"{', '.join(f.__name__ for f in FAMILIES.values())}), found {type(model).__name__}; "
            f"write other models by their own means"
        )
    small = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    tensors = _tensors(model, small)
    floats = tensors[f"{model.embedding_name}.weight"].dtype
    config = model.config.to_dict(floats)
    config["tie_word_embeddings"] = not any(name.startswith("lm_head.") for name in tensors)
    if small:
        if not is_new(folder):
            raise ValueError(
                f"a quantized model needs a new or empty folder, found files in '{folder}'; choose "
                f"another one"
            )
    else:
        _refuse_foreign(folder)
        config |= _MARK
    with whole_folder(folder, last=CONFIG) as made:
        if not small:
            tensors = {model.written_fqn(name): tensor for name, tensor in tensors.items()}
        write(made / (QUANTIZED if small else WEIGHTS), tensor_content(tensors, {"format": "pt"}))
        if small:
            write_json(made / LAYERS, layer_rows(small))
        if generation := _generation(config, tokenizer):
            write_json(made / GENERATION, generation)
        write_json(made / CONFIG, config)
        if tokenizer is not None:
            tokenizer.save(made)
            remove_templates(folder, made)


def _generation(config: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return what `generate` of transformers reads: the special ids, with all that end a text."""
    end = config.get("eos_token_id")
    ends = [*end] if isinstance(end, list) else [end] * (end is not None)
    if tokenizer is not None:
        ends += sorted(tokenizer.stop_ids.difference(ends))
    if not ends:
        return {}
    ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
    ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return {key: value for key, value in ids.items() if value is not None}


def _tensors(model: CausalLM, small: dict[str, QuantizedLinear]) -> dict[str, Tensor]:
    """Return what a model stores, or raise where it is no plain model with quantized layers."""
    state = model.state_dict()
    parts = {f"{name}.{part}" for name, layer in small.items() for part in layer.state_dict()}
    replaced = {f"{name}.{part}" for name in small for part in ("weight", "bias")}
    plain = type(model)(model.config, device="meta").state_dict().keys()
    other = sorted(state.keys() ^ ((plain - replaced) | parts))
    other += [fqn for fqn in state.keys() - parts if state[fqn].dtype not in FLOATS]
    if other:
        raise ValueError(
            f"save_pretrained writes a plain {type(model).__name__}, in floating point or "
            f"quantized, found the model differs in {some(other)}; eject adapters "
            f"(minilora.eject) first"
        )
    embedding = state[f"{model.embedding_name}.weight"]
    if HEAD in state and state[HEAD].data_ptr() == embedding.data_ptr():
        if model.config.tie_word_embeddings:
            del state[HEAD]
        else:
            state[HEAD] = state[HEAD].clone()
    return {fqn: tensor.detach().contiguous() for fqn, tensor in state.items()}


def _refuse_foreign(folder: Path) -> None:
    found = {file.name for form in _FOREIGN for file in folder.glob(form)}
    if (folder / CONFIG).is_file():
        ours = _MARK.items() <= read_json(folder / CONFIG).items()
        found = found - {WEIGHTS} if ours else found | {CONFIG}
    if found:
        raise ValueError(
            f"'{folder}' must hold no model files but minilora's own, found "
            f"{some(sorted(found))}; choose another folder"
        )


# --- models of transformers


def _is_transformers(model: Any) -> bool:
    return hasattr(model, "save_pretrained") and hasattr(
        getattr(model, "config", None), "to_json_string"
    )


def _save_foreign(model: Any, folder: Path, tokenizer: Tokenizer | None) -> None:
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
    options = getattr(model, "generation_config", None)
    with whole_folder(folder, last=CONFIG) as made, quiet():
        if small:
            config = copy.deepcopy(model.config)
            config.architectures = [type(model).__name__]
            config.save_pretrained(made)
            write(made / QUANTIZED, tensor_content(_foreign_tensors(model), {"format": "pt"}))
            write_json(made / LAYERS, layer_rows(small))
        else:
            _save_whole(model, options, made)
        if options is not None:
            write(made / GENERATION, options.to_json_string())
        for file in made.iterdir():
            sync(file)
        if tokenizer is not None:
            tokenizer.save(made)


def _save_whole(model: Any, options: Any, made: Path) -> None:
    """Have transformers write the model, without its generation options, which it may refuse."""
    try:
        if options is not None:
            model.generation_config = type(options)()
        model.save_pretrained(made)
    finally:
        if options is not None:
            model.generation_config = options


def _foreign_tensors(model: Any) -> dict[str, Tensor]:
    """Return what a model stores; of weights that are one, the one that transformers ties to."""
    state = model.state_dict()
    tied = getattr(model, "all_tied_weights_keys", {})
    seen: set[int] = {state[name].data_ptr() for name in state.keys() - tied.keys()}
    left = {name for name in tied.keys() & state.keys() if state[name].data_ptr() in seen}
    return {name: tensor.contiguous() for name, tensor in state.items() if name not in left}
