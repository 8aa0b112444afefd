"""The token cache: same files, tokenizer and options give the same tokens, anything else not."""

import os

import pytest
from test_cli import tiny_folder

from minilora.data import Encoding, Example
from minilora.data.records import EncodeReport
from minilora.data.token_cache import cached
from minilora.loading.model import load_model

REPORT = EncodeReport(2, 8, 7, 0, 0, 5, ("a note",))
MADE = [Example((1, 2, 3), (-100, 2, 3)), Example((4,) * 5, (4,) * 5)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_model(tiny_folder(tmp_path_factory.mktemp("model") / "m"))[1]


@pytest.fixture
def ask(tmp_path, tokenizer):
    file = tmp_path / "a.jsonl"
    file.write_text("content")
    calls = []

    def make():
        calls.append(1)
        return MADE, REPORT

    def asked(tokenizer=tokenizer, options=None, files=(file,)):
        before = len(calls)
        examples, report = cached(
            tmp_path / "cache", files, tokenizer, options or Encoding(9), make
        )
        known = len(calls) == before
        assert report.notes == ("a note", "from the cache")[: 1 + known]
        assert examples == MADE and str(report).startswith(str(REPORT))
        return known

    return asked


def test_cache_is_keyed_by_content_tokenizer_and_options(ask, tmp_path, tokenizer):
    assert [ask(), ask()] == [False, True]
    os.utime(tmp_path / "a.jsonl", (1, 1))
    assert ask()
    assert not ask(options=Encoding(8))
    (tmp_path / "b.jsonl").write_text("content")
    assert ask(files=[tmp_path / "b.jsonl"])  # the name does not matter
    for other in ("a.txt", "a.txt.gz", "a.jsonl.gz"):  # each would be read in another way
        (tmp_path / other).write_text("content")
        assert not ask(files=[tmp_path / other])
    (tmp_path / "a.jsonl").write_text("Content")
    assert [ask(), ask()] == [False, True]

    class Other:
        stop_ids = tokenizer.stop_ids

        def save(self, folder):
            tokenizer.save(folder)
            (folder / "tokenizer_config.json").write_text("{}")

    assert [ask(tokenizer=Other()), ask(tokenizer=Other())] == [False, True]
    Other.stop_ids = tokenizer.stop_ids | {3}  # as generation_config.json was mended
    assert [ask(tokenizer=Other()), ask(tokenizer=Other())] == [False, True]


@pytest.mark.parametrize("how", ["flip", "cut", "empty"])
def test_cache_makes_a_damaged_entry_anew(ask, tmp_path, how):
    assert not ask()
    (entry,) = (tmp_path / "cache").iterdir()
    content = bytearray(entry.read_bytes())
    content[-3] ^= 1
    entry.write_bytes({"flip": content, "cut": content[:-9], "empty": b""}[how])
    assert [ask(), ask()] == [False, True]


def test_cache_that_can_not_be_written_is_done_without(ask, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert [ask(), ask()] == [False, False]
