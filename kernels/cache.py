"""Where what was fetched or compiled once is kept."""

import os
from pathlib import Path


def cache_folder(cache: str | Path | None = None) -> Path:
    """Return the folder for fetched models and compiled kernels.

    Args:
        cache: the folder, or None for `MINILORA_CACHE`, else `XDG_CACHE_HOME`/minilora, else
            `~/.cache/minilora`.

    Returns:
        The path; it need not exist.
    """
    if cache is not None:
        return Path(cache)
    if os.environ.get("MINILORA_CACHE"):
        return Path(os.environ["MINILORA_CACHE"])
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "minilora"
