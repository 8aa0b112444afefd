"""One call from a path, or a known name, to a model and its tokenizer."""

import warnings
from pathlib import Path

import torch

from minilora.files import read_json, short
from minilora.loading.fetching import fetch, hub_name, known_name
from minilora.loading.folder import KINDS, Model, read_folder
from minilora.loading.gguf_file import read_gguf, read_model
from minilora.models import Prepare, Transform
from minilora.text import Tokenizer

_NAMES = ("smollm2-135m",)
_GPT2_END = "<|endoftext|>"


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = "auto",
    device: torch.device | str = "cpu",
    transform: Transform | None = None,
    prepare: Prepare | None = None,
) -> tuple[Model, Tokenizer]:
    """Read a model and its tokenizer from the same place.

    Args:
        path: a Hugging Face folder (its `config.json` says whether it holds a Llama or a GPT-2), a
            GGUF file of the llama architecture, or `"smollm2-135m"`, which is fetched when it is
            not in the cache (a file or folder of that name goes first); its name on the hub,
            which adapters trained on it carry, means the same.
        dtype: `"auto"` the fastest here, None as stored, or a floating-point torch dtype.
        device: where the weights go.
        transform: called per tensor; see `Llama.from_pretrained`.
        prepare: called with the model on the meta device, in its dtype; returns a function that is
            called with name and value of each tensor, one at a time, and puts it where it belongs.
            None keeps each tensor whole.

    Returns:
        The model, a `Llama` or `GPT2` in evaluation mode, and the tokenizer.

    Raises:
        ValueError: a path that is neither, or whose content cannot be read.
        RuntimeError: a package is missing, or fetching fails.
    """
    place = Path(path)
    known = known_name(str(path))
    if known and not place.exists():
        place = fetch(known)
    if place.is_dir():
        kind = _model_type(place)
        model = read_folder(
            place, dtype=dtype, device=device, transform=transform, kind=kind, prepare=prepare
        )
        tokenizer = Tokenizer.from_pretrained(place)
        tokenizer = _with_gpt2_tokens(tokenizer) if kind == "gpt2" else tokenizer
        check_tokenizer(model, tokenizer, place)
        return model, tokenizer
    if place.is_file():
        source = read_gguf(place)
        tokenizer = Tokenizer._from_gguf(source)
        model = read_model(source, dtype=dtype, device=device, transform=transform, prepare=prepare)
        check_tokenizer(model, tokenizer, place)
        model.name_or_path = hub_name(place) or model.name_or_path
        return model, tokenizer
    raise ValueError(
        f"a model is a folder with config.json, a .gguf file or one of {', '.join(_NAMES)}, found "
        f"nothing at {str(path)!r}"
    )


def check_tokenizer(model: Model, tokenizer: Tokenizer, place: Path) -> None:
    """Warn where a tokenizer's ids are not those of the model's embedding."""
    rows, ids = model.config.vocab_size, tokenizer.vocab_size
    problems = []
    if ids > rows:
        problems.append(f"its tokenizer has {ids} ids, and the model can't compute {rows} and more")
    if tokenizer.stop_ids and min(tokenizer.stop_ids) >= rows:
        stop = min(tokenizer.stop_ids)
        problems.append(f"eos_token_id {stop} is not among the model's {rows} ids: no text ends")
    for problem in problems:
        warnings.warn(f"minilora: '{place}': {problem}", stacklevel=4)


def _model_type(folder: Path) -> str:
    """What kind of model a folder holds, by its `config.json`: a key of `KINDS`."""
    file = folder / "config.json"
    found = read_json(file).get("model_type")
    if not isinstance(found, str) or found not in KINDS:
        raise ValueError(
            f"'{file}' must name a model_type that is built ({', '.join(KINDS)}), found "
            f"{short(found)}; for another model pass transformers' own to minilora.inject"
        )
    return found


def _with_gpt2_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Name the special tokens where no file does, as transformers' `GPT2Tokenizer` does.

    OpenAI's own folder names none. Without one, training has nothing to end a text with.
    """
    if tokenizer.eos_id is not None or _GPT2_END not in tokenizer.control:
        return tokenizer
    named = {"bos_token": _GPT2_END, "unk_token": _GPT2_END, **tokenizer._named}
    return Tokenizer(
        tokenizer._backend,
        eos=_GPT2_END,
        stop_ids=tokenizer.stop_ids,
        chat_template=tokenizer.chat_template,
        **{name.removesuffix("_token"): text for name, text in named.items()},
    )
