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
    """Import a package of an extra.

    Args:
        package: a key of `EXTRAS`.
        what: what needs it, to begin the message.

    Raises:
        RuntimeError: it cannot be imported; names the extra that brings it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise RuntimeError(
            f'{what} needs {package} ({error}): pip install "minilora[{EXTRAS[package]}]", or '
            f'"minilora[all]"'
        ) from error
