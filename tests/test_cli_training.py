"""`minilora train`: held-out rows, samples in conversations, boards, and flags that are none."""

import io
import json
import sys

import pytest
import test_cli
from byte_tokenizer import CHATML, byte_tokenizer
from test_cli import run, tiny_folder

from minilora.cli import run_file
from minilora.cli.command import build_parser
from minilora.cli.training import form_of, is_chat
from minilora.data import read_data
from minilora.loading import read_tokenizer

letters, no_model = test_cli.letters, test_cli.no_model  # fixtures

TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role[0] }} {{ m.content }} <end>{% endfor %}"
    "{% if add_generation_prompt %}<s> a {% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    return tiny_folder(tmp_path / "model")


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    words = "abcdefgh"
    texts = [" ".join(words[i % 8 :] + words[: i % 5]) for i in range(20)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.mark.parametrize(("share", "count"), [("10%", 2), ("0.1", 2), ("4", 4)])
def test_rows_are_held_out_where_asked(folder, rows, tmp_path, capsys, share, count):
    train = ["train", folder, "--data", rows, "--max-length", 16, "--max-steps", 2]
    assert run(*train, "--hold-out", share, "--out", tmp_path / "a") == 0
    said = capsys.readouterr()
    assert "held out before:" in said.out and "nothing is held out" not in said.err
    assert "held-out examples are trained on too" not in said.err
    assert f"held out: {count} of 20 examples" in said.err


def test_hold_out_is_a_share_or_a_number_and_stands_alone(rows, tmp_path, capsys, no_model):
    train = ["train", "model", "--data", rows, "--out", tmp_path / "a"]
    for word in ("0", "100%", "-5%", "half", "1.5", "nan", "inf"):
        with pytest.raises(SystemExit):
            run(*train, f"--hold-out={word}")
        said = capsys.readouterr().err
        assert "must be a share below 100%, as 5%, or a number of rows, found" in said
    for other in (("--valid", rows), ("--stream",)):
        assert run(*train, "--hold-out", "5%", *other) == 2
        said = capsys.readouterr().err
        assert f"--hold-out takes rows away from --data, found {other[0]} too" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "m", "--dta", "x.jsonl", "--out", "o"],
         "minilora train: unknown argument '--dta'; nearest: --data (see minilora train --help)\n"),
        (["train", "m", "--data", "x.jsonl", "--out", "o", "--epoch=3", "--learning-rate", "1"],
         "minilora train: unknown argument '--learning-rate'"),
        (["chat", "m", "--adaptor", "a"], "unknown argument '--adaptor'; nearest: --adapter"),
        (["train", "m", "--data", "x"], "the following arguments are required: --out"),
        (["generate", "m", "x", "--system", "a", "--sys=b"],
         "--system must be given once, found it twice; leave out one"),
        (["train", "m", "--data", "x", "--out", "o", "--rank", "8", "--r", "4"],
         "--r must be given once, found it twice; leave out one"),
        (["train", "m", "--data", "x", "--out", "o", "--rslora", "--no-rslora"],
         "--no-rslora contradicts what was given before it; leave one out"),
        (["train", "m", "--data", "x", "--out", "o", "--block-size", "32"],
         "--block-size does nothing without --quantize, found none; pass it, or leave --block"),
        (["generate", "m", "x", "--top-k", "4"], "--top-k does nothing without --temperature"),
        (["chat", "m", "--top-p", "0.5"], "--top-p does nothing without --temperature"),
        (["merge", "m", "--out", "o", "--type", "q8_0"], "--type does nothing without --gguf"),
        (["compare", "m", "o", "--data", "x", "--max-new-tokens", "4"],
         "--max-new-tokens does nothing without --right"),
        (["explain", "o", "--train", "x", "--ablate", "4"], "--ablate does nothing without --data"),
        (["explain", "o", "--words", "x"], "--words does nothing without --data"),
        (["explain", "o", "--examples", "4"],
         "--examples does nothing without --data or --train or --outside"),
        (["plan", "m", "--block-size", "32"], "--block-size does nothing without --quantize"),
    ],
)  # fmt: skip
def test_a_flag_that_is_none_is_one_line_with_the_nearest(words, said, capsys, no_model):
    with pytest.raises(SystemExit) as ended:
        run(*words)
    found = capsys.readouterr().err
    assert ended.value.code == 2 and said in found and found.count("\n") == 1


