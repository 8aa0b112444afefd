"""Runs that go on, or are run again, from nothing but their folder."""

import hashlib
import json
import os
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import tiny_folder

import minilora
from minilora.cli import run_file, runs
from minilora.cli.command import main
from minilora.training.run import Run


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a model and data, which commands name by relative paths."""
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "model")
    rows = [{"text": " ".join("abcdefgh"[i % 4 : i % 4 + 3 + i % 2])} for i in range(9)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


TRAIN = ["train", "model", "--data", "train.jsonl", "--max-length", "24", "--batch-size", "2"]
TRAIN += ["--dtype", "float32", "--lr", "1e-2", "--dropout", "0.2", "--out"]


def test_a_run_writes_what_it_takes_to_run_it_again(place):
    assert main([*TRAIN, "out/é", "--max-steps", "3"]) == 0
    text = (place / "out" / "é" / "run.toml").read_text("utf-8")
    assert '"--data", "train.jsonl"' in text
    assert '"out/é"' in text
    assert re.search(r'^"train.jsonl" = "sha256:[0-9a-f]{64}"$', text, re.M)
    assert f'torch = "{torch.__version__}"' in text


@pytest.mark.skipif(sys.version_info < (3, 11), reason="run.toml is read with Python 3.11")
def test_a_run_is_repeated_to_the_bit_from_anywhere(place, monkeypatch, capsys):
    assert main([*TRAIN, "out/a", "--max-steps", "4"]) == 0
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    capsys.readouterr()
    assert main(["repeat", "../out/a", "again"]) == 0
    said = capsys.readouterr().out
    assert "bit-equal: the adapter in again is that in ../out/a\n" in said
    assert f"steps; adapter in {elsewhere / 'again'}\n" in said  # as the run began elsewhere
    assert os.getcwd() == str(elsewhere)
    one, two = (
        load_file(f / "adapter_model.safetensors") for f in (place / "out/a", elsewhere / "again")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="run.toml is read with Python 3.11")
def test_what_differs_is_said(place, capsys):
    assert main([*TRAIN, "out/a", "--max-steps", "2"]) == 0
    weights = place / "out" / "a" / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 0.25
    save_file(tensors, weights)
    run = place / "out" / "a" / "run.toml"
    run.write_text(run.read_text().replace(torch.__version__, "1.0"))
    assert main(["repeat", "out/a", "b"]) == 1
    out = capsys.readouterr().out
    assert f"torch was 1.0 and is {torch.__version__}" in out
    assert "not bit-equal: the adapters differ by up to 0.25" in out
    (place / "train.jsonl").write_text('{"text": "a b c"}\n')
    assert main(["repeat", "out/a", "c"]) == 2
    assert "must be as they were, found others in train.jsonl" in capsys.readouterr().err
    assert not (place / "c").exists()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="run.toml is read with Python 3.11")
def test_settings_and_folders_that_changed_are_named(place, capsys):
    (place / "data").mkdir()
    (place / "data" / "tr🙂\x7f.jsonl").write_text('{"text": "a b c d"}\n' * 4)
    (place / "c.toml").write_text("[train]\nlr = 1e-2\n")
    words = ["train", "model", "--data", "data", "--max-length", "24", "--dtype", "float32"]
    words += ["--config", "c.toml", "--max-steps", "2", "--out", "out/a"]
    assert main(words) == 0
    assert main(["repeat", "out/a", "b"]) == 0
    (place / "c.toml").write_text("[train]\nlr = 2e-2\n")
    (place / "data" / "b.jsonl").write_text('{"text": "e f g h"}\n')
    config = place / "model" / "config.json"
    config.write_text(config.read_text().replace("{", "{ ", 1))
    capsys.readouterr()
    assert main(["repeat", "out/a", "c"]) == 2
    found = capsys.readouterr().err
    assert all(name in found for name in ("c.toml", "data/b.jsonl", "model/config.json"))
    assert "tr" not in found.partition("found others in ")[2]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="run.toml is read with Python 3.11")
def test_a_run_of_which_nothing_was_kept_begins_anew(place, monkeypatch, capsys):
    """As one does that was stopped before its first save; one that can't begin leaves nothing."""
    words = [*TRAIN, "out/a", "--max-steps", "2", "--targets", "q_prj"]
    assert main(words) == 2
    assert not (place / "out").exists()
    (place / "out").mkdir()

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("minilora.cli.training.load", stop)
        assert main(words) == 130
    assert {file.name for file in (place / "out" / "a").iterdir()} == {"run.toml"}
    run = place / "out" / "a" / "run.toml"
    assert main(["resume", "out/a"]) == 2
    assert run.exists()  # it was there before
    capsys.readouterr()
    assert main(["repeat", "out/a", "out/b"]) == 2
    assert "found no adapter in" in capsys.readouterr().err
    run.write_text(run.read_text().replace("q_prj", "q_proj"))
    assert main(["resume", "out/a"]) == 0
    assert "nothing of the run had been kept; it begins anew" in capsys.readouterr().err
    assert (place / "out" / "a" / "adapter_config.json").exists()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="run.toml is read with Python 3.11")
