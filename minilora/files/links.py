"""Links in folders that others made: none is written through, and none leads out of a model."""

import os
import stat
from pathlib import Path

NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # opening a pipe would else wait for its other end


def open_plain(file: str | Path, flags: int) -> int:
    """Open a file of a folder that may come from a stranger: never through a link.

    Raises:
        ValueError: it is a link, or no file.
        OSError: as `os.open`.
    """
    try:
        opened = os.open(file, flags | NOFOLLOW | NONBLOCK | getattr(os, "O_CLOEXEC", 0), 0o666)
    except OSError:
        if Path(file).is_symlink():
            raise ValueError(
                f"'{file}' must be a file of its own, found a link; remove it: what it leads to "
                f"is not to be written"
            ) from None
        raise
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise ValueError(f"'{file}' must be a file, found something else; remove it")
    return opened


def leads_out(folder: Path, file: Path) -> bool:
    """Return whether a file of a model folder is a link to somewhere else.

    In Hugging Face's cache, files of `snapshots/…` are links into `blobs`: those count as inside.
    """
    root, real = folder.resolve(), file.resolve()
    homes = [root]
    for level in (root, *root.parents):
        if level.parent.name == "snapshots":
            homes.append((level.parent.parent / "blobs").resolve())
    return not any(real.is_relative_to(home) for home in homes)
