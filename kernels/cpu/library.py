"""The C sources of this folder as one library, compiled when first needed.

It is built by the C compiler there is (`CC`, else cc, gcc or clang; about a second) into the cache
folder, under a name that holds a hash of the sources and the platform, and linked to no OpenMP of
its own: the symbols are those of the runtime that torch has loaded, and with it torch's threads.
Only a library that nobody else could have written is loaded.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..cache import cache_folder

_C = [Path(__file__).with_name(name) for name in ("rows.c", "blocks.c")]
_HEADERS = [Path(__file__).with_name(name) for name in ("avx2.h", "int4.h")]
_FLAGS = ("-O3", "-fPIC", "-fopenmp")


def compilers() -> list[list[str]]:
    """Return the commands of the C compilers there are, in the order to try them."""
    asked = shlex.split(os.environ.get("CC", ""))
    commands = [asked] if asked else [["cc"], ["gcc"], ["clang"]]
    return [command for command in commands if shutil.which(command[0])]


def build(folder: Path, command: Sequence[str], flags: Sequence[str] = ()) -> ctypes.CDLL | None:
    """Open the library in `folder`, compiled unless it is there; None where that fails."""
    place = (platform.machine(), sys.platform, platform.libc_ver(), _FLAGS, tuple(flags))
    code = b"".join(source.read_bytes() for source in [*_C, *_HEADERS])
    key = hashlib.sha256(code + repr(place).encode()).hexdigest()
    library = folder / f"rows-{key[:16]}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if library.is_file() and (opened := _open(library)) is not None:
            return opened
        with tempfile.TemporaryDirectory(dir=folder) as name:
            made, compile = Path(name) / "rows.so", [*command, *_FLAGS, *flags, "-c"]
            objects = [str(Path(name) / f"{source.stem}.o") for source in _C]
            pairs = zip(_C, objects, strict=True)
            steps = [[*compile, str(source), "-o", to] for source, to in pairs]
            for step in [*steps, [*command, "-shared", *objects, "-o", str(made), "-lm"]]:
                subprocess.run(step, check=True, capture_output=True, timeout=60)
            made.chmod(0o700)
            made.replace(library)  # whole or not at all, whoever else builds it
        return _open(library)
    except (OSError, subprocess.SubprocessError):
        return None


def _open(library: Path) -> ctypes.CDLL | None:
    """Open a library; None if it can't be, or if others may write it or into its folder."""
    if hasattr(os, "getuid"):
        for found in (library.stat(), library.parent.stat()):
            if found.st_uid != os.getuid() or found.st_mode & 0o022:
                return None
    try:
        opened = ctypes.CDLL(str(library))
        for name, tensors, sizes in (
            ("int8_rows", 4, 3), ("int4_rows", 5, 4), ("nf4_weights", 4, 2), ("int4_weights", 3, 3),
            ("int8_blocks", 5, 4), ("int4_blocks", 6, 5), ("blocks_bytes", 0, 4),
            ("has_blocks", 0, 0),
        ):  # fmt: skip
            function = getattr(opened, f"minilora_{name}")
            function.argtypes = [ctypes.c_void_p] * tensors + [ctypes.c_long] * sizes
            function.restype = None if tensors else ctypes.c_long
    except (OSError, AttributeError):
        return None
    return opened


@functools.cache
def native() -> ctypes.CDLL | None:
    """Return this process's library, built if need be, or None where nothing can be compiled."""
    try:
        folder = cache_folder() / "kernels"
        tried = (build(folder, command) for command in compilers())
        return next((library for library in tried if library is not None), None)
    except (OSError, RuntimeError, ValueError):  # no home, a CC that is no command, no source
        return None