def test_a_stopped_run_goes_on_from_its_folder_alone(place, monkeypatch):
    """Interrupted after its second step; the end is that of an unbroken run."""
    real, saves = Run.save, []

    def save(self, *given, **options):
        real(self, *given, **options)
        saves.append(1)
        if len(saves) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", save)
        assert main([*TRAIN, "out/a", "--max-steps", "6", "--save-every", "1"]) == 130
    assert main(["resume", "out/a"]) == 0
    assert main([*TRAIN, "out/b", "--max-steps", "6", "--save-every", "1"]) == 0
    one, two = (load_file(place / "out" / f / "adapter_model.safetensors") for f in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="run.toml is read with Python 3.11")
def test_a_run_with_raised_limits_goes_on_to_them(place, monkeypatch, capsys):
    """Interrupted after `--resume` had raised them; `repeat` then runs the whole of it."""
    words = [*TRAIN, "out/a", "--schedule", "constant", "--warmup", "0", "--save-every", "1"]
    assert main([*words, "--max-steps", "2"]) == 0
    real = Run.save

    def save(self, *given, **options):
        real(self, *given, **options)
        if self.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", save)
        assert main([*words, "--max-steps", "5", "--resu"]) == 130
    text = (place / "out" / "a" / "run.toml").read_text("utf-8")
    assert '"5"]' in text and "max_steps = 5" in text and "--resu" not in text
    assert re.search(r'^began = \[.*"2"\]$', text, re.M)
    capsys.readouterr()
    assert main(["resume", "out/a"]) == 0
    assert capsys.readouterr().out.startswith("5 steps; adapter in out/a\n")
    assert main(["repeat", "out/a", "out/b"]) == 0
    assert "bit-equal: the adapter" in capsys.readouterr().out
    # A resumption that is refused leaves the file as it is.
    assert main([*words, "--max-steps", "9", "--seed", "7", "--resume"]) == 2
    assert (place / "out" / "a" / "run.toml").read_text("utf-8") == text


@pytest.mark.skipif(sys.version_info < (3, 11), reason="run.toml is read with Python 3.11")
def test_a_base_or_tokenizer_that_changed_is_named(place, capsys):
    assert main([*TRAIN, "out/a", "--max-steps", "2"]) == 0
    assert main([*TRAIN, "out/a", "--max-steps", "3", "--resume"]) == 0
    weights = place / "model" / "model.safetensors"
    save_file({k: v * 1.25 for k, v in load_file(weights).items()}, weights, {"format": "pt"})
    capsys.readouterr()
    assert main(["repeat", "out/a", "b"]) == 1
    said = capsys.readouterr().out
    assert "the base is not what it was: weights that were sampled differ" in said
    assert "it was resumed with other words than it began with" in said
    tokenizer = place / "model" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert main(["repeat", "out/a", "c"]) == 2
    assert "found others in model/tokenizer.json" in capsys.readouterr().err


