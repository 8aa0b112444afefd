"""Records: every bad line named, and labels that say exactly what is learned."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from minilora.data import Example
from minilora.models import Tokenizer, fetch
from minilora.records import EncodeReport, encode_prompt, encode_records, read_records

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
END, BEGIN, START, STOP = 256, 257, 258, 259
NAMES = {"<|endoftext|>": END, "<|begin|>": BEGIN, "<|im_start|>": START, "<|im_end|>": STOP}


def byte_tokenizer(template=None, begin=False, eos="<|endoftext|>", merges=(), close=False):
    """A token per byte, in order of GPT-2's alphabet, four control tokens, and the merges."""
    letters = [*ALPHABET.values(), *NAMES, *("".join(pair) for pair in merges)]
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(letters)}, [*merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in NAMES])
    if begin or close:
        frame = ["<|begin|>"] * begin + ["$A"] + ["<|endoftext|>"] * close
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(frame), special_tokens=[("<|begin|>", BEGIN), ("<|endoftext|>", END)]
        )
    return Tokenizer(backend, bos="<|begin|>", eos=eos, chat_template=template)


def _alphabet():
    """GPT-2's printable stand-in for each byte (Radford et al. 2019, encoder.py)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {
        **{byte: chr(byte) for byte in shown},
        **{b: chr(256 + i) for i, b in enumerate(hidden)},
    }


ALPHABET = dict(sorted(_alphabet().items()))


def pieces(*parts):
    """The oracle: ids and labels of (what, learned) pairs; what is text or a control token's id."""
    ids, labels = [], []
    for what, learned in parts:
        found = [what] if isinstance(what, int) else list(what.encode("utf-8"))
        ids += found
        labels += found if learned else [-100] * len(found)
    return ids, labels


def turn(role, content, learned):
    """One ChatML turn; of a learned one the content and the marker that ends it."""
    return [
        (START, False),
        (f"{role}\n", False),
        (content, learned),
        (STOP, learned),
        ("\n", learned),
    ]


def encode_one(record, tokenizer, **options):
    """The ids and labels of the only record, and the report."""
    ((example,), report) = encode_records([record], tokenizer, **{"max_length": 10**6, **options})
    return (list(example.input_ids), list(example.labels)), report


def write(folder, content, name="a.jsonl"):
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return file


def lines(*records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def talk(*roles):
    return [{"role": role, "content": f"{i}"} for i, role in enumerate(roles)]


KINDS = [
    {"text": "héllo 🙂\n\twörld"},
    {"prompt": "", "completion": "b", "id": 7},
    {"prompt": "a", "completion": "b"},
    {"messages": talk("system", "user", "assistant", "user"), "source": {"any": [1, None]}},
]


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_read_records_reads_each_kind(tmp_path, ending, mark):
    content = mark + lines(*KINDS).replace("\n", ending)
    assert read_records(write(tmp_path, content)) == KINDS
    assert read_records(str(write(tmp_path, content.rstrip()))) == KINDS


def test_read_records_keeps_the_order_of_files_and_lines(tmp_path):
    a = write(tmp_path, lines(*KINDS[:2]), "a.jsonl")
    b = write(tmp_path, "plain", "b.txt")
    c = write(tmp_path, lines(KINDS[2]), "c.jsonl")
    assert read_records([c, str(b), a]) == [KINDS[2], {"text": "plain"}, *KINDS[:2]]


def test_read_records_ends_lines_at_newlines_only(tmp_path):
    """U+2028, U+2029, U+0085, vertical tabs and form feeds are text inside JSON."""
    text = "a\u2028b\u2029c\u0085d"
    content = '{"text": "' + text + '"}\n{"text": "x\\u000by\\fz\\r"}\n'
    assert len(content.splitlines()) > 2
    assert read_records(write(tmp_path, content)) == [{"text": text}, {"text": "x\vy\fz\r"}]


def test_read_records_skips_blank_lines_and_counts_them(tmp_path):
    content = "\n \t\r\n" + lines(KINDS[0]) + "\r\n\n"
    assert read_records(write(tmp_path, content)) == [KINDS[0]]
    with pytest.raises(ValueError, match=r"a\.jsonl:6: must be JSON"):
        read_records(write(tmp_path, content + "{"))


@settings(max_examples=50)
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=5))
def test_read_records_returns_any_text_that_was_written(tmp_path_factory, texts):
    records = [{"text": text} for text in texts]
    for ascii_only in (True, False):
        content = "\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records)
        file = write(tmp_path_factory.mktemp("any"), content)
        assert read_records(file) == records


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"one\ntwo\n", "one\ntwo\n"),
        (b"\xef\xbb\xbfone\r\ntwo\r\n", "one\ntwo\n"),
        (b"a\rb \xe2\x80\xa8 c\n\n", "a\rb \u2028 c\n\n"),
        (b'{"text": 1}', '{"text": 1}'),
    ],
)
def test_read_records_takes_a_text_file_as_one_document(tmp_path, raw, text):
    assert read_records(write(tmp_path, raw, "a.txt")) == [{"text": text}]


