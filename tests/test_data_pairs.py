"""Records that say which answer is better: each shape becomes the same pair, bad ones are named."""

import json
import re

import pytest
from byte_tokenizer import CHATML, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from minilora.data import (
    Batches,
    DataFiles,
    Encoding,
    Pair,
    as_examples,
    pack,
    pad,
    read_data,
    shown,
    streamed,
)
from minilora.data.pairs import cut, with_other_answers
from minilora.data.preference_shapes import PREFERENCES
from minilora.running import Preference
from minilora.training.prepare import _check_kind

ASK = [{"role": "user", "content": "hi"}]
YES, NO = ([{"role": "assistant", "content": text}] for text in ("yes", "no"))
TALK = {"prompt": ASK, "chosen": YES, "rejected": NO}


def read(record, template=CHATML, **options):
    examples, report = read_data([record], byte_tokenizer(template), **options)
    return examples, report.notes


def texts(*prompts_and_answers, template=CHATML):
    """The pair of two records with a prompt and a completion each, as plain training reads them."""
    return [read(one, template)[0][0] for one in prompts_and_answers]


def test_a_pair_is_what_plain_training_learns_of_each_answer():
    """Ids and labels of a prompt and a completion, side by side, whatever the tokenizer."""
    for template in (None, CHATML):
        (pair,), _ = read({"prompt": "2+2=", "chosen": " 4", "rejected": " five"}, template)
        both = texts(
            {"prompt": "2+2=", "completion": " 4"},
            {"prompt": "2+2=", "completion": " five"},
            template=template,
        )
        assert list(cut(pair)) == both and pair.wanted is None
        assert pair.lengths == (4, 3, 6)
        assert set(pair.labels[:4]) == {-100}


CONVERSATIONS = [
    TALK,
    {"chosen": ASK + YES, "rejected": ASK + NO},
    {"prompt": ASK, "chosen": "yes", "rejected": "no"},
    {"prompt": "hi", "chosen": ASK + YES, "rejected": ASK + NO, "messages": ASK + YES, "score": 1},
    {"prompt": "hi", "chosen": YES, "rejected": NO},
    {"messages": ASK, "chosen": YES[0], "rejected": NO[0]},
    {
        "conversations": [{"from": "human", "value": "hi"}],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    },
    {"question": "hi", "chosen": "yes", "rejected": "no"},
    {"input": {"messages": ASK}, "preferred_output": YES, "non_preferred_output": NO},
]


@pytest.mark.parametrize("record", CONVERSATIONS)
def test_every_shape_of_a_conversation_is_one_pair(record):
    (pair,), _ = read(record)
    both = texts({"messages": ASK + YES}, {"messages": ASK + NO})
    assert [text.input_ids for text in cut(pair)] == [text.input_ids for text in both]
    assert [text.labels for text in cut(pair)] == [text.labels for text in both]


def test_every_preference_shape_is_tried():
    tried = [*CONVERSATIONS, {"prompt": "a", "completion": "b", "label": True}]
    keys = {shape.keys for shape in PREFERENCES}
    assert {k for k in keys if any(set(k) <= set(r) for r in tried)} == keys


def test_a_prompt_that_is_implicit_ends_before_the_word_that_differs():
    (pair,), notes = read({"chosen": "The sky is blue", "rejected": "The sky is green."}, None)
    want = texts({"prompt": "The sky is", "completion": " blue"}, template=None)
    assert cut(pair)[0] == want[0]
    assert notes == ("the prompt is what chosen and rejected begin with alike (record 0)",)


@pytest.mark.parametrize(
    ("prompt", "answers"),
    [
        ("Human: ok?\n\nAssistant:", (" Yes", " You")),
        ("Human: ok?\n\nAssistant:\n", ("Yes", "You")),
        ("The sky", (" is", "\nwas")),
        ("Say:\n", ("Yes", "You")),
    ],
)
def test_an_implicit_prompt_is_never_cut_inside_a_word(prompt, answers):
    chosen, rejected = (prompt + answer for answer in answers)
    (pair,), _ = read({"chosen": chosen, "rejected": rejected}, None)
    rows = [{"prompt": prompt, "completion": answer} for answer in answers]
    assert list(cut(pair)) == texts(*rows, template=None)


