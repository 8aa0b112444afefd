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

    Those that the vocabulary lacks are put behind it with `add`, else left out. Added tokens that
    tokenizer.json has keep their options, and with `add` stay text if they are text there.
    """
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    made = []
    for text in dict.fromkeys(texts):
        old = added.get(text)
        stays = old is not None and (add or old.special)
        if not stays and (add or backend.token_to_id(text) is not None):
            options = {"normalized": False} if old is None else _options(old)
            made.append(tokenizers_library().AddedToken(text, **options))
    backend.add_special_tokens(made)


def _options(token: Any) -> dict[str, bool]:
    """Return where an added token is found in a text."""
    return {key: getattr(token, key) for key in ("single_word", "lstrip", "rstrip", "normalized")}


def stand_in(backend: Any, mark: str) -> tuple[Any, dict[int, int]]:
    """Return a backend to which names of control tokens are text, and marks control tokens.

    The mark and five digits name one, numbered from the longest name on. Beside the backend are the
    control tokens' ids by its ids of the marks.
    """
    made = type(backend).from_str(backend.to_str())
    made.encode_special_tokens = True  # as text
    control = control_tokens(backend)
    added = backend.get_added_tokens_decoder()
    ids = {}
    for i, name in enumerate(longest_first(control)):
        token = tokenizers_library().AddedToken(f"{mark}{i:05d}", **_options(added[control[name]]))
        made.add_tokens([token])
        ids[made.token_to_id(f"{mark}{i:05d}")] = control[name]
    return made, ids


def encode_as_text(backend: Any, text: str, control: dict[str, int]) -> Encoded:
    """Encode text in which no name is a control token, by a backend that takes those as text.

    Not even where it is a piece of a unigram vocabulary: such names are cut in two.
    """
    found = backend.encode(text, add_special_tokens=False)
    names = {i: name for name, i in control.items()}
    read = zip(found.ids, found.offsets, strict=True)
    if not any(i in names and names[i] in text[start:end] for i, (start, end) in read):
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
