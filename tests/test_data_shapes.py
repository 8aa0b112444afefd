"""Records as other programs write them, and the kinds of file they come in: equal to our own."""

import csv
import gzip
import io
import json
import re
from pathlib import Path

import pytest
from byte_tokenizer import CHATML, byte_tokenizer, talk
from hypothesis import given
from hypothesis import strategies as st

from minilora.data import DataFiles, Encoding, Stream, read_data, streamed
from minilora.data.docstrings import SPLITS, built_in, docstring_rows
from minilora.data.foreign_shapes import FOREIGN
from minilora.data.record_files import check_streamed, files_in

ASKED = [{"role": "user", "content": "hi"}]
TALK = [*ASKED, {"role": "assistant", "content": "hello"}]
SYSTEM = {"role": "system", "content": "Be brief."}


def learned(record, template=CHATML, **options):
    """The examples of a record, and what is said of it."""
    examples, report = read_data([record], byte_tokenizer(template), **options)
    return examples, report.notes


FOREIGN_RECORDS = [
    ({"instruction": "hi", "input": "", "output": "hello"}, TALK, "instruction and input; output"),
    ({"instruction": "hi", "output": "hello"}, TALK, "instruction and input; output"),
    (
        {"instruction": "Add.", "input": "1+1", "output": "2"},
        [{"role": "user", "content": "Add.\n\n1+1"}, {"role": "assistant", "content": "2"}],
        "instruction and input; output",
    ),
    (
        {"instruction": "hi", "context": "x", "response": "hello", "category": "qa"},
        [{"role": "user", "content": "hi\n\nx"}, TALK[1]],
        "instruction and context; response",
    ),
    ({"prompt": "hi", "response": "hello"}, TALK, "prompt; response"),
    ({"question": "hi", "response": "hello"}, TALK, "question; response"),
    ({"question": "hi", "output": "hello"}, TALK, "question; output"),
    ({"query": "hi", "response": "hello"}, TALK, "query; response"),
    ({"query": "hi", "answer": "hello"}, TALK, "query; answer"),
    ({"input": "hi", "output": "hello", "system": "Be brief."}, [SYSTEM, *TALK], "input; output"),
    (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        TALK,
        "conversations: read as messages",
    ),
    (
        {
            "conversations": [{"from": "user", "value": "hi"}, {"from": "bot", "value": "hello"}],
            "system": "Be brief.",
        },
        [SYSTEM, *TALK],
        "conversations: read as messages",
    ),
    ({"conversation": TALK}, TALK, "conversation: read as messages"),
    ({"conversations": json.dumps(TALK)}, TALK, "conversations: read as messages"),
]


@pytest.mark.parametrize(("record", "messages", "note"), FOREIGN_RECORDS)
def test_other_programs_records_are_the_conversation_they_mean(record, messages, note):
    examples, notes = learned(record)
    assert examples == learned({"messages": messages})[0]
    assert note in notes[0]
    assert notes[0].endswith("(record 0)")


def test_every_foreign_shape_is_tried():
    keys = {shape.keys for shape in FOREIGN}
    assert {k for k in keys if any(set(k) <= set(r) for r, _, _ in FOREIGN_RECORDS)} == keys


OWN_RECORDS = [
    ({"question": "hi", "answer": "hello"}, TALK),
    ({"question": "hi", "answer": "hello", "system": "Be brief."}, [SYSTEM, *TALK]),
    ({"messages": json.dumps(TALK)}, TALK),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, TALK[1]]}, TALK),
    (
        {"messages": [{"role": "user", "content": ["h", {"type": "text", "text": "i"}]}, TALK[1]]},
        TALK,
    ),
    ({"prompt": ASKED, "completion": [TALK[1]]}, TALK),
    ({"prompt": ASKED, "completion": "hello"}, TALK),
]


@pytest.mark.parametrize(("record", "messages"), OWN_RECORDS)
def test_own_shapes_are_read_as_they_are_found(record, messages):
    found = learned(record)
    assert found[0] == learned({"messages": messages})[0]
    assert not any("ignored" in note for note in found[1])


def test_of_a_conversation_cut_in_two_the_completion_alone_is_learned():
    prompt = [*TALK, {"role": "user", "content": "more"}]
    answer = {"role": "assistant", "content": "no"}
    unlearned = [TALK[0], {**TALK[1], "weight": 0}, prompt[2], answer]
    found = learned({"prompt": prompt, "completion": [answer]})[0]
    assert found == learned({"messages": unlearned})[0]
    assert found != learned({"messages": [*prompt, answer]})[0]


said = st.text().filter(str.strip)


