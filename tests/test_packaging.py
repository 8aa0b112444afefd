"""What a user installs: the wheel's files, its imports, and the one direction between rooms."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import minilora

ROOT = Path(__file__).resolve().parents[1]


def _checker():
    spec = importlib.util.spec_from_file_location("check_layers", ROOT / "tests/check_layers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return _checker().build_wheel(tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_every_source_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, prefix in (("minilora", "minilora"), ("kernels", "minilora/kernels")):
        for file in (ROOT / folder).rglob("*.py"):
            assert f"{prefix}/{file.relative_to(ROOT / folder).as_posix()}" in names
    assert "minilora/py.typed" in names
    assert {f"minilora/docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= names
    assert not [name for name in names if name.startswith(("kernels/", "tests/"))]


def test_import_from_the_wheel_is_light(wheel, tmp_path):
    """A clean folder on the path, nothing of this repository."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sys, importlib.util, torch, minilora, minilora.models\n"
        f"assert minilora.__file__.startswith({str(tmp_path)!r}), minilora.__file__\n"
        "heavy = {'triton', 'transformers', 'tokenizers', 'matplotlib', 'gguf', 'jinja2', 'peft'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert importlib.util.find_spec('kernels') is None\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)


def test_rooms_import_only_to_their_left(wheel):
    checker = _checker()
    assert checker.check(wheel, {}) == 0
    upward = {"minilora/lora/layer.py": "\nimport minilora.peft\n"}
    assert checker.check(wheel, upward) != 0
    behind_the_door = {"minilora/peft/config.py": "\nimport minilora.lora.layer\n"}
    assert checker.check(wheel, behind_the_door) != 0


def test_public_names_are_complete_and_shadow_no_module():
    modules = {path.stem for path in (ROOT / "minilora").iterdir()} | {"kernels"}
    assert not modules & set(minilora.__all__)
    assert len(minilora.__all__) <= 28
    for name in minilora.__all__:
        assert getattr(minilora, name).__doc__, name
