"""Write model folders that transformers loads; `folder` reads them."""

from pathlib import Path
from typing import Any

import torch

from minilora.files import read_json, tensor_content, whole_folder, write, write_json
from minilora.loading.folder import CONFIG, FLOATS, KINDS, WEIGHTS, Kind, Model, some
from minilora.text import as_tokenizer

_FOREIGN = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.index.json",
    "adapter_config.json",
)
_MARK = {"written_by": "minilora"}  # in config.json: what save_pretrained may replace


def save_pretrained(model: Model, folder: str | Path, tokenizer: Any = None) -> None:
    """Write a folder that transformers' `AutoModelForCausalLM` and `AutoTokenizer` load.

    A new or empty folder appears whole, by one rename. Files of an earlier one are replaced after
    all have been written, `config.json` at the end: without it nobody reads the folder.

    Args:
        model: a plain floating-point `Llama` or `GPT2`: no adapters, not quantized. A head that
            no longer shares the embedding's memory is stored as its own tensor.
        folder: made when missing. Files of an earlier `save_pretrained` are replaced.
        tokenizer: a `Tokenizer`, or one of transformers', to write beside it, or None.

    Raises:
        ValueError: a model that holds anything but the plain parameters, or a folder that holds
            model files written by something else.
        TypeError: another kind of model or tokenizer.
        RuntimeError: the folder can't be written.
    """
    folder = Path(folder)
    known = next((kind for kind in KINDS.values() if isinstance(model, kind.model)), None)
    if known is None:
        raise TypeError(
            f"save_pretrained writes a Llama or GPT2 of minilora.models, found "
            f"{type(model).__name__}; write other models by their own means"
        )
    tokenizer = None if tokenizer is None else as_tokenizer(tokenizer)
    tensors = _plain_tensors(model, known)
    _refuse_foreign(folder)
    config = model.config.to_dict(tensors[known.embedding].dtype)
    config |= {"tie_word_embeddings": "lm_head.weight" not in tensors, **_MARK}
    with whole_folder(folder, last=CONFIG) as made:
        write(made / WEIGHTS, tensor_content(tensors, {"format": "pt"}))
        if model.config.eos_token_id is not None:
            ids = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
            generation = {key: value for key, value in ids.items() if value is not None}
            write_json(made / "generation_config.json", generation)
        write_json(made / CONFIG, config)
        if tokenizer is not None:
            tokenizer.save(made)


def _plain_tensors(model: Model, kind: Kind) -> dict[str, torch.Tensor]:
    wanted = kind.model(model.config, device="meta").state_dict().keys()  # type: ignore[arg-type]
    state = model.state_dict()
    other = sorted(state.keys() ^ wanted)
    other += [fqn for fqn, tensor in state.items() if tensor.dtype not in FLOATS]
    if other:
        raise ValueError(
            f"save_pretrained writes a plain floating-point {kind.model.__name__}, found the model "
            f"differs in {some(other)}; eject adapters (minilora.eject) and dequantize first"
        )
    head = state["lm_head.weight"]
    if head.data_ptr() == state[kind.embedding].data_ptr():
        if model.config.tie_word_embeddings:
            del state["lm_head.weight"]
        else:
            state["lm_head.weight"] = head.clone()
    return {fqn: tensor.detach().contiguous() for fqn, tensor in state.items()}


def _refuse_foreign(folder: Path) -> None:
    found = {file.name for kind in _FOREIGN for file in folder.glob(kind)}
    if (folder / CONFIG).is_file():
        ours = _MARK.items() <= read_json(folder / CONFIG).items()
        found = found - {WEIGHTS} if ours else found | {CONFIG}
    if found:
        raise ValueError(
            f"'{folder}' must hold no model files but minilora's own, found "
            f"{some(sorted(found))}; choose another folder"
        )
