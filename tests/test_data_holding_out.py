"""Examples that are kept back."""

import json

import pytest
from byte_tokenizer import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from minilora.cli.training import _refuse_shared
from minilora.data import DataFiles, Encoding, Example, hold_out, read_data
from minilora.training.prepare import HeldOut

ROWS = st.lists(st.integers(0, 50), min_size=2, max_size=60, unique=True)


def made(numbers):
    return [Example((n, n + 1), (-100, n + 1)) for n in numbers]


@given(ROWS, st.floats(0.01, 0.99))
def test_every_example_is_on_one_side_and_their_share_is_the_one_asked_for(numbers, share):
    rows = made(numbers)
    count = max(1, round(share * len(rows)))
    if count == len(rows):
        with pytest.raises(ValueError, match="leaves none that differs to learn .*; hold out less"):
            hold_out(rows, share)
        return
    learned, held_out = hold_out(rows, share)
    assert len(held_out) == count
    assert [row for row in rows if row in learned] == learned
    assert [row for row in rows if row not in learned] == held_out


@given(ROWS, st.randoms())
def test_the_order_does_not_matter_and_equal_examples_stay_together(numbers, random):
    rows = made(numbers)
    other = rows * 2
    random.shuffle(other)
    if len(rows) == 1:
        return
    held_out = set(hold_out(rows, 1)[1])
    assert set(hold_out(other, 1)[1]) == held_out
    assert len(hold_out(other, 1)[1]) == 2


@given(ROWS, st.integers(51, 99))
def test_what_is_held_out_stays_so_when_rows_are_added(numbers, new):
    (before,) = hold_out(made(numbers), 1)[1]
    (after,) = hold_out(made([*numbers, new]), 1)[1]
    assert after in (before, *made([new]))


def test_a_number_of_rows_is_a_number():
    assert len(hold_out(made(range(40)), 7)[1]) == 7
    with pytest.raises(ValueError, match="holding out 40 of 40 examples"):
        hold_out(made(range(40)), 40)
    with pytest.raises(ValueError, match="holding out 1 of 3 examples"):
        hold_out(made([1, 1, 1]), 0.1)


# Earlier answers are left out, so that each answer is an example of its own.
LAST = "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}" + (
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def records(kind):
    """Ten records that share a letter with what must stay together with them."""
    for name in "abcdefghij":
        if kind == "conversations":
            turns = [("user", name * 3), ("assistant", name * 4)] * 3
            yield {"messages": [{"role": role, "content": text} for role, text in turns]}
        elif kind == "windows":
            yield {"document": name * 100}
        elif kind == "pairs":
            yield from ({"prompt": name * 3, "chosen": "yes", "rejected": no} for no in "xyz")
        else:
            for n in range(3):
                yield {"prompt": name * 3, "completion": str(n), "label": n == 1}


def letters(example):
    """Of `records`: what stands in it three times in a row."""
    text = bytes(i for i in example.own_ids if i < 256).decode()
    return {name for name in "abcdefghij" if name * 3 in text}


@pytest.mark.parametrize("kind", ["conversations", "windows", "pairs", "labels"])
def test_examples_of_one_record_and_pairs_to_one_prompt_stay_together(kind, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in records(kind)))
    for _ in range(2):  # encoded, and from the cache
        data = DataFiles([file], Encoding(120 if kind == "conversations" else 40))
        rows, _ = data.encode(byte_tokenizer(LAST), tmp_path / "cache")
        assert len(rows) == 30
        learned, held_out = hold_out(rows, 0.2)
        sides = [{name for e in side for name in letters(e)} for side in (learned, held_out)]
        assert not sides[0] & sides[1] and len(held_out) == 6


def test_one_record_is_not_cut_in_two():
    rows, _ = read_data([{"document": "abc" * 100}], byte_tokenizer(), max_length=40)
    with pytest.raises(ValueError, match=r"of one record, .* stay together\); .* cut long records"):
        hold_out(rows, 0.1)


def labelled(*prompts):
    rows = [{"prompt": p * 3, "completion": p + "!", "label": True} for p in prompts]
    return read_data(rows, byte_tokenizer())[0]


def test_an_answer_with_a_label_is_the_same_beside_any_other():
    """Its neighbour's answer, which it is compared with, says nothing of it."""
    before, after = labelled(*"abcdef"), labelled(*"axbxcdef")
    (kept,), (still, *more) = hold_out(before, 1)[1], hold_out(after, 1)[1]
    assert chr(still.input_ids[0]) in (chr(kept.input_ids[0]), "x")
    assert {e.input_ids[0] for e in more} <= {ord("x")}
    train, valid = labelled(*"abc"), labelled(*"xbz")
    assert train[1].input_ids != valid[1].input_ids
    with pytest.raises(ValueError, match=r"found 1 of 3 in both \(the first is example 1\)"):
        _refuse_shared(train, valid)
    (said,) = HeldOut(valid).found(train)
    assert said.startswith("1 of 3 held-out examples are trained on too (first: example 1 of")
