"""Tokenizers of GGUF files: trained here, written with the gguf package, judged by transformers."""

import json

import gguf
import pytest
from tokenizer_lines import ODD, lines
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from minilora.loading.gguf_reader import read_gguf
from minilora.text.cuts import CUTS
from minilora.text.tokenizer import Tokenizer

LINES = lines()
CONTROL, USER = ["<s>", "</s>", "<|user|>", "<|end|>"], ["<think>", "</think>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# What transformers cuts by; the others' names it passes over.
THEIRS = ("gpt-2", "phi-2", "olmo", "llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx")
THEIRS += ("smaug-bpe", "qwen2", "deepseek-r1-qwen", "tekken", "gpt-4o", "llama4")
DIGITS = ("smollm", "starcoder", "refact", "command-r")


def _write(file, tokens, types, architecture="llama", **values):
    """Write a file that holds a vocabulary alone, and what a configuration needs."""
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in {"context_length": 64, "embedding_length": 32, "block_count": 1,
                       "feed_forward_length": 64, "attention.head_count": 2,
                       "attention.head_count_kv": 1, "rope.dimension_count": 16,
                       "vocab_size": len(tokens)}.items():  # fmt: skip
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in values.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
        add.get(type(value), writer.add_array)(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


_trained = {}


def byte_level():
    """Tokens, types and merges of a byte-level BPE, with control tokens and others behind."""
    if "bytes" not in _trained:
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(
            LINES,
            trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False),
        )
        stored = json.loads(backend.to_str())["model"]
        tokens = sorted(stored["vocab"], key=stored["vocab"].get)
        types = [1] * len(tokens) + [3] * len(CONTROL) + [4] * len(USER)
        _trained["bytes"] = tokens + CONTROL + USER, types, [" ".join(p) for p in stored["merges"]]
    return _trained["bytes"]


def bytes_file(file, pre, **values):
    tokens, types, merges = byte_level()
    end = tokens.index("</s>")
    values = {"bos_token_id": end - 1, "eos_token_id": end, **values}
    return _write(file, tokens, types, model="gpt2", pre=pre, merges=merges, **values)


def pieces(gemma=False):
    """Tokens, types and scores of a SentencePiece BPE, the best first; spaces are ▁."""
    if gemma not in _trained:
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=not gemma)
        backend.train_from_iterator(
            [*LINES, *["x" + " " * 8] * 9],
            trainers.BpeTrainer(vocab_size=1200, show_progress=False),
        )
        stored = json.loads(backend.to_str())["model"]
        letters = {t for t in stored["vocab"] if len(t) == 1}
        made = list(dict.fromkeys("".join(pair) for pair in stored["merges"]))
        head = ["<pad>", "</s>", "<s>", "<unk>"] if gemma else ["<unk>", "<s>", "</s>"]
        head += ["<|user|>", "<|end|>"]
        tokens = [*head, *BYTES, *USER, *made, *sorted(letters)]
        scores = [0.0] * (len(tokens) - len(made) - len(letters))
        scores += [-float(i) for i in range(len(made))] + [-1e4 - i for i in range(len(letters))]
        types = [2 if t == "<unk>" else 3 for t in head] + [6] * 256 + [4] * len(USER)
        types += [1] * (len(tokens) - len(types))
        if gemma:
            tokens = [" " * len(t) if len(t) > 1 and not t.strip("▁") else t for t in tokens]
        _trained[gemma] = tokens, types, scores
    return _trained[gemma]


def pieces_file(file, architecture, **values):
    tokens, types, scores = pieces(architecture.startswith("gemma"))
    ids = {"bos": "<s>", "eos": "</s>", "unknown": "<unk>"}
    values = {f"{key}_token_id": tokens.index(text) for key, text in ids.items()} | values
    return _write(file, tokens, types, architecture, model="llama", scores=scores, **values)


def pair(file):
    ours = Tokenizer.from_metadata(read_gguf(file).metadata)
    return ours, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def _same(ours, theirs):
    assert len(LINES) == 1000
    for line in LINES:
        assert ours.encode(line, parse_special=True) == theirs.encode(line), repr(line)
        plain = ours.encode(line, special=False)
        if any(name in line for name in CONTROL):  # transformers may read bos all the same
            assert not set(ours.control.values()) & set(plain), repr(line)
        else:
            assert plain == theirs.encode(line, add_special_tokens=False), repr(line)


@pytest.mark.peers
@pytest.mark.parametrize("pre", THEIRS)
def test_byte_level_files_encode_as_transformers(tmp_path, pre):
    ours, theirs = pair(bytes_file(tmp_path / "a.gguf", pre, add_bos_token=False))
    _same(ours, theirs)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)


@pytest.mark.parametrize("pre", DIGITS)
def test_digits_are_single_pieces(tmp_path, pre):
    """As in SmolLM's tokenizer.json: digits one by one, then GPT-2's cut."""
    ours = Tokenizer.from_metadata(read_gguf(bytes_file(tmp_path / "a.gguf", pre)).metadata)
    tokens, _, merges = byte_level()
    ids = {token: i for i, token in enumerate(tokens)}
    judge = Backend(models.BPE(ids, [tuple(merge.split()) for merge in merges]))
    judge.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for line in LINES:
        if not any(text in line for text in (*CONTROL, *USER)):
            assert ours.encode(line) == judge.encode(line).ids, repr(line)


