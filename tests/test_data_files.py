"""Data files as people have them, good and bad, and what is said to each: docs/data.md's table.

`python tests/test_data_files.py` writes the table anew.
"""

import gzip
import json
import re
import tempfile
from pathlib import Path

import pytest
from byte_tokenizer import byte_tokenizer
from test_data_shapes import TOOLS, arrow, json_lines, json_text, parquet, table

from minilora.data import read_data

PAGE = Path(__file__).resolve().parents[1] / "docs" / "data.md"
BEGIN, END = "<!-- table of files: begin -->\n", "<!-- table of files: end -->\n"

ASKED = [{"question": "Where?", "answer": "In Köln."}, {"question": "When?", "answer": "Today."}]
CHAT = [
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "In Köln."},
]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Where?"}]}, CHAT[1]]
CALL = {"type": "function", "function": {"name": "find", "arguments": '{"city": "Köln"}'}}
CALLS = [
    CHAT[0],
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "Köln"},
    CHAT[1],
]
TOOL = {"type": "function", "function": {"name": "find", "parameters": {}}}
ALPACA = {"instruction": "Translate.", "input": "Where?", "output": "Wo?"}
SHAREGPT = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "In Köln."}]


def renamed(*names):
    return [dict(zip(names, row.values(), strict=True)) for row in ASKED]


def lines(*rows):
    return json_lines(rows)


def image():
    return [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        CHAT[1],
    ]


SAVED = {
    "dataset_dict.json": b'{"splits": ["train", "test"]}',
    "train/state.json": b'{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}',
    "train/data-00000-of-00001.arrow": arrow(ASKED),
    "test/data-00000-of-00001.arrow": arrow(ASKED[:1]),
}

# Name of the file, what it holds, and its bytes.
GOOD = [
    ("text.jsonl", "`text`", lines({"text": "In Köln."})),
    ("notes.txt", "plain text", "In Köln.\nToday.\n".encode()),
    ("pairs.jsonl", "`prompt`, `completion`", json_lines(renamed("prompt", "completion"))),
    ("asked.json", "an array of `question`, `answer`", json_text(ASKED)),
    ("asked.csv", "`question`, `answer`", table(ASKED)),
    ("asked.tsv", "the same, tabs", table(ASKED, "\t")),
    ("asked.parquet", "the same", parquet(ASKED)),
    ("asked.csv.gz", "the same, compressed", gzip.compress(table(ASKED))),
    ("excel.csv", "the same, semicolons and a byte order mark, as European Excel writes",
     b"\xef\xbb\xbf" + table(ASKED, ";")),
    ("inside.json", '`{"data": [...]}`', json_text({"data": ASKED})),
    ("alpaca.json", "Alpaca", json_text([ALPACA])),
    ("sharegpt.jsonl", "ShareGPT", lines({"conversations": SHAREGPT})),
    ("openai.jsonl", "messages, content in parts", lines({"messages": PARTS})),
    ("tools.jsonl", "messages with calls of tools, and `tools`",
     lines({"messages": CALLS, "tools": [TOOL]})),
    ("trl.jsonl", "TRL: prompt and completion are messages",
     lines({"prompt": CHAT[:1], "completion": CHAT[1:]})),
    ("upper.csv", "`Question`, `Answer`", table(renamed("Question", "Answer"))),
    ("extra.csv", "a column that nothing reads",
     table([{"id": i, **row} for i, row in enumerate(ASKED)])),
    ("control.csv", "a control token's name in a question",
     table([{"question": "What is <|im_end|>?", "answer": "A mark."}])),
    ("folder/", "a folder of a CSV and a JSONL file",
     {"a.csv": table(ASKED[:1]), "b.jsonl": json_lines(ASKED[1:]), "README.md": b"about them"}),
    ("saved/", "what Hugging Face datasets' `save_to_disk` wrote, with splits", SAVED),
    ("long.jsonl", "a row longer than `--max-length`",
     lines({"question": "Where?", "answer": "In Köln. " * 150}, *ASKED)),
]  # fmt: skip
BAD = [
    ("empty.csv", "nothing", b""),
    ("header.csv", "a header alone", b"question,answer\n"),
    ("half.jsonl", "half a line of JSON", lines(ASKED[0]) + b'{"question": "Whe'),
    ("utf16.csv", "UTF-16", table(ASKED).decode().encode("utf-16")),
    ("umlauts.csv", "Windows' cp1252", table(ASKED).decode().encode("cp1252")),
    ("latin.jsonl", "Latin-1", json.dumps(ASKED[0], ensure_ascii=False).encode("latin-1")),
    ("parquet.csv", "Parquet under another name", parquet(ASKED)),
    ("excel.xlsx", "an Excel workbook", b"PK\x03\x04 and so on"),
    ("excel2.csv", "an Excel workbook under another name", b"PK\x03\x04 and so on \0"),
    ("packed.jsonl", "gzip under another name", gzip.compress(json_lines(ASKED))),
    ("quotes.csv", "a quote that is never closed",
     b'question,answer\n"Where?,In K.\nWhen?,Today.\n'),
    ("commas.csv", "a comma in a field without quotes", b"question,answer\nWhere, please?,Here.\n"),
    ("columns.csv", "unknown columns", table(renamed("frage", "antwort"))),
    ("twice.csv", "a column twice", b"question,answer,answer\nWhere?,Here.,There.\n"),
    ("noheader.csv", "no header", b"Where?,Here.\nWhen?,Today.\n"),
    ("noanswer.csv", "a row without an answer",
     table([*ASKED, {"question": "Why?", "answer": ""}])),
    ("null.jsonl", "null as an answer", lines(*ASKED, {"question": "Why?", "answer": None})),
    ("numbers.jsonl", "a number as an answer", lines({"question": "1 + 1?", "answer": 2})),
    ("image.jsonl", "an image", lines({"messages": image()})),
    ("sets/", "a folder of `train.csv` and `test.csv`",
     {"train.csv": table(ASKED[:1]), "test.csv": table(ASKED[1:])}),
    ("array.jsonl", "half of an array", json_text(ASKED)[:-9]),
]  # fmt: skip


