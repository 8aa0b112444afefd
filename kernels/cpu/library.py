"""The C sources of this folder as one library, compiled when first needed.

It is built by the C compiler there is (`CC`, else cc, gcc or clang; about a second) into the cache
folder, under a name that holds a hash of the sources and the platform, and linked to no OpenMP of
its own: the symbols are those of the runtime that torch has loaded, and with it torch's threads.
Only a library that nobody else could have written is loaded: from a file that was checked after it
was opened, in a folder that no other user can change.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..cache import cache_folder, private_folder

_C = [Path(__file__).with_name(name) for name in ("rows.c", "blocks.c", "passes.c")]
_HEADERS = [Path(__file__).with_name(name) for name in ("avx2.h", "int4.h")]
_FLAGS = ("-O3", "-fPIC", "-fopenmp")


def compilers() -> list[list[str]]:
    """Return the commands of the C compilers there are, in the order to try them."""
    asked = shlex.split(os.environ.get("CC", ""))
    commands = [asked] if asked else [["cc"], ["gcc"], ["clang"]]
    # A bare name must not be found in the current folder.
    return [
        command
        for command in commands
        if (at := shutil.which(command[0])) and (os.path.isabs(at) or os.sep in command[0])
    ]


def build(folder: Path, command: Sequence[str], flags: Sequence[str] = ()) -> ctypes.CDLL | None:
    """Open the library in `folder`, compiled unless it is there; None where that fails."""
    built = (platform.machine(), sys.platform, platform.libc_ver(), _FLAGS, tuple(flags))
    code = b"".join(source.read_bytes() for source in [*_C, *_HEADERS])
    key = hashlib.sha256(code + repr(built).encode()).hexdigest()
    library = folder / f"rows-{key[:16]}.so"
    try:
        private_folder(folder)
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


def _load(library: Path) -> ctypes.CDLL:
    """Load a library that nobody else could have written, or raise PermissionError."""
    if not hasattr(os, "getuid"):
        return ctypes.CDLL(str(library))
    path = private_folder(library.parent) / library.name
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(file)
        if found.st_uid != os.getuid() or found.st_mode & 0o022 or not stat.S_ISREG(found.st_mode):
            raise PermissionError(f"{library} could have been written by others")
        # Without /proc the folder, which is ours alone, has to do.
        held = Path(f"/proc/self/fd/{file}")
        return ctypes.CDLL(str(held if held.exists() else path))
    except BaseException:
        os.close(file)
        raise
    # Else it stays open: the loader knows a library by its name, and would take a later one under
    # the same number for this one.


def _open(library: Path) -> ctypes.CDLL | None:
    """Open a library; None if it can't be, or if others could have written it."""
    try:
        opened = _load(library)
        for name, tensors, sizes, floats in (
            ("int8_rows", 4, 3, 0), ("int4_rows", 5, 4, 0), ("nf4_weights", 4, 2, 0),
            ("int4_weights", 3, 3, 0), ("int8_blocks", 5, 4, 0), ("int4_blocks", 6, 5, 0),
            ("blocks_bytes", 0, 4, 0), ("has_blocks", 0, 0, 0), ("has_passes", 0, 0, 0),
            ("norm_pass", 3, 3, 2), ("norm_back_pass", 4, 2, 2), ("gated_pass", 3, 2, 0),
            ("gated_back_pass", 5, 2, 0), ("rotary_pass", 4, 13, 0),
        ):  # fmt: skip
            function = getattr(opened, f"minilora_{name}")
            function.argtypes = (
                [ctypes.c_void_p] * tensors + [ctypes.c_long] * sizes + [ctypes.c_double] * floats
            )
            function.restype = None if tensors else ctypes.c_long
    except (OSError, AttributeError):
        return None
    return opened


@functools.cache
def native() -> ctypes.CDLL | None:
    """Return this process's library, built if need be, or None where nothing can be compiled.

    Where the cache can't be written, or others could write to it, it is built for this process
    alone.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = private_folder(cache_folder() / "kernels")
        except (OSError, RuntimeError):  # RuntimeError: no home
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            tried = (build(folder, command) for command in compilers())
            return next((library for library in tried if library is not None), None)
        except (OSError, ValueError):  # no source, a CC that is no command
            return None