@given(st.sampled_from(["", "System."]), said, said)
def test_without_a_chat_template_a_question_has_alpacas_form(system, question, answer):
    record = {"question": question, "answer": answer, **({"system": system} if system else {})}
    before = f"{system}\n\n" if system else ""
    prompt = f"{before}### Instruction:\n{question}\n\n### Response:\n"
    found, notes = learned(record, None, parse_special=False)
    wanted = learned({"prompt": prompt, "completion": answer}, None, parse_special=False)
    assert found == wanted[0]
    assert "the tokenizer has no chat template" in notes[0]


TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + (m.tool_calls | tojson "
    "if m.tool_calls else '') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_calls_of_tools_are_answers():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    messages = [*ASKED, call, {"role": "tool", "content": "3"}, {**TALK[1]}]
    written = '[{"name": "add"}]'
    as_text = [*ASKED, {"role": "assistant", "content": written}, *messages[2:]]
    assert learned({"messages": messages}, TOOLS)[0] == learned({"messages": as_text}, TOOLS)[0]


WRITTEN = {  # arguments: how a template writes them, and whether it wants an object
    "{{ call.arguments | tojson }}": True,
    "{{ call | tojson(indent=1) }}": True,
    "{% for key, value in call.arguments.items() %}{{ key ~ '=' ~ value }}{% endfor %}": True,
    "{{ '```' + call.arguments + '```' }}": False,
    "{{ call.arguments if call.arguments is string else call.arguments | tojson }}": False,
}


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("written", WRITTEN)
def test_arguments_of_calls_as_text_are_read_as_the_template_wants_them(written, within):
    """Judge: transformers' text of what the template wants, object or string."""
    transformers = pytest.importorskip("transformers")
    template = TOOLS.replace(
        "(m.tool_calls | tojson if m.tool_calls else '') + '<|im_end|>\n' }}",
        "'' }}{% for c in m.tool_calls or [] %}{% set call = c.function or c %}"
        + written + "{% endfor %}{{ '<|im_end|>\n' }}",
    )  # fmt: skip
    assert template != TOOLS

    def messages(arguments):
        call = {"name": "add", "arguments": arguments}
        call = {"type": "function", "function": call} if within else call
        return [*ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]

    given = '{"a": "é \\"x\\"", "b": {"c": [1]}}'
    wants = json.loads(given) if WRITTEN[written] else given
    tokenizer = byte_tokenizer(template)
    (example,), report = read_data([{"messages": messages(given)}], tokenizer)
    judge = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._backend)
    text = judge.apply_chat_template(messages(wants), chat_template=template, tokenize=False)
    assert tokenizer.decode(example.input_ids, skip_special=False) == text
    assert any("are read as objects" in note for note in report.notes) == WRITTEN[written]
    assert example == read_data([{"messages": messages(wants)}], tokenizer)[0][0]
    for other in ("three", "[1]", ""):  # no object: stays text
        found = read_data([{"messages": messages(other)}], byte_tokenizer(TOOLS))[0][0]
        assert json.dumps(other) in tokenizer.decode(found.input_ids)


