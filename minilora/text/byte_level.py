"""Tokenizer backends: from tokenizer.json, from GPT-2's older pair of files, from a GGUF."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilora.files import one_line, read_json

# Values of a GGUF's `tokenizer.ggml.pre` that are built: how text is cut before merging. From
# llama.cpp's llama-vocab.cpp; the same cuts in the models' own tokenizer.json.
_PRE_TOKENIZERS = ("gpt-2", "llama-bpe", "smollm")
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END = "<|endoftext|>"
_LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")


def tokenizers_library() -> Any:
    """Return the `tokenizers` package, or raise RuntimeError with how to get it."""
    try:
        import tokenizers
    except ImportError as error:
        raise RuntimeError('a Tokenizer needs tokenizers: pip install "minilora[text]"') from error
    return tokenizers


def folder_backend(folder: Path, entries: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """Return a folder's backend, and the special tokens it has where no file names them.

    Args:
        folder: holds `tokenizer.json`, or GPT-2's `vocab.json` and `merges.txt`.
        entries: of `special_tokens_map.json` and `tokenizer_config.json`.
    """
    library = tokenizers_library()
    file = folder / "tokenizer.json"
    pair = folder / "vocab.json", folder / "merges.txt"
    if not file.is_file() and any(one.is_file() for one in pair):
        return _gpt2_backend(*pair, entries)
    stored = read_json(file)  # a clear error where it is missing or no JSON
    try:
        backend = library.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(
            f"'{file}' must describe a tokenizer, found: {one_line(error, 200)}"
        ) from error
    if entries.get("tokenizer_class") in _LLAMA and _prepends(stored.get("normalizer")):
        _begin_once(backend, entries)
    return backend, {}


def _prepends(normalizer: Any) -> bool:
    """Whether a space is put before every stretch of text between control tokens."""
    steps = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, dict) else []
    return any(isinstance(step, dict) and step.get("type") == "Prepend" for step in steps)


def _begin_once(backend: Any, entries: dict[str, Any]) -> None:
    """Put a space before the first stretch of text alone, as transformers does for this class.

    huggingface/transformers, `models/llama/tokenization_llama.py`.
    """
    spaced = entries.get("add_prefix_space")
    scheme = "always" if entries.get("legacy") else "first"
    backend.normalizer = None
    backend.pre_tokenizer = tokenizers_library().pre_tokenizers.Metaspace(
        prepend_scheme="never" if spaced is False else scheme, split=False
    )


def _gpt2_backend(
    vocabulary: Path, merges: Path, entries: dict[str, Any]
) -> tuple[Any, dict[str, str]]:
    """GPT-2's tokenizer from its two files; other models cut text differently over such files."""
    library, folder = tokenizers_library(), vocabulary.parent
    config = folder / "config.json"
    kinds = {
        "tokenizer_config.json: tokenizer_class": entries.get("tokenizer_class"),
        "config.json: model_type": read_json(config).get("model_type")
        if config.is_file()
        else None,
    }
    for where, kind in kinds.items():
        if kind not in (None, "gpt2", "GPT2Tokenizer", "GPT2TokenizerFast"):
            raise ValueError(
                f"'{folder}' without tokenizer.json must be of GPT-2, found {kind!r} in {where}; "
                f"write tokenizer.json with transformers (AutoTokenizer, save_pretrained)"
            )
    if not merges.is_file():
        raise ValueError(f"'{folder}' must hold merges.txt beside vocab.json, found none")
    read_json(vocabulary)  # a clear error where it is missing or no JSON
    try:
        model = library.models.BPE.from_file(str(vocabulary), str(merges))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(
            f"'{folder}': vocab.json and merges.txt must be a byte-level BPE, found: "
            f"{one_line(error, 200)}"
        ) from error
    backend = library.Tokenizer(model)
    spaced = bool(entries.get("add_prefix_space"))
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    backend.decoder = library.decoders.ByteLevel()
    names = [entries.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad")]
    for token in _added(folder, entries):
        wanted = token.pop("id")
        backend.add_tokens([library.AddedToken(**token)])
        found = backend.token_to_id(token["content"])
        if found != wanted:
            raise ValueError(
                f"'{folder}': added token {token['content']!r} must get the id {wanted} that the "
                f"files state, found {found}; vocab.json is of another model"
            )
    special = {n.get("content") if isinstance(n, dict) else n for n in names} | {_END}
    known = [
        text for text in sorted(filter(None, special)) if backend.token_to_id(text) is not None
    ]
    backend.add_special_tokens([library.AddedToken(t, normalized=False) for t in known])
    defaults = dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END)
    return backend, defaults if _END in known else {}


def _added(folder: Path, entries: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tokens added after training, as arguments of AddedToken with their ids."""
    found: dict[int, dict[str, Any]] = {}
    known = ("single_word", "lstrip", "rstrip", "normalized", "special")
    file = folder / "added_tokens.json"
    try:
        for text, i in (read_json(file) if file.is_file() else {}).items():
            found[int(i)] = {"content": str(text), "normalized": False}
        for i, token in (entries.get("added_tokens_decoder") or {}).items():
            rest = {key: value for key, value in token.items() if key in known}
            found[int(i)] = {"content": token["content"], **rest}
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        raise ValueError(
            f"'{folder}': added tokens must have whole numbers as ids and a content, found "
            f"otherwise ({one_line(error, 200)}); correct added_tokens.json"
        ) from None
    return [{"id": i, **found[i]} for i in sorted(found)]


def needed(metadata: Mapping[str, Any], key: str) -> Any:
    """Return a value of a GGUF's metadata, or raise ValueError by its name."""
    if key not in metadata:
        raise ValueError(f"the tokenizer must state {key}, found no such metadata")
    return metadata[key]


def gguf_backend(metadata: Mapping[str, Any], tokens: list[str]) -> Any:
    """Return a GGUF's BPE model, its cuts and its decoder, without added tokens."""
    library = tokenizers_library()
    kind, cut = needed(metadata, "tokenizer.ggml.model"), needed(metadata, "tokenizer.ggml.pre")
    if kind != "gpt2":
        raise ValueError(
            f"tokenizer.ggml.model must be 'gpt2' (byte-level BPE), found {kind!r}, which is not "
            f"built; read the tokenizer from a folder with tokenizer.json"
        )
    if cut not in _PRE_TOKENIZERS:
        raise ValueError(
            f"tokenizer.ggml.pre must be one of {', '.join(_PRE_TOKENIZERS)}, found {cut!r}, which "
            f"is not built; read the tokenizer from a folder with tokenizer.json"
        )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in needed(metadata, "tokenizer.ggml.merges")]
    if len(vocabulary) != len(tokens) or any(len(pair) != 2 for pair in merges):
        raise ValueError("tokens must differ and merges must be pairs, found otherwise")
    try:
        model = library.models.BPE(vocabulary, merges, ignore_merges=cut == "llama-bpe")
    except Exception as error:  # the library raises plain Exception
        raise ValueError(
            f"the merges must lie in the vocabulary: {one_line(error, 200)}"
        ) from error
    backend = library.Tokenizer(model)
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
    return backend
