"""A tokenizer's parts from a GGUF's metadata: a byte-level BPE vocabulary with its merges.

How text is cut before merging follows from `tokenizer.ggml.pre`: llama.cpp, `llama-vocab.cpp`; the
same cuts are in the models' own tokenizer.json.
"""

from collections.abc import Mapping
from typing import Any

from minilora.files import one_line
from minilora.text.special_tokens import tokenizers_library

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_NAMES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
CUTS = ("gpt-2", "llama-bpe", "smollm")
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def metadata_parts(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `Tokenizer` is made of; see `Tokenizer.from_metadata`."""

    def id_of(name: str) -> int | None:
        return metadata.get(f"tokenizer.ggml.{name}_token_id")

    tokens = _needed(metadata, "tokens")
    named = {name: id_of(key) for name, key in _NAMES.items()}
    for name, token_id in named.items():
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise ValueError(
                f"the {name} token's id must lie in [0, {len(tokens)}), found {token_id}"
            )
    begins = _needed(metadata, "pre") == "llama-bpe"  # llama.cpp's default
    return {
        "backend": _backend(metadata, tokens),
        **{name: None if i is None else tokens[i] for name, i in named.items()},
        "stop_ids": [i for i in map(id_of, ("eot", "eom")) if i is not None],
        "chat_template": metadata.get("tokenizer.chat_template"),
        "frame": (
            bool(metadata.get("tokenizer.ggml.add_bos_token", begins)),
            bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        ),
    }


def _needed(metadata: Mapping[str, Any], name: str) -> Any:
    key = f"tokenizer.ggml.{name}"
    if key not in metadata:
        raise ValueError(f"the tokenizer must state {key}, found no such metadata")
    return metadata[key]


def _backend(metadata: Mapping[str, Any], tokens: list[str]) -> Any:
    """Return the BPE model with its cuts, its decoder and the added tokens."""
    library = tokenizers_library()
    model, cut = _needed(metadata, "model"), _needed(metadata, "pre")
    if model != "gpt2":
        raise ValueError(
            f"tokenizer.ggml.model must be 'gpt2' (byte-level BPE), found {model!r}, which is not "
            f"built; read the tokenizer from a folder with tokenizer.json"
        )
    if cut not in CUTS:
        raise ValueError(
            f"tokenizer.ggml.pre must be one of {', '.join(CUTS)}, found {cut!r}, which "
            f"is not built; read the tokenizer from a folder with tokenizer.json"
        )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in _needed(metadata, "merges")]
    if len(vocabulary) != len(tokens) or any(len(pair) != 2 for pair in merges):
        raise ValueError("tokens must differ and merges must be pairs, found otherwise")
    try:
        bpe = library.models.BPE(vocabulary, merges, ignore_merges=cut == "llama-bpe")
    except Exception as error:  # the library raises plain Exception
        raise ValueError(
            f"the merges must lie in the vocabulary: {one_line(error, 200)}"
        ) from error
    backend = library.Tokenizer(bpe)
    pre = library.pre_tokenizers
    steps = []
    if cut == "smollm":
        steps.append(pre.Digits(individual_digits=True))
    elif cut == "llama-bpe":
        steps.append(pre.Split(library.Regex(_LLAMA3), behavior="isolated"))
    # ByteLevel's own regex is GPT-2's.
    steps.append(pre.ByteLevel(add_prefix_space=False, use_regex=cut != "llama-bpe"))
    backend.pre_tokenizer = pre.Sequence(steps)
    backend.decoder = library.decoders.ByteLevel()
    types = list(zip(tokens, metadata.get("tokenizer.ggml.token_type", []), strict=False))
    added = [
        library.AddedToken(t, normalized=False, special=True) for t, k in types if k == _CONTROL
    ]
    backend.add_special_tokens(added)
    backend.add_tokens(
        [library.AddedToken(t, normalized=False) for t, k in types if k == _USER_DEFINED]
    )
    return backend
