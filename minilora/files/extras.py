"""Packages that minilora does without until something needs them."""

import importlib
from typing import Any

# The smallest extra of minilora that brings a package; `minilora[all]` brings them all.
EXTRAS = {
    "gguf": "gguf",
    "huggingface_hub": "hub",
    "jinja2": "text",
    "matplotlib": "plots",
    "pyarrow": "data",
    "tokenizers": "text",
    "tqdm": "train",
}


def import_extra(package: str, what: str) -> Any:
    """Import a package of an extra, or one that is in none of them.

    Args:
        package: a key of `EXTRAS`; of any other, its own name is what to install.
        what: what needs it, to begin the message.

    Raises:
        RuntimeError: it cannot be imported; says what to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        extra = (
            f'"minilora[{EXTRAS[package]}]", or "minilora[all]"' if package in EXTRAS else package
        )
        raise RuntimeError(f"{what} needs {package} ({error}): pip install {extra}") from error
