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
LAYERS = """
[importlinter]
root_package = minilora

[importlinter:contract:rooms]
name = a room imports only rooms to its left
type = layers
layers =
    minilora.cli
    minilora.cli_arguments
    minilora.cli_loading
    minilora.report
    minilora.training
    minilora.planning
    minilora.generation
    minilora.evaluation
    minilora.data_files
    minilora.token_cache
    minilora.streaming
    minilora.packing
    minilora.records
    minilora.turns
    minilora.record_files
    minilora.data
    minilora.token_rows
    minilora.quantized_models
    minilora.quantized_files
    minilora.models
    minilora.portable
    minilora.readers
    minilora.pretrained
    minilora.checkpoint
    minilora.adapter_files
    minilora.adapter_config
    minilora.combination
    minilora.serving
    minilora.merging
    minilora.adapters
    minilora.bases
    minilora.injection
    minilora.sizes
    minilora.frozen_values
    minilora.selection
    minilora.bare_parameters
    minilora.copies
    minilora.widening
    minilora.layers
    minilora.compiling
    minilora.inference
    minilora.lora_layer
    minilora.patterns
    minilora.threads
    minilora.factors
    minilora.packed
    minilora.wrappers
    minilora.quantization
    minilora.json_text
    minilora.kernels | minilora.files
    minilora.links
    minilora.wording
    minilora.interrupt
"""


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
        (folder / ".importlinter").write_text(LAYERS)
        lint = Path(sys.executable).with_name("lint-imports")
        environment = os.environ | {"PYTHONPATH": name}
        command = [lint, "--no-cache"]
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as where:
        sys.exit(check(build_wheel(Path(where)), {}))
