"""One process per output folder: a lock that the system lets go of when its holder dies."""

import json
import os
import shlex
import time
from pathlib import Path

from minilora.files import open_plain

try:
    import fcntl
except ImportError:  # Windows: two runs on one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = "run.lock"
RUN_FILE = "run.toml"  # which the command writes
RESUME = "--resume (in Python: resume=True)"


class FolderLock:
    """Hold a run's folder until `release`; the file says who does.

    The lock is the kernel's, on the open file, so a crash leaves no lock behind: only the file,
    which then tells that a run was killed here. The folder is made if it is missing.
    """

    def __init__(self, folder: Path):
        self.file = folder / LOCK_FILE
        missing = [one for one in (folder, *folder.parents) if not one.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.made = missing
            self.opened = self._open()
            try:
                self._tell()
            except BaseException:  # a full disk: the folder must not stay locked
                self.withdraw()
                raise
        except OSError as error:
            raise RuntimeError(
                f"out must be a folder that can be written, but {folder} can not: "
                f"{error.strerror or error}; name another one"
            ) from error

    def _tell(self) -> None:
        told = {"pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        os.truncate(self.opened, 0)
        os.pwrite(self.opened, json.dumps(told).encode(), 0)

    def _open(self) -> int:
        shared = False
        while True:
            # The file itself is the mark: a run may be killed before it writes anything into it.
            there = os.path.lexists(self.file)
            self.left = there or shared  # by a run that was killed, if the lock is free
            new = 0 if there else os.O_CREAT | os.O_EXCL
            try:
                opened = open_plain(self.file, os.O_RDWR | new)
            except (FileExistsError, FileNotFoundError):
                if os.path.lexists(self.file) == there:
                    raise
                continue  # another run began or ended just now
            try:
                _take(opened, self.file)
                shared = os.fstat(opened).st_nlink > 1  # the name of another file, too
                if shared and self._is(opened):
                    self.file.unlink()
                elif self._is(opened):
                    return opened
            except BaseException:
                os.close(opened)
                raise
            os.close(opened)  # its holder removed it as we waited: not the folder's lock any more

    def _is(self, opened: int) -> bool:
        try:
            return os.path.samestat(os.fstat(opened), os.stat(self.file))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let go of a folder whose run has ended, well or not."""
        self.file.unlink(missing_ok=True)
        os.close(self.opened)

    def withdraw(self) -> None:
        """Leave the folder as it was found: the run did not begin."""
        if self.left:
            os.close(self.opened)
            return
        self.release()
        for made in self.made:
            made.rmdir()


def check_free(folder: Path) -> None:
    """Raise RuntimeError if a process works in the folder now."""
    try:
        opened = open_plain(folder / LOCK_FILE, os.O_RDWR)  # else NFS refuses the lock
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # which `FolderLock` tells
        return
    try:
        _take(opened, folder / LOCK_FILE)
    finally:
        os.close(opened)


def _take(opened: int, file: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(
            f"out must be the folder of one process at a time, but {_holder(file)} is at work in "
            f"{file.parent}; wait for it, stop it, or name another folder"
        ) from None


def _holder(file: Path) -> str:
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        return f"process {told['pid']} (started {told['started']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def to_resume(out: Path | None) -> str:
    """Return how the run in a folder is continued: by one command, if it was begun by one."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"  # torchrun's processes take all the flags
    if out is not None and alone and (out / RUN_FILE).is_file():
        return f"minilora resume {shlex.quote(str(out))}"
    return RESUME