def test_the_default_cut_parts_punctuation_and_groups_of_three_digits(tmp_path):
    pieces = ["a", " b", "=", "=", "1", "23", "456", " don", "'", "t"]
    ours = Tokenizer.from_metadata(read_gguf(bytes_file(tmp_path / "a.gguf", "default")).metadata)
    cut = ours._backend.pre_tokenizer
    found = [text.replace("Ġ", " ") for text, _ in cut.pre_tokenize_str("a b==123456 don't")]
    assert found == ["a", " b", "==", "123", "456", " don", "'", "t"] != pieces


@pytest.mark.parametrize("pre", [pre for pre, cut in CUTS.items() if cut.whole])
def test_a_token_that_merges_do_not_make_stays_whole(tmp_path, pre):
    tokens, types, merges = byte_level()
    word = next(merge for merge in merges[::-1] if not merge.startswith("Ġ"))
    values = {"model": "gpt2", "merges": [m for m in merges if m != word]}
    file = _write(tmp_path / "a.gguf", tokens, types, pre=pre, **values)
    text = word.replace(" ", "")
    ours = Tokenizer.from_metadata(read_gguf(file).metadata)
    assert ours.encode(text, special=False) == [tokens.index(text)]
    file = _write(tmp_path / "b.gguf", tokens, types, pre="gpt-2", **values)
    ours = Tokenizer.from_metadata(read_gguf(file).metadata)
    assert len(ours.encode(text, special=False)) > 1


@pytest.mark.peers
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma2", "gemma3"])
def test_sentencepiece_files_encode_as_transformers(tmp_path, architecture):
    ours, theirs = pair(pieces_file(tmp_path / "a.gguf", architecture))
    _same(ours, theirs)
    for line in LINES:
        ids = theirs.encode(line, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("make", "name", "begins"),
    [
        (bytes_file, "gpt-2", False),
        (bytes_file, "qwen2", False),
        (bytes_file, "llama-bpe", True),
        (bytes_file, "tekken", True),
        (pieces_file, "llama", True),
        (pieces_file, "gemma2", True),
    ],
)
def test_bos_and_eos_are_added_as_the_file_or_llama_cpp_says(tmp_path, make, name, begins):
    """Where the file is silent: llama.cpp, `llama-vocab.cpp`."""

    def frame(**values):
        tokenizer = Tokenizer.from_metadata(
            read_gguf(make(tmp_path / "a", name, **values)).metadata
        )
        ids = tokenizer.encode("a")
        return ids[0] == tokenizer.bos_id, ids[-1] == tokenizer.eos_id

    assert frame() == (begins, False)
    assert frame(add_bos_token=True) == (True, False)
    assert frame(add_bos_token=False, add_eos_token=True) == (False, True)


def test_a_file_may_say_that_no_space_is_put_before_a_text(tmp_path):
    file = pieces_file(tmp_path / "a.gguf", "llama", add_space_prefix=False)
    ours = Tokenizer.from_metadata(read_gguf(file).metadata)
    assert ours.decode(ours.encode("ab")) == "ab"
    tokens = pieces()[0]
    assert tokens[ours.encode("self", special=False)[0]][0] != "▁"
    plain = pieces_file(tmp_path / "b.gguf", "llama")
    ours = Tokenizer.from_metadata(read_gguf(plain).metadata)
    assert tokens[ours.encode("self", special=False)[0]][0] == "▁"


@pytest.mark.peers
@pytest.mark.parametrize("make", ["bytes", "pieces", "gemma"])
def test_save_writes_what_transformers_reads(tmp_path, make):
    if make == "bytes":
        file = bytes_file(tmp_path / "a.gguf", "qwen2")
    else:
        file = pieces_file(tmp_path / "a.gguf", "gemma2" if make == "gemma" else "llama")
    ours = Tokenizer.from_metadata(read_gguf(file).metadata)
    ours.save(tmp_path / "saved")
    _same(ours, AutoTokenizer.from_pretrained(tmp_path / "saved"))
    again = Tokenizer.from_pretrained(tmp_path / "saved")
    assert [again.encode(line) for line in ODD] == [ours.encode(line) for line in ODD]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "t5"}, "model must be 'gpt2' .* or 'llama' .*, found 't5', which is not built"),
        ({"model": "bert"}, "found 'bert', which is not built; read the tokenizer from a folder"),
        ({"model": "gpt2", "pre": "bloom"}, "pre must be one of gpt-2, .*, found 'bloom', which"),
        ({"model": "gpt2"}, "must state tokenizer.ggml.pre, found no such metadata"),
        ({"model": "llama"}, "must state tokenizer.ggml.scores, found no such metadata"),
        ({"model": "llama", "scores": [0.0]}, "scores must hold a number for each of 3 tokens"),
        ({"model": "llama", "scores": [0.0] * 3, "tokens": ["a", "a", "b"]}, "tokens must differ"),
    ],
)
def test_other_vocabularies_are_refused_by_name(values, message):
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_metadata({"tokenizer.ggml.tokens": ["a", "b", "c"], **metadata})
