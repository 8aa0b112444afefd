"""What a model of any make takes: arguments, and tokens."""

import inspect
import math
from typing import Any

from minilora.models import ModelConfig

_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx")  # in transformers' configurations


def argument_names(function: Any) -> set[str]:
    """Return the names of a function's arguments; none for what is no function."""
    return set(inspect.signature(function).parameters) if inspect.isroutine(function) else set()


def context_of(model: Any) -> float:
    """Return how many tokens a sequence may have, inf where the model's config does not say."""
    config = getattr(model, "config", None)
    if isinstance(config, ModelConfig):
        return config.context_length
    found = (getattr(config, name, None) for name in _CONTEXT)
    return next((n for n in found if isinstance(n, int)), math.inf)