def test_a_list_that_is_given_in_parts_is_added_up():
    text = "train m --out o --data a --valid v w --dat b c --sample p --valid u --sample q "
    text += "--targets q_proj --map prompt=a --targets k_proj v_proj --map completion=b"
    words, parser = text.split(), build_parser()
    for _ in range(2):  # each time anew
        found = parser.parse_args(words)
        assert (found.data, found.valid, found.sample) == (list("abc"), list("vwu"), list("pq"))
        assert vars(found)["AdapterConfig.targets"] == ["q_proj", "k_proj", "v_proj"]
        assert found.map == ["prompt=a", "completion=b"]
    words = "tune m --out o --data a --valid v --rates 1 --rates 2 3 --vary r=1 --vary alpha=2"
    found = parser.parse_args(words.split())
    assert found.rates == [1, 2, 3] and found.vary == ["r=1", "alpha=2"]
    words = "chat m --adapter a b --adapter c"
    assert [*map(str, parser.parse_args(words.split()).adapter)] == list("abc")


def test_what_a_format_does_not_read_is_not_passed_on(folder, tmp_path):
    words = ["quantize", folder, "--format", "nf4", "--out"]
    assert run(*words, tmp_path / "a", "--block-size", 32) == 0
    rows = json.loads((tmp_path / "a" / "quantization.json").read_text())["layers"]
    assert {row["block_size"] for row in rows.values()} == {32}


def test_a_prompt_may_begin_with_dashes():
    prompt = "-- select all users"
    options = build_parser().parse_args(["generate", "m", prompt])
    assert options.prompts == [prompt]
    words = ["chat", "m", "--system", "--short answers"]
    assert build_parser().parse_args(words).system == "--short answers"


def test_a_missing_board_is_said_before_the_model(letters, tmp_path, capsys, no_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    train = ["train", "model", "--data", letters, "--out", tmp_path / "a"]
    assert run(*train, "--log", "wandb") == 2
    assert "--log wandb (in Python: log='wandb') needs wandb" in capsys.readouterr().err


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_run_toml_shows_what_was_chosen(folder, rows, tmp_path):
    train = ["train", folder, "--data", rows, "--max-length", 16, "--minutes", 5]
    assert run(*train, "--r", 2, "--lr", 1e-3, "--out", tmp_path / "a") == 0
    import tomllib

    found = tomllib.loads((tmp_path / "a" / "run.toml").read_text())
    assert found["train"]["epochs"] == 20 and found["train"]["lr"] == 1e-3
    assert found["train"]["max_minutes"] == 5 and found["adapter"]["r"] == 2
    assert found["train"]["betas"] == [0.9, 0.999] and "max_steps" not in found["train"]


def test_samples_are_asked_as_the_data_is(folder, tmp_path, capsys):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    tokenizer = read_tokenizer(folder)
    answers = "efghijkl"
    talk = [
        {"messages": [{"role": "user", "content": "b c"}, {"role": "assistant", "content": x}]}
        for x in answers
    ]
    plain = [{"prompt": "b c", "completion": f" d {x}"} for x in answers]
    assert is_chat(read_data(talk, tokenizer)[0], tokenizer)
    assert not is_chat(read_data(plain, tokenizer)[0], tokenizer)
    assert is_chat(read_data(plain, tokenizer, chat_prompts=True)[0], tokenizer)
    for name, records, said in (("talk", talk, "sample: b c → "), ("plain", plain, "sample: b c")):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in records))
        train = ["train", folder, "--data", file, "--hold-out", 2, "--max-steps", 1]
        assert run(*train, "--sample", "b c", "--out", tmp_path / name) == 0
        found = capsys.readouterr().err
        assert said in found and ("→" in found) == (name == "talk")
        train = ["train", folder, "--data", file, "--stream", "--valid", file, "--max-steps", 1]
        with pytest.warns(UserWarning, match="held-out examples are trained on too"):
            assert run(*train, "--sample", "b c", "--out", tmp_path / f"{name} streamed") == 0
        found = capsys.readouterr().err
        assert said in found and ("→" in found) == (name == "talk")
        assert f"{file}: 8 of 8 documents kept" in found


