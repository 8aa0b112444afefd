"""The metadata by which a GGUF file describes a tokenizer; `from_gguf` reads it."""

import json
import warnings
from collections.abc import Iterable
from typing import Any

from minilora.text.cuts import CUTS, Cut
from minilora.text.tokenizer import ENDS, Tokenizer

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type
# Two tokenizers that encode this alike cut text alike: numbers, contractions, cases, marks, spaces.
_PROBE = (
    "I'm 42, don't 1234567 YOU'LL Ünïcode camelCase ABCdef x=3.14e-5; (foo_bar)/baz\n\n\n \t  z"
    "\r\n  中文字符 العربية हिन्दी 🙂👍🏽 ½²③ --->>> \u00a0 a   b    c\n\t\n !!!??? 007 10000 'S 'Ll"
)


def gguf_metadata(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """Return the keys `tokenizer.ggml.…` of a tokenizer, and `tokenizer.chat_template`.

    Args:
        tokenizer: a byte-level BPE whose text is cut in a way that llama.cpp has a name for.
        rows: of the model's embedding; ids without a token get an unused one.

    Raises:
        ValueError: another kind of tokenizer.
    """
    stored = json.loads(tokenizer.to_json())
    model = stored["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ValueError(
            f"a tokenizer written to GGUF must be a byte-level BPE, found {model.get('type')}; "
            "write a folder and convert that with llama.cpp's own convert_hf_to_gguf.py"
        )
    if not model["merges"]:
        raise ValueError(
            "a tokenizer written to GGUF must have merges, found none: the gguf package leaves an "
            "empty list out, and llama.cpp refuses a file without it; write a folder instead"
        )
    _check_losses(stored)
    kinds = dict.fromkeys(model["vocab"].values(), _NORMAL)
    names = {id: name for name, id in model["vocab"].items()}
    for token in stored["added_tokens"]:
        names[token["id"]] = token["content"]
        kinds[token["id"]] = _CONTROL if token["special"] else _USER_DEFINED
    if rows <= max(names):
        raise ValueError(
            f"a GGUF file needs a row of the embedding for each token, found {rows} rows and "
            f"{1 + max(names)} ids; resize the embedding"
        )
    begin, end = tokenizer.frame()
    found = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [names.get(i, f"[unused {i}]") for i in range(rows)],
        "tokenizer.ggml.token_type": [kinds.get(i, _UNUSED) for i in range(rows)],
        "tokenizer.ggml.merges": [
            m if isinstance(m, str) else " ".join(m) for m in model["merges"]
        ],
        "tokenizer.ggml.add_bos_token": begin,
        "tokenizer.ggml.add_eos_token": end,
    }
    pad = None if tokenizer.pad_id == tokenizer.eos_id else tokenizer.pad_id
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": pad}
    ids |= _ends(tokenizer, names)
    found |= {f"tokenizer.ggml.{name}_token_id": id for name, id in ids.items() if id is not None}
    if tokenizer.chat_template is not None:
        found["tokenizer.chat_template"] = tokenizer.chat_template
    if tokenizer.tool_template is not None:
        found["tokenizer.chat_templates"] = ["tool_use"]
        found["tokenizer.chat_template.tool_use"] = tokenizer.tool_template
    cuts: dict[Cut, str] = {}
    for name, cut in CUTS.items():
        cuts.setdefault(cut, name)
    return found | {"tokenizer.ggml.pre": _cut(tokenizer, found, cuts.values())}


def _ends(tokenizer: Tokenizer, names: dict[int, str]) -> dict[str, int]:
    """Return what ends a text beside eos, by the keys that the format has for it.

    Those that llama.cpp does not know by their names go first; of more than two, say so.
    """
    ids = sorted(tokenizer.stop_ids & names.keys() - {tokenizer.eos_id})
    others = {names[i]: i for i in ids}
    unknown = [name for name in others if name not in ENDS]
    if lost := unknown[2:]:
        warnings.warn(
            f"minilora: a GGUF file has keys for two more ends of a text than eos, found "
            f"{len(unknown)}; in llama.cpp {', '.join(lost)} will not end one: pass them to it as "
            f"stop strings",
            stacklevel=4,
        )
    order = [*unknown, *(name for name in ENDS if name in others)]
    return {key: others[name] for key, name in zip(("eot", "eom"), order, strict=False)}


def _check_losses(stored: dict[str, Any]) -> None:
    """Refuse, or say, what llama.cpp does not do with a text."""
    normalizer = stored.get("normalizer")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise ValueError(
            f"a GGUF file has no key for a tokenizer's normalizer, found {normalizer['type']}; "
            "write a folder and convert that with llama.cpp's own convert_hf_to_gguf.py"
        )
    strips = [
        token["content"]
        for token in stored["added_tokens"]
        if token["lstrip"] or token["rstrip"] or token["single_word"]
    ]
    lost = ["text is not brought to NFC"] * (normalizer is not None)
    lost += [f"{', '.join(strips[:3])} take no space beside them"] * bool(strips)
    if lost:
        warnings.warn(f"minilora: in llama.cpp {' and '.join(lost)}", stacklevel=4)


def _cut(tokenizer: Tokenizer, metadata: dict[str, Any], names: Iterable[str]) -> str:
    """Return llama.cpp's name for how the tokenizer cuts text, found by trying all of them."""
    wanted = tokenizer.encode(_PROBE)
    for name in names:
        made = Tokenizer.from_metadata(metadata | {"tokenizer.ggml.pre": name})
        if made.encode(_PROBE) == wanted:
            return name
    raise ValueError(
        f"a tokenizer written to GGUF must cut text as one of {', '.join(names)} does, found "
        "another way; write a folder and convert that with llama.cpp's own convert_hf_to_gguf.py"
    )