BAD = [
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, TALK[1]]},
        r"messages\[0\]\.content\[0\] must be a text, as images and sounds are not read, found",
    ),
    ({"messages": "[{"}, "messages must be JSON, found otherwise"),
    ({"question": "a", "answer": ""}, "answer must not be empty"),
    ({"question": 3, "answer": "b"}, "question must be a string, found int 3; write it as text"),
    ({"question": "a", "answer": None}, "answer must be a string, found null"),
    ({"instruction": "a", "output": 3}, "answer must be a string, found int"),
    ({"instruction": "a", "input": 21, "output": "b"}, "input must be a string, found int"),
    ({"instruction": "a", "context": ["x"], "response": "b"}, "context must be a string, found l"),
    ({"conversations": {"a": 1}}, "messages must be a list of at least one message"),
    (
        {"conversations": [{"from": "function_call", "value": "x"}]},
        "role must be one of .*, not 'function_call'",
    ),
    ({"prompt": "a", "response": "b", "messages": TALK}, "found 'prompt, response, messages'"),
    ({"question": "a", "answer": "b", "text": "c"}, "found 'question, answer, text'"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_bad_records_are_refused(record, message):
    with pytest.raises(ValueError, match=message):
        read_data([record], byte_tokenizer(CHATML))


# --- names of fields, system messages, the last turn ----------------------------------------------


def test_fields_are_named():
    record = {"q": "a", "reply": "b", "text": "c", "messages": 3}
    fields = {"prompt": "q", "completion": "reply"}
    assert learned(record, fields=fields)[0] == learned({"prompt": "a", "completion": "b"})[0]
    with pytest.raises(ValueError, match="must have the field 'Q' that was named, found q, reply"):
        learned(record, fields={"prompt": "Q", "completion": "reply"})


def test_names_of_fields_that_are_mistyped_are_told():
    for fields, message in (
        ({"prompt": "Ask", "completion": "reply"}, "'Ask' that was named, .*; nearest: asked"),
        ({"promt": "asked", "completion": "reply"}, "'promt', which is none .*; nearest: prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            learned({"asked": "a", "reply": "b"}, fields=fields)
    with pytest.raises(ValueError, match=r"--map question=frage answer=antwort \(in Python"):
        learned({"frage": "a", "antwort": "b"})


def test_capitals_in_names_do_not_count():
    record = {"Question": "hi", "ANSWER": "hello", "Id": 3}
    found, notes = learned(record)
    assert found == learned({"question": "hi", "answer": "hello"})[0]
    assert notes[-1] == "ignored fields, with how often they occur: id (1)"
    alpaca = learned({"Instruction": "Add.", "Input": "1", "Output": "2"})[0]
    assert alpaca == learned({"instruction": "Add.", "input": "1", "output": "2"})[0]
    assert alpaca == learned({"instruction": "Add.", "Input": "1", "output": "2"})[0]
    twice = learned({"instruction": "Add.", "Input": "1", "INPUT": "3", "output": "2"})[1]
    assert "Input (1), INPUT (1)" in twice[-1]
    with pytest.raises(ValueError, match="found 'Text, TEXT'"):
        learned({"Text": "a", "TEXT": "b"})


def test_fields_that_are_null_are_not_there():
    record = {"text": None, "prompt": "a", "completion": "b", "messages": None}
    assert learned(record)[0] == learned({"prompt": "a", "completion": "b"})[0]


def test_what_decides_about_learning_is_said():
    """Marks of answers, and what the template reads of a row."""
    marked = [*TALK, TALK[0], {**TALK[1], "weight": 0}]
    said = "answers that are marked (weight, train, …) are not learned (record 0)"
    assert said in learned({"messages": marked})[1]
    assert said not in learned({"messages": [*TALK, *TALK]}, last_turn=True)[1]
    template = "{{ tools | tojson if tools else '' }}" + CHATML
    said = "the chat template reads tools (record 0)"
    assert said in learned({"messages": TALK, "tools": []}, template)[1]
    assert said not in learned({"messages": TALK}, template)[1]


def test_a_row_does_not_say_whether_an_answer_follows():
    """The template reads it, and each rendering sets it."""
    found, notes = learned(
        {"messages": TALK, "chat_template_kwargs": {"add_generation_prompt": True}}
    )
    assert found == learned({"messages": TALK})[0]
    assert notes == ("ignored fields, with how often they occur: add_generation_prompt (1)",)


def test_what_is_beside_named_fields_is_read_or_reported():
    """The shape's own further fields are read; another shape's fields are said to be left."""
    record = {"task": "Double it", "input": "21", "reply": "42", "text": "T"}
    found, notes = learned(record, fields={"instruction": "task", "output": "reply"})
    assert found == learned({"instruction": "Double it", "input": "21", "output": "42"})[0]
    assert notes[-1] == "ignored fields, with how often they occur: text (not named) (1)"


def test_a_system_message_without_a_conversation_is_reported():
    said = "the system message is not put before what is no conversation (--chat) (record 0)"
    for record in ({"text": "a"}, {"document": "ab"}, {"prompt": "a", "completion": "b"}):
        found, notes = learned(record, system="S")
        assert found == learned(record)[0]
        assert said in notes
    question = {"question": "q", "answer": "a"}
    found = learned(question, None, system="S")[0]
    assert found == learned({**question, "system": "S"}, None)[0] != learned(question, None)[0]


def test_a_system_message_is_put_before_conversations_that_have_none():
    told = {"system": "Be brief."}
    assert learned({"messages": TALK}, **told)[0] == learned({"messages": [SYSTEM, *TALK]})[0]
    own = {"messages": [{**SYSTEM, "content": "Mine."}, *TALK]}
    assert learned(own, **told)[0] == learned(own)[0]
    pair = {"prompt": "hi", "completion": "hello"}
    found = learned(pair, chat_prompts=True, **told)[0]
    assert found == learned({"messages": [SYSTEM, *TALK]})[0]


def test_a_prompts_own_answers_are_learned_with_all_tokens():
    messages = talk("user", "assistant", "user", "assistant")
    record = {"prompt": messages[:3], "completion": messages[3:]}
    whole = learned({"messages": messages}, completion_only=False)[0]
    assert learned(record, completion_only=False)[0] == whole
    alone = [{**messages[1], "weight": 0} if i == 1 else m for i, m in enumerate(messages)]
    assert learned(record)[0] == learned({"messages": alone})[0]


def test_the_last_turn_alone_and_all_tokens_exclude_each_other():
    with pytest.raises(ValueError, match=r"--last-turn learns .* --all-tokens .*leave one"):
        learned({"messages": TALK}, last_turn=True, completion_only=False)


BLANKS = ["\n", " ", "\t \u3000"]


@pytest.mark.parametrize("blank", BLANKS)
@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"question": "hi", "answer": ...}, "answer"),
        ({"question": ..., "answer": "hi"}, "question"),
        ({"instruction": ..., "input": ..., "output": "hi"}, "question"),
        ({"prompt": "hi", "completion": ...}, "completion"),
        ({"messages": [*ASKED, {"role": "assistant", "content": ...}]}, r"messages\[1\].content"),
        ({"prompt": "hi", "chosen": ..., "rejected": "a"}, "chosen"),
        ({"question": "hi", "chosen": "a", "rejected": ...}, "rejected"),
        ({"question": ..., "chosen": "a", "rejected": "b"}, "question"),
    ],
)
def test_white_space_says_nothing(record, name, blank):
    record = json.loads(json.dumps(record, default=lambda _: blank))
    empty = {"instruction": "must not be empty"}  # as nothing is joined
    said = next((empty[key] for key in record if key in empty), "must say something, found only")
    with pytest.raises(ValueError, match=f"{name} {said}"):
        learned(record)