def test_the_template_reads_no_tokenizer_without_one(folder):
    tokenizer = read_tokenizer(folder)
    assert tokenizer.chat_template is None
    assert not is_chat(read_data([{"text": "a b"}], tokenizer)[0], tokenizer)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="run.toml is read with Python 3.11")
def test_what_an_adapter_was_asked_in_training_is_known_later(
    folder, tmp_path, capsys, monkeypatch
):
    """Generating asks in that form, and chat says what a second question may come to."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    turns = [{"role": "user", "content": "b c"}, {"role": "assistant", "content": "d"}]
    kinds = {
        "single": ({"question": "b c", "answer": "d"}, {"chat": True, "questions": 1}),
        "talk": ({"messages": turns * 2}, {"chat": True, "questions": 2}),
        "plain": ({"prompt": "b c", "completion": " d"}, {"chat": False}),
    }
    for name, (row, form) in kinds.items():
        file, out = tmp_path / f"{name}.jsonl", tmp_path / name
        file.write_text(f"{json.dumps(row)}\n" * 8)
        train = ["train", folder, "--data", file, "--max-steps", 1, "--out", out]
        assert run(*train, *(["--pack", "--max-length", 32] if name == "single" else [])) == 0
        verb = f'try it: minilora generate {out} "PROMPT"'
        if form["chat"]:
            verb = f"talk to it: minilora chat {out}"
        assert capsys.readouterr().out.endswith(f"\n{verb}\n")
        assert {"chat": None, "questions": 2} | form == run_file.rows_of(out)
        said = {}
        for flag in (None, "--chat", "--no-chat"):
            words = ["generate", out, "b", "--max-new-tokens", 3, *([flag] if flag else [])]
            assert run(*words) == 0
            found = capsys.readouterr()
            said[flag] = found.out
            assert ("prompts are asked through" in found.err) == (form["chat"] and flag is None)
        assert said[None] == said["--chat" if form["chat"] else "--no-chat"]
        for flags in ([], ["--no-chat"]):
            words = ["generate", out, "b", "--system", "x", "--max-new-tokens", 1, *flags]
            taken = form["chat"] and not flags
            assert run(*words) == (0 if taken else 2)
            assert ("--system does nothing without --chat" in capsys.readouterr().err) != taken
        monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))
        assert run("chat", out) == 0
        single = f"trained on single questions: {name}. A second question may be answered"
        assert (single in capsys.readouterr().err) == (name == "single")
    train = ["train", folder, "--data", file, "--adapter", tmp_path / "talk", "--max-steps", 1]
    assert run(*train, "--chat", "--out", tmp_path / "on") == 0
    assert run_file.rows_of(tmp_path / "on") == {"chat": True, "questions": 2}
    for wrong in ("rows = 1\n", "[rows]\nchat = 1\n", '[rows]\nquestions = "2"\n',
                  "rows = [1]\n", "train = 3\n", "[rows]\nquestions = -5\n"):  # fmt: skip
        text = (tmp_path / "on" / "run.toml").read_text().partition("[rows]")[0]
        before = "" if wrong.startswith("[") else wrong
        bare = text.partition("[train]")[0] if before else text
        (tmp_path / "on" / "run.toml").write_text(before + bare + wrong[len(before) :])
        assert run_file.rows_of(tmp_path / "on") == {}
        assert run("resume", tmp_path / "on") == 2
        must = "data, versions, rows, train must be tables"
        must = must if before else "[rows] must say chat = true or false, and how many"
        assert f"is damaged: {must}" in capsys.readouterr().err
        (tmp_path / "on" / "run.toml").write_text(text)


def test_a_template_that_tells_little_of_the_rows_stops_nothing():
    """One that takes a single question, and one that writes nothing before an answer."""
    rows = [{"question": "a", "answer": "b"}] * 3
    single = CHATML.replace(
        "{%", "{% if messages|length > 2 %}{{ raise_exception('one') }}{% endif %}{%", 1
    )
    tokenizer = byte_tokenizer(single)
    assert form_of(read_data(rows, tokenizer)[0], tokenizer) == {"chat": True}
    bare = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    tokenizer = byte_tokenizer(bare)
    assert form_of(read_data(rows, tokenizer)[0], tokenizer) == {}
