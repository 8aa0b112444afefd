"""Record docs/session.md anew: run every command that the page shows, and write what it printed.

    python examples/session.py [--folder FOLDER] [--blocks N ...]

A command stands in a block of text behind `$ `; all run in one folder that begins with the files of
examples/. With --folder it is kept, and --blocks runs some blocks alone, counted from 1. Nothing is
edited, but of the lines of steps every tenth is kept, of those that say how far something is the
first, long lines are folded, and the home folder is `~`. It needs `pip install xllamacpp`.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "session.md"
FILES = ("questions.csv", "questions-test.csv", "ask_llama_cpp.py")
WIDTH = 88


def recorded(commands: str, folder: Path) -> str:
    """Run the commands of a block; return it with what each printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    lines = []
    for command in re.findall(r"^\$ (.*(?:\\\n.*)*)$", commands, re.M):
        print(f"$ {command}", flush=True)
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env={**os.environ, "PATH": path}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        print(done.stdout, flush=True)
        if done.returncode:
            sys.exit(f"{command} ended with {done.returncode}")
        lines.append(f"$ {command}")
        for line in done.stdout.replace(str(Path.home()), "~").rstrip().splitlines():
            step = re.match(r"step +\d*[1-9]/", line) and not line.startswith("step    1/")
            waiting = re.match(r"(.*): (?:\d+ s so far|\d+ of \d+ .* left)$", line)
            if step or (waiting and any(waiting.group(1) in told for told in lines)):
                continue
            lines += textwrap.wrap(
                line, WIDTH, subsequent_indent="  ", replace_whitespace=False
            ) or [""]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", metavar="N")
    options = parser.parse_args()
    parts = re.split(r"(?<=^```text\n)(.*?)(?=^```$)", PAGE.read_text("utf-8"), flags=re.M | re.S)
    with tempfile.TemporaryDirectory() as name:
        folder = (options.folder or Path(name)).absolute()
        folder.mkdir(exist_ok=True)
        for file in FILES:
            shutil.copy(HERE / file, folder)
        for n in range(1, len(parts), 2):
            if options.blocks is None or (n + 1) // 2 in options.blocks:
                parts[n] = recorded(parts[n], folder)
                PAGE.write_text("".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