def test_read_records_names_every_bad_line(tmp_path):
    good = json.dumps(KINDS[0])
    a = write(tmp_path, "\n".join([good, "{", good, "[]", '{"text": ""}']), "a.jsonl")
    b = write(tmp_path, good, "b.jsonl")
    c = write(tmp_path, good.encode() + b"\n\xff\n", "c.jsonl")
    with pytest.raises(ValueError) as caught:
        read_records([a, b, c])
    head, *problems = str(caught.value).split("\n  ")
    assert head == "cannot read the data:"
    assert [problem.split(" ")[0] for problem in problems] == [
        f"{a}:2:",
        f"{a}:4:",
        f"{a}:5:",
        f"{c}:2:",
    ]


@pytest.mark.parametrize(("count", "more"), [(10, None), (11, "and 1 more"), (25, "and 15 more")])
def test_read_records_lists_ten_problems_in_full(tmp_path, count, more):
    file = write(tmp_path, "{\n" * count)
    with pytest.raises(ValueError, match="cannot read the data") as caught:
        read_records(file)
    found = str(caught.value).split("\n  ")[1:]
    assert [problem.split(" ")[0] for problem in found[:10]] == [
        f"{file}:{i}:" for i in range(1, 11)
    ]
    assert found[10:] == ([] if more is None else [more])


CONTENT = [{"role": "user", "content": "a"}]
BAD_RECORDS = [
    ([1], "a record must be an object, found list"),
    ("text", "a record must be an object, found str"),
    (
        {},
        'a record must have "text", or "prompt" and "completion", or "messages", found nothing',
    ),
    ({"content": "a", "id": 1}, 'or "messages", found content, id'),
    ({"prompt": "a"}, 'or "messages", found prompt'),
    ({"completion": "a"}, 'or "messages", found completion'),
    ({"text": "a", "completion": "b"}, "found text, completion"),
    ({"text": "a", "messages": talk("user", "assistant")}, "found text, messages"),
    ({"text": 3}, "text must be a string, found int"),
    ({"text": None}, "text must be a string, found NoneType"),
    ({"text": ""}, "text must not be empty"),
    ({"prompt": "a", "completion": ""}, "completion must not be empty"),
    ({"prompt": ["a"], "completion": "b"}, "prompt must be a string, found list"),
    ({"messages": {}}, "messages must be a list of at least one message"),
    ({"messages": []}, "messages must be a list of at least one message"),
    ({"messages": [*CONTENT, "hi"]}, r"messages\[1\] must be an object, found str"),
    (
        {"messages": [*CONTENT, {"role": "tool", "content": "x"}]},
        r"messages\[1\]: role must be one of system, user, assistant, not 'tool'",
    ),
    ({"messages": [{"content": "x"}]}, r"messages\[0\]: role must be .*, not None"),
    ({"messages": [{"role": ["user"]}]}, r"messages\[0\]: role must be .*, not \['user'\]"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\]\.content must be a string, found None"),
    (
        {"messages": [*CONTENT, {"role": "assistant", "content": ""}]},
        r"messages\[1\]\.content must not be empty",
    ),
    (
        {"messages": talk("assistant", "user", "assistant")},
        "messages must begin with a system or user message, found assistant",
    ),
    (
        {"messages": talk("system", "user")},
        "messages must hold an assistant message, found none",
    ),
    ({"text": "half \ud83d"}, "surrogates not allowed"),
    ({"messages": [{"role": "user", "content": "\udc00"}]}, "surrogates not allowed"),
]