@pytest.mark.parametrize("more", [{}, {"prompt": "hi"}])
def test_conversations_that_differ_before_the_answer_are_refused(more):
    other = [{"role": "user", "content": "hello"}]
    message = r"record 0: .*alike up to an assistant message, found chosen with another 'user' mes"
    with pytest.raises(ValueError, match=message):
        read({"chosen": ASK + YES, "rejected": other + NO, **more})
    with pytest.raises(ValueError, match=r"found rejected with another 'user' message at \[2\]"):
        read({"chosen": ASK + YES + YES, "rejected": ASK + YES + other + NO, **more})


def test_fields_of_other_names_are_named():
    record = {"instruction": "2+2=", "chosen": " 4", "worse": " 5"}
    fields = {"prompt": "instruction", "chosen": "chosen", "rejected": "worse"}
    want = read({"prompt": "2+2=", "chosen": " 4", "rejected": " 5"}, None)[0]
    assert read(record, None, fields=fields)[0] == want
    alone = read({"prompt": "a", "chosen": "b", "rejected": "c"}, None,
                 fields={"prompt": "prompt", "completion": "chosen"})[0]  # fmt: skip
    assert alone == texts({"prompt": "a", "completion": "b"}, template=None)


def test_notes_and_fields_are_said_once_for_both_answers():
    _, notes = read({**TALK, "score_chosen": 3})
    assert notes == ("ignored fields, with how often they occur: score_chosen (1)",)
    _, notes = read({"question": "hi", "system": "S", "chosen": "yes", "rejected": "no"})
    assert notes == ("the question is read as the user's turn (record 0)",)


def test_earlier_answers_of_a_conversation_are_not_compared():
    before = [*ASK, *YES, {"role": "user", "content": "sure?"}]
    (pair,), _ = read({"prompt": before, "chosen": YES, "rejected": NO})
    learned = [i for i, label in enumerate(pair.labels) if label != -100]
    assert min(learned) >= pair.lengths[0]
    _, notes = read({"prompt": before, "completion": YES})
    assert notes == ()  # as nobody marked them
    _, notes = read({"prompt": [*ASK, {**YES[0], "train": False}, *ASK], "completion": YES})
    assert notes == ("answers that are marked (weight, train, …) are not learned (record 0)",)


def test_a_template_is_given_what_it_reads_with_both_answers():
    template = "{{ mood }}" + CHATML
    (pair,), notes = read({**TALK, "mood": "sad", "left": 1}, template)
    assert all(bytes(text.input_ids[:3]) == b"sad" for text in cut(pair))
    assert notes == (
        "the chat template reads mood (record 0)",
        "ignored fields, with how often they occur: left (1)",
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "must have chosen and rejected, found chosen without rej"),
        ({"prompt": "a", "rejected": "b"}, "found rejected without chosen; add it, or learn r"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected must differ, found"),
        ({"prompt": ASK, "chosen": YES, "rejected": "yes"}, "chosen and rejected must differ"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen must not be empty"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected must not be empty"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "rejected must be a text or a list of"),
        ({"prompt": ASK, "chosen": [], "rejected": NO}, "chosen must be a text .* an empty list"),
        ({"prompt": ASK, "chosen": YES, "rejected": [{"role": "assistant", "content": ""}]},
         r"rejected: messages\[1\].content must not be empty"),
        ({"chosen": "same", "rejected": "same"}, "chosen must go on after the prompt, found noth"),
        ({"chosen": "same", "rejected": "same, longer"}, "chosen must go on after the prompt"),
        ({"instruction": "a", "chosen": "b", "rejected": "c"},
         r"must stand in prompt, .*, found instruction beside them; name it: .*prompt=instr"),
        ({"chosen": "a", "rejected": NO}, "must both be texts or both be messages"),
        ({"prompt": 3, "chosen": YES, "rejected": NO}, "prompt must be a string, found int"),
        ({"question": "a", "chosen": "b", "rejected": None}, "rejected must be a string"),
        ({"messages": 3, "chosen": "b", "rejected": "c"}, "messages must be a list of messages"),
        ({"input": "hi", "preferred_output": YES, "non_preferred_output": NO},
         "input must hold messages, beside preferred_output, found none"),
        ({"prompt": "a", "completion": "", "label": True}, "completion must not be empty"),
        ({"text": "a", "prompt": "a", "chosen": "b", "rejected": "c"}, "a record must have text"),
    ],
)  # fmt: skip
def test_bad_records_are_named(record, message):
    with pytest.raises(ValueError, match=f"record 0: .*{message}"):
        read(record)