@pytest.mark.parametrize("blank", BLANKS)
def test_white_space_is_text_and_may_be_asked_with(blank):
    assert (
        learned({"text": blank * 2})[0] == learned({"input_ids": [*(blank * 2).encode(), 256]})[0]
    )
    assert learned({"prompt": blank, "completion": "b"})[0]
    call = {"role": "assistant", "content": blank, "tool_calls": [{"name": "add"}]}
    assert learned({"messages": [*ASKED, call]}, TOOLS)[0]


def test_only_what_says_something_of_a_question_is_joined():
    wanted = learned({"question": "1+1", "answer": "2"})[0]
    for empty in ("", " "):
        assert learned({"instruction": empty, "input": "1+1", "output": "2"})[0] == wanted
        assert learned({"instruction": "1+1", "context": empty, "response": "2"})[0] == wanted


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_conversation_gets_one_system_message(role):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    own = [{"from": role, "value": "Be brief."}, *turns]
    wanted = learned({"conversations": own})[0]
    assert learned({"conversations": own, "system": "Be brief."})[0] == wanted
    assert learned({"conversations": own, "system": ""})[0] == wanted
    with pytest.raises(
        ValueError, match=r"found another one .* \('Mine.'\) than .* \('Be brief.'\)"
    ):
        learned({"conversations": own, "system": "Mine."})


def test_only_the_last_turn_is_learned():
    messages = talk("user", "assistant", "user", "assistant")
    wanted = [{**m, "weight": 0} if i == 1 else m for i, m in enumerate(messages)]
    found = learned({"messages": messages}, last_turn=True)[0]
    assert found == learned({"messages": wanted})[0] != learned({"messages": messages})[0]


# --- kinds of files -------------------------------------------------------------------------------

ROWS = [{"question": 'a, "b"\nc', "answer": "d;é"}, {"question": "e\t", "answer": " f "}]


def table(rows, delimiter=","):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def arrow(rows):
    pyarrow = pytest.importorskip("pyarrow")
    written = pyarrow.Table.from_pylist(rows)
    sink = io.BytesIO()
    with pyarrow.ipc.new_stream(sink, written.schema) as stream:
        stream.write_table(written)
    return sink.getvalue()


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def json_text(rows, **options):
    return json.dumps(rows, **options).encode()


