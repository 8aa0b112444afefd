"""Tokenizers of transformers, taken wherever our own are."""

from typing import Any

from minilora.text.tokenizer import Tokenizer


def as_tokenizer(tokenizer: Any) -> Tokenizer:
    """Return a tokenizer as ours.

    Args:
        tokenizer: a `Tokenizer`, which is returned, or one of transformers', whose vocabulary is
            shared. Its chat template is the one named "default" where it has several.

    Raises:
        TypeError: anything else, with the line that converts it.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "get_added_tokens_decoder"):
        line = "minilora.models.Tokenizer.from_pretrained(folder), where tokenizer.json lies"
        if type(tokenizer).__module__.startswith("tokenizers"):
            line = 'minilora.models.Tokenizer(tokenizer, eos="…")'
        raise TypeError(
            f"the tokenizer must be a minilora.models.Tokenizer or one of transformers' that has a "
            f"backend_tokenizer, found {type(tokenizer).__name__}; convert it by {line}"
        )
    named: dict[str, Any] = {}
    for key in ("bos", "eos", "pad", "unk"):
        token = getattr(tokenizer, f"{key}_token", None)
        named[key] = None if token is None else str(token)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return Tokenizer(backend, **named, chat_template=template)