def test_prompts_are_not_learned():
    with pytest.raises(ValueError, match=r"prompts are not learned, found --all-tokens"):
        read(TALK, completion_only=False)


def test_answers_that_a_template_writes_apart_are_refused():
    last = "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}" + (
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    answer = [*YES, *ASK, *YES]
    with pytest.raises(ValueError, match="an answer must become one text, found 2, as the chat"):
        read({"prompt": ASK, "chosen": answer, "rejected": NO}, last)


def test_pairs_whose_difference_is_cut_off_are_left_out_and_counted():
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a" * 20, "chosen": "b", "rejected": "c"},  # nothing left of the answers
        {"prompt": "a", "chosen": "x" * 20, "rejected": "x" * 30},  # alike as far as they are kept
    ]
    examples, report = read_data(rows, byte_tokenizer(), max_length=10)
    assert len(examples) == 1
    assert (report.documents, report.fully_masked, report.truncated) == (3, 2, 2)
    assert report.longest == 32


LABELLED = [{"prompt": p, "completion": c, "label": label} for p, c, label in (
    ("a", "one", True), ("a", "two", False), ("b", "three", "false"), ("c", "four", 1),
)]  # fmt: skip


def test_labelled_answers_meet_the_answer_to_another_prompt():
    examples, _ = read_data(LABELLED, byte_tokenizer(), max_length=99)
    assert [pair.wanted for pair in examples] == [True, False, False, True]
    others = [bytes(i for i in cut(pair)[1].input_ids if i < 256).decode() for pair in examples]
    assert others == ["afour", "afour", "btwo", "cthree"]
    assert [cut(pair)[0].labels[0] for pair in examples] == [-100] * 4
    short, _ = read_data(LABELLED, byte_tokenizer(), max_length=4)
    assert all(pair.longest <= 4 for pair in short)


def test_labels_are_read_where_they_say_yes_or_no():
    """Another field of that name is no preference: a class, a text."""
    (example,), notes = read({"prompt": "a", "completion": "b", "label": "positive"}, None)
    assert not isinstance(example, Pair) and "label (1)" in notes[0]
    (one, _), _ = read_data([*LABELLED[2:]], byte_tokenizer())
    assert one.wanted is False
    for yes, no in ((1.0, 0.0), ("1.0", "0.0"), ("True", "FALSE")):  # as tables hold them
        rows = [{"prompt": p, "completion": "b", "label": v} for p, v in (("a", yes), ("b", no))]
        assert [pair.wanted for pair in read_data(rows, byte_tokenizer())[0]] == [True, False]
    with pytest.raises(ValueError, match=r"to two prompts at least, .* found 2 rows with one"):
        read_data(LABELLED[:2], byte_tokenizer())


