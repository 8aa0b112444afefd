"""Vocabularies that begin each text with a space, and others of any make: transformers judges."""

import argparse
import inspect
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minilora.data import encode_prompt, read_data
from minilora.text import long_text
from minilora.text.foreign_tokenizer import as_tokenizer
from minilora.text.tokenizer import Tokenizer

LINES = inspect.getsource(argparse).splitlines()
LLAMA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + "
    "' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
SPECIALS = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _trained(model, trainer, **parts):
    backend = Backend(model)
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.train_from_iterator(LINES, trainer)
    return backend


def _spelled(model):
    """A trained model with a token for every byte, and the three control tokens."""
    stored = json.loads(model.to_str())
    vocab = stored["model"]["vocab"]
    vocab |= {each: len(vocab) + i for i, each in enumerate(b for b in BYTES if b not in vocab)}
    stored["model"] |= {"byte_fallback": True, "fuse_unk": True}
    return Backend.from_str(json.dumps(stored))


def _llama(scheme):
    """As Llama 2's file: by a normalizer, or by a pre-tokenizer (None: the older way)."""
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIALS, show_progress=False)
    space = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    backend = _spelled(_trained(models.BPE(unk_token="<unk>"), trainer, pre_tokenizer=space))
    if scheme is None:
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _unigram():
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
    )
    space = pre_tokenizers.Metaspace()
    return _trained(models.Unigram(), trainer, pre_tokenizer=space, decoder=decoders.Metaspace())


def _words():
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=SPECIALS, show_progress=False
    )
    return _trained(
        models.WordPiece(unk_token="<unk>"),
        trainer,
        pre_tokenizer=pre_tokenizers.Whitespace(),
        decoder=decoders.WordPiece(cleanup=False),
    )


def _bytes(spaced):
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return _trained(
        models.BPE(),
        trainer,
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=spaced),
        decoder=decoders.ByteLevel(),
        post_processor=processors.ByteLevel(trim_offsets=spaced),
    )


MAKES = {
    "llama, older file": lambda: _llama(None),
    "llama, first": lambda: _llama("first"),
    "llama, always": lambda: _llama("always"),
    "llama, never": lambda: _llama("never"),
    "unigram": _unigram,
    "words": _words,
    "bytes": lambda: _bytes(False),
    "bytes after a space": lambda: _bytes(True),
}
JOINING = ("llama, never", "bytes")
_made = {}


def made(name):
    """A backend of each kind, trained once, with `<s>` before a text."""
    if name not in _made:
        backend = MAKES[name]()
        backend.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIALS])
        if not name.startswith("bytes"):
            backend.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
            )
        _made[name] = backend.to_str()
    return Backend.from_str(_made[name])


