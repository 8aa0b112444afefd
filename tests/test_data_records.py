"""Records: every bad line named, and labels that say exactly what is learned."""

import json
import re

import pytest
from byte_tokenizer import (
    BEGIN,
    CHATML,
    END,
    NAMES,
    STOP,
    byte_tokenizer,
    encode_one,
    pieces,
    talk,
    turn,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

import minilora
from minilora.data import (
    Encoding,
    Example,
    as_examples,
    encode_prompt,
    files_in,
    read_data,
    recognition,
    streamed,
)
from minilora.data.readers import READERS
from minilora.data.record_files import read_rows
from minilora.data.records import EncodeReport
from minilora.data.shapes import SHAPES, Shape
from minilora.loading.fetching import fetch
from minilora.loading.model import read_tokenizer

PLAIN = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


def write(folder, content, name="a.jsonl"):
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return file


def lines(*records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read(*files, skip_bad=0):
    """The records of files, as `read_data` sees them."""
    return [record for _, record in read_rows(files, Encoding(2, skip_bad=skip_bad))[0]]


RECORDS = [
    {"text": "héllo 🙂\n\twörld"},
    {"prompt": "", "completion": "b", "id": 7},
    {"prompt": "a", "completion": "b"},
    {"messages": talk("system", "user", "assistant", "user"), "source": {"any": [1, None]}},
]


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_files_reads_each_kind(tmp_path, ending, mark):
    content = mark + lines(*RECORDS).replace("\n", ending)
    assert read(write(tmp_path, content)) == RECORDS
    assert read(str(write(tmp_path, content.rstrip()))) == RECORDS


def test_files_keeps_the_order_of_files_and_lines(tmp_path):
    a = write(tmp_path, lines(*RECORDS[:2]), "a.jsonl")
    b = write(tmp_path, "plain", "b.txt")
    c = write(tmp_path, lines(RECORDS[2]), "c.jsonl")
    assert read(c, str(b), a) == [RECORDS[2], {"document": "plain"}, *RECORDS[:2]]


def test_files_ends_lines_at_newlines_only(tmp_path):
    """U+2028, U+2029, U+0085, vertical tabs and form feeds are text inside JSON."""
    text = "a\u2028b\u2029c\u0085d"
    content = '{"text": "' + text + '"}\n{"text": "x\\u000by\\fz\\r"}\n'
    assert len(content.splitlines()) > 2
    assert read(write(tmp_path, content)) == [{"text": text}, {"text": "x\vy\fz\r"}]


def test_files_skips_blank_lines_and_counts_them(tmp_path):
    content = "\n \t\r\n" + lines(RECORDS[0]) + "\r\n\n"
    assert read(write(tmp_path, content)) == [RECORDS[0]]
    with pytest.raises(ValueError, match=r"a\.jsonl:6: must be JSON"):
        read(write(tmp_path, content + "{"))


@settings(max_examples=50)
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=5))
def test_files_returns_any_text_that_was_written(tmp_path_factory, texts):
    records = [{"text": text} for text in texts]
    for ascii_only in (True, False):
        content = "\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records)
        file = write(tmp_path_factory.mktemp("any"), content)
        assert read(file) == records


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"one\ntwo\n", "one\ntwo\n"),
        (b"\xef\xbb\xbfone\r\ntwo\r\n", "one\ntwo\n"),
        (b"a\rb \xe2\x80\xa8 c\n\n", "a\rb \u2028 c\n\n"),
        (b'{"text": 1}', '{"text": 1}'),
    ],
)
def test_files_takes_a_text_file_as_one_document(tmp_path, raw, text):
    assert read(write(tmp_path, raw, "a.txt")) == [{"document": text}]


def test_files_says_each_reason_once_behind_its_places(tmp_path):
    good = json.dumps(RECORDS[0])
    a = write(tmp_path, "\n".join([good, "{", good, "[]", '{"text": ""}', "[1"]), "a.jsonl")
    b = write(tmp_path, good, "b.jsonl")
    c = write(tmp_path, good.encode() + b"\n\xff\n[]", "c.jsonl")
    with pytest.raises(ValueError) as caught:
        read(a, b, c)
    assert str(caught.value) == (
        f"cannot read the data: {a}:2: must be JSON: Expecting property name enclosed in double "
        f"quotes (column 2); {a}:4, {c}:3: a record must be an object, found list; {a}:5: text "
        f"must not be empty; {a}:6: must be JSON: Expecting ',' delimiter (column 3); {c}:2: must "
        "be UTF-8, found the byte ff (invalid start byte), which is 'ÿ' in Windows' cp1252; save "
        "it as UTF-8 (in Excel: CSV UTF-8); mend these rows, or leave them out with "
        "--skip-bad 6 (in Python: skip_bad=6)"
    )


