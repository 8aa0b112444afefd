"""A tokenizer's parts from a GGUF's metadata: a byte-level BPE, or a SentencePiece one.

How llama.cpp reads the same keys: its `llama-vocab.cpp`.
"""

from collections.abc import Mapping
from typing import Any

from minilora.files import one_line, short
from minilora.text import sentencepiece
from minilora.text.cuts import CUTS, cutting
from minilora.text.special_tokens import tokenizers_library

_NAMES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
_FOLDER = "read the tokenizer from a folder with tokenizer.json"


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
    model = _needed(metadata, "model")
    if model == "gpt2":
        backend, begins = _byte_level(metadata, tokens)
    elif model == "llama":
        unk = None if named["unk"] is None else tokens[named["unk"]]
        backend, begins = _sentencepiece(metadata, tokens, unk), True
    else:
        raise ValueError(
            f"tokenizer.ggml.model must be 'gpt2' (byte-level BPE) or 'llama' (SentencePiece), "
            f"found {short(model)}, which is not built; {_FOLDER}"
        )
    sentencepiece.add_typed(backend, tokens, metadata.get("tokenizer.ggml.token_type", []))
    return {
        "backend": backend,
        **{name: None if i is None else tokens[i] for name, i in named.items()},
        "stop_ids": [i for i in map(id_of, ("eot", "eom")) if i is not None],
        "chat_template": metadata.get("tokenizer.chat_template"),
        "tool_template": metadata.get("tokenizer.chat_template.tool_use"),
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


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> tuple[Any, bool]:
    """Return a BPE with its cuts and its decoder, and whether bos begins a text by default."""
    library = tokenizers_library()
    name = _needed(metadata, "pre")
    if not isinstance(name, str) or name not in CUTS:
        raise ValueError(
            f"tokenizer.ggml.pre must be one of {', '.join(CUTS)}, found {short(name)}, which is "
            f"not built; {_FOLDER}"
        )
    cut = CUTS[name]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in _needed(metadata, "merges")]
    if len(vocabulary) != len(tokens) or any(len(pair) != 2 for pair in merges):
        raise ValueError("tokens must differ and merges must be pairs, found otherwise")
    try:
        bpe = library.models.BPE(vocabulary, merges, ignore_merges=cut.whole)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(
            f"the merges must lie in the vocabulary: {one_line(error, 200)}"
        ) from error
    backend = library.Tokenizer(bpe)
    backend.pre_tokenizer = cutting(cut)
    backend.decoder = library.decoders.ByteLevel()
    return backend, cut.begins


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], unk: str | None) -> Any:
    """Return a SentencePiece BPE, whose merges follow from the pieces' scores.

    Gemma's follow from their order; it has no space before a text, and its pieces of spaces are
    written as such. Phi-3 puts a space before a text that begins with one, too.
    """
    family = str(metadata.get("general.architecture"))
    if family.startswith("gemma"):
        tokens = ["▁" * len(t) if " " in t and not t.strip() else t for t in tokens]
        backend = sentencepiece.bpe(tokens, range(len(tokens)), unk, longest_left=True)
        sentencepiece.gemma(backend)
        return backend
    scores = _needed(metadata, "scores")
    if len(scores) != len(tokens):
        raise ValueError(
            f"tokenizer.ggml.scores must hold a number for each of {len(tokens)} tokens, found "
            f"{len(scores)}"
        )
    backend = sentencepiece.bpe(tokens, [-score for score in scores], unk, longest_left=True)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    scheme = "each" if family == "phi3" else "first"
    sentencepiece.space(backend, scheme if prefix else "never")
    sentencepiece.unspace(backend, strip=prefix)
    return backend