@pytest.mark.parametrize(("record", "message"), BAD_RECORDS)
def test_read_records_refuses_other_records_by_line(tmp_path, record, message):
    content = lines(KINDS[0]) + json.dumps(record)  # surrogates escaped, as JSON may have them
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: .*{message}"):
        read_records(write(tmp_path, content))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"text": "a"', r"must be JSON: Expecting ',' delimiter \(column 13\)"),
        (b'{"text": "a"} {"text": "b"}', r"must be JSON: Extra data \(column 15\)"),
        (b'\xef\xbb\xbf{"text": "a"}', "must be JSON: Unexpected UTF-8 BOM"),
        (b'{"text": "\xff"}', "must be UTF-8: invalid start byte"),
        (b'{"text": "\xed\xa0\xbd"}', "must be UTF-8: invalid continuation byte"),
        (b"[" * 200_000, "maximum recursion depth|Stack overflow|too deep"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
    ],
)
def test_read_records_refuses_what_is_no_json_by_line(tmp_path, raw, message):
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: .*({message})"):
        read_records(write(tmp_path, b'{"text": "a"}\n' + raw + b"\n"))


@pytest.mark.parametrize("name", ["a.json", "a.JSONL", "jsonl", "a.txt.gz"])
def test_read_records_refuses_other_files(tmp_path, name):
    file = write(tmp_path, '{"text": "a"}', name)
    message = f"{re.escape(str(file))}: must be a file whose name ends in .jsonl or .txt"
    with pytest.raises(ValueError, match=message):
        read_records(file)


def test_read_records_refuses_a_folder(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(ValueError, match=r"a\.txt: must be a file whose name ends in"):
        read_records(tmp_path / "a.txt")


@pytest.mark.parametrize("raw", [b"", b"\xef\xbb\xbf", b" \r\n\n\t"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_read_records_refuses_an_empty_file(tmp_path, raw, name):
    with pytest.raises(ValueError, match=rf"{name}: must hold text, found none"):
        read_records(write(tmp_path, raw, name))


def test_read_records_names_the_line_of_bad_text(tmp_path):
    file = write(tmp_path, b"\ntwo\nthr\xe9e\nfour", "a.txt")
    with pytest.raises(ValueError, match=r"a\.txt:3: must be UTF-8: invalid continuation byte"):
        read_records(file)


def test_read_records_refuses_no_files():
    with pytest.raises(ValueError, match="paths must name at least one file, found none"):
        read_records([])


def test_read_records_of_a_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        read_records(tmp_path / "missing.txt")


# --- encoding texts, prompts and completions ----------------------------------------------------

texts = st.text(st.sampled_from("ab <|>\n\té🙂"), min_size=1, max_size=12) | st.sampled_from(
    ["<|endoftext|>", "a<|im_end|>b", "<|begin|>"]
)


@given(texts, texts | st.just(""), st.booleans(), st.booleans(), st.booleans())
def test_encode_records_learns_texts_and_completions(text, prompt, begin, close, completion_only):
    """Framed once, whatever the tokenizer puts around; names of control tokens stay text."""
    tokenizer = byte_tokenizer(begin=begin, close=close)
    first = [(BEGIN, True)] if begin else []
    found, _ = encode_one({"text": text}, tokenizer, completion_only=completion_only)
    assert found == pieces(*first, (text, True), (END, True))
    record = {"prompt": prompt, "completion": text}
    found, _ = encode_one(record, tokenizer, completion_only=completion_only)
    own = not completion_only
    first = [(BEGIN, own)] if begin else []
    assert found == pieces(*first, (prompt, own), (text, True), (END, True))


@given(texts | st.just(""), st.booleans(), st.booleans())
def test_encode_prompt_is_the_beginning_of_the_record(text, begin, close):
    """What generation feeds is what training saw before the completion; no end in between."""
    tokenizer = byte_tokenizer(begin=begin, close=close)
    prompt = encode_prompt(tokenizer, text)
    assert prompt == [BEGIN] * begin + list(text.encode("utf-8"))
    (ids, labels), _ = encode_one({"prompt": text, "completion": "x"}, tokenizer)
    assert ids == [*prompt, ord("x"), END]
    assert labels == [-100] * len(prompt) + [ord("x"), END]


def test_encode_records_refuses_a_tokenizer_without_an_end():
    tokenizer = byte_tokenizer(CHATML, eos=None)
    for record in ({"text": "a"}, {"prompt": "a", "completion": "b"}):
        message = "record 1: the tokenizer must have an eos_id to end it with, found None"
        with pytest.raises(ValueError, match=message):
            encode_records(
                [{"messages": talk("user", "assistant")}, record], tokenizer, max_length=99
            )


# --- encoding conversations ---------------------------------------------------------------------

messages = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "system"]), texts), min_size=0, max_size=5
)