CONTAINERS = {
    "a.jsonl": json_lines,
    "A.JSONL": json_lines,
    "a.ndjson": json_lines,
    "a.json": json_text,
    "lines.json": json_lines,
    "pretty.json": lambda rows: json_text(rows, indent=1),
    "inside.json": lambda rows: json_text({"data": rows}),
    "array.jsonl": json_text,
    "pretty.jsonl": lambda rows: json_text(rows, indent=1),
    "a.csv": table,
    "meta.json": lambda rows: json_text({"version": "1", "data": rows, "tags": []}),
    "semicolons.csv": lambda rows: table(rows, ";"),
    "mark.csv": lambda rows: b"\xef\xbb\xbf" + table(rows),
    "a.tsv": lambda rows: table(rows, "\t"),
    "a.parquet": parquet,
    "a.arrow": arrow,
    "a.csv.gz": lambda rows: gzip.compress(table(rows)),
    "a.jsonl.gz": lambda rows: gzip.compress(json_lines(rows)),
    "a.parquet.gz": lambda rows: gzip.compress(parquet(rows)),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_kind_of_file_holds_the_same_records(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(CONTAINERS[name](ROWS))
    found, report = read_data(file, byte_tokenizer(CHATML))
    assert found == read_data(ROWS, byte_tokenizer(CHATML))[0]
    assert report.documents == 2


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\0")), min_size=1))
def test_any_text_survives_a_table(tmp_path_factory, texts):
    texts = [f"x{text}" for text in texts]
    file = tmp_path_factory.mktemp("t") / "a.csv"
    file.write_bytes(table([{"text": text, "id": i} for i, text in enumerate(texts)]))
    wanted = read_data([{"text": text} for text in texts], byte_tokenizer(), max_length=9999)[0]
    assert read_data(file, byte_tokenizer(), max_length=9999)[0] == wanted


def test_quotes_that_join_the_rows_of_a_table_of_tabs_are_refused(tmp_path):
    """Files of sentence pairs know no quoting: there a quote is a character."""
    file = tmp_path / "a.tsv"
    rows = ['"We must go,\tWir gehen,', "now\tjetzt", 'he said."\tsagte er.', "bye\ttschau"]
    file.write_text("\n".join(["prompt\tcompletion", *rows]))
    with pytest.raises(ValueError, match=r"a\.tsv:2: a quote opens there and closes in line 4, th"):
        read_data(file, byte_tokenizer())
    assert len(read_data(file, byte_tokenizer(), skip_bad=1)[0]) == 1
    (tmp_path / "b.csv").write_text('text\n"two\nlines"\n"one"\n')  # a single column
    assert (
        read_data(tmp_path / "b.csv", byte_tokenizer())[0]
        == (read_data([{"text": "two\nlines"}, {"text": "one"}], byte_tokenizer())[0])
    )
    file.write_text('prompt\tcompletion\n"two\nlines, a\ttab"\tyes\n')
    assert (
        read_data(file, byte_tokenizer())[0]
        == (read_data([{"prompt": "two\nlines, a\ttab", "completion": "yes"}], byte_tokenizer())[0])
    )


def test_messages_that_a_table_holds_as_text_are_messages():
    """As `messages` are; a completion that is such a list behind a plain prompt stays a text."""
    ask, say = [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Yes"}]
    other = [{"role": "assistant", "content": "No"}]
    for record in (
        {"prompt": ask, "completion": say},
        {"prompt": ask, "chosen": say, "rejected": other},
        {"chosen": ask + say, "rejected": ask + other},
        {"prompt": ask, "completion": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]},
    ):
        text = {key: json.dumps(value) for key, value in record.items()}
        found, wanted = (read_data([each], byte_tokenizer(CHATML))[0] for each in (text, record))
        assert found == wanted
        one = {k: json.dumps(v[0]) if len(v) == 1 else text[k] for k, v in record.items()}
        assert read_data([one], byte_tokenizer(CHATML))[0] == wanted
    shared = json.dumps({"from": "human", "value": "Hi"})  # ShareGPT's
    told = {"prompt": shared, "chosen": json.dumps(say), "rejected": json.dumps(other[0])}
    wanted = {"prompt": ask, "chosen": say, "rejected": other}
    assert (
        read_data([told], byte_tokenizer(CHATML))[0]
        == read_data([wanted], byte_tokenizer(CHATML))[0]
    )
    for printed in (
        str(ask),
        f" {ask[0]}",
        "[{'content': 'Hi', 'role': 'user'}\n {'content': 'b', 'role': 'gpt'}]",
    ):
        with pytest.raises(ValueError, match="must be JSON, found Python's own form, as pandas"):
            read_data([{"prompt": printed, "completion": "b"}], byte_tokenizer(CHATML))
    for text, answer in (  # texts that are like messages
        ("List a talk.", json.dumps(say)),
        ('{"from": "system", "text": "disk full"}', "Alert"),
        ('{"from": "user", "to": "bot"}', "a"),
        (f"{ask}\nHow is this list sent?", "By post."),
    ):
        (row,) = read_data([{"prompt": text, "completion": answer}], byte_tokenizer())[0]
        assert byte_tokenizer().decode(row.input_ids) == text + answer
    answers = {"prompt": "One message.", "chosen": json.dumps(ask[0]), "rejected": "No"}
    (pair,) = read_data([answers], byte_tokenizer())[0]
    assert json.dumps(ask[0]) in byte_tokenizer().decode(pair.input_ids)


def test_a_system_message_of_a_question_is_a_text():
    for bad, found in ((float("nan"), "found float nan"), (["a"], "found list")):
        with pytest.raises(ValueError, match=f"record 0: system must be a string, {found}"):
            read_data([{"question": "a", "answer": "b", "system": bad}], byte_tokenizer(CHATML))
    rows = [{"question": "a", "answer": "b", **more} for more in ({}, {"system": None})]
    assert len({row.input_ids for row in read_data(rows, byte_tokenizer(CHATML))[0]}) == 1


def test_nested_tables_leave_out_what_other_rows_have(tmp_path):
    marked = [TALK[0], {**TALK[1], "weight": 0}, *TALK]
    rows = [{"messages": marked, "tools": None}, {"messages": TALK, "tools": "[]"}]
    (tmp_path / "a.parquet").write_bytes(parquet(rows))
    found, report = read_data(tmp_path / "a.parquet", byte_tokenizer(CHATML))
    assert found == read_data([{"messages": marked}, {"messages": TALK}], byte_tokenizer(CHATML))[0]
    assert report.notes[1:] == ("ignored fields, with how often they occur: tools (1)",)
    assert "answers that are marked" in report.notes[0]


def test_a_folder_is_its_files_in_order(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(json_lines(ROWS[1:]))
    (tmp_path / "a.csv").write_bytes(table(ROWS[:1]))
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "LICENSE.txt").write_text("no data either, beside tables")
    assert read_data(tmp_path, byte_tokenizer())[0] == read_data(ROWS, byte_tokenizer())[0]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["test.jsonl", "rows.jsonl"], "other and test"),
        (["my_validation.csv", "a.jsonl", "train.jsonl"], "other and training and validation"),
        (["dev-0.jsonl", "test-0.jsonl"], "test and validation"),
        (["train.jsonl", "test.jsonl"], "test and training"),
        (["train.jsonl", "more.jsonl"], None),
        (["test-0.jsonl", "test-1.jsonl"], None),
        (["latest.jsonl", "rows.jsonl"], None),
    ],
)
def test_a_folders_held_out_files_are_not_read_with_others(tmp_path, names, found):
    for name in names:
        (tmp_path / name).write_bytes((table if name.endswith("csv") else json_lines)(ROWS))
    if found is None:
        assert [Path(each).name for each in files_in([tmp_path])] == sorted(names)
    else:
        message = rf"found by their names {found} data \({', '.join(sorted(names))}\); name the"
        with pytest.raises(ValueError, match=message):
            files_in([tmp_path])


