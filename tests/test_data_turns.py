"""What is learned of a conversation: any template, marked turns, fields, text templated before."""

import pytest
from byte_tokenizer import (
    BEGIN,
    CHATML,
    END,
    START,
    STOP,
    byte_tokenizer,
    encode_one,
    pieces,
    talk,
    turn,
)
from hypothesis import given
from hypothesis import strategies as st

from minilora.data import read_data

HYBRID = (  # reasoning stands in the last answer alone
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last %}"
    "{{ m.content }}{% else %}{{ m.content.split('</think>')[-1].lstrip() }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PRIMED = (  # the prompt begins the reasoning, which finished turns don't show
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content.split('</think>')[-1].lstrip() + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
MOVING = (  # the system prompt goes into the last question
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ 'u:' + (messages[0].content if loop.index0 == ns.last else '') "
    "+ m.content + '\na:' }}{% elif m.role == 'assistant' %}{{ m.content + '<|im_end|>' }}"
    "{% endif %}{% endfor %}"
)
THINKING = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\n4<|im_end|>"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "<think>\nagain\n</think>\n\n6"},
]


def parted(examples):
    return [(list(example.input_ids), list(example.labels)) for example in examples]


@pytest.mark.parametrize("template", ["HYBRID", "PRIMED"])
def test_rewritten_answers_get_examples_of_their_own(template):
    """Each answer is learned behind the history and the prompt that generation will see."""
    tokenizer = byte_tokenizer({"HYBRID": HYBRID, "PRIMED": PRIMED}[template])
    found, report = read_data([{"messages": THINKING}], tokenizer, max_length=999)
    begun = [(START, False), ("assistant\n", False), ("<think>\n", template == "HYBRID")]
    end = [(STOP, True), ("\n", True)]
    first = [*turn("user", "2+2?", False), *begun, ("add\n</think>\n\n4<|im_end|>", True), *end]
    second = [
        *turn("user", "2+2?", False),
        *turn("assistant", "4<|im_end|>", False),
        *turn("user", "3+3?", False),
        *begun,
        ("again\n</think>\n\n6", True),
        *end,
    ]
    assert parted(found) == [pieces(*first), pieces(*second)]
    assert (report.documents, report.fully_masked) == (1, 0)
    assert any("rewrites earlier turns, so each answer is an exa" in note for note in report.notes)
    for i, example in enumerate(found):  # as generation asks
        asked = tokenizer.encode_chat(THINKING[: 2 * i + 1])
        assert list(example.input_ids[: len(asked)]) == asked
        assert set(example.labels[: len(asked)]) == {-100} and example.labels[len(asked)] >= 0
    whole, _ = encode_one({"messages": THINKING}, tokenizer, completion_only=False)
    assert whole == (pieces(*second)[0],) * 2  # the reasoning of the last answer too


def test_a_moving_system_prompt_splits_a_conversation():
    messages = [{"role": "system", "content": "S"}, *[{**m, "content": "x"} for m in THINKING]]
    found, _ = read_data([{"messages": messages}], byte_tokenizer(MOVING), max_length=99)
    end = [("x", True), (STOP, True)]
    assert parted(found) == [
        pieces(("u:Sx\na:", False), *end),
        pieces(("u:x\na:x", False), (STOP, False), ("u:Sx\na:", False), *end),
    ]


def test_an_answer_must_go_on_from_the_prompt():
    tokenizer = byte_tokenizer(PRIMED)
    record = {"messages": talk("user", "assistant")}
    message = (
        r"record 1: messages\[1\]: an answer must go on from the prompt that the chat template "
        r"writes, which ends with '<think>\\n', found '1'; begin the content with that, or use"
    )
    with pytest.raises(ValueError, match=message):
        read_data([{"text": "a"}, record], tokenizer, max_length=99)
    found, report = read_data([{"text": "a"}, record], tokenizer, max_length=99, skip_bad=1)
    assert len(found) == 1 and "left out: record 1: messages[1]" in str(report)
    whole, _ = encode_one(record, tokenizer, completion_only=False)
    plain = tokenizer.encode_chat(record["messages"], add_generation_prompt=False)
    assert whole[0] == whole[1] == plain


def test_a_template_that_drops_part_of_an_answer_is_named():
    template = PRIMED.replace("<think>\n", "")
    record = {"messages": THINKING[2:]}
    found, report = encode_one(record, byte_tokenizer(template))
    assert found == pieces(*turn("user", "3+3?", False), *turn("assistant", "6", True))
    said = "note: the chat template leaves out or changes part of an answer (record 0)"
    assert said in str(report)
    assert "leaves out" not in str(encode_one(record, byte_tokenizer(HYBRID))[1])


ROLES_ONLY = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("only", [True, False])
def test_a_template_without_an_end_is_named(only):
    record = {"messages": talk("user", "assistant", "user", "assistant")}
    said = "no stop token is learned, so generation will not end by itself: the chat template wri"
    _, report = encode_one(record, byte_tokenizer(ROLES_ONLY), completion_only=only)
    assert said in str(report)
    _, report = encode_one(record, byte_tokenizer(CHATML), completion_only=only)
    assert report.notes == ()


# --- fields that change training ----------------------------------------------------------------

MARKS = ("weight", "train", "trainable", "training", "loss", "loss_mask")


