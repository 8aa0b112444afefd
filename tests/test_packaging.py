"""What a user installs: the wheel, its imports and rooms, what it requires, pins that resolve."""

import os
import pkgutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email import message_from_bytes
from importlib import metadata
from pathlib import Path

import pytest
from check_layers import build_wheel, check
from packaging.requirements import Requirement
from sweeps import wide

import minilora
import minilora.models
from minilora.files import import_extra
from minilora.files.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[1]


def required(texts, extras=("",)):
    """Return the requirements among Requires-Dist lines that hold here under one of some extras."""
    found = [Requirement(text) for text in texts or ()]
    return [
        r for r in found if not r.marker or any(r.marker.evaluate({"extra": e}) for e in extras)
    ]


def distributions(texts):
    """Return what some requirements install, by name, from what is installed here."""
    found, waiting = {}, required(texts)
    while waiting:
        requirement = waiting.pop()
        key = requirement.name.lower(), *sorted(requirement.extras)
        if key not in found:
            found[key] = metadata.distribution(requirement.name)
            waiting += required(found[key].requires, ("", *requirement.extras))
    return {name: distribution for (name, *_), distribution in found.items()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("wheel")))


def test_wheel_holds_every_source_file(wheel):
    names = set(wheel.namelist())
    for folder, prefix in (("minilora", "minilora"), ("kernels", "minilora/kernels")):
        for file in (ROOT / folder).rglob("*.py"):
            assert f"{prefix}/{file.relative_to(ROOT / folder).as_posix()}" in names
    assert "minilora/py.typed" in names
    assert {f"minilora/docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= names
    assert not [name for name in names if name.startswith(("kernels/", "tests/"))]


def test_import_from_the_wheel_is_light(wheel, tmp_path):
    """A clean folder on the path, nothing of this repository."""
    wheel.extractall(tmp_path)
    code = (
        "import sys, importlib.util, torch, minilora, minilora.models\n"
        f"assert minilora.__file__.startswith({str(tmp_path)!r}), minilora.__file__\n"
        "heavy = {'triton', 'transformers', 'tokenizers', 'matplotlib', 'gguf', 'jinja2', 'peft',\n"
        "         'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert importlib.util.find_spec('kernels') is None\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)


def test_rooms_import_only_to_their_left(wheel):
    file = Path(wheel.filename)
    assert check(file, {}) == 0
    upward = {"minilora/lora/layer.py": "\nimport minilora.peft\n"}
    assert check(file, upward) != 0
    behind_the_door = {"minilora/peft/config.py": "\nimport minilora.lora.layer\n"}
    assert check(file, behind_the_door) != 0


def test_public_names_are_complete_and_shadow_no_module():
    modules = {path.stem for path in (ROOT / "minilora").iterdir()} | {"kernels"}
    assert not modules & set(minilora.__all__)
    assert len(minilora.__all__) <= 28
    for name in minilora.__all__:
        assert getattr(minilora, name).__doc__, name
    modules = {module.name for module in pkgutil.iter_modules(minilora.models.__path__)}
    assert len(modules) > 5 and not modules & set(minilora.models.__all__)


# --- what it requires ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def requires(wheel):
    """What the wheel's metadata says it requires."""
    (name,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    return message_from_bytes(wheel.read(name)).get_all("Requires-Dist")


@pytest.fixture(scope="module")
def bare(tmp_path_factory, wheel, requires):
    """A virtual environment with the wheel and what it requires, as links, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.EnvBuilder(symlinks=True).create(folder)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": folder}))
    wheel.extractall(site)
    for distribution in distributions(requires).values():
        for name in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(distribution.locate_file(name))
    return folder / "bin" / "python"


def test_a_bare_installation_trains_and_says_what_a_verb_lacks(bare, tmp_path):
    """Over 5 s: a process of its own imports torch."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [bare, ROOT / "tests" / "bare_installation.py"],
        cwd=tmp_path, env=environment | {"PYTHONSAFEPATH": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "every verb answered\n"


def test_extras_bring_what_the_messages_name(requires):
    assert {r.name for r in required(requires)} == {"torch", "safetensors", "numpy"}
    for package, extra in EXTRAS.items():
        assert package in {r.name for r in required(requires, [extra])}
    everything = [r for r in required(requires, ["all"]) if r.name == "minilora"]
    assert [r.extras for r in everything] == [set(EXTRAS.values())]


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(
        RuntimeError,
        match=r'^a bar needs tqdm \(.*\): pip install "minilora\[train\]", or "minilora\[all\]"$',
    ):
        import_extra("tqdm", "a bar")


@pytest.fixture(scope="module")
def pip(tmp_path_factory):
    """Pip's newest version as a command: older ones download what they resolve."""
    folder = tmp_path_factory.mktemp("pip")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    got = subprocess.run(
        [*pip, "install", "-q", "--target", folder, "--retries", "1", "pip>=25"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if got.returncode:
        pytest.skip(f"no package index answers: {got.stderr.strip().splitlines()[-1]}")
    return [sys.executable, folder / "pip", "--disable-pip-version-check"]


@pytest.mark.network
@pytest.mark.parametrize(("triton", "resolves"), [(None, True), wide("3.9.0", False)])
def test_the_pins_hold_for_cuda_builds_of_torch(pip, tmp_path, triton, resolves):
    """`===` takes the public file, which requires one triton; a local build has no such name.

    Over 5 s: pip reads the metadata of large files in parts. The second case is what a wrong pin
    gives.
    """
    if sys.platform != "linux":
        pytest.skip("the public builds for CUDA are of Linux")
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    if triton is not None:
        pins = [f"triton=={triton}" if pin.startswith("triton==") else pin for pin in pins]
    file = tmp_path / "constraints.txt"
    file.write_text("\n".join(pins))
    (torch,) = [pin for pin in pins if pin.startswith("torch==")]
    done = subprocess.run(
        [*pip, "install", "-q", "--dry-run", "--ignore-installed", "--use-feature=fast-deps",
         "-c", file, torch.replace("==", "==="), "triton"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) == resolves, done.stderr
    if not resolves:
        assert "conflicting dependencies" in done.stderr
