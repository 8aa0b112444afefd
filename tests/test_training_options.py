"""Options: every field has a flag, a key of the config file and a line in the docs.

python tests/test_training_options.py    # writes the table of docs/options.md anew
"""

import argparse
import dataclasses
from pathlib import Path

import pytest

from minilora.cli.arguments import Parser
from minilora.files import add_flags, flags_of, given, option, read_options, whole
from minilora.lora.config import AdapterConfig
from minilora.training.config import TrainConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "options.md"
FIELDS = dataclasses.fields(TrainConfig)
# A value other than the default of each option, and how the command line spells it.
OTHERS = {
    "lr": (0.25, "0.25"), "lora_plus_ratio": (16.0, "16"), "schedule": ("linear", "linear"),
    "warmup": (0.5, ".5"), "warmup_steps": (3, "3"), "final_lr_ratio": (0.1, "0.1"),
    "weight_decay": (0.01, "1e-2"), "loss": ("dpo", "dpo"), "beta": (0.5, "0.5"),
    "gamma": (0.3, "0.3"), "kto_weights": ([2.0, 0.5], "2 0.5"),
    "betas": ([0.8, 0.9], "0.8 0.9"), "eps": (1e-6, "1e-6"), "clip": (None, "none"),
    "batch_size": (3, "3"), "accumulate": (2, "2"), "epochs": (0.5, "0.5"),
    "log": ("trackio", "trackio"),
    "max_steps": (7, "7"), "max_minutes": (1.5, "1.5"), "eval_every": (5, "5"),
    "eval_batch_size": (2, "2"), "save_every": (9, "9"), "dtype": ("float16", "float16"),
    "checkpointing": (True, ""), "max_memory": (2.5, "2.5"), "pass_tokens": (77, "77"),
    "compile": ("auto", "-auto"),
    "shuffle": (False, "--no-shuffle"), "group_by_length": (False, "--no-group-by-length"),
    "seed": (2**40, str(2**40)), "patience": (3, "3"), "parallel": ("ddp", "ddp"),
    "deterministic": (False, "--no-deterministic"),
    "max_bad_steps": (2, "2"), "log_every": (1, "1"), "base_name": ("me/base", "me/base"),
}  # fmt: skip
# What an option needs beside it.
BESIDE = {"patience": {"eval_every": 5}, "beta": {"loss": "dpo"}, "gamma": {"loss": "simpo"},
          "kto_weights": {"loss": "kto"}}  # fmt: skip


def table(options, resumed=False):
    """Return the docs' table of a dataclass's options."""
    head = ["field", "flag", "default", "what it does", *["may differ"] * resumed]
    rows = [head, ["---"] * len(head)]
    for field in dataclasses.fields(options):
        flags = ", ".join(f"`{flag}`" for flag in flags_of(field))
        differs = ["yes" if field.metadata["may_differ"] else ""] * resumed
        help = field.metadata["help"].replace("|", r"\|")
        rows.append([f"`{field.name}`", flags, f"`{field.default}`", help, *differs])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def tables():
    return f"{table(TrainConfig, resumed=True)}\n## `[adapter]`\n\n{table(AdapterConfig)}"


def test_the_docs_have_the_tables_of_all_options():
    assert PAGE.read_text(encoding="utf-8").partition("| field")[2] == tables()[7:]


def test_the_adapters_options_are_read_as_the_runs(tmp_path):
    words = "--rank 4 --alpha none --targets q_proj v_proj --layers 0 2 --bias all --lora-bias"
    values = {"r": 4, "alpha": None, "targets": ["q_proj", "v_proj"], "layers": [0, 2],
              "bias": "all", "lora_bias": True}  # fmt: skip
    assert parse(*words.split(), options=AdapterConfig) == values
    text = '[adapter]\nr = 4\ntargets = "(q|v)_proj"\nrank_pattern = {q_proj = 2}\n'
    (tmp_path / "run.toml").write_text(text)
    assert read_options(tmp_path / "run.toml", {"adapter": AdapterConfig})["adapter"] == {
        "r": 4, "targets": "(q|v)_proj", "rank_pattern": {"q_proj": 2},
    }  # fmt: skip