@pytest.mark.parametrize(("count", "more"), [(10, ""), (11, " and 1 more"), (25, " and 15 more")])
def test_files_names_ten_lines_of_a_kind(tmp_path, count, more):
    file = write(tmp_path, '{"text": ""}\n' * count + '{"text": "a"}\n')
    places = f"{file}:1, 2, 3, 4, 5, 6, 7, 8, 9, 10{more}: text must not be empty; mend"
    with pytest.raises(ValueError, match=re.escape(f"cannot read the data: {places}")):
        read(file)


def test_files_counts_more_than_five_kinds(tmp_path):
    kinds = ["[]", "{", '{"text": ""}', '{"text": 1}', '{"prompt": ""}', '{"messages": 1}', "a"]
    with pytest.raises(ValueError, match="; and 3 other kinds of fault; mend"):
        read(write(tmp_path, "\n".join([*kinds, '{"text": "a"}'])))


def test_rows_that_are_all_bad_are_not_to_be_left_out(tmp_path):
    file = write(tmp_path, '{"text": ""}\n' * 3)
    with pytest.raises(ValueError, match="a.jsonl:1, 2, 3: text must not be empty$"):
        read(file)
    with pytest.raises(ValueError, match="record 0, record 1: text must not be empty$"):
        read_data([{"text": ""}] * 2, byte_tokenizer())
    with pytest.raises(ValueError, match="record 0: text must not be empty; mend"):
        read_data([{"text": ""}, {"text": "a"}], byte_tokenizer())


def test_files_leaves_out_as_many_bad_rows_as_are_allowed(tmp_path):
    good = json.dumps(RECORDS[0])
    file = write(tmp_path, "\n".join([good, '{"text": ""}', good, "{", good]))
    found, report = read_data(file, byte_tokenizer(), skip_bad=2)
    assert len(found) == report.documents == 3
    assert re.match(r"left out: .*:2: text must not be empty; .*:4: must", report.notes[0])
    with pytest.raises(ValueError, match=r"--skip-bad 2 \(in Python: skip_bad=2\)"):
        read_data(file, byte_tokenizer(), skip_bad=1)
    with pytest.warns(UserWarning, match="a bad row was left out"):
        stream = streamed([file], byte_tokenizer(), Encoding(2, skip_bad=2)).source
        assert [row for _, (_, row) in stream] == [RECORDS[0]] * 3
    assert [where[-2:] for _, (where, _) in stream] == [":1", ":3", ":5"]  # nothing is said again
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=":2: .*; .*:4: must be JSON"):
        list(streamed([file], byte_tokenizer(), Encoding(2, skip_bad=1)).source)
    for bad in (-1, 1.0, True):
        with pytest.raises(ValueError, match="skip_bad must be a whole number of at least 0"):
            read_data(file, byte_tokenizer(), skip_bad=bad)
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.jsonl: must hold text"):  # a file is no row
        read(file, tmp_path / "empty.jsonl", skip_bad=9)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_files_names_other_encodings_of_unicode(tmp_path, encoding, name):
    file = write(tmp_path, lines(RECORDS[0]).encode(encoding), name)
    named = encoding[:6].upper()
    message = f"cannot read the data: .*: must be UTF-8, found {named}; save it as UTF-8"
    with pytest.raises(ValueError, match=message):
        read(file)
    if name == "a.jsonl":
        with pytest.raises(ValueError, match=message):
            list(streamed([file], byte_tokenizer(), Encoding(2)).source)