@given(st.sampled_from(["user", "system"]), texts, messages, texts, messages, st.booleans())
def test_encode_records_learns_assistant_turns(role, text, before, answer, after, completion_only):
    turns = [(role, text), *before, ("assistant", answer), *after]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    tokenizer = byte_tokenizer(CHATML, begin=True, eos=None)
    found, _ = encode_one(record, tokenizer, completion_only=completion_only)
    if completion_only:  # what follows the last assistant turn is left out
        last = max(i for i, (role, _) in enumerate(turns) if role == "assistant")
        turns = turns[: last + 1]
    parts = [turn(role, content, role == "assistant") for role, content in turns]
    ids, labels = pieces(*(part for each in parts for part in each))
    assert found == (ids, labels if completion_only else ids)


def test_encode_records_learns_a_token_that_straddles_the_start():
    """A token of the prompt's last character and the answer's first is the answer's."""
    tokenizer = byte_tokenizer(PLAIN, merges=[(":", "x")])
    merged = tokenizer.encode(":x")
    assert len(merged) == 1 and merged[0] > STOP
    record = {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "xy"}]
    }
    found, _ = encode_one(record, tokenizer)
    assert found == pieces(
        ("u", False), (merged[0], False), ("\na", False), (merged[0], True), ("y\n", True)
    )


@given(texts, texts, st.booleans())
def test_encode_records_puts_prompts_through_the_chat_template(prompt, completion, only):
    tokenizer = byte_tokenizer(CHATML)
    record = {"prompt": prompt, "completion": completion}
    found, _ = encode_one(record, tokenizer, chat_prompts=True, completion_only=only)
    ids, labels = pieces(*turn("user", prompt, False), *turn("assistant", completion, True))
    assert found == (ids, labels if only else ids)
    asked = tokenizer.encode_chat([{"role": "user", "content": prompt}])
    assert ids[: len(asked)] == asked  # as generate(chat=True) asks


def test_encode_records_with_chat_prompts_leaves_texts_alone():
    found, _ = encode_one({"text": "ab"}, byte_tokenizer(CHATML), chat_prompts=True)
    assert found == pieces(("ab", True), (END, True))


REWRITING = {
    "the history changes": "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}"
    "{{ m['content'] }}{% endif %};{% endfor %}",
    "the prompt is no prefix": "{% for m in messages %}{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}<think>{% endif %}",
}


@pytest.mark.parametrize("template", REWRITING)
def test_encode_records_refuses_a_template_that_rewrites(template):
    tokenizer = byte_tokenizer(REWRITING[template])
    record = {"messages": talk("user", "assistant", "user", "assistant")}
    turn = 3 if template == "the history changes" else 1
    message = (
        rf"record 1, messages\[{turn}\]: the chat template must write a conversation as a prefix "
        "of its continuation, found that a later turn changes an earlier one; pass "
        "completion_only=False or use another template"
    )
    with pytest.raises(ValueError, match=message):
        encode_records([{"text": "a"}, record], tokenizer, max_length=99)
    whole, _ = encode_one(record, tokenizer, completion_only=False)
    assert (
        whole[0]
        == whole[1]
        == tokenizer.encode_chat(record["messages"], add_generation_prompt=False)
    )


# --- cutting and counting -----------------------------------------------------------------------

kinds = st.one_of(
    st.builds(lambda a: {"text": a}, texts),
    st.builds(lambda a, b: {"prompt": a, "completion": b}, texts | st.just(""), texts),
    st.builds(
        lambda a, b: {
            "messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
        },
        texts,
        texts,
    ),
)


def whole(record):
    """The oracle of a whole record."""
    if "text" in record:
        return pieces((record["text"], True), (END, True))
    if "prompt" in record:
        return pieces((record["prompt"], False), (record["completion"], True), (END, True))
    asked, answer = (message["content"] for message in record["messages"])
    return pieces(*turn("user", asked, False), *turn("assistant", answer, True))


