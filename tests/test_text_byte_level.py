"""GPT-2's tokenizer from vocab.json and merges.txt; transformers' GPT2Tokenizer judges."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text_tokenizer import _backend

from minilora.text.tokenizer import Tokenizer

NASTY = [
    "", " ", "  ", "\n", "\r\n\r\n", "\t \t", "a", " a", "  a  b   ", "don't we'll I'M they'Re",
    "x=1;y  =\t2\n\n\ndef f():\n    return", "0123456789 3.14 1,000,000", "naïve café Ünïcödé",
    "日本語のテキスト、漢字", "Привет, мир!", "مرحبا بالعالم", "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301",
    "\u00a0\u2003\u200b\ufeff",
    "\u0000\u0001\u007f\u0085\u2028", "#version: 0.2", "<|endoftext|>", "a<|endoftext|>b",
    " <|endoftext|> <think></think>", "<|endoftext", "Ġhello Ċ", "\\u0120 %s {} ''", "a" * 300,
]  # fmt: skip
# Files beside the two: tokenizer_config.json, added_tokens.json, config.json.
FOLDERS = {
    "bare": {},
    "gpt2": {"config.json": {"model_type": "gpt2"},
             "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 9}},
    "prefix space": {"tokenizer_config.json": {"add_prefix_space": True}},
    "framed": {"tokenizer_config.json": {"add_bos_token": True}},
    "named": {"special_tokens_map.json": {"eos_token": {"content": "<|im_end|>"},
                                          "pad_token": "<|im_start|>"}},
    "added": {"tokenizer_config.json": {"added_tokens_decoder": {
        "401": {"content": "<think>", "lstrip": False, "rstrip": True, "normalized": False,
                "special": False, "single_word": False},
        "400": {"content": "<new>", "lstrip": True, "rstrip": False, "normalized": False,
                "special": True, "single_word": False}}}},
    "added apart": {"added_tokens.json": {"<think>": 400}},
}  # fmt: skip


def written(folder, more=()):
    """Write GPT-2's two files, with the merges as OpenAI's begin, and others."""
    model = json.loads(_backend().to_str())["model"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "".join(f"{' '.join(pair)}\n" for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    for name, entries in dict(more).items():
        (folder / name).write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module", params=FOLDERS)
def pair(request, tmp_path_factory):
    """The same two files, read by us and by transformers."""
    transformers = pytest.importorskip("transformers")
    folder = written(tmp_path_factory.mktemp("gpt2"), FOLDERS[request.param])
    theirs = transformers.GPT2Tokenizer.from_pretrained(folder)
    return Tokenizer.from_pretrained(folder), theirs


@pytest.mark.peers
def test_two_files_encode_and_decode_as_transformers(pair):
    ours, theirs = pair
    for text in NASTY:
        ids = theirs.encode(text)
        assert ours.encode(text, parse_special=True) == ids, text
        plain = theirs.encode(text, split_special_tokens=True)
        assert ours.encode(text) == plain, text
        assert ours.decode(ids, skip_special=False) == theirs.decode(
            ids, clean_up_tokenization_spaces=False
        )


@pytest.mark.peers
@settings(max_examples=60)
@given(text=st.text(max_size=40))
def test_two_files_encode_any_text_as_transformers(pair, text):
    ours, theirs = pair
    ids = ours.encode(text, special=False)
    assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert ours.decode(ids).endswith(text)  # a space may stand before it


@pytest.mark.peers
def test_two_files_name_the_special_tokens_as_transformers(pair):
    ours, theirs = pair
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.pad_id == (theirs.eos_token_id if theirs.pad_token is None else theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)
    assert ours.eos_id in ours.stop_ids


@pytest.mark.peers
def test_save_after_two_files_writes_what_transformers_reads(pair, tmp_path):
    ours, theirs = pair
    transformers = pytest.importorskip("transformers")
    ours.save(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in NASTY:
        assert again.encode(text) == theirs.encode(text)
    assert again.eos_token == theirs.eos_token


def test_tokenizer_json_comes_first(tmp_path):
    folder = written(tmp_path)
    _backend(begin=True).save(str(folder / "tokenizer.json"))
    (folder / "merges.txt").write_text("nonsense")
    assert Tokenizer.from_pretrained(folder).encode("a")[0] == 1  # framed, as that file says


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "merges.txt").unlink(), "must hold merges.txt beside vocab.json, found no"),
        (lambda d: (d / "vocab.json").unlink(), "must hold vocab.json, found none"),
        (lambda d: (d / "vocab.json").write_text("[]"), "vocab.json' must hold a JSON object"),
        (lambda d: (d / "merges.txt").write_text("a b c\n"), "merges.txt must be a byte-level BPE"),
        (lambda d: (d / "merges.txt").write_text("日 本\n"), "merges.txt must be a byte-level BPE"),
        (lambda d: (d / "config.json").write_text('{"model_type": "roberta"}'),
         "must be of GPT-2, found 'roberta' in config.json: model_type; write tokenizer.json"),
        (lambda d: (d / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}'),
         "found 'CLIPTokenizer' in tokenizer_config.json: tokenizer_class"),
        (lambda d: (d / "added_tokens.json").write_text('{"<think>": 999}'),
         "added token '<think>' must get the id 999 that the files state, found 400"),
        (lambda d: (d / "added_tokens.json").write_text('{"<think>": "x"}'),
         "added tokens must have whole numbers as ids"),
        (lambda d: (d / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"9": 3}}'),
         "added tokens must have whole numbers as ids"),
        (lambda d: (d / "tokenizer_config.json").write_text('{"eos_token": "<gone>"}'),
         "eos_token must be in the vocabulary, found '<gone>'"),
    ],
)  # fmt: skip
def test_two_files_that_do_not_fit_are_refused(tmp_path, spoil, message):
    folder = written(tmp_path)
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(folder)