CONTENT = [{"role": "user", "content": "a"}]
BAD_RECORDS = [
    ([1], "a record must be an object, found list"),
    ("text", "a record must be an object, found str"),
    (
        {},
        "must have text, document, prompt and completion, messages, question and answer, or "
        "input_ids, found nothing; say which is which, as in --map question=FIELD answer",
    ),
    ({"content": "a", "id": 1}, "or input_ids, found 'content, id'"),
    ({"prompt": "a"}, "or input_ids, found 'prompt'"),
    ({"completion": "a"}, "or input_ids, found 'completion'"),
    ({"text": "a", "completion": "b"}, "found 'text, completion'"),
    ({"text": "a", "messages": talk("user", "assistant")}, "found 'text, messages'"),
    ({"text": 3}, "text must be a string, found int"),
    ({"text": None}, "text must be a string, found null"),
    ({"text": ""}, "text must not be empty"),
    ({"prompt": "a", "completion": ""}, "completion must not be empty"),
    ({"prompt": {"a": 1}, "completion": "b"}, "prompt must be a string, found dict"),
    ({"messages": {}}, "messages must be a list of at least one message"),
    ({"messages": []}, "messages must be a list of at least one message"),
    ({"messages": [*CONTENT, "hi"]}, r"messages\[1\] must be an object, found str"),
    (
        {"messages": [*CONTENT, {"role": "bot", "content": "x"}]},
        r"messages\[1\]: role must be one of system, developer, user, assistant, tool, not 'bot'",
    ),
    ({"messages": [{"content": "x"}]}, r"messages\[0\]: role must be .*, not None"),
    ({"messages": [{"role": ["user"]}]}, r"messages\[0\]: role must be .*, not \['user'\]"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\]\.content must be a string, found null"),
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
    ({"text": "half \ud83d"}, "half a surrogate pair at character 5"),
    (
        {"messages": [{"role": "user", "content": "\udc00"}]},
        r"\]\.content must be text, found half",
    ),
    (
        {"messages": [*CONTENT, {"role": "assistant", "content": "b", "weight": 0.5}]},
        r"messages\[1\]\.weight must be 0 or 1, true or false, found 0\.5",
    ),
]


@pytest.mark.parametrize(("record", "message"), BAD_RECORDS)
def test_files_refuses_other_records_by_line(tmp_path, record, message):
    content = lines(RECORDS[0]) + json.dumps(record)  # surrogates escaped, as JSON may have them
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: .*{message}"):
        read(write(tmp_path, content))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"text": "a"', r"must be JSON: Expecting ',' delimiter \(column 13\)"),
        (b'{"text": "a", "text": "b"}', r"the key 'text' is given twice"),
        (b'{"text": "a"} {"text": "b"}', r"must be JSON: Extra data \(column 15\)"),
        (b'\xef\xbb\xbf{"text": "a"}', "must be JSON: Unexpected UTF-8 BOM"),
        (
            b'{"text": "\xfc"}',
            r"must be UTF-8, found the byte fc \(invalid start byte\), which is 'ü' in Windows' cp",
        ),
        (b'{"text": "\xed\xa0\xbd"}', r"found the byte ed \(invalid continuation byte"),
        (b"[" * 200_000, "maximum recursion depth|Stack overflow|too deep"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
    ],
)
def test_files_refuses_what_is_no_json_by_line(tmp_path, raw, message):
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: .*({message})"):
        read(write(tmp_path, b'{"text": "a"}\n' + raw + b"\n"))


@pytest.mark.parametrize("name", ["a.md", "jsonl", "a.gz", "a.jsonl.zip"])
def test_files_refuses_other_files(tmp_path, name):
    file = write(tmp_path, '{"text": "a"}', name)
    message = f"{re.escape(str(file))}: must be a file whose name ends in one of .jsonl, "
    with pytest.raises(ValueError, match=message):
        read(file)


def test_files_names_a_file_of_another_kind_by_how_it_begins(tmp_path):
    for content, found in (
        (b"PAR1....", "a Parquet file; let its name end in .parquet"),
        (b"\x1f\x8b\x08\0", "a compressed file; let its name end in .gz"),
        (b"PK\x03\x04", "a zip file or an Excel workbook; unzip it, or save the sheet as CSV"),
        (b"\xd0\xcf\x11\xe0", "an old Excel workbook; save the sheet as CSV UTF-8"),
    ):
        for name in ("a.csv", "a.jsonl", "a.txt"):
            message = rf"{name}: must be what its name says \({name[1:]}\), found {found}"
            with pytest.raises(ValueError, match=message):
                read(write(tmp_path, content, name))
    with pytest.raises(ValueError, match="or that and .gz.; save the sheet as CSV UTF-8"):
        read(write(tmp_path, b"PK", "a.xlsx"))


def test_files_refuses_a_folder_of_several_sets(tmp_path):
    for name in ("train-0.jsonl", "my_test.jsonl"):
        write(tmp_path, lines(RECORDS[0]), name)
    message = "found by their names test and training data .my_test.jsonl, train-0.jsonl.; name"
    with pytest.raises(ValueError, match=message):
        read_data(tmp_path, byte_tokenizer())
    (tmp_path / "my_test.jsonl").rename(tmp_path / "latest.jsonl")  # no word of its own
    assert len(read_data(tmp_path, byte_tokenizer())[0]) == 2