def test_labels_of_classes_are_not_read():
    """Where one label is no yes or no, 0 and 1 are none either; under kto that is refused."""
    rows = [{"prompt": "a", "completion": "b", "label": n} for n in (1, 0, 3)]
    examples, report = read_data(rows, byte_tokenizer())
    assert examples == texts({"prompt": "a", "completion": "b"}) * 3
    assert report.notes[0].startswith(
        "label is not read, as not all are true, false, 1 or 0 (found 3 in record 2)"
    )
    with pytest.raises(
        ValueError, match=r"label \(true, false, 1 or 0 in all\), but a row is a te"
    ):
        _check_kind(examples[0], "a row", Preference("kto"))


def test_the_way_out_for_answers_with_a_label_works():
    labelled = read_data(LABELLED, byte_tokenizer())[0]
    for check in (as_examples, lambda rows: _check_kind(rows[0], "example 0", None)):
        with pytest.raises(
            ValueError, match=r"example 0 .* an answer with a label; .*, or"
        ) as said:
            check(labelled)
        words = re.search(r"--map (.*) \(in Python", str(said.value))[1].split()
        fields = dict(word.split("=") for word in words)
        examples = read_data(LABELLED, byte_tokenizer(), fields=fields)[0]
        assert examples == texts(*({k: row[k] for k in fields} for row in LABELLED))


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=12))
def test_no_answer_meets_one_to_its_own_prompt(prompts):
    single = [Pair((ord(p), i), (-100, i), (1, 1, 0), wanted=True) for i, p in enumerate(prompts)]
    if len(set(prompts)) == 1:
        with pytest.raises(ValueError, match="to two prompts at least"):
            with_other_answers(single, 9)
        return
    for pair in with_other_answers(single, 9):
        assert prompts[pair.input_ids[2]] != chr(pair.input_ids[0])


def test_files_caches_and_streams_hold_pairs(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{i}", "chosen": "yes" * i, "rejected": "no"} for i in (1, 2, 3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataFiles([file], Encoding(64))
    examples, _ = data.encode(byte_tokenizer())
    for _ in range(2):
        again, report = data.encode(byte_tokenizer(), tmp_path / "cache")
        assert again == examples
    assert "from the cache" in report.notes
    stream = streamed([str(file)], byte_tokenizer(), Encoding(64))
    assert [one for row in stream.source for one in stream.encode(row)] == examples
    label = tmp_path / "label.jsonl"
    label.write_text("".join(json.dumps(row) + "\n" for row in LABELLED))
    data = DataFiles([label], Encoding(64))
    want = data.encode(byte_tokenizer())[0]
    assert [data.encode(byte_tokenizer(), tmp_path / "cache")[0] for _ in range(2)] == [want] * 2


def test_pairs_are_not_packed():
    (pair,), _ = read(TALK)
    with pytest.raises(ValueError, match=r"preference pairs .* can't be packed; leave --pack"):
        pack([pair], 64)


def test_batches_tell_labels_and_parts_apart():
    """What defines a run's data must change with them."""
    one = Pair((1, 2, 3), (-100, 2, 3), (1, 1, 1))
    others = [Pair((1, 2, 3), (-100, 2, 3), (1, 2, 0)),
              Pair((1, 2, 3), (-100, 2, 3), (1, 1, 1), wanted=True)]  # fmt: skip
    digests = {Batches([each], batch_size=1).digest for each in (one, *others)}
    assert len(digests) == 3
    assert Batches([one, one], batch_size=1).about().startswith("2 pairs of answers, 6 tokens")
    assert len(set(pad([one, *others]).keys.tolist())) == 2


def test_both_answers_are_shown():
    tokenizer = byte_tokenizer()
    (pair,), _ = read({"prompt": "a", "chosen": "b", "rejected": "c"}, None)
    assert shown(pair, tokenizer, colors=False) == (
        "chosen: a⟦b<|endoftext|>⟧\nrejected: a⟦c<|endoftext|>⟧"
    )
    first = read_data(LABELLED, tokenizer)[0][0]
    assert shown(first, tokenizer, colors=False).startswith(
        "wanted: a⟦one<|endoftext|>⟧\nan answer"
    )
