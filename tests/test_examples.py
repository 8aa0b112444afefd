"""The README's example and the scripts, run as a reader would run them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(arguments, folder):
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_your_own_module_learns(tmp_path):
    text = run([ROOT / "examples/your_own_module.py"], tmp_path)
    losses = [float(found) for found in re.findall(r"step +\d+  loss ([\d.]+)", text)]
    assert losses[-1] < 0.3 * losses[0]
    assert f"merged: {losses[-1]:.2f}"[:-1] in text


@pytest.mark.real_model
def test_tinyllama_example_learns_its_facts(tmp_path):
    text = run([ROOT / "examples/tinyllama.py", "--out", tmp_path / "out"], tmp_path)
    before, after = (re.search(rf"{word}: +(.*)", text).group(1) for word in ("before", "after"))
    assert "Ottoline" in after and "Ottoline" not in before


@pytest.mark.real_model
def test_readme_example_runs(tmp_path):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    rows = [
        {"prompt": f"Q: {a} + {b}?", "completion": f" A: {a + b}"}
        for a in range(4)
        for b in range(4)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = run(["-c", code], tmp_path)
    assert "A:" in text
    assert (tmp_path / "out/v1-adapter/adapter_config.json").exists()
