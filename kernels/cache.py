"""Where what was fetched or compiled once is kept: folders that this user alone can write to."""

import errno
import functools
import os
import stat
from pathlib import Path


def cache_folder(cache: str | Path | None = None) -> Path:
    """Return the folder for fetched models and compiled kernels.

    Args:
        cache: the folder, or None for `MINILORA_CACHE`, else `XDG_CACHE_HOME`/minilora, else
            `~/.cache/minilora`.

    Returns:
        The path; it need not exist.
    """
    if cache is not None:
        return Path(cache)
    if os.environ.get("MINILORA_CACHE"):
        return Path(os.environ["MINILORA_CACHE"])
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "minilora"


def make_folder(folder: str | Path) -> Path:
    """Make a folder and those above it that are missing, each with mode 0700.

    Returns:
        The path without links.

    Raises:
        OSError: it can't be made.
    """
    folder = Path(os.path.abspath(folder))
    for level in reversed([folder, *folder.parents]):
        if not level.is_dir():
            try:
                level.mkdir(0o700)
            except FileExistsError:
                if not level.is_dir():  # else another process made it just now
                    raise
    return folder.resolve()


def private_folder(folder: str | Path) -> Path:
    """Make a folder as `make_folder` does, and require that nobody else could change what it holds.

    It must be this user's, each folder above it this user's or root's, and none writable by others
    (a group of this user alone is none); one above may be if it is sticky, as `/tmp` is: nobody can
    swap a folder of ours in it.

    Raises:
        OSError: it can't be made, or others could write to it.
    """
    real = make_folder(folder)
    if not hasattr(os, "getuid"):
        return real
    for level in reversed([real, *real.parents]):  # one that is safe makes the next one stay
        found, above = level.lstat(), level != real
        ours = found.st_uid == os.getuid() or (above and found.st_uid == 0)
        others = found.st_mode & (stat.S_IWOTH if _is_own_group(found.st_gid) else 0o022)
        shared = others and not (above and found.st_mode & stat.S_ISVTX)
        if not ours or shared or not stat.S_ISDIR(found.st_mode):
            raise PermissionError(errno.EPERM, "others could write to this folder", str(level))
    return real


@functools.cache
def _is_own_group(gid: int) -> bool:
    """Return whether a group is this user's private one: of the same name, with no other member.

    Where each user has one, folders are made with mode 0775 (umask 002).
    """
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return False
    return group.gr_name == user and set(group.gr_mem) <= {user}
