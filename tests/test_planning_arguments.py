"""The command line's own errors, and that its options reach the plan."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import torch
from planning_machine import MACHINE
from test_cli import tiny_folder

from minilora.cli.command import main
from minilora.planning import plans as verb


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A model folder and data in a folder of their own, on a machine with round figures."""
    monkeypatch.setattr(verb, "calibrate", lambda: dataclasses.replace(MACHINE))
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "model")
    rows = [{"text": " ".join("abcdefgh"[: 3 + i % 4])} for i in range(9)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def run(capsys, *arguments):
    code = main(["plan", *arguments, "--untimed"])
    return code, capsys.readouterr()


def test_data_is_counted_by_the_models_tokenizer(capsys):
    code, said = run(capsys, "model", "--data", "train.jsonl", "--max-length", "32", "--r", "2",
                     "--json")  # fmt: skip
    assert code == 0
    found = json.loads(said.out)
    assert found["data"]["examples"] == 9
    assert 4 <= found["data"]["mean"] <= found["data"]["longest"] <= 8
    assert found["settings"]["r"] == 2
    assert found["advice"]["cpu"]
    assert found["advice"]["command"].startswith("minilora train model --data train.jsonl")


def test_the_command_that_is_advised_runs(capsys):
    run_plan = ["model", "--data", "train.jsonl", "more.jsonl", "--max-length", "32", "--r", "2"]
    Path("more.jsonl").write_text(Path("train.jsonl").read_text())
    _, said = run(capsys, *run_plan, "--epochs", "0.5", "--json")
    words = shlex.split(json.loads(said.out)["advice"]["command"])
    assert words[:6] == ["minilora", "train", "model", "--data", "train.jsonl", "more.jsonl"]
    assert main(words[1:]) == 0
    assert "adapter in out/v1" in capsys.readouterr().out
    _, said = run(capsys, *run_plan, "--memory", "0.1", "--json")
    words = shlex.split(json.loads(said.out)["advice"]["command"])
    assert words[words.index("--device") + 1] == "cuda"
    assert main([*words[1:], "--resume"]) == (0 if torch.cuda.is_available() else 2)


def test_prices_go_to_their_machines(capsys):
    code, said = run(capsys, "tinyllama-1.1b", "--gpu", "RTX-4090", "--price", "0.5", "here=0.1",
                     "--json")  # fmt: skip
    assert code == 0
    found = json.loads(said.out)
    assert found["cost"] == pytest.approx(0.5 * found["speed"]["hours"])
    local = next(one for one in found["options"] if one["device"] == "here")
    assert local["cost"] == pytest.approx(0.1 * local["speed"]["hours"])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["gpt2", "--data", "train.jsonl"], "counted by the model's tokenizer, found none at 'gp"),
        (["model", "--data", "train.jsonl", "--examples", "3"], "--examples stands for data that"),
        (["gpt2", "--price", "cheap"], "--price must be a number, or NAME=number, found 'cheap'"),
        (["gpt2", "--price", "h100=3"], "device must be 'auto', 'cpu', 'cuda' or one of"),
        (["gpt3"], "found 'gpt3'; nearest: gpt2"),
        (["gpt2", "--batch-size", "-2"], "batch_size must be a whole number of at least 1"),
        (["gpt2", "--examples", "0"], "data must be a whole number of at least 1, at most 1,000"),
        (
            ["gpt2", "--price", "-1"],
            "the price of an hour on this machine must be at least 0, found -1",
        ),
        (["gpt2", "--r", "1000"], "r=1000 is above what transformer.h.0.attn.c_attn can use"),
    ],
)
def test_bad_arguments_are_one_line(capsys, arguments, match):
    code, said = run(capsys, *arguments)
    assert code == 2
    assert match in said.err
    assert said.err.startswith("minilora plan: ")
    assert len(said.err.strip().splitlines()) == 1
