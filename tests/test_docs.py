"""The pages' commands, run as they are printed, and their own loop."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cli import tiny_folder
from training_models import examples, plain

import minilora
from minilora.cli.command import main

DOCS = Path(__file__).resolve().parents[1] / "docs"
README = DOCS.with_name("README.md")
RESULTS = DOCS.with_name("benchmarks") / "results"


def test_the_readme_is_read_in_one_sitting():
    """At most 900 words, and every link leads somewhere."""
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    for file in [README, *DOCS.glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", file.read_text(encoding="utf-8")):
            assert link.startswith("http") or (file.parent / link).exists(), (file.name, link)


def fenced(file, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", file.read_text(), re.M | re.S)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the pages' commands name."""
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "model")
    for name in ("train", "valid"):
        rows = [{"text": " ".join("abcdefgh"[i % 4 : i % 4 + 3 + i % 2])} for i in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.mark.parametrize(
    "page", ["resume.md", "data.md", "deploy.md", "many-gpus.md", "plan.md", "options.md"]
)
def test_the_commands_of_a_page_work(place, page):
    commands = [line for block in fenced(DOCS / page, "sh") for line in block.splitlines()]
    for text in fenced(DOCS / page, "toml"):
        (place / text.splitlines()[0].removeprefix("# ")).write_text(text)
    assert commands
    for command in commands:
        program, *arguments = shlex.split(command)
        if program == "minilora":
            assert main(arguments) == 0, command
            continue
        assert program == "torchrun"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        free = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        run = [sys.executable, "-m", "torch.distributed.run", *free, *arguments]
        done = subprocess.run(
            run, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr[-3000:]


def test_the_70b_table_is_the_files(place):
    """Every line of the table comes from the CSV that the script wrote."""
    text = (DOCS / "many-gpus.md").read_text().split("## Measured on CPUs")[0]
    lines = [line for line in text.splitlines() if re.match(r"\| (bfloat16|nf4) \|", line)]
    with open(RESULTS / "llama_70b.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(lines) == len(rows) == 10
    for line, row in zip(lines, rows, strict=True):
        base, gpus, part, trained, rest, peak, fits = line.strip("| ").split(" | ")
        size = {name: int(row[f"{name} bytes"]) / 1e9 for name in (
            "base", "codes", "scales", "adapters", "gradients", "optimizer", "peak")}  # fmt: skip
        held, mine = sum(list(size.values())[:3]), sum(list(size.values())[3:6])
        assert (base, gpus) == (row["base format"], row["ranks"])
        assert (part, trained, peak) == (f"{held:.1f}", f"{mine:.2f}", f"{size['peak']:.1f}")
        assert rest == f"{size['peak'] - held - mine:.1f}"
        room = [gb for gb in (24, 48, 80) if row[f"fits {gb} GB"] == "True"]
        assert fits == (f"{room[0]} GB" if room else "none of these")
        assert room == [gb for gb in (24, 48, 80) if size["peak"] <= 0.9 * gb]


def test_the_table_of_each_ranks_memory_is_the_files():
    text = (DOCS / "many-gpus.md").read_text().split("## Measured on CPUs")[1]
    lines = [line for line in text.splitlines() if re.match(r"\| (float32|nf4) \|", line)]
    with open(RESULTS / "rank_memory.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    held = ("held_bytes", "loading_bytes", "training_bytes")
    assert [line.strip("| ").split(" | ") for line in lines] == [
        [row["base"], row["ranks"], *(f"{int(row[name]) / 1e6:.0f}" for name in held)]
        for row in rows
    ]


def test_the_streaming_example_of_the_data_page_runs(place):
    (code,) = fenced(DOCS / "data.md", "python")
    rows = examples(9)
    names = {"my_dataset": rows, "to_example": lambda item: item, "minilora": minilora}
    model = minilora.inject(plain(), r=2, alpha=3)
    exec(code.replace("max_steps=1000", "max_steps=2"), names | {"model": model})
    assert (place / "out" / "run" / "adapter_config.json").exists()


def test_the_loop_of_the_api_page_trains(place):
    """The plain loop, 15 lines at most, learns, and touches the adapter alone."""
    loops = [code for code in fenced(DOCS / "api.md", "python") if "optimizer.step()" in code]
    assert len(loops) == 1
    (code,) = loops
    assert len(code.strip().splitlines()) <= 15
    model, rows = plain(), examples(12)
    before = {name: p.clone() for name, p in model.named_parameters()}
    names = {"model": model, "examples": rows, "minilora": minilora, "torch": torch}
    start = minilora.evaluate(model, rows).loss
    exec(code, names)
    assert minilora.evaluate(model, rows).loss < start - 1e-3
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name.replace(".base.", ".")])
    assert (place / "out" / "mine" / "adapter_config.json").exists()