def test_files_refuses_a_folder_without_data(tmp_path):
    (tmp_path / "within" / "data").mkdir(parents=True)
    with pytest.raises(ValueError, match="found none; name one of its folders: data"):
        read_data(tmp_path / "within", byte_tokenizer())
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(ValueError, match=r"a\.txt: a folder must hold files of data .*found none"):
        read_data(tmp_path / "a.txt", byte_tokenizer())


@pytest.mark.parametrize("raw", [b"", b"\xef\xbb\xbf", b" \r\n\n\t"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_files_refuses_an_empty_file(tmp_path, raw, name):
    with pytest.raises(ValueError, match=rf"{name}: must hold text, found none"):
        read(write(tmp_path, raw, name))


def test_files_names_the_line_of_bad_text(tmp_path):
    file = write(tmp_path, b"\ntwo\nthr\xe9e\nfour", "a.txt")
    with pytest.raises(ValueError, match=r"a\.txt:3: must be UTF-8, found the byte e9"):
        read(file)


def test_files_of_a_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        read(tmp_path / "missing.txt")
    with pytest.raises(FileNotFoundError, match=r"found no file '.*missing.txt'$"):
        files_in([tmp_path / "missing.txt"])
    (tmp_path / "cafe.csv").write_text("text\na\n")
    with pytest.raises(
        FileNotFoundError, match=r"found no file '.*cafee.csv'; nearest: .*/cafe.csv$"
    ):
        files_in([tmp_path / "cafee.csv"])
    with pytest.raises(FileNotFoundError, match=r"found no file 'none/x.csv'$"):
        files_in(["none/x.csv"])


# --- encoding texts, prompts and completions ----------------------------------------------------

texts = st.text(st.sampled_from("ab <|>\n\té🙂"), min_size=1, max_size=12) | st.sampled_from(
    ["<|endoftext|>", "a<|im_end|>b", "<|begin|>"]
)
answers = texts.filter(str.strip)


@given(texts, texts | st.just(""), answers, st.booleans(), st.booleans(), st.booleans())
def test_read_data_learns_texts_and_completions(
    text, prompt, answer, begin, close, completion_only
):
    """Framed once, whatever the tokenizer puts around; names of control tokens stay text."""
    tokenizer = byte_tokenizer(begin=begin, close=close)
    first = [(BEGIN, True)] if begin else []
    found, _ = encode_one({"text": text}, tokenizer, completion_only=completion_only)
    assert found == pieces(*first, (text, True), (END, True))
    record = {"prompt": prompt, "completion": answer}
    found, _ = encode_one(record, tokenizer, completion_only=completion_only)
    own = not completion_only
    first = [(BEGIN, own)] if begin else []
    assert found == pieces(*first, (prompt, own), (answer, True), (END, True))


@given(texts | st.just(""), st.booleans(), st.booleans())
def test_encode_prompt_is_the_beginning_of_the_record(text, begin, close):
    """What generation feeds is what training saw before the completion; no end in between."""
    tokenizer = byte_tokenizer(begin=begin, close=close)
    prompt = encode_prompt(tokenizer, text)
    assert prompt == [BEGIN] * begin + list(text.encode("utf-8"))
    (ids, labels), _ = encode_one({"prompt": text, "completion": "x"}, tokenizer)
    assert ids == [*prompt, ord("x"), END]
    assert labels == [-100] * len(prompt) + [ord("x"), END]


def test_read_data_refuses_a_tokenizer_without_an_end():
    tokenizer = byte_tokenizer(CHATML, eos=None)
    for record in ({"text": "a"}, {"prompt": "a", "completion": "b"}):
        message = "record 1: the tokenizer must have an eos_id to end it with, found None"
        with pytest.raises(ValueError, match=message):
            read_data([{"messages": talk("user", "assistant")}, record], tokenizer, max_length=99)


# --- encoding conversations ---------------------------------------------------------------------

messages = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "system"]), answers), min_size=0, max_size=5
)


@given(st.sampled_from(["user", "system"]), texts, messages, answers, messages, st.booleans())
def test_read_data_learns_assistant_turns(role, text, before, answer, after, completion_only):
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


