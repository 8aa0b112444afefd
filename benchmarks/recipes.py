"""Run docs/recipes.md as it stands, and measure it.

    PYTHONPATH=benchmarks python benchmarks/recipes.py [--only TITLE ...]

Each section in a folder of its own: its Python, then its commands. Time and peak memory are those
of `minilora train` as a whole, reading the model included; losses and right answers are those of
`minilora compare`. A row a recipe is added to benchmarks/results/recipes.csv.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from train_step import commit, processor, save

import minilora

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "recipes.md"
COLUMNS = (
    "recipe", "rows", "steps", "minutes", "peak_mb", "loss_before", "loss_after", "examples",
    "right_before", "right_after", "processor", "flags", "threads", "torch", "commit", "date",
)  # fmt: skip


def sections() -> dict[str, str]:
    """Return the sections that train something, by their titles."""
    parts = re.split(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]
    return {
        name: text for name, text in zip(parts[::2], parts[1::2], strict=True) if "```sh" in text
    }


def measured(command: list[str], folder: Path) -> tuple[float, int, str]:
    """Run a command; return its minutes, its peak memory in MB and what it said."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=folder, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        said.seek(0)
        text = said.read()
    if status:
        raise SystemExit(f"{shlex.join(command)} ended with {status}:\n{text[-3000:]}")
    return (time.perf_counter() - begun) / 60, usage.ru_maxrss * 1024 // 10**6, text


def run(name: str, text: str) -> dict[str, object]:
    here = minilora.hardware()
    row: dict[str, object] = {
        "recipe": name, "processor": processor(), "flags": " ".join(here.flags),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit(),
        "date": date.today().isoformat(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        for language, code in re.findall(r"^```(python|sh)\n(.*?)^```$", text, re.M | re.S):
            if language == "python":
                measured([sys.executable, "-c", code], folder)
                continue
            for line in code.splitlines():
                words = shlex.split(line)
                minutes, peak, said = measured([sys.executable, "-m", *words], folder)
                print(said, file=sys.stderr)
                if words[1] == "train":
                    steps, rows = (
                        found.group(1) if (found := re.search(pattern, said)) else ""
                        for pattern in (r"(\d+) steps in", r"(\d+) of \d+ documents kept")
                    )
                    row |= {"minutes": f"{minutes:.1f}", "peak_mb": peak, "steps": steps,
                            "rows": rows}  # fmt: skip
                else:
                    row |= judged(json.loads((folder / words[-1]).read_text()))
    return row


def judged(found: dict) -> dict[str, object]:
    """Return losses and right answers of base and adapter."""
    losses, right = list(found["losses"].values()), list(found["right"].values())
    return {
        "loss_before": f"{losses[0]:.3f}", "loss_after": f"{losses[1]:.3f}",
        "examples": found["differences"][0]["examples"],
        "right_before": right[0] if right else "", "right_after": right[1] if right else "",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="TITLE")
    options = parser.parse_args()
    for name, text in sections().items():
        if options.only is None or name in options.only:
            save([run(name, text)], HERE / "results" / "recipes.csv", COLUMNS)


if __name__ == "__main__":
    main()