@given(
    st.sampled_from(MARKS), st.sampled_from([0, False, 0.0]), st.lists(st.booleans(), min_size=1)
)
def test_marked_turns_are_not_learned(mark, off, kept):
    """What follows the last learned turn is left out; all of the text where prompts are learned."""
    tokenizer, messages, parts = byte_tokenizer(CHATML), [], []
    for i, keep in enumerate(kept):
        messages += [{"role": "user", "content": f"q{i}"}]
        messages += [{"role": "assistant", "content": f"a{i}", mark: 1 if keep else off}]
        parts.append((turn("user", f"q{i}", False), turn("assistant", f"a{i}", keep)))
    records = [{"messages": messages}]
    found, report = read_data(records, tokenizer, max_length=9999)
    last = max((i for i, keep in enumerate(kept) if keep), default=-1)
    wanted = [part for pair in parts[: last + 1] for each in pair for part in each]
    assert parted(found) == ([pieces(*wanted)] if any(kept) else [])
    assert report.fully_masked == (not any(kept))
    assert len(report.notes) == (not all(kept))
    found, _ = read_data(records, tokenizer, max_length=9999, completion_only=False)
    wanted = []
    for keep, (asked, answer) in zip(kept, parts, strict=True):
        wanted += [(what, True) for what, _ in asked]
        wanted += [(what, keep or i < 2) for i, (what, _) in enumerate(answer)]
    assert parted(found) == [pieces(*wanted)]


def test_a_marked_turn_that_is_rewritten_is_refused_where_prompts_are_learned():
    messages = [dict(message) for message in THINKING]
    messages[1]["weight"] = 0
    found, _ = encode_one({"messages": messages}, byte_tokenizer(HYBRID))
    assert found[1].count(STOP) == 1
    with pytest.raises(ValueError, match=r"messages\[1\]: a turn that is marked must keep its pla"):
        encode_one({"messages": messages}, byte_tokenizer(HYBRID), completion_only=False)


def test_fields_go_to_the_template_that_reads_them_and_others_are_named():
    template = (
        "{% if tools %}{{ tools[0].name }}{% endif %}{% if not think %}-{% endif %}"
        + CHATML.replace("message['content']", "message['content'] + (message.name or '')")
    )
    tokenizer = byte_tokenizer(template)
    row = {"messages": [*talk("user"), {"role": "assistant", "content": "b", "name": "N"}]}
    plain, report = encode_one(row, tokenizer)
    assert report.notes == ()
    assert plain == pieces(("-", False), *turn("user", "0", False), *turn("assistant", "bN", True))
    row["messages"][0] |= {"weight": 1, "extra": 2, "nothing": None}
    more = {"id": 7, "weight": 2, "documents": None, "chat_template_kwargs": {"think": 1, "x": 0}}
    for tools in ([{"name": "<|im_end|>T"}], '[{"name": "<|im_end|>T"}]'):
        found, report = encode_one({**row, **more, "tools": tools}, tokenizer)
        asked = [("<|im_end|>T", False), *turn("user", "0", False)]
        assert found == pieces(*asked, *turn("assistant", "bN", True))
        fields = "messages.weight of user turns (1), messages.extra (1)"
        assert f"with how often they occur: id (1), weight (1), x (1), {fields}" in str(report)
    for key, value, message in (
        ("tools", "[", r"record 0: tools must be JSON, found '\['"),
        ("chat_template_kwargs", [1], r"chat_template_kwargs must be an object, found \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_one({**row, key: value}, tokenizer)
    _, report = encode_one({"text": "ab", "loss_mask": [1, 0], "source": "x"}, tokenizer)
    assert "ignored fields, with how often they occur: loss_mask (1), sou" in str(report)


# --- text that was put through a chat template before -------------------------------------------

ASKED = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
ASKED_PIECES = [*turn("user", "x", False), (START, False), ("assistant\n", False)]


@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|>\n"])
@pytest.mark.parametrize("begin", [False, True])
def test_templated_text_keeps_its_control_tokens(begin, end):
    """No second beginning, no second end."""
    tokenizer = byte_tokenizer(CHATML, begin=begin, eos="<|im_end|>")
    first = [(BEGIN, False)] * begin
    ending = [(STOP, True)] + [("\n", True)] * end.endswith("\n")
    wanted = pieces(*first, *ASKED_PIECES, ("y", True), *ending)
    found, report = encode_one({"prompt": ASKED, "completion": "y" + end}, tokenizer)
    assert found == wanted
    assert "are read as tokens, as the text begins like the chat template's" in str(report)
    found, _ = encode_one({"text": ASKED + "y" + end}, tokenizer)
    assert found == (wanted[0],) * 2
    if begin:  # rendered by a template that begins with the token itself
        record = {"text": "<|begin|>" + ASKED + "y" + end}
        found, _ = encode_one(record, tokenizer, parse_special=True)
        assert found == (wanted[0],) * 2


def test_names_of_control_tokens_read_as_text_are_named():
    tokenizer = byte_tokenizer(CHATML)
    for record in (
        {"text": "x" + ASKED},  # begins otherwise
        {"text": "<|im_start|> is a token"},  # a single name
        {"text": "<|endoftext|><|endoftext|>"},  # which the template does not write
        {"prompt": "a", "completion": "<|im_end|>"},
        {"messages": [*talk("user"), {"role": "assistant", "content": "<|im_end|>"}]},
    ):
        (ids, _), report = encode_one(record, tokenizer)
        assert "names of control tokens are read as text" in str(report)
        assert sum(i >= 256 for i in ids) == (4 if "messages" in record else 1)
    (ids, _), report = encode_one({"text": ASKED}, tokenizer, parse_special=False)
    assert [i for i in ids if i >= 256] == [END] and "are read as text" in str(report)
    (ids, _), report = encode_one({"text": "a<|im_start|>b"}, tokenizer, parse_special=True)
    assert ids == pieces(("a", True), (START, True), ("b", True), (END, True))[0]
    assert report.notes == ()
