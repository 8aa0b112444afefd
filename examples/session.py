"""Record docs/session.md anew: run every command that the page shows, and write what it printed.

    python examples/session.py

A command stands in a block of text behind `$ `; all run in one empty folder that holds the files of
examples/. Nothing is edited but long lines, which are folded. It needs `pip install xllamacpp`.
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
WIDTH = 86


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
        for line in done.stdout.rstrip().splitlines():
            lines += textwrap.wrap(
                line, WIDTH, subsequent_indent="  ", replace_whitespace=False
            ) or [""]
    return "\n".join(lines) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    text = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in FILES:
            shutil.copy(HERE / file, folder)
        text = re.sub(
            r"(?<=^```text\n)(.*?)(?=^```$)", lambda block: recorded(block.group(1), folder), text,
            flags=re.M | re.S,
        )  # fmt: skip
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
