"""What is said of data before a run: lengths, duplicates, and every learned token."""

import itertools
import json
import re
from collections import Counter

import pytest
from byte_tokenizer import CHATML, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from test_running_generation import spaced_tokenizer

from minilora.cli.command import main
from minilora.data import Example, duplicates, endless, lengths, read_data, shown
from minilora.data.inspection import near_pairs
from minilora.loading.saving import save_pretrained
from minilora.models import Llama, LlamaConfig

TOKENIZER = byte_tokenizer(CHATML)
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def examples(*texts):
    return read_data([{"text": text} for text in texts], TOKENIZER)[0]


def test_lengths_are_those_of_the_examples():
    rows = [Example([1] * n, [-100] * m + [1] * (n - m)) for n, m in ((5, 1), (9, 8), (7, 2))]
    assert lengths(rows) == (
        "5 to 9 long (median 7, 95 % at most 9); 1 to 5 learned (median 4, 95 % at most 5)"
    )


def test_duplicates_are_found_within_and_between_sets():
    sets = {
        "train": examples("One two", "three", "one  TWO\n", "1+1", "1-1", "three"),
        "valid": examples("four", "three"),
        "test": examples("five"),
    }
    assert duplicates(sets, TOKENIZER) == [
        "train: 2 examples occur again: 0 = 2, 1 = 5",
        "train and valid share 1 example: 1 = 1",
    ]


def test_many_duplicates_are_counted_and_five_are_named():
    rows = examples(*"abcdefg")
    found = duplicates({"a": rows, "b": rows}, TOKENIZER)
    assert found == ["a and b share 7 examples: 0 = 0, 1 = 1, 2 = 2, 3 = 3, 4 = 4 and 2 more"]


WORDS = st.sets(st.sampled_from([f"w{i}" for i in range(14)]), min_size=1)


@given(st.lists(WORDS, max_size=12))
def test_rows_that_are_nearly_the_same_are_those_that_share_four_fifths(rows):
    """The oracle compares every two."""
    counts = Counter(word for words in rows for word in words)
    kept = [{word for word in words if counts[word] <= 10} for words in rows]
    places = [("a", i) for i in range(len(rows))]
    wanted = {
        (places[i], places[j])
        for i, j in itertools.combinations(range(len(rows)), 2)
        if min(len(kept[i]), len(kept[j])) >= 4
        and 5 * len(kept[i] & kept[j]) >= 4 * len(kept[i] | kept[j])
    }
    found = list(near_pairs(list(zip(places, rows, strict=True))))
    assert len(found) == len(set(found)) and set(found) == wanted


def test_nearly_the_same_rows_are_said_after_the_same_ones():
    text = "the quick brown fox jumps over a lazy dog tonight"
    sets = {
        "train": examples(text, f"{text} again", "something else", text.upper()),
        "valid": examples(text.replace("quick", "slow")),
    }
    assert duplicates(sets, TOKENIZER) == [
        "train: 1 example occurs again: 0 = 3",
        "train: 1 pair of rows that are nearly the same: 0 ~ 1",
        "train and valid: 1 pair of rows that are nearly the same: 0 ~ 0",
    ]


def test_what_all_rows_say_makes_them_not_alike():
    asked = "you are a helpful assistant who answers in one word"
    rows = examples(*(f"{asked} {word}{word}" for word in "abcdefghijklmnopqrst"))
    assert duplicates({"train": rows}, TOKENIZER) == []


def test_answers_without_an_end_are_counted():
    rows = read_data([{"text": "abc"}, {"text": "a"}], TOKENIZER, max_length=3)[0]
    assert endless(rows, TOKENIZER.stop_ids) == 1
    assert endless(read_data([{"messages": TALK}], TOKENIZER)[0], TOKENIZER.stop_ids) == 0
    pair = {"prompt": "ask", "chosen": " a long answer that is cut", "rejected": " no"}
    for length, count in ((99, 0), (12, 1)):
        rows = read_data([pair], TOKENIZER, max_length=length)[0]
        assert endless(rows, TOKENIZER.stop_ids) == count, "the chosen one is looked at, too"