def parse(*words, options=TrainConfig):
    parser = Parser(prog="minilora train")
    add_flags(parser, options)
    return given(parser.parse_args([str(word) for word in words]), options)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_each_option_has_a_flag_and_a_key_of_the_file(tmp_path, field):
    value, spelled = OTHERS[field.name]
    assert value != field.default
    for flag in flags_of(field):
        words = [spelled] if spelled.startswith("--") else f"{flag} {spelled}".split()
        words = [f"{flag}{spelled}"] if spelled == "-auto" else words
        assert parse(*words) == {field.name: value}
    written = str(value).lower() if isinstance(value, bool) else repr(value or "none")
    (tmp_path / "run.toml").write_text(f"[train]\n{field.name} = {written}\n")
    assert read_options(tmp_path / "run.toml", {"train": TrainConfig}) == {
        "train": {field.name: value}
    }
    more = BESIDE.get(field.name, {})
    assert getattr(TrainConfig(**{field.name: value} | more), field.name) == value


def test_help_shows_the_first_sentence_and_the_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "--batch-size N Rows in a micro-batch, over all ranks (default: 8)" in said
    assert "--schedule {cosine,linear,constant}" in said
    assert "--compile, --no-compile, --compile-auto" in said
    assert "Rows in a micro-batch" in TrainConfig.__doc__


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "0"], "argument --lr: lr must be a finite number above 0, or none, found 0.0"),
        (["--lr", "fast"], "lr must be a finite number above 0, or none, found 'fast'"),
        (["--minutes", "nan"], "max_minutes must be a finite number above 0, or none, found nan"),
        (["--schedule", "x"], "schedule must be 'cosine', 'linear' or 'constant', found 'x'"),
        (["--lora-plus-rate", "3"], "argument '--lora-plus-rate'; nearest: --lora-plus-ratio"),
        (["--batchsize=3"], "unknown argument '--batchsize=3'; nearest: --batch-size"),
        (["--betas", "1"], "argument --betas: expected 2 arguments"),
    ],
)
def test_a_bad_flag_is_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*words)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said
    assert said.endswith(" (see minilora train --help)\n") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = ", "must be a TOML file, found: Invalid value"),
        ("[trian]\nlr = 1", r"must hold the tables \[train\] alone, found 'trian'; nearest: train"),
        ("train = 3", r"must hold the tables \[train\] alone, found 'train'"),
        ("[train]\nlearn = 1", r"run.toml: \[train\] has no option 'learn'"),
        ("[train]\nmax_step = 1", r"\[train\] has no option 'max_step'; nearest: max_steps"),
        ("[train]\nlr = '1'", "run.toml: lr must be a finite number above 0, or none, found '1'"),
        ("[train]\neps = 'none'", "run.toml: eps must be a finite number above 0, found 'none'"),
    ],
)
def test_a_bad_config_file_is_named_with_the_option(tmp_path, text, message):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_options(tmp_path / "run.toml", {"train": TrainConfig})
    with pytest.raises(ValueError, match=r"none.toml must be a TOML file, found: .*No such file"):
        read_options(tmp_path / "none.toml", {"train": TrainConfig})


def test_an_option_is_its_field():
    """A new field has its flag, its check and its help without a line elsewhere."""

    @dataclasses.dataclass(frozen=True)
    class Mine:
        hops: int = option(3, "Hops of 100 % hemp. And more.", whole(1, 5), metavar="HOPS")
        hidden: int = option(3, "No flag.", flags=())

    parser = argparse.ArgumentParser()
    add_flags(parser, Mine)
    assert "--hops HOPS  Hops of 100 % hemp (default: 3)" in parser.format_help()
    assert "hidden" not in parser.format_help()
    assert parse("--hops", 4, options=Mine) == {"hops": 4}


if __name__ == "__main__":
    before = PAGE.read_text(encoding="utf-8").partition("| field")[0]
    PAGE.write_text(before + tables(), encoding="utf-8")
