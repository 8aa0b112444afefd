"""Hold the import direction with import-linter, on the unpacked wheel; exit 1 when it is broken.

The linter does not see setuptools' package-dir mapping in an editable install, so it reads what a
user would install.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    "kernels", "files", "quantization", "lora", "peft", "models", "text", "data", "loading",
    "running", "planning", "training", "report", "cli",
)  # fmt: skip


def contracts() -> str:
    """Return what the linter holds: the rooms' direction, and that each is entered by its door."""
    layers = "\n    ".join(f"minilora.{room}" for room in reversed(ROOMS))
    text = f"""
[importlinter]
root_package = minilora

[importlinter:contract:rooms]
name = a room imports only rooms to its left
type = layers
layers =
    {layers}
"""
    for room in ROOMS:
        text += f"""
[importlinter:contract:{room}]
name = other rooms enter {room} by its door
type = protected
protected_modules = minilora.{room}.*
allowed_importers = minilora.{room}
ignore_imports = minilora -> minilora.cli.interrupt
unmatched_ignore_imports_alerting = none
"""
    return text


def build_wheel(folder: Path) -> Path:
    """Build the wheel with the installed setuptools, in a copy-free, isolated temporary folder."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(folder), str(ROOT)], check=True)
    return next(folder.glob("*.whl"))


def check(wheel: Path, plant: dict[str, str]) -> int:
    """Lint the wheel's imports; `plant` appends text to files, to see the linter fail."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        zipfile.ZipFile(wheel).extractall(folder)
        for file, text in plant.items():
            with open(folder / file, "a", encoding="utf-8") as opened:
                opened.write(text)
        (folder / ".importlinter").write_text(contracts())
        lint = Path(sys.executable).with_name("lint-imports")
        environment = os.environ | {"PYTHONPATH": name}
        command = [lint, "--no-cache"]
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as where:
        sys.exit(check(build_wheel(Path(where)), {}))
