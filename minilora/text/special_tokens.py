"""Control tokens: which entries of a vocabulary they are, and text that names them kept apart."""

import itertools
import re
from collections.abc import Iterable
from typing import Any

from minilora.files import import_extra

_STANDARD = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]

Encoded = tuple[list[int], list[tuple[int, int]]]  # ids, and the characters of each


def tokenizers_library() -> Any:
    """Return the `tokenizers` package, or raise RuntimeError with how to get it."""
    return import_extra("tokenizers", "a Tokenizer")


def text_of(token: Any) -> str | None:
    """Return a special token's text: in config files a string or an object."""
    return token.get("content") if isinstance(token, dict) else token


def special_texts(entries: dict[str, Any]) -> list[str]:
    """Return the control tokens that tokenizer_config.json names beside bos, eos, pad and unk.

    The order is transformers': those under names of their own, then the others.
    """
    extra = entries.get("extra_special_tokens") or entries.get("additional_special_tokens") or ()
    named = entries.get("model_specific_special_tokens") or {}
    own = [v for k, v in entries.items() if k.endswith("_token") and k not in _STANDARD]
    found: list[Any] = [token for token in own if isinstance(token, str)]  # as "image_token"
    for tokens in (named, extra):
        found += map(text_of, tokens.values() if isinstance(tokens, dict) else tokens)
    return [text for text in found if isinstance(text, str)]


def control_tokens(backend: Any) -> dict[str, int]:
    """Return the ids of a backend's control tokens by name."""
    added = backend.get_added_tokens_decoder()
    return {token.content: i for i, token in added.items() if token.special}


def make_special(backend: Any, texts: Iterable[str], add: bool = False) -> None:
    """Make control tokens of texts that are none yet, as transformers does.

    Args:
        backend: is changed.
        texts: of the tokens.
        add: put those behind the vocabulary that it lacks; else they are left out.
    """
    known = control_tokens(backend)
    backend.add_special_tokens(
        [
            tokenizers_library().AddedToken(text, normalized=False)
            for text in dict.fromkeys(texts)
            if text not in known and (add or backend.token_to_id(text) is not None)
        ]
    )


def stand_in(backend: Any, mark: str) -> tuple[Any, dict[int, int]]:
    """Return a backend to which names of control tokens are text, and marks control tokens.

    Args:
        backend: stays as it is.
        mark: followed by five digits it is a control token's name, numbered in the order of
            their names from the longest on.

    Returns:
        The backend, and the control tokens' ids by its ids of the marks.
    """
    made = type(backend).from_str(backend.to_str())
    made.encode_special_tokens = True  # as text
    control = control_tokens(backend)
    added = backend.get_added_tokens_decoder()
    kept = ("single_word", "lstrip", "rstrip", "normalized")
    ids = {}
    for i, name in enumerate(longest_first(control)):
        options = {key: getattr(added[control[name]], key) for key in kept}
        made.add_tokens([tokenizers_library().AddedToken(f"{mark}{i:05d}", **options)])
        ids[made.token_to_id(f"{mark}{i:05d}")] = control[name]
    return made, ids


def encode_as_text(backend: Any, text: str, control: dict[str, int]) -> Encoded:
    """Encode text in which no name is a control token, not even where it is a piece of a unigram
    vocabulary: such names are cut in two.

    Args:
        backend: one that encodes special tokens as text.
        text: any text.
        control: ids of the control tokens by name.

    Returns:
        Ids and character spans.
    """
    found = backend.encode(text, add_special_tokens=False)
    used = set(found.ids)
    if not any(i in used and name in text for name, i in control.items()):
        return found.ids, found.offsets
    cuts = [match.start() + 1 for match in name_pattern(control).finditer(text)]
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for start, end in itertools.pairwise([0, *cuts, len(text)]):
        part = backend.encode(text[start:end], add_special_tokens=False)
        ids += part.ids
        spans += [(start + a, start + b) for a, b in part.offsets]
    return ids, spans


def name_pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds names, at each position the longest."""
    return re.compile("|".join(map(re.escape, longest_first(names))) or r"(?!)")


def longest_first(names: Iterable[str]) -> list[str]:
    """Return names, the longest first, so that none is hidden by its own beginning."""
    return sorted(names, key=len, reverse=True)