def pair(name, template=None):
    """Ours, and transformers' as the judge."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=made(name), chat_template=template, **special)
    ours = Tokenizer(made(name), bos="<s>", eos="</s>", unk="<unk>", chat_template=template)
    return ours, theirs


texts = st.text(st.sampled_from("abc.(:\n  é🙂"), max_size=12) | st.sampled_from(LINES)


@pytest.mark.peers
@pytest.mark.parametrize("name", MAKES)
def test_joins_is_what_encoding_apart_shows(name):
    ours, _ = pair(name)
    assert ours.joins == (name in JOINING)


@pytest.mark.peers
@pytest.mark.parametrize("name", MAKES)
@settings(max_examples=40)
@given(prompt=texts, completion=texts.filter(str.strip))
def test_a_prompt_and_its_completion_are_encoded_as_one_text(name, prompt, completion):
    ours, theirs = pair(name)
    ((example,), report) = read_data(
        [{"prompt": prompt, "completion": completion}], ours, max_length=10**6
    )
    noted = any("begins inside a token of its prompt" in note for note in report.notes)
    ids, labels = list(example.input_ids), list(example.labels)
    if name in JOINING:  # as generation feeds the prompt
        apart = [theirs.encode(text, add_special_tokens=False) for text in (prompt, completion)]
        begin = encode_prompt(ours, "")
        assert ids == [*begin, *apart[0], *apart[1], ours.eos_id]
        assert labels == [-100] * len(begin + apart[0]) + [*apart[1], ours.eos_id]
        assert not noted
        return
    assert ids == [*theirs.encode(prompt + completion), ours.eos_id]
    learned = [i for i, label in enumerate(labels) if label >= 0]
    assert learned == list(range(learned[0], len(ids)))  # all from the first on
    spans = theirs(prompt + completion, return_offsets_mapping=True)["offset_mapping"]
    assert noted or not any(a < len(prompt) < b for a, b in spans)
    begun = len(prompt) or -1
    wanted = [i for i, (a, b) in enumerate(spans) if b > begun and ids[i] != ours.bos_id]
    assert learned == [*wanted, len(ids) - 1]


@pytest.mark.peers
@pytest.mark.parametrize("name", MAKES)
@settings(max_examples=40)
@given(prompt=texts.filter(lambda text: text.strip()), more=texts)
def test_generated_text_keeps_its_spaces(name, prompt, more):
    """Prompt and generated text together are what all the ids say."""
    ours, theirs = pair(name)
    whole = theirs.encode(prompt + more, add_special_tokens=False)
    for cut in range(1, len(whole)):
        said, all_of_it = (
            theirs.decode(ids, skip_special_tokens=True) for ids in (whole[:cut], whole)
        )
        if said.endswith("\ufffd") or not said.strip() or all_of_it.endswith("\ufffd"):
            continue
        assert said + ours.decode_after(whole[:cut], whole[cut:]) == all_of_it


@pytest.mark.parametrize("name", ["llama, first", "bytes"])
@settings(max_examples=60)
@given(text=texts, prompt=st.booleans())
def test_text_of_more_ids_begins_with_the_text_of_fewer(name, text, prompt):
    """Nothing is taken back, and no character is shown before its last byte is there."""
    ours, _ = pair(name)
    before = ours.encode("ab", special=False) if prompt else []
    ids = ours.encode("x" + text, special=False)
    shown = [ours.decode_after(before, ids[:n]) for n in range(len(ids) + 1)]
    assert all(b.startswith(a) for a, b in itertools.pairwise(shown))
    assert not any("\ufffd" in each for each in shown)


def test_a_replacement_character_that_was_written_is_kept():
    for name in ("llama, first", "bytes"):
        ours, _ = pair(name)
        ids = ours.encode("a\ufffd", special=False)
        assert ours.decode_after([], ids) == "a\ufffd"
        assert ours.decode_after(ids, ids[:-1]).rstrip() in ("a", " a".rstrip())


@pytest.mark.peers
@pytest.mark.parametrize("legacy", [None, False, True])
@pytest.mark.parametrize("kind", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_folders_of_llama_encode_behind_control_tokens_as_transformers(tmp_path, kind, legacy):
    """With the class's own rule no space is put behind `</s>`, whatever tokenizer.json says."""
    made("llama, older file").save(str(tmp_path / "tokenizer.json"))
    entries = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>"}
    entries |= {"unk_token": "<unk>"} | ({} if legacy is None else {"legacy": legacy})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(entries))
    ours, theirs = Tokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("[INST] hi [/INST] yes </s>[INST] so", "<s>a", "a b</s> c</s>", " a", *LINES[:40]):
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, special=False, parse_special=True) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    ours.save(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "x </s>y"
    assert again.encode(text) == theirs.encode(text)


@pytest.mark.peers
@pytest.mark.parametrize("name", MAKES)
def test_chats_encode_alike_whether_or_not_a_name_is_in_them(name):
    ours, theirs = pair(name, LLAMA)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}] * 2
    text = theirs.apply_chat_template(messages, tokenize=False)
    plain = ours.encode_chat(messages, add_generation_prompt=False)
    assert plain == theirs(text, add_special_tokens=False).input_ids
    messages[2] = {"role": "user", "content": "hi </s>"}
    named = ours.encode_chat(messages, add_generation_prompt=False)
    count = [ids.count(ours.eos_id) for ids in (plain, named)]
    assert count == [2, 2]
    end = plain.index(ours.eos_id)
    assert named[: end + 3] == plain[: end + 3]  # with the third token behind it
    assert named[-4:] == plain[-4:]


