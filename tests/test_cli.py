"""The command, run as a user runs it, on the real SmolLM2 where a model is needed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from minilora.cli import main
from minilora.models import Llama, load_model

ROWS = [
    {"prompt": f"What is {a} plus {b}?", "completion": f" The sum of {a} and {b} is {a + b}."}
    for a in range(8)
    for b in range(4)
]


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_cli_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f" {name} " in text for name in ("train", "eval", "generate", "merge", "targets"))
    assert "fetch" in text


@pytest.mark.real_model
def test_cli_train_eval_generate_merge(data, tmp_path, capsys):
    """Train, measure, ask, merge; transformers loads what merge wrote."""
    out, merged = tmp_path / "run", tmp_path / "merged"
    train = ["train", "smollm2-135m", "--data", data, "--valid", data, "--out", out, "--alpha", 16]
    assert run(*train, "--max-steps", 6, "--lr", "2e-3", "--dtype", "float32") == 0
    assert "held out after" in capsys.readouterr().out
    losses = {}
    for name, adapter in (("base", []), ("tuned", ["--adapter", out])):
        evaluate = ["eval", "smollm2-135m", "--dtype", "float32", "--data", data, "--json"]
        assert run(*evaluate, *adapter) == 0
        losses[name] = json.loads(capsys.readouterr().out)["loss"]
    assert losses["tuned"] < 0.7 * losses["base"]
    ask = ["generate", "smollm2-135m", "What is 3 plus 2?", "--adapter", out]
    assert run(*ask, "--dtype", "float32", "--max-new-tokens", 12) == 0
    assert "sum" in capsys.readouterr().out
    assert (
        run("merge", "smollm2-135m", "--dtype", "float32", "--adapter", out, "--out", merged) == 0
    )
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    ours, tokenizer = load_model(merged, dtype=torch.float32)
    assert isinstance(ours, Llama)
    ids = torch.tensor([tokenizer.encode("What is 3 plus 2?")])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.real_model
def test_cli_targets_lists_the_head_as_left_out(capsys):
    assert run("targets", "smollm2-135m", "--r", 4) == 0
    text = capsys.readouterr().out
    assert "lm_head" in text and "(left out)" in text and "210 of 211 linear layers" in text


@pytest.mark.real_model
def test_cli_interrupt_saves_and_resume_goes_on(data, tmp_path):
    """A real process, a real SIGINT: the state is saved, the message says how to go on."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "minilora", "train", "smollm2-135m", "--data", data,
               "--out", out, "--batch-size", "2", "--max-steps"]  # fmt: skip
    command = [str(part) for part in command]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    child = subprocess.Popen([*command, "500", "--epochs", "40"], stderr=subprocess.PIPE, text=True,
                             env=environment)  # fmt: skip
    metrics = out / "metrics.jsonl"
    while child.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 2):
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    errors = child.communicate(timeout=120)[1]
    assert child.returncode == 130, errors
    assert "continue with resume=True (--resume)" in errors
    done = len(metrics.read_text().splitlines())
    goal = str(done + 2)
    again = subprocess.run([*command, goal, "--epochs", "40", "--resume"], capture_output=True,
                           text=True, env=environment, check=False)  # fmt: skip
    assert again.returncode == 0, again.stderr
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, done + 3))


def test_cli_bad_input_is_one_line_and_exit_2(tmp_path, capsys):
    missing = tmp_path / "none"
    assert run("targets", missing) == 2
    error = capsys.readouterr().err
    assert error.startswith("minilora targets: a model is a folder") and error.count("\n") == 1
    assert run("fetch", "gpt-9") == 2
    assert "smollm2-135m" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        run("train")
    assert stop.value.code == 2


@pytest.mark.real_model
def test_cli_reports_bad_lines_by_file_and_number(tmp_path, capsys):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "fine"}\n{"txt": "typo"}\nnot json\n')
    assert run("eval", "smollm2-135m", "--data", file) == 2
    error = capsys.readouterr().err
    assert f"{file}:2:" in error and f"{file}:3:" in error