@pytest.mark.skipif(sys.version_info < (3, 11), reason="run.toml is read with Python 3.11")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "OUT must be the folder of a run, found no run.toml in"),
        ("command = 3", "run.toml is damaged"),
        ('command = ["eval"]\nfolder = "x"\n[data]\n[versions]\n', "must be train or tune"),
        (
            'command = ["train"]\nfolder = "x"\nprocesses = 2\n[data]\n[versions]\n',
            "the run had 2 processes; give torchrun the command in",
        ),
        (
            'command = ["train"]\nfolder = "/none"\nprocesses = 1\n[data]\n[versions]\n',
            "the run began in /none, which is not there",
        ),
    ],
)
def test_a_folder_that_says_nothing_is_refused(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "run.toml").write_text(text)
    assert main(["resume", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_finished_run_has_a_card(place):
    (place / "v.jsonl").write_text('{"text": "a b c d"}\n')
    words = [*TRAIN, "out/a", "--max-steps", "3", "--valid", "v.jsonl", "--alpha", "5", "--rslora"]
    assert main(words) == 0
    card = (place / "out" / "a" / "README.md").read_text("utf-8")

    def digest(name):
        return hashlib.sha256((place / name).read_bytes()).hexdigest()[:12]

    base = json.loads((place / "out/a/adapter_config.json").read_text())["base_model_name_or_path"]
    assert card.startswith(f"---\nbase_model: {base}\nlibrary_name: peft\n")
    for line in (
        f"| data | train.jsonl (sha256:{digest('train.jsonl')}) |",
        f"| held-out data | v.jsonl (sha256:{digest('v.jsonl')}) |",
        "| steps | 3 of 2 rows |",
        "| learning rate | 0.01 |",
        "| lora_alpha | 5.0 |",
        "| rslora | True |",
    ):
        assert line in card.splitlines()
    assert "| weights |" not in card, "those of the base itself"
    assert re.search(r"^\| held-out loss \| \d\.\d{4} → \d\.\d{4} \|$", card, re.M)
    file = place / "out" / "a" / "README.md"
    assert main([*words, "--resume"]) == 0
    assert file.read_text("utf-8") == card  # ours, written again
    for mine in ("mine", f"{card}and mine\n"):
        file.write_text(mine, "utf-8")
        assert main([*words, "--resume"]) == 0
        assert file.read_text("utf-8") == mine


@pytest.mark.skipif(sys.version_info < (3, 11), reason="run.toml is read with Python 3.11")
def test_a_run_goes_on_to_a_higher_limit_from_its_folder(place, capsys):
    """The end is that of the long run: `resume` takes the limits, and says how when one is met."""
    long = [*TRAIN, "out/b", "--schedule", "constant", "--warmup", "0", "--max-steps", "5"]
    words = [word.replace("out/b", "out/a") for word in long[:-1]]
    assert main([*words, "2"]) == 0
    capsys.readouterr()
    assert main(["resume", "out/a"]) == 0
    said = "limits (max_steps 2) allow no more; to go on, raise --max-steps, --epochs or --minutes"
    assert said in capsys.readouterr().err
    assert main(["resume", "out/a", "--max-steps", "5"]) == 0
    assert capsys.readouterr().out.startswith("5 steps; adapter in out/a\n")
    assert main(long) == 0
    one, two = (load_file(place / "out" / f / "adapter_model.safetensors") for f in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)
    text = (place / "out" / "a" / "run.toml").read_text("utf-8")
    assert text.count("--max-steps") == 2  # of command, and of what began
    with pytest.raises(SystemExit):
        main(["resume", "out/a", "--max-steps", "x"])
    assert "argument --max-steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["train", "--minutes", "3", "--out", "a"], ["train", "--out", "a", "--minutes", "9"]),
        (["train", "--minutes=3", "x"], ["train", "x", "--minutes", "9"]),
        (["train", "--minut", "3", "-m"], ["train", "-m", "--minutes", "9"]),
        (["train", "--max-steps", "3"], ["train", "--max-steps", "3", "--minutes", "9"]),
        (["train", "--max-minutes", "3", "x"], ["train", "x", "--minutes", "9"]),
        (["train", "--max-mi=3", "x"], ["train", "x", "--minutes", "9"]),
    ],
)
def test_a_flag_gets_another_value(words, wanted):
    assert run_file.replaced(words, runs.LIMITS["--minutes"], "9") == wanted


@pytest.mark.skipif(sys.version_info < (3, 11), reason="run.toml is read with Python 3.11")
def test_what_the_clock_ends_says_so(place, capsys):
    assert main([*TRAIN, "out/a", "--epochs", "5000", "--minutes", "0.001"]) == 0
    said = capsys.readouterr()
    assert re.search(
        r"the time was up after step \d+ of 2\d{4}; go on with minilora resume out/a and a "
        r"higher limit \(--minutes, in Python: max_minutes\)\n",
        said.err,
    )
    assert said.out.endswith("\ntalk to it: minilora chat out/a\n")
    main(["repeat", "out/a", "out/b"])
    said = capsys.readouterr().out
    assert said.startswith("--minutes ties a run to the clock, so the same bits can hardly come")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="run.toml is read with Python 3.11")
