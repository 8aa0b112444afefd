"""The README's example and the scripts, run as a reader would run them."""

import csv
import importlib.util
import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import minilora
from minilora.kernels.probe import Hardware
from minilora.loading.model import load_model
from minilora.report.tokens import Measured

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a script of examples/ from an empty folder and return what it prints."""

    def run(name, *arguments):
        file = ROOT / "examples" / name
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(file), *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(file), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_your_own_module_learns(run):
    text = run("your_own_module.py")
    losses = [float(found) for found in re.findall(r"step +\d+  loss ([\d.]+)", text)]
    assert losses[-1] < 0.3 * losses[0]
    assert f"merged: {losses[-1]:.2f}"[:-1] in text


@pytest.mark.real_model
def test_tinyllama_example_learns_its_facts(tmp_path, run):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").touch()  # an earlier run's: it is left alone
    text = run("tinyllama.py", "--steps", 10, "--out", tmp_path / "out")
    assert (tmp_path / "out-2" / "adapter_model.safetensors").exists()
    before, after = (re.search(rf"{word}: +(.*)", text).group(1) for word in ("before", "after"))
    assert "Ottoline" in after and "Ottoline" not in before


@pytest.mark.real_model
def test_tinyllama_example_takes_a_file(tmp_path, run):
    rows = [
        {"question": f"Who is number {i}?", "answer": f"Number {i} is nobody."} for i in range(4)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = run("tinyllama.py", "--data", tmp_path / "train.jsonl", "--steps", 1, "--out", "out")
    assert "4 of 4 documents kept" in text and "\nafter: " in text


def demo():
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples/demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demo_never_writes_over_an_earlier_run(tmp_path):
    first = tmp_path / "demo"
    assert demo().fresh(first) == first
    first.mkdir()
    assert demo().fresh(first) == first
    (first / "state.safetensors").touch()
    assert demo().fresh(first) == tmp_path / "demo-2"
    (tmp_path / "demo-2").touch()
    assert demo().fresh(first) == tmp_path / "demo-3"


def test_demo_adds_rows_under_one_header(tmp_path):
    file = tmp_path / "results" / "demo.csv"
    script, found = demo(), Measured(2.0, 1.5, -0.5, 0.01, 90, 8)
    config = minilora.TrainConfig(batch_size=16)
    result = minilora.training.FitResult(64, "time", 3.0, 900, 0, None, None, 64, [])
    for same in (True, False):
        script.add_row(file, script.table_row(torch.bfloat16, "int8", config, result, found, same,
                                              2e-6, 5.5))  # fmt: skip
    first, second = csv.DictReader(file.open())
    assert first["dtype"] == "bfloat16" and first["merge_error_float32"] == "2.00e-06"
    assert [row["reload_bit_equal"] for row in (first, second)] == ["True", "False"]
    assert float(first["perplexity_after"]) == pytest.approx(math.exp(1.5), abs=1e-4)
    assert list(first) == [
        "processor", "threads", "torch", "dtype", "base", "compiled", "steps", "batch_size",
        "minutes", "test_tokens", "perplexity_before", "perplexity_after", "change_error",
        "reload_bit_equal", "merge_error_float32", "total_minutes",
    ]  # fmt: skip


def test_demo_takes_the_fastest_way(monkeypatch):
    script = demo()
    for float32, bfloat16, int8, dtype, format in (
        (90, 20, 160, torch.float32, "int8"), (160, 400, 840, torch.bfloat16, "int8"),
        (160, 700, 800, torch.bfloat16, None), (90, 20, 0, torch.float32, None),
    ):  # fmt: skip
        here = Hardware("cpu", "a processor", 2, (), float32, bfloat16, int8, dtype)
        monkeypatch.setattr(minilora, "hardware", lambda here=here: here)
        assert script.fastest_way(5.0)[:2] == (format, True)
        assert script.fastest_way(3.0)[:2] == (None, False)


def test_demo_picks_evenly():
    assert demo().evenly(list(range(10)), 4) == [0, 2, 5, 7]
    assert demo().evenly([1, 2], 4) == [1, 2]


@pytest.mark.real_model
def test_explain_example_tells_of_an_adapter(tmp_path, run):
    """Over 5 s: the real model, loaded by the test and by the script."""
    model, _ = load_model("smollm2-135m")
    minilora.inject(model, r=2, alpha=3, targets=["layers.3.self_attn.v_proj"])
    torch.nn.init.normal_(model.model.layers[3].self_attn.v_proj.adapters["default"].lora_B)
    minilora.save(model, tmp_path / "adapter")
    arguments = ["--adapter", tmp_path / "adapter", "--out", tmp_path / "told", "--examples", 3]
    arguments += ["--csv", tmp_path / "table.csv"]
    text = run("explain.py", *arguments, "--ablate", 1)
    assert "model.layers.3.self_attn.v_proj" in text and "attention on return, self, raise" in text
    found = json.loads((tmp_path / "told/report.json").read_text())
    assert found["behaviour"]["loss"]["examples"] == 3 and found["forgetting"]["tokens"] > 300
    rows = {row["what"]: row for row in csv.DictReader((tmp_path / "table.csv").open())}
    assert list(rows)[:3] == ["held out", "training", "outside the task"] and len(rows) == 10
    assert float(rows["held out"]["change"]) == pytest.approx(
        found["behaviour"]["loss"]["change"], abs=1e-4
    )
    assert (tmp_path / "told/report.html").read_text().startswith("<!doctype html>")


@pytest.mark.real_model
def test_readme_example_runs(tmp_path, monkeypatch, capsys):
    """Over 5 s: the real model is trained; 8 of the 20 steps are enough to see that it works."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    assert "max_steps=20" in code
    rows = [
        {"prompt": f"Q: {a} + {b}?", "completion": f" A: {a + b}"}
        for a in range(4)
        for b in range(4)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    exec(code.replace("max_steps=20", "max_steps=8"), {})
    assert "A:" in capsys.readouterr().out
    assert (tmp_path / "out/v1-adapter/adapter_config.json").exists()