def test_what_is_shown_keeps_spaces_and_whole_characters():
    """Where a part alone would be decoded without its space, or as half a character."""
    spaced = spaced_tokenizer()
    ids = spaced.encode("a b é", special=False)
    for start in range(1, len(ids)):
        row = Example(ids, [-100] * start + ids[start:])
        text = shown(row, spaced, colors=False)
        assert re.sub("[⟦⟧]", "", text) == spaced.decode(ids)
        assert "\ufffd" not in text


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), min_size=1))
def test_what_is_shown_as_learned_is_what_is_learned(letters):
    """The oracle walks over letters; the first label never counts."""
    ids = [TOKENIZER.encode(letter, special=False)[0] for letter, _ in letters]
    row = Example(ids, [i if known else -100 for i, (_, known) in zip(ids, letters, strict=True)])
    text = shown(row, TOKENIZER, colors=False)
    assert re.sub("[⟦⟧]", "", text) == "".join(letter for letter, _ in letters)
    learned = "".join(re.findall("⟦([^⟦⟧]*)⟧", text))
    assert learned == "".join(letter for letter, known in letters[1:] if known)
    assert "⟧⟦" not in text


def test_colours_part_what_is_given_from_what_is_learned():
    row = read_data([{"prompt": "ab", "completion": "c"}], TOKENIZER)[0][0]
    wanted = "\033[2mab\033[0m\033[1;32mc<|endoftext|>\033[0m"
    assert shown(row, TOKENIZER, colors=True) == wanted


@pytest.fixture
def folder(tmp_path):
    config = LlamaConfig(260, 8, 8, 1, 2, 1, 4, 64)
    save_pretrained(Llama(config), tmp_path / "model", TOKENIZER)
    (tmp_path / "t.csv").write_text("question,answer\nhi,hello\nho,\n")
    (tmp_path / "v.jsonl").write_text(json.dumps({"question": "HI", "answer": "hello"}) + "\n")
    return tmp_path


def test_the_command_reads_no_weights(folder, capsys):
    (folder / "model" / "model.safetensors").unlink()
    words = ["data", folder / "t.csv", "--model", folder / "model", "--valid", folder / "v.jsonl"]
    assert main([*map(str, words), "--skip-bad", "1", "--show", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "train: 1 example, tokens: 28 long; 7 learned",
        "valid: 1 example, tokens: 28 long; 7 learned",
        "train and valid share 1 example: 0 = 0",
        "learned is what stands in ⟦⟧:",
        "<|im_start|>user",
        "hi<|im_end|>",
        "<|im_start|>assistant",
        "⟦hello<|im_end|>",
        "⟧",
        "--------------------",
    ]
    assert "t.csv:3: answer must not be empty" in err


def test_the_command_refuses_bad_rows(folder, capsys):
    assert main(["data", str(folder / "t.csv"), "--model", str(folder / "model")]) == 2
    assert "t.csv:3: answer must not be empty; mend these rows" in capsys.readouterr().err
    words = ["--map", "prompt:a", "--show", "0"]
    assert main(["data", str(folder / "t.csv"), "--model", str(folder / "model"), *words]) == 2
    said = capsys.readouterr().err
    assert "--map takes NAME=FIELD, as in question=frage where your rows call the" in said
    assert "found 'prompt:a'" in said
    words = ["--map", "prompt=a", "--map", "prompt=b"]
    assert main(["data", str(folder / "t.csv"), "--model", str(folder / "model"), *words]) == 2
    assert "--map takes each name once, found 'prompt' twice" in capsys.readouterr().err


def test_the_command_says_what_is_lacking(folder, capsys):
    """Nothing held out, and answers that are cut."""
    words = ["data", str(folder / "v.jsonl"), "--model", str(folder / "model"), "--show", "0"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "no --valid: no rows are held out" in said and "without a token" not in said
    assert main([*words, "--max-length", "25"]) == 0
    said = capsys.readouterr().out
    assert "train: 1 example without a token at the end that stops generation (cut at" in said