def test_an_answer_is_learned_behind_the_tokens_it_will_be_asked_with():
    """Encoded as one text, the prompt's last character and the answer's first were one token."""
    tokenizer = byte_tokenizer(PLAIN, merges=[(":", "x")])
    merged = tokenizer.encode(":x")
    assert len(merged) == 1 and merged[0] > STOP
    record = {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "xy"}]
    }
    found, _ = encode_one(record, tokenizer)
    assert found == pieces(("u", False), (merged[0], False), ("\na:", False), ("xy\n", True))
    asked = tokenizer.encode_chat(record["messages"][:1])
    assert found[0][: len(asked)] == asked and found[1][len(asked)] == ord("x")
    whole, _ = encode_one(record, tokenizer, completion_only=False)
    assert whole[0].count(merged[0]) == 2  # learned whole, it is one text


@pytest.mark.parametrize("talk", [True, False])
@pytest.mark.parametrize(("answer", "inside"), [("yes", True), (" yes", False)])
def test_an_answer_within_a_token_of_its_prompt_is_named(answer, inside, talk):
    """Where the vocabulary puts a space before each text, so that it is encoded as one."""
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
    record = {"messages": turns} if talk else {"prompt": "a:", "completion": answer}
    tokenizer = byte_tokenizer(PLAIN, merges=[(":", "y")])
    backend = tokenizer._backend
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    assert not tokenizer.joins
    notes = encode_one(record, tokenizer)[1].notes
    assert any("an answer begins inside a token of its prompt" in note for note in notes) == inside


@given(texts, answers, st.booleans())
def test_read_data_puts_prompts_through_the_chat_template(prompt, completion, only):
    tokenizer = byte_tokenizer(CHATML)
    record = {"prompt": prompt, "completion": completion}
    found, _ = encode_one(record, tokenizer, chat_prompts=True, completion_only=only)
    ids, labels = pieces(*turn("user", prompt, False), *turn("assistant", completion, True))
    assert found == (ids, labels if only else ids)
    asked = tokenizer.encode_chat([{"role": "user", "content": prompt}])
    assert ids[: len(asked)] == asked  # as generate(chat=True) asks


def test_read_data_with_chat_prompts_leaves_texts_alone():
    found, _ = encode_one({"text": "ab"}, byte_tokenizer(CHATML), chat_prompts=True)
    assert found == pieces(("ab", True), (END, True))


# --- token ids ----------------------------------------------------------------------------------