@pytest.mark.peers
@pytest.mark.parametrize("name", MAKES)
def test_long_texts_are_encoded_in_pieces_to_the_same_ids(monkeypatch, name):
    ours, theirs = pair(name)
    text = "\n".join(LINES[:400]).replace("self", "s🙂lf")
    wanted = theirs.encode(text, add_special_tokens=False)
    longest = []
    backend = ours._backend

    class Watched:
        def __getattr__(self, key):
            return getattr(backend, key)

        def encode(self, part, **options):
            longest.append(len(part))
            return backend.encode(part, **options)

    ours._backend = Watched()
    monkeypatch.setattr(long_text, "PIECE", 700)
    monkeypatch.setattr(long_text, "_BESIDE", 100)
    assert ours.encode(text, special=False) == wanted
    assert len(longest) > len(text) // 700 and max(longest) == 1000
    ends = [end for _, after in ours.pieces(text) for end in after]
    whole = theirs(text, return_offsets_mapping=True, add_special_tokens=False)
    assert ends == [after for _, after in whole["offset_mapping"]]
    assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize("name", ["llama, never", "bytes"])
def test_a_word_without_end_is_still_spelled(monkeypatch, name):
    ours, _ = pair(name)
    monkeypatch.setattr(long_text, "PIECE", 300)
    monkeypatch.setattr(long_text, "_BESIDE", 8)
    for word in ("ab" * 2000, "🙂" * 1000, "x" * 1999):
        assert ours.decode(ours.encode(word, special=False)) == word


# --- transformers' tokenizers in place of ours ----------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize("name", MAKES)
def test_tokenizers_of_transformers_are_taken(name):
    ours, theirs = pair(name, LLAMA)
    theirs.backend_tokenizer.enable_truncation(2)
    theirs.backend_tokenizer.enable_padding(length=9)
    messages = [{"role": "user", "content": "a </s> b"}, {"role": "assistant", "content": "c"}]
    records = [{"text": "d e f"}, {"prompt": "a:", "completion": " b"}, {"messages": messages}]
    assert read_data(records, theirs, max_length=99) == read_data(records, ours, max_length=99)
    assert encode_prompt(theirs, "a b") == encode_prompt(ours, "a b")
    assert as_tokenizer(ours) is ours
    assert theirs.encode("a</s>") == pair(name)[1].encode("a</s>")  # as before


def test_other_tokenizers_are_refused_with_the_line_that_converts_them():
    for tokenizer, message in (
        (
            made("bytes"),
            r"found Tokenizer; convert it by minilora.text.Tokenizer\(tok",
        ),
        (
            object(),
            r"found object; convert it by minilora.text.Tokenizer.from_p",
        ),
    ):
        with pytest.raises(TypeError, match=message):
            read_data([{"text": "ab"}], tokenizer, max_length=9)


def test_a_name_is_read_alike_beside_a_letter_that_is_unknown():
    """The letter's id is that of the name, which is text all the same."""
    tokens = [*SPECIALS, "\u2581", *"aunkb<>"]
    backend = Backend(models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.add_special_tokens(SPECIALS)
    ours = Tokenizer(backend, bos="<s>", eos="</s>", unk="<unk>")
    alone, beside = ours.encode("a<unk>b"), ours.encode("a<unk>b\u4e2d")
    assert beside == [*alone, 0]