@given(st.lists(kinds, max_size=6), st.integers(2, 40))
def test_encode_records_cuts_drops_and_counts(records, max_length):
    found, report = encode_records(iter(records), byte_tokenizer(CHATML), max_length=max_length)
    full = [whole(record) for record in records]
    cut = [(ids[:max_length], labels[:max_length]) for ids, labels in full]
    kept = [(ids, labels) for ids, labels in cut if any(label >= 0 for label in labels[1:])]
    assert [(list(example.input_ids), list(example.labels)) for example in found] == kept
    assert all(type(example) is Example for example in found)
    assert report == EncodeReport(
        documents=len(records),
        tokens=sum(len(ids) for ids, _ in kept),
        learned_tokens=sum(label >= 0 for _, labels in kept for label in labels[1:]),
        truncated=sum(len(ids) > max_length for ids, _ in full),
        fully_masked=len(records) - len(kept),
        longest=max((len(ids) for ids, _ in full), default=0),
    )


def test_encode_report_says_what_became_of_the_records():
    records = [
        {"prompt": "abcdef", "completion": "x"},  # cut within the prompt
        {"prompt": "ab", "completion": "xyz"},  # cut within the completion
        {"prompt": "a", "completion": "x"},
    ]
    found, report = encode_records(records, byte_tokenizer(), max_length=4)
    assert [list(example.labels) for example in found] == [
        [-100, -100, *b"xy"],
        [-100, *b"x", END],
    ]
    assert str(report) == (
        "2 of 3 documents kept: 7 tokens, 4 learned; 2 truncated (the longest had 8), "
        "1 dropped with nothing left to learn"
    )


@pytest.mark.parametrize("length", [1, 0, -5])
def test_encode_records_refuses_a_length_that_leaves_nothing(length):
    with pytest.raises(ValueError, match=f"max_length must be at least 2, found {length}"):
        encode_records([{"text": "ab"}], byte_tokenizer(), max_length=length)


@pytest.mark.parametrize(("record", "message"), BAD_RECORDS)
def test_encode_records_refuses_other_records_by_index(record, message):
    with pytest.raises(ValueError, match=f"cannot encode the records:\n  record 1: .*{message}"):
        encode_records([{"text": "a"}, record], byte_tokenizer(CHATML), max_length=9)


def test_encode_records_names_all_bad_records_at_once():
    records = [{"text": ""}, {"text": "a"}] * 12
    with pytest.raises(ValueError, match="\n  and 2 more$") as caught:
        encode_records(records, byte_tokenizer(), max_length=9)
    for i in range(0, 20, 2):
        assert f"record {i}: text must not be empty" in str(caught.value)


# --- the real SmolLM2 ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm():
    return Tokenizer.from_gguf(fetch("smollm2-135m"))


@pytest.mark.real_model
def test_smollm_learns_the_answers_alone(smollm):
    talk = [
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": " Five.\n\nBecause <|im_end|> is text: 2+3."},
        {"role": "user", "content": "And 12*12?"},
        {"role": "assistant", "content": "144 🙂"},
        {"role": "user", "content": "Thanks"},
    ]
    (ids, labels), report = encode_one({"messages": talk}, smollm)
    assert ids == smollm.encode_chat(talk[:4], add_generation_prompt=False)
    assert report.truncated == report.fully_masked == 0
    assert report.learned_tokens == sum(label != -100 for label in labels)
    runs, last = [], None
    for t, label in enumerate(labels):
        if label != -100:
            assert label == ids[t]
            if last != t - 1:
                runs.append([])
            runs[-1].append(label)
            last = t
    shown = [smollm.decode(run, skip_special=False) for run in runs]
    assert shown == [f"{talk[i]['content']}<|im_end|>\n" for i in (1, 3)]
    assert [run.count(smollm.eos_id) for run in runs] == [1, 1]
    asked = smollm.encode_chat(talk[:1])
    assert labels[: len(asked)] == [-100] * len(asked)
    assert ids[: len(asked)] == asked
    assert labels[len(asked)] != -100


@pytest.mark.real_model
def test_smollm_learns_completions_to_the_end(smollm):
    record = {"prompt": "def f(x):\n", "completion": '    """Return x."""'}
    (ids, labels), _ = encode_one(record, smollm)
    prompt = smollm.encode(record["prompt"])
    assert ids[: len(prompt)] == prompt
    assert labels == [-100] * len(prompt) + ids[len(prompt) :]
    shown = smollm.decode(labels[len(prompt) :], skip_special=False)
    assert shown == record["completion"] + "<|im_end|>"