def test_several_training_sets_in_a_folder_are_not_one(tmp_path):
    """As of a data set of the hub that was copied: each holds the same questions."""
    for name in (
        "train_sft-00000-of-00002",
        "train_sft-00001-of-00002",
        "train_gen-00000-of-00001",
    ):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a b"}\n')
    message = (
        r"must hold one training set, found train_gen, train_sft; name the files of one, as in"
    )
    with pytest.raises(ValueError, match=message):
        read_data(tmp_path, byte_tokenizer())
    (tmp_path / "train_gen-00000-of-00001.jsonl").rename(tmp_path / "train_gen.jsonl")
    assert len(read_data(tmp_path, byte_tokenizer())[0]) == 3


def test_what_a_folder_holds_beside_its_data_is_named(tmp_path):
    """Not what is hidden or describes a data set."""
    (tmp_path / "sub").mkdir()
    for name in ("a.jsonl", "b.xlsx", "LICENSE.txt", ".hidden", "dataset_info.json", "sub/c.jsonl"):
        (tmp_path / name).write_bytes(json_lines(ROWS))
    said = f"not read: {tmp_path}/LICENSE.txt, {tmp_path}/b.xlsx, {tmp_path}/sub"
    assert read_data([tmp_path], byte_tokenizer(CHATML))[1].notes == (said,)
    with pytest.warns(UserWarning, match=re.escape(said)):
        streamed([tmp_path], byte_tokenizer(CHATML), Encoding(64))
    assert not read_data([tmp_path / "a.jsonl"], byte_tokenizer(CHATML))[1].notes


