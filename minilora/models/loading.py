"""One call from a path, or a known name, to a model and its tokenizer."""

from pathlib import Path

import torch

from .fetching import fetch
from .gguf_file import read_gguf, read_model
from .llama import Llama, Transform
from .tokenizer import Tokenizer

_NAMES = ("smollm2-135m",)


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = "auto",
    device: torch.device | str = "cpu",
    transform: Transform | None = None,
) -> tuple[Llama, Tokenizer]:
    """Read a model and its tokenizer from the same place.

    Args:
        path: a Hugging Face folder, a GGUF file, or `"smollm2-135m"`, which is fetched when it is
            not in the cache (a file or folder of that name goes first).
        dtype: `"auto"` the fastest here, None as stored, or a floating-point torch dtype.
        device: where the weights go.
        transform: called per tensor; see `Llama.from_pretrained`.

    Returns:
        The model in evaluation mode, and the tokenizer.

    Raises:
        ValueError: a path that is neither, or whose content cannot be read.
        RuntimeError: a package is missing, or fetching fails.
    """
    place = Path(path)
    if str(path) in _NAMES and not place.exists():
        place = fetch(str(path))
    if place.is_dir():
        model = Llama.from_pretrained(place, dtype=dtype, device=device, transform=transform)
        return model, Tokenizer.from_pretrained(place)
    if place.is_file():
        source = read_gguf(place)
        tokenizer = Tokenizer._from_gguf(source)
        return read_model(source, dtype=dtype, device=device, transform=transform), tokenizer
    raise ValueError(
        f"a model is a folder with config.json, a .gguf file or one of {', '.join(_NAMES)}, found "
        f"nothing at {str(path)!r}"
    )