def test_read_data_takes_token_ids_as_they_are(tmp_path):
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 8], "source": "x"},
        {"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]},
        {"input_ids": [5, 6, 7]},
        {"input_ids": [5, 6], "labels": [5, -100]},
    ]
    found, report = read_data(write(tmp_path, lines(*rows)), byte_tokenizer(), max_length=3)
    assert found == as_examples(rows[:3]) and report.fully_masked == 1
    found, report = read_data(rows[:1], byte_tokenizer(), max_length=2)
    assert found == [Example((5, 6), (-100, 6))] and report.truncated == 1
    kept, _ = read_data([{"text": "ab", "input_ids": [1, 2]}], byte_tokenizer())
    assert kept == read_data([{"text": "ab"}], byte_tokenizer())[0]  # data sets keep both
    for bad, message in (
        ({"input_ids": [1, "a"]}, r"a\.jsonl:1: a row: input_ids must hold integers in one dimen"),
        ({"input_ids": [1, -1]}, "a row: input_ids must not be negative, found -1"),
        (
            {"input_ids": [1, 2, 3, 4], "seq_lengths": [2, 2]},
            "input_ids must be of one document, found 2; pack them with pack",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            read_data(write(tmp_path, lines(bad)), byte_tokenizer())


# --- documents ----------------------------------------------------------------------------------


def test_read_data_cuts_a_text_into_windows_that_share_a_token(tmp_path):
    a, b = write(tmp_path, "abcdefgh", "a.txt"), write(tmp_path, lines(RECORDS[2]))
    found, report = read_data([b, a], byte_tokenizer(), max_length=4)
    ids = [*b"abcdefgh", END]
    assert [list(e.input_ids) for e in found[1:]] == [ids[:4], ids[3:7], ids[6:]]
    assert all(example.labels == example.input_ids for example in found[1:])
    assert (report.documents, report.tokens, report.longest) == (2, 3 + 11, 4)
    assert report.learned_tokens == 2 + 8 and report.truncated == 0
    assert report.notes == (f"9 tokens in 3 windows of up to 4 ({a})",)
    assert read_data([{"document": "abcdefgh"}], byte_tokenizer(), max_length=4)[0] == found[1:]


def test_a_new_shape_and_a_new_kind_of_file_are_an_entry_each(monkeypatch, tmp_path):
    completion = next(shape for shape in SHAPES if "prompt" in shape.keys)

    def renamed(record):
        return {"prompt": record["asked"], "completion": record["told"]}

    asked = Shape(
        ("asked", "told"),
        lambda record: completion.check(renamed(record)),
        lambda encoder, record, name: completion.encode(encoder, renamed(record), name),
    )
    monkeypatch.setattr(recognition, "SHAPES", (*SHAPES, asked))
    monkeypatch.setitem(READERS, ".new", lambda file: (("", row) for row in json.load(file)))
    file = write(tmp_path, json.dumps([{"asked": "a", "told": "b"}]), "a.new")
    found, report = read_data(file, byte_tokenizer())
    assert found == read_data([RECORDS[2]], byte_tokenizer())[0]
    assert report.shapes == ("asked and told",)
    with pytest.raises(ValueError, match="or asked and told, found 'told'"):
        read_data([{"told": "b"}], byte_tokenizer())


def test_read_data_is_in_the_public_interface():
    assert minilora.read_data is read_data


# --- cutting and counting -----------------------------------------------------------------------

kinds = st.one_of(
    st.builds(lambda a: {"text": a}, texts),
    st.builds(lambda a, b: {"prompt": a, "completion": b}, texts | st.just(""), answers),
    st.builds(
        lambda a, b: {
            "messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
        },
        texts,
        answers,
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
def test_read_data_cuts_drops_and_counts(records, max_length):
    found, report = read_data(iter(records), byte_tokenizer(CHATML), max_length=max_length)
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
        notes=report.notes,
        shapes=report.shapes,
    )
    assert bool(report.notes) == any(name in str(record) for record in records for name in NAMES)


def test_encode_report_says_what_became_of_the_records():
    records = [
        {"prompt": "abcdef", "completion": "x"},  # cut within the prompt
        {"prompt": "ab", "completion": "xyz"},  # cut within the completion
        {"prompt": "a", "completion": "x"},
    ]
    found, report = read_data(records, byte_tokenizer(), max_length=4)
    assert [list(example.labels) for example in found] == [
        [-100, -100, *b"xy"],
        [-100, *b"x", END],
    ]
    assert str(report) == (
        "2 of 3 documents kept (prompt and completion): 7 tokens, 4 learned; 2 truncated (the "
        "longest had 8), 1 dropped with nothing left to learn"
    )


@pytest.mark.parametrize("length", [1, 0, -5])
def test_read_data_refuses_a_length_that_leaves_nothing(length):
    with pytest.raises(ValueError, match=f"max_length must be at least 2, found {length}"):
        read_data([{"text": "ab"}], byte_tokenizer(), max_length=length)


@pytest.mark.parametrize(("record", "message"), BAD_RECORDS)
def test_read_data_refuses_other_records_by_index(record, message):
    with pytest.raises(ValueError, match=f"cannot encode the records: record 1: .*{message}"):
        read_data([{"text": "a"}, record], byte_tokenizer(CHATML), max_length=9)


def test_read_data_names_all_bad_records_at_once():
    records = [{"text": ""}, {"text": "a"}] * 12
    places = ", ".join(f"record {i}" for i in range(0, 20, 2))
    with pytest.raises(ValueError, match=f": {places} and 2 more: text must not be empty; mend"):
        read_data(records, byte_tokenizer(), max_length=9)
    found, report = read_data(records, byte_tokenizer(), max_length=9, skip_bad=12)
    assert len(found) == report.documents == 12
    assert report.notes == (f"left out: {places} and 2 more: text must not be empty",)


# --- the real SmolLM2 ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm():
    return read_tokenizer(fetch("smollm2-135m"))


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


@pytest.mark.parametrize("system", [False, True])
def test_the_templates_own_text_is_recognized_where_it_begins_with_words(system):
    """As Zephyr's and TinyLlama's do, whose only control token ends a turn."""
    template = "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer = byte_tokenizer(template)
    talk = [{"role": "system", "content": "Be brief."}] * system
    talk += [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    text = tokenizer.render(talk, add_generation_prompt=False)
    (row,), _ = read_data([{"text": text}], tokenizer)
    assert list(row.input_ids) == tokenizer.encode(text, special=False, parse_special=True)
    (row,), _ = read_data([{"text": f"a {text}"}], tokenizer)
    assert tokenizer.control["<|im_end|>"] not in row.input_ids[:-1]