def test_what_a_run_was_trained_on_is_known(place):
    (place / "more").mkdir()
    (place / "more" / "x.jsonl").write_text('{"text": "a b c"}\n')
    (place / "valid.jsonl").write_text('{"text": "a b d"}\n')
    words = [*TRAIN[:3], "more", *TRAIN[3:], "out/a", "--max-steps", "1", "--valid", "valid.jsonl"]
    assert main(words) == 0
    out = place / "out" / "a"
    assert run_file.trained_on(out, ["train.jsonl", "valid.jsonl"]) == ["train.jsonl"]
    assert run_file.trained_on(out, ["more"]) == ["more/x.jsonl"]
    several = (out / "run.toml").read_text("utf-8").replace("processes = 1", "processes = 2")
    (out / "run.toml").write_text(several)
    assert run_file.trained_on(out, ["train.jsonl", "valid.jsonl"]) == ["train.jsonl"]
    (out / "run.toml").write_text(
        several.replace('"--data", "train.jsonl", "more"', '"--data", "."')
    )
    assert run_file.trained_on(out, ["train.jsonl", "valid.jsonl"]) == ["train.jsonl"]
    (out / "run.toml").write_text(several)
    assert run_file.trained_on(place / "model", ["train.jsonl"]) == []
    assert run_file.trained_on(out / "last", ["more"]) == ["more/x.jsonl"]
    shutil.copytree(out / "last", out / "mine")  # of another run, perhaps
    assert run_file.trained_on(out / "mine", ["more"]) == []
    assert run_file.rows_of(out / "mine") == {}
    other = (out / "run.toml").read_text("utf-8").replace("--max-length", "--no-such-flag")
    (out / "run.toml").write_text(other.replace('"--data", "train.jsonl"', '"--data=train.jsonl"'))
    assert run_file.trained_on(out, ["train.jsonl"]) == ["train.jsonl"]
    (place / "train.jsonl").write_text('{"text": "others"}\n')
    assert run_file.trained_on(out, ["train.jsonl"]) == []


@pytest.mark.skipif(sys.version_info < (3, 11), reason="run.toml is read with Python 3.11")
def test_data_without_a_file_and_that_of_adapters_before_is_known(place):
    assert main([*TRAIN, "out/a", "--max-steps", "1"]) == 0
    words = [word for word in TRAIN if word not in ("--dropout", "0.2")]
    again = [*words, "out/b", "--adapter", "out/a", "--max-steps", "1"]
    (place / "more.jsonl").write_text('{"text": "a b c"}\n')
    again[again.index("train.jsonl")] = "more.jsonl"
    assert main(again) == 0
    found = run_file.trained_on(place / "out" / "b", ["train.jsonl", "more.jsonl", "@docstrings"])
    assert found == ["more.jsonl", "train.jsonl"]
    file = place / "out" / "a" / "run.toml"
    text = file.read_text("utf-8")
    file.write_text(text.replace('"--data", "train.jsonl"', '"--data", "@docstrings", "own/er"'))
    names = ["@docstrings/train", "@docstrings/test"]
    assert run_file.trained_on(place / "out" / "a", names) == ["@docstrings/train"]


def test_a_file_of_the_users_is_not_written_over(place, capsys):
    """Whoever calls a config file `run.toml` keeps it, and so does tune."""
    out = place / "exp"
    out.mkdir()
    mine = "[train]\nmax_steps = 1\n"
    (out / "run.toml").write_text(mine)
    for words in (TRAIN, ["tune", *TRAIN[1:6], "--valid", "train.jsonl", "--out"]):
        assert main([*words, "exp", "--config", "exp/run.toml"]) == 2
        assert "exp/run.toml would be written over with the run's settings, found somebody" in (
            capsys.readouterr().err
        )
        assert (out / "run.toml").read_text() == mine


def test_a_card_names_the_data_that_was_read(place, monkeypatch):
    """Its file may be changed or moved while the run goes on."""
    digest = hashlib.sha256((place / "train.jsonl").read_bytes()).hexdigest()[:12]
    whole = minilora.fit

    def fit(*args, **options):
        found = whole(*args, **options)
        (place / "train.jsonl").rename(place / "moved.jsonl")
        return found

    monkeypatch.setattr(minilora, "fit", fit)
    assert main([*TRAIN, "out/a", "--max-steps", "1", "--clip", "none"]) == 0
    card = (place / "out" / "a" / "README.md").read_text("utf-8")
    assert f"| data | train.jsonl (sha256:{digest}) |" in card
    text = (place / "out" / "a" / "run.toml").read_text("utf-8")
    assert '\nclip = "none"\n' in text and "max_minutes" not in text


@pytest.mark.skipif(sys.version_info < (3, 11), reason="run.toml is read with Python 3.11")
@pytest.mark.parametrize("flag", runs.LIMITS)
def test_a_tuning_has_limits_of_its_own(tmp_path, capsys, flag):
    text = 'command = ["tune"]\nfolder = "."\nprocesses = 1\n[data]\n[versions]\n'
    (tmp_path / "run.toml").write_text(text)
    assert main(["resume", str(tmp_path), flag, "3"]) == 2
    assert (
        f"{flag} is for a run's folder, found a tuning's; leave it out" in capsys.readouterr().err
    )
