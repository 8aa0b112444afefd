"""The pages' commands and code, run as they are printed.

A block that can't run here begins with `# not run in the tests: WHY`. The rest runs page by page,
in its order, in one folder that has what `place` makes, on a tiny model in the place of a real one.
"""

import ast
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
from minilora.models import LlamaConfig

DOCS = Path(__file__).resolve().parents[1] / "docs"
README = DOCS.with_name("README.md")
PAGES = sorted(DOCS.glob("*.md"))
NOT_RUN = "# not run in the tests: "
# What pages say, and what stands for it here: a tiny model, small files, few steps.
SHORTER = {
    "smollm2-135m": "model", r"--minutes \d+": "--max-steps 2",
    "max_steps=1000": "max_steps=2", "@docstrings/(valid|test)": r"\1.jsonl",
    "@docstrings": "train.jsonl",
    # The limit is on the process, which has run other tests.
    "--max-memory 3": "--max-memory 30",
}  # fmt: skip
ADAPTED = {"explain", "compare"}  # begin with adapters that are there


def test_the_readme_is_read_in_one_sitting():
    """At most 900 words, and every link leads somewhere."""
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    for file in [README, *PAGES]:
        for link in re.findall(r"\]\(([^)#]+)\)", file.read_text(encoding="utf-8")):
            assert link.startswith("http") or (file.parent / link).exists(), (file.name, link)


def fenced(file, language):
    return re.findall(
        rf"^```({language})\n(.*?)^```$", file.read_text(encoding="utf-8"), re.M | re.S
    )


def train(out):
    words = f"train model --data train.jsonl --out {out} --max-steps 2 --max-length 24 --rank 2"
    assert main(words.split()) == 0


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the pages' commands name."""
    monkeypatch.chdir(tmp_path)
    config = LlamaConfig(
        vocab_size=28, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, max_position_embeddings=2048,
        eos_token_id=1,
    )  # fmt: skip
    tiny_folder(tmp_path / "model", config=config)
    for n, name in enumerate(("train", "valid", "test")):
        letters = "abcdefghij"[n:]
        rows = [{"text": " ".join(letters[i % 4 : i % 4 + 3 + i % 2])} for i in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        rows = [
            {"prompt": "a b", "chosen": " c" * (i + 1), "rejected": f" {name[0]}"} for i in range(5)
        ]
        (tmp_path / f"{name}-pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "other.txt").write_text("h g f e d c b a " * 4)
    return tmp_path


def names():
    """What the pages' Python speaks of without making it."""
    model, rows = plain(), examples(12)
    return {
        "minilora": minilora, "torch": torch, "model": model, "examples": rows, "train": rows,
        "test": examples(6, seed=1), "other": examples(6, seed=2), "tokenizer": None,
        "my_dataset": rows, "to_example": lambda item: item,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:minilora. adapter .* adds nothing")  # words it does not know
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_works(place, page):
    """All pages together take some 25 s: training, though tiny, is what they are about."""
    for text in fenced(page, "toml"):
        (place / text[1].splitlines()[0].removeprefix("# ")).write_text(text[1])
    if page.stem in ADAPTED:
        train("out/v1")
        train("out/v2")
    known = names()
    for language, shown in fenced(page, "sh|python"):
        if shown.startswith(NOT_RUN):
            assert len(shown.splitlines()[0]) > len(NOT_RUN) + 5, "say why"
            continue
        code = shown
        for long, short in SHORTER.items():
            code = re.sub(long, short, code)
        if language == "python":
            exec(code, known)
        else:
            for command in code.replace("\\\n", " ").splitlines():
                run(shlex.split(command, comments=True))


def run(words):
    """Run a command of the shell: `minilora` in this process, `torchrun` in its own."""
    if not words:
        return
    program, *arguments = words
    if program == "minilora":
        assert main(arguments) == 0, words
        return
    assert program == "torchrun", words
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    free = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command = [sys.executable, "-m", "torch.distributed.run", *free, *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_loop_of_the_api_page_trains(place):
    """The plain loop, 15 lines at most, learns, and touches the adapter alone."""
    loops = [code for _, code in fenced(DOCS / "api.md", "python") if "optimizer.step()" in code]
    assert len(loops) == 1
    (code,) = loops
    assert len(code.strip().splitlines()) <= 15
    known = names()
    model, rows = known["model"], known["examples"]
    before = {name: p.clone() for name, p in model.named_parameters()}
    start = minilora.evaluate(model, rows).loss
    exec(code, known)
    assert minilora.evaluate(model, rows).loss < start - 1e-3
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name.replace(".base.", ".")])
    assert (place / "out" / "mine" / "adapter_config.json").exists()


def literals():
    """Return all strings of the code, with "…" where a value is put in."""
    for room in ("minilora", "kernels"):
        for file in (DOCS.parent / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
                elif isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "…"
                             for part in node.values]  # fmt: skip
                    yield "".join(parts)


def test_the_messages_of_the_troubleshooting_page_are_the_codes():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages, known = re.findall(r"^> (.*)$", text, re.M), "\0".join(literals())
    assert len(messages) > 20
    for message in messages:
        pattern = "[^\0]*".join(map(re.escape, message.split("…")))
        assert re.search(pattern, known), message


def test_figures_of_the_recorded_session_are_that_sessions():
    """`compare.csv`, and the pages that quote it, are copied by hand."""
    session, compare, recipes = (
        (DOCS / f"{name}.md").read_text("utf-8") for name in ("session", "compare", "recipes")
    )
    with open(DOCS.parent / "benchmarks" / "results" / "compare.csv", newline="") as file:
        base, cafe = csv.DictReader(file)
    for row in (base, cafe):
        name, loss, right = row["contender"], row["held_out_loss"], f"{row['right']} of {row['of']}"
        assert f"  {name}  {loss}\n" in session
        told = (
            f"{right} answers right, {row['answer_tokens']} tokens each, {row['cut_off']} cut off"
        )
        assert f"{name}: {told}\n" in session
        assert (
            f"| {name} | {loss} | {right} | {row['answer_tokens']} | {row['cut_off']} |" in compare
        )
    assert f"{float(base['held_out_loss']):.2f} → {float(cafe['held_out_loss']):.2f}" in recipes
    assert f"{cafe['right']} of {cafe['of']} in other words" in recipes