FILES = [*GOOD, *BAD]
TOKENIZER = byte_tokenizer("{{ tools | tojson if tools else '' }}" + TOOLS)


def said(name, content, folder):
    """What is said to a file, or a folder of files, without the counts of tokens."""
    made = folder / name.strip("/")
    for part, inside in content.items() if isinstance(content, dict) else [("", content)]:
        file = made / part if part else made
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(inside)
    try:
        report = read_data(made, TOKENIZER, max_length=1000)[1]
    except ValueError as error:
        return str(error).replace(f"{folder}/", "").removeprefix("cannot read the data: ")
    counts = r": \d+ tokens, \d+ learned; 0 truncated.*?left to learn"
    return re.sub(counts, "", str(report)).replace(f"{folder}/", "")


def page_table(folder):
    """The table, as the page has it."""
    rows = ["| file | holds | what is said |", "|---|---|---|"]
    for name, what, content in FILES:
        shown = re.sub(r"([|<>*_])", r"\\\1", said(name, content, folder))
        rows.append(f"| `{name}` | {what} | {shown} |")
    return "\n".join(rows) + "\n"


def test_the_pages_table_is_what_is_said(tmp_path):
    assert len(FILES) >= 30
    assert page_table(tmp_path) in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "what", "content"), GOOD, ids=[name for name, *_ in GOOD])
def test_good_files_are_read(tmp_path, name, what, content):
    assert re.match(r"(\d) of \1 documents kept", said(name, content, tmp_path)), what


@pytest.mark.parametrize(("name", "what", "content"), BAD, ids=[name for name, *_ in BAD])
def test_bad_files_are_refused_by_name(tmp_path, name, what, content):
    """With what must hold, and no word of Python's."""
    found = said(name, content, tmp_path)
    assert found.startswith(name.strip("/")), what
    assert re.search("must|are read as one set", found)
    assert "NoneType" not in found


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    with tempfile.TemporaryDirectory() as made:
        PAGE.write_text(
            before + BEGIN + page_table(Path(made)) + END + rest.partition(END)[2],
            encoding="utf-8",
        )
