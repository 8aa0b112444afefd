"""Messages: one line of readable length, whatever they quote."""

import pytest
from tokenizers import Tokenizer as Backend

from minilora.files.json_text import parse_json
from minilora.files.wording import one_line, reading, said, short


def test_short_quotes_at_most_its_limit():
    assert short("a\nb") == r"'a\nb'"
    assert short("x" * 10**6) == "'" + "x" * 79 + "… (1,000,002 characters)"
    assert short(10**5000) == "a int too large to show"
    nested = []
    for _ in range(10**5):
        nested = [nested]
    assert short(nested) == "a list too large to show"


def test_one_line_has_no_breaks_and_no_control_characters():
    assert one_line("a\n  b\tc") == "a b c"
    assert one_line("\x1b[2J\u202e\x07é") == r"\x1b[2J\u202e\x07é"
    assert one_line("x" * 700) == "x" * 599 + "…"
    assert one_line("y" * 10**8, 5) == "yyyy…"


@pytest.mark.parametrize(
    "error", [KeyError("a"), OverflowError("b"), UnicodeDecodeError("utf-8", b"", 0, 1, "c"),
              RecursionError("d"), AttributeError("e\nf"), IndexError()],
)  # fmt: skip
def test_what_a_library_makes_of_content_names_the_file(error):
    message = r"^the file must be whole, found otherwise: \w+Error, "
    with pytest.raises(ValueError, match=message), reading("the file"):
        raise error


@pytest.mark.parametrize("error", [ValueError("ours"), OSError(28, "full"), KeyboardInterrupt()])
def test_errors_with_words_of_their_own_pass(error):
    with pytest.raises(type(error)) as caught, reading("the file"):
        raise error
    assert caught.value is error


def test_a_panic_of_a_library_in_rust_is_a_value_error():
    text = (
        '{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer":'
        '{"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "pre_tokenizer": null,'
        '"post_processor": null, "decoder": null, "model": {"type": "WordLevel", "vocab": {"a": 0},'
        '"unk_token": "a"}}'
    )
    message = "the tokenizer must be whole, found otherwise: PanicException, "
    with pytest.raises(ValueError, match=message), reading("the tokenizer"):
        Backend.from_str(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "it must be JSON, found otherwise: Expecting property name"),
        (b"\xff{}", "it must be JSON, found otherwise: 'utf-8' codec can't decode"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is given twice"),
        ("[" * 10**5, "it must be JSON, found otherwise: maximum recursion depth"),
        ("1" * 10**4, "it must be JSON, found otherwise: Exceeds the limit"),
    ],
)
def test_json_that_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text, "it")
    assert parse_json('{"a": [1, {"a": 2}]}', "it") == {"a": [1, {"a": 2}]}


def test_an_error_of_the_system_is_said_without_its_number(tmp_path):
    with pytest.raises(OSError) as caught:
        (tmp_path / "none").read_text()
    assert said(caught.value) == (
        f"{tmp_path / 'none'} must be a file or folder that can be used, found: No such file or "
        f"directory"
    )
    assert said(OSError("ours")) == "ours"
