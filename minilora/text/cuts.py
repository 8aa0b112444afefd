"""How text is cut before a byte-level BPE merges within the pieces, by `tokenizer.ggml.pre`.

The names: llama.cpp, `llama-vocab.cpp`. The expressions of all but "default" are those in the
models' own tokenizer.json.
"""

from typing import Any, NamedTuple

from minilora.text.special_tokens import tokenizers_library

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}|"
)
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


class Cut(NamedTuple):
    """Expressions that text is cut by, one after another, and what else follows from a name.

    Attributes:
        patterns: their matches, and what lies between, become pieces.
        whole: a piece that is a token stays whole, whatever the merges say.
        begins: a document begins with the bos token where the file does not say.
    """

    patterns: tuple[str, ...]
    whole: bool = False
    begins: bool = False


_llama3 = Cut((_WORD + r"\p{N}{1,3}" + _REST,), whole=True, begins=True)
_digits = Cut((r"\p{N}", _GPT2))
_qwen2 = Cut((_WORD + r"\p{N}" + _REST,))
_gpt4o = Cut((_CASED.replace("{0}", _SHORT).replace("{{", "{") + r"\p{N}{1,3}" + _CASED_REST,))
CUTS = {
    "gpt-2": Cut((_GPT2,)),
    "phi-2": Cut((_GPT2,)),
    "olmo": Cut((_GPT2,)),
    "smollm": _digits,
    "starcoder": _digits,
    "refact": _digits,
    "command-r": _digits,
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "llama-v3": _llama3,
    "falcon3": _llama3,
    "dbrx": Cut(_llama3.patterns),
    "smaug-bpe": Cut(_llama3.patterns),
    "qwen2": _qwen2,
    "deepseek-r1-qwen": _qwen2,
    "stablelm2": _qwen2,
    "tekken": Cut((_CASED.replace("{0}", "") + r"\p{N}" + _CASED_REST,), whole=True, begins=True),
    "gpt-4o": _gpt4o,
    "llama4": _gpt4o,
    "default": Cut((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}


def cutting(cut: Cut) -> Any:
    """Return the pre-tokenizer that cuts so and spells the pieces in bytes."""
    library = tokenizers_library()
    pre = library.pre_tokenizers
    steps = [pre.Split(library.Regex(pattern), behavior="isolated") for pattern in cut.patterns]
    return pre.Sequence([*steps, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