@pytest.mark.parametrize("key", ["examples", "data", "train"])
def test_a_record_that_holds_a_list_is_a_record(tmp_path, key):
    """And of an object that is none, what is left out is said."""
    (tmp_path / "a.json").write_bytes(json_text({**ROWS[0], key: ROWS[1:]}))
    found, report = read_data(tmp_path / "a.json", byte_tokenizer(CHATML))
    assert found == read_data(ROWS[:1], byte_tokenizer(CHATML))[0]
    assert report.notes == (f"ignored fields, with how often they occur: {key} (1)",)
    for name in ("b.json", "b.jsonl"):
        (tmp_path / name).write_bytes(json_text({key: ROWS, "test": ROWS[:1], "v": 1}, indent=1))
        found, report = read_data(tmp_path / name, byte_tokenizer(CHATML))
        assert found == read_data(ROWS, byte_tokenizer(CHATML))[0]
        assert report.notes == (f"{tmp_path / name}: {key} is read, not test, v",)
    with pytest.warns(UserWarning, match=f"b.jsonl: {key} is read, not test, v"):
        assert (
            len(list(streamed([tmp_path / "b.jsonl"], byte_tokenizer(), Encoding(9)).source)) == 2
        )


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_column_twice_is_refused(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = [pyarrow.array([text]) for text in ("q", "first", "second")]
    twice = pyarrow.Table.from_arrays(columns, names=["question", "answer", "answer"])
    file = tmp_path / f"a.{kind}"
    if kind == "parquet":
        parquet.write_table(twice, file)
    else:
        with pyarrow.ipc.new_stream(file, twice.schema) as stream:
            stream.write_table(twice)
    message = f"a.{kind}: must name each column once, found question, answer, answer"
    with pytest.raises(ValueError, match=message):
        read_data(file, byte_tokenizer(CHATML))


def test_a_table_may_begin_with_blank_lines(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\n \r\n" + table(ROWS))
    assert (
        read_data(tmp_path / "a.csv", byte_tokenizer())[0] == read_data(ROWS, byte_tokenizer())[0]
    )
    (tmp_path / "b.csv").write_bytes(b"\n\ntext,b\na,b\n1\n")
    with pytest.raises(ValueError, match=r"b\.csv:5: must have the first line's 2 fields"):
        read_data(tmp_path / "b.csv", byte_tokenizer())


@pytest.mark.parametrize("split", [True, False])
def test_a_folder_of_hugging_face_datasets_is_read(tmp_path, split):
    """As `save_to_disk` lays it out; the package itself judges nothing here."""
    folder = tmp_path / "train" if split else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / "data-00000-of-00001.arrow").write_bytes(arrow(ROWS))
    (folder / "state.json").write_text("{}")
    (folder / "dataset_info.json").write_text("{}")
    (folder / "cache-1234.arrow").write_bytes(arrow([{"text": "of an earlier map"}]))
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))
    if split:
        (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert read_data(tmp_path, byte_tokenizer())[0] == read_data(ROWS, byte_tokenizer())[0]


GZ = gzip.compress(b'{"text": "abcdefghijklmnopqrstuvwxyz"}\n' * 9, mtime=0)
BAD_FILES = [
    ("a.csv", b"a,a\n1,2\n", "its first line must name each field once, found 'a,a'"),
    ("a.csv", b"text,b\n1,2\n1\n1,2,3\n", r"a\.csv:3, 4: must have the first line's 2 fields"),
    ("a.csv", b'text\n"a"b\n', "must be CSV from line 2 on"),
    (
        "a.csv",
        "text\nfür\nschön".encode() + b"\nf\xfcr\n",
        "line 4 must be UTF-8, found the byte fc .invalid start byte., which is 'ü' in Windows'",
    ),
    ("a.csv", b"text\n", "must hold a row below its first line, 'text', found none"),
    ("a.csv", b'a,b\n1,"2\n3,4\n', "CSV from line 2 on: a quote opens there and is never closed"),
    ("a.csv", b" \n", "must hold text, found none"),
    ("a.json", b"3", "must hold an array of records, found int"),
    ("a.json", b'[{"text": "a"},]', r"must be JSON: .* \(column 1[56]\)"),
    ("a.json", b'[\n{"text": "a"}\n{}]', r"must be JSON: .* \(line 3, column 1\)"),
    ("a.json", b'[{"text": "a"}, {"text": 3}]', r"a\.json:\[1\]: text must be a string"),
    ("a.json", b'{"rows": [{"text": 3}]}', r"a\.json:rows\[0\]: text must be a string"),
    ("a.json", b" ", "must hold text, found none"),
    ("a.jsonl.gz", b"no gzip", "must be a whole gzip file"),
    (
        "a.jsonl.gz",
        gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-9],
        "must be a whole gzip file",
    ),
    ("b.jsonl.gz", GZ[:20] + b"\xff" * 9 + GZ[29:], "must be a whole gzip file"),
    ("a.parquet", b"PAR1....PAR1", "must be a Parquet file, found"),
    ("a.arrow", b"ARROW", "must be an Arrow stream, found"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_damaged_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read the data: .*{message}"):
        read_data(tmp_path / name, byte_tokenizer(CHATML))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(RuntimeError, match=r"Arrow file needs pyarrow .*minilora\[data\]"):
        read_data(tmp_path / "a.parquet", byte_tokenizer())


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.csv.gz"])
def test_rows_are_streamed(tmp_path, name):
    (tmp_path / name).write_bytes(CONTAINERS[name](ROWS))
    options = Encoding(64)
    stream = streamed([tmp_path / name], byte_tokenizer(CHATML), options)
    assert isinstance(stream, Stream)
    found = [example for record in stream.source for example in stream.encode(record)]
    assert found == read_data(ROWS, byte_tokenizer(CHATML), max_length=64)[0]


def stream_of(folder, rows, **options):
    (folder / "a.jsonl").write_bytes(json_lines(rows))
    template = "{{ tools | tojson if tools }}" + CHATML
    return streamed([folder / "a.jsonl"], byte_tokenizer(template), Encoding(48, **options))


def test_a_stream_leaves_out_what_encoding_finds_bad_as_reading_at_once_does(tmp_path):
    """Line 2 is bad when it is encoded, line 3 already when it is read."""
    rows = [{"messages": TALK}, {"messages": TALK, "tools": "{"}, {"text": 3}, {"text": "b"}]
    with pytest.warns(UserWarning, match="a bad row was left out") as said:
        stream = stream_of(tmp_path, rows, skip_bad=2)
        for _ in range(2):  # in a second epoch nothing is counted anew
            found = [example for row in stream.source for example in stream.encode(row)]
    template = byte_tokenizer("{{ tools | tojson if tools }}" + CHATML)
    assert found == read_data(tmp_path / "a.jsonl", template, max_length=48, skip_bad=2)[0]
    assert [str(each.message).partition("a.jsonl:")[2][:2] for each in said] == ["2:", "3:"]
    assert stream.source.report.documents == 2
    stream = stream_of(tmp_path, rows[:2])
    message = r"a\.jsonl:2: tools must be JSON, .* leave them out with --skip-bad 1 \(in Python"
    with pytest.raises(ValueError, match=message):
        [stream.encode(row) for row in stream.source]


def test_a_stream_says_what_is_dropped_and_cut_and_counts_it_once(tmp_path):
    """Of rows 1 and 3 nothing of the answer is left, of row 4 a part."""
    long = {"prompt": "p" * 60, "completion": "c"}
    rows = [long, {"text": "b"}, long, {"prompt": "p", "completion": "c" * 60}]
    with pytest.warns(UserWarning) as said:
        stream = stream_of(tmp_path, rows)
        for _ in range(2):
            found = [example for row in stream.source for example in stream.encode(row)]
    said = [str(each.message).partition(f" ({tmp_path}/a.jsonl:") for each in said]
    assert [(message, place[0]) for message, _, place in said] == [
        ("in the stream: a row with nothing left to learn within 48 tokens is dropped", "1"),
        ("in the stream: a row is cut at 48 tokens", "1"),
    ]
    whole, report = read_data(tmp_path / "a.jsonl", byte_tokenizer(), max_length=48)
    assert found == whole and stream.source.report == report
    assert (report.documents, report.fully_masked, report.truncated) == (4, 2, 3)


@pytest.mark.parametrize("name", ["a.json", "a.txt", "a.txt.gz", "a.md"])
def test_what_is_read_at_once_is_not_streamed(tmp_path, name):
    (tmp_path / name).write_bytes(b"[]")
    with pytest.raises(ValueError, match=r"only \.jsonl, .* files can be streamed"):
        check_streamed([tmp_path / name])


# --- built in -------------------------------------------------------------------------------------


def test_docstrings_come_with_python(tmp_path):
    """`shutil.copyfileobj` is there, without its docstring in the question."""
    parts = {part: docstring_rows(part) for part in SPLITS}
    assert all(len(rows) > 100 for rows in parts.values())
    answer = "copy data from file-like object fsrc to file-like object fdst"
    (row,) = (row for rows in parts.values() for row in rows if row["answer"] == answer)
    assert row["question"].startswith("What does this Python function do?\n\ndef copyfileobj(")
    assert answer not in row["question"]
    files = DataFiles(["@docstrings/valid"], Encoding(512))
    stored = files.encode(byte_tokenizer(CHATML), tmp_path)[0]
    assert stored == read_data(parts["valid"], byte_tokenizer(CHATML))[0]
    again, report = files.encode(byte_tokenizer(CHATML), tmp_path)
    assert again == stored
    assert "from the cache" in report.notes


def test_the_whole_is_what_is_trained_on():
    assert next(iter(built_in("@docstrings")))[0] == "@docstrings:1"
    assert [row for _, row in built_in("@docstrings")] == list(docstring_rows("train"))


def test_another_built_in_name_is_refused():
    message = "built-in data is one of @docstrings, @docstrings/train, .* found '@docstring'"
    with pytest.raises(ValueError, match=message):
        read_data("@docstring", byte_tokenizer())
