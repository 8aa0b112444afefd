"""A tokenizer's parts from a folder: tokenizer.json, or the older files it may lack.

Those are GPT-2's vocab.json and merges.txt, and SentencePiece's tokenizer.model.
"""

import json
from pathlib import Path
from typing import Any

from minilora.files import leads_out, one_line, read_json, short
from minilora.text import sentencepiece
from minilora.text.special_tokens import (
    control_tokens,
    make_special,
    special_texts,
    text_of,
    tokenizers_library,
)

_END, _PIECES = "<|endoftext|>", "tokenizer.model"
_LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")
_GEMMA = ("GemmaTokenizer", "GemmaTokenizerFast")
_ANY = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
_SPACED = [  # classes that build ByteLevel anew, with add_prefix_space of tokenizer_config.json
    f"{family}Tokenizer{fast}"
    for family in ("GPT2", "GPTNeoX", "Qwen2", "CodeGen")
    for fast in ("", "Fast")
]
_NAMES = ("bos", "eos", "pad", "unk")
OTHERS = ("sep_token", "cls_token", "mask_token")  # which templates may read
_TEMPLATES = {
    "default": Path("chat_template.jinja"),
    "tool_use": Path("additional_chat_templates", "tool_use.jinja"),
}
# Model types whose tokenizer.json transformers 5 reads as it stands, whatever class a folder names
# (`models/auto/tokenization_auto.py`); others are brought to what the named class does.
AS_STORED = frozenset((
    "EvollaModel", "arctic", "aria", "beam", "bigbird_pegasus", "camembertv2-base", "canary",
    "chatlm", "cohere_asr", "ernie4_5", "ernie4_5_moe", "flex_olmo", "fuyu", "glm", "glm4",
    "glm4_moe", "glm4_moe_lite", "glm4v", "glm4v_moe", "glm_image", "glmasr", "got_ocr2",
    "gpt_bigcode", "gradium_phonon_tts", "granite", "granitemoe", "granitemoehybrid",
    "granitemoeshared", "h2ovl_chat", "hyperclovax", "hyperclovax_vlm", "internlm2", "internlm3",
    "iquestcoder", "jamba", "kimi_k25", "kimi_linear", "kosmos-2", "llava", "llava_next",
    "mimo_v2_flash", "minicpm3", "minicpm_ocr", "minicpmv", "minicpmv4_6", "minicpmv4_7",
    "minimax_m2", "ministral", "ministral3", "mistral", "mistral3", "mistral_large4", "mixtral",
    "modernbert", "modernbert-decoder", "molmo", "molmo2", "nemo_speechlm", "nemotron", "nvfp4",
    "nystromformer", "olmo2", "olmo3", "olmo_hybrid", "opencua", "openvla", "paddleocr_vl",
    "pegasus_x", "persimmon", "phi3", "phi3_v", "phimoe", "pix2struct", "pixtral", "pocket_tts",
    "smolvlm", "stablelm", "step3_vl", "umt5", "vipllava", "voxtral", "voxtral_realtime",
    "xlm-roberta-xl",
))  # fmt: skip


def folder_parts(folder: Path, end: str | None) -> dict[str, Any]:
    """Return what `Tokenizer` is made of; see `Tokenizer.from_pretrained`."""
    tokenizers_library()  # an error about it comes before one about the files
    config = _entries(folder, "tokenizer_config.json")
    older = _entries(folder, "special_tokens_map.json")
    # As in transformers, the older file goes before one that does not list the added tokens.
    entries = {**older, **config} if "added_tokens_decoder" in config else {**config, **older}
    named = {name: text_of(entries.get(f"{name}_token")) for name in _NAMES}
    stated = (folder / "tokenizer.json").is_file()
    if not stated and any((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        backend = _gpt2_backend(folder, entries)
        make_special(backend, [_END])
        if _END in control_tokens(backend):
            named |= {name: _END for name in ("bos", "eos", "unk") if named[name] is None}
    elif not stated and (folder / _PIECES).is_file():
        backend, own = _sentencepiece_backend(folder, entries)
        named |= {name: text for name, text in own.items() if named[name] is None}
    else:
        backend, stated = _backend(folder, entries), True
        if end in control_tokens(backend) and named["eos"] is None:
            named |= {name: end for name in ("bos", "eos", "unk") if named[name] is None}
    make_special(backend, special_texts(entries), add=True)
    frame = bool(entries.get("add_bos_token")), bool(entries.get("add_eos_token"))
    return {
        "backend": backend,
        **named,
        "stop_ids": stop_ids(folder),
        **dict(zip(("chat_template", "tool_template"), _templates(folder, entries), strict=True)),
        "others": {name: text for name in OTHERS if (text := text_of(entries.get(name)))},
        "frame": None if stated else frame,  # tokenizer.json states its own
    }


def _entries(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder / name) if (folder / name).is_file() else {}


def stop_ids(folder: Path) -> set[int]:
    """Return the ids that end a text, of a model folder's configurations."""
    config, generation = (_entries(folder, f"{name}config.json") for name in ("", "generation_"))
    return ids_in(config.get("eos_token_id")) | ids_in(generation.get("eos_token_id"))


def ids_in(stated: Any) -> set[int]:
    """Return the ids in one id, a list of them, or None."""
    return {i for i in (stated if isinstance(stated, list) else [stated]) if type(i) is int}


def _templates(folder: Path, entries: dict[str, Any]) -> tuple[str | None, str | None]:
    """Return the chat template, and the one for conversations with tools, if that is another."""
    stated = entries.get("chat_template")
    named = {"default": stated}
    if isinstance(stated, list):  # several, by name
        named = {each["name"]: each["template"] for each in stated}
    for name, path in _TEMPLATES.items():
        file = folder / path
        if not file.is_file():
            continue
        if leads_out(folder, file):
            raise ValueError(
                f"'{file}' must lie in its folder, found a link to somewhere else; put a copy "
                f"there: save would publish whatever it leads to"
            )
        if name == "default":
            named = {}
        named[name] = file.read_text(encoding="utf-8")
    return named.get("default"), named.get("tool_use")


def remove_templates(folder: Path, made: Path) -> None:
    """Remove an earlier tokenizer's templates from a folder, but those that `made` has anew."""
    for path in _TEMPLATES.values():
        if not (made / path).exists():
            (folder / path).unlink(missing_ok=True)


def _backend(folder: Path, entries: dict[str, Any]) -> Any:
    file = folder / "tokenizer.json"
    stored = read_json(file)  # a clear error where it is missing or no JSON
    try:
        backend = tokenizers_library().Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(
            f"'{file}' must describe a tokenizer, found: {one_line(error, 200)}"
        ) from error
    family = _entries(folder, "config.json").get("model_type")
    named = None if family in AS_STORED else entries.get("tokenizer_class")
    if named in _LLAMA and _prepends(stored.get("normalizer")):
        _begin_once(backend, entries)
    if named in _SPACED:
        backend = _spaced(folder, stored, backend, bool(entries.get("add_prefix_space")))
    _add(backend, folder, entries, file.name)
    return backend


def _spaced(folder: Path, stored: dict[str, Any], backend: Any, spaced: bool) -> Any:
    """Put a space before a text or not, as transformers' class does whatever the file says."""
    steps = stored.get("pre_tokenizer") or {}
    levels = [
        step
        for step in steps.get("pretokenizers", [steps])
        if isinstance(step, dict) and step.get("type") == "ByteLevel"
    ]
    if spaced and not levels:
        raise ValueError(
            f"'{folder}': add_prefix_space of tokenizer_config.json needs a ByteLevel "
            "pre-tokenizer in tokenizer.json, found none; leave it out"
        )
    if all(level["add_prefix_space"] == spaced for level in levels):
        return backend
    for level in levels:
        level["add_prefix_space"] = spaced
    return type(backend).from_str(json.dumps(stored))


def _prepends(normalizer: Any) -> bool:
    """Whether a space is put before every stretch of text between control tokens."""
    steps = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, dict) else []
    return any(isinstance(step, dict) and step.get("type") == "Prepend" for step in steps)


def _begin_once(backend: Any, entries: dict[str, Any]) -> None:
    """Put a space before the first stretch of text alone, as transformers' Llama class does."""
    never = entries.get("add_prefix_space") is False
    scheme = "always" if entries.get("legacy") else "first"
    sentencepiece.space(backend, "never" if never else scheme)


def _gpt2_backend(folder: Path, entries: dict[str, Any]) -> Any:
    """GPT-2's tokenizer from its two files; other models cut text differently over such files."""
    library = tokenizers_library()
    family = _entries(folder, "config.json").get("model_type")
    for stated, where in (
        (entries.get("tokenizer_class"), "tokenizer_config.json: tokenizer_class"),
        (family, "config.json: model_type"),
    ):
        if stated not in (None, "gpt2", "GPT2Tokenizer", "GPT2TokenizerFast"):
            raise ValueError(
                f"'{folder}' without tokenizer.json must be of GPT-2, found {stated!r} in {where}; "
                f"write tokenizer.json with transformers (AutoTokenizer, save_pretrained)"
            )
    if not (folder / "merges.txt").is_file():
        raise ValueError(f"'{folder}' must hold merges.txt beside vocab.json, found none")
    read_json(folder / "vocab.json")  # a clear error where it is missing or no JSON
    try:
        files = str(folder / "vocab.json"), str(folder / "merges.txt")
        backend = library.Tokenizer(library.models.BPE.from_file(*files))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(
            f"'{folder}': vocab.json and merges.txt must be a byte-level BPE, found: "
            f"{one_line(error, 200)}"
        ) from error
    spaced = bool(entries.get("add_prefix_space"))
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    backend.decoder = library.decoders.ByteLevel()
    _add(backend, folder, entries, "vocab.json")
    return backend


def _sentencepiece_backend(folder: Path, entries: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """A SentencePiece tokenizer, and the control tokens it names itself."""
    kind = entries.get("tokenizer_class")
    if kind not in (*_LLAMA, *_GEMMA, *_ANY):
        raise ValueError(
            f"'{folder}' without tokenizer.json must be of Llama or Gemma, found {short(kind)} in "
            f"tokenizer_config.json: tokenizer_class; write tokenizer.json with transformers "
            f"(AutoTokenizer, save_pretrained)"
        )
    pieces = sentencepiece.read_pieces(folder / _PIECES)
    backend = pieces.backend()
    if kind in _GEMMA:  # spaces are put as transformers' class does, else as SentencePiece does
        sentencepiece.gemma(backend)
    elif kind in _LLAMA:
        _begin_once(backend, entries)
        sentencepiece.unspace(backend, strip=entries.get("add_prefix_space") is not False)
    sentencepiece.add_typed(backend, pieces.tokens, pieces.types)
    _add(backend, folder, entries, _PIECES)
    return backend, pieces.named


def _add(backend: Any, folder: Path, entries: dict[str, Any], file: str) -> None:
    """Add the tokens that were added after training, under the ids that the files state."""
    library = tokenizers_library()
    for wanted, token in _added(folder, entries):
        known = file == "tokenizer.json" and backend.token_to_id(token["content"]) is not None
        if known and "special" not in token:
            continue  # of added_tokens.json, which does not say how it is matched
        backend.add_tokens([library.AddedToken(**token)])
        found = backend.token_to_id(token["content"])
        if found != wanted and not known:
            raise ValueError(
                f"'{folder}': added token {token['content']!r} must get the id {wanted} that the "
                f"files state, found {found}; {file} is of another model"
            )


def _added(folder: Path, entries: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Return the tokens added after training by their ids, as arguments of AddedToken."""
    found: dict[int, dict[str, Any]] = {}
    known = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        for text, i in _entries(folder, "added_tokens.json").items():
            found[int(i)] = {"content": str(text), "normalized": False}
        for i, token in (entries.get("added_tokens_decoder") or {}).items():
            found[int(i)] = {key: token[key] for key in known if key in token or key == "content"}
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        raise ValueError(
            f"'{folder}': added tokens must have whole numbers as ids and a content, found "
            f"otherwise ({one_line(error, 200)}); correct added_tokens.json"
        ) from None
    return sorted(found.items())
