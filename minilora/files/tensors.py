"""Files on the disk: read with one kind of error, written whole or not at all.

A file is written beside its place under a name that nobody could have foreseen, flushed, and
renamed. What a killed process leaves is called `.<name>.<16 hex digits>.tmp`; `leftovers` finds it.
Links are followed to read a model, and never to write.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minilora.files.links import NOFOLLOW, NONBLOCK
from minilora.files.wording import one_line

try:
    import fcntl
except ImportError:  # Windows: what a killed process leaves stays there
    fcntl = None  # type: ignore[assignment]

CHECKSUMS = "minilora_sha256"  # in a file's metadata
_HINTS = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, or raise the quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "name a folder on a file system that can be written",
    errno.EACCES: "make the folder writable, or name another one",
    errno.EPERM: "make the folder writable, or name another one",
}
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip

# --- reading


@contextlib.contextmanager
def tensor_file(file: str | Path) -> Iterator[Any]:
    """Open a safetensors file: a handle with `keys`, `get_tensor`, `get_slice` and `metadata`.

    Raises:
        ValueError: there is none, or it is damaged; also while it is read.
        RuntimeError: it is there, and can't be read.
    """
    try:
        with open(file, "rb"):  # the library's own errors don't say which of the three it is
            pass
        opened = safe_open(str(file), framework="pt")
    except SafetensorError as error:
        raise damaged(file, error) from None
    except FileNotFoundError:
        raise ValueError(f"'{file}' must be a safetensors file, found none there") from None
    except OSError as error:
        raise RuntimeError(
            f"'{file}' must be readable, found: {error.strerror or error}; mend that and try again"
        ) from None
    with opened as handle:
        try:
            yield handle
        except SafetensorError as error:
            raise damaged(file, error) from None


def damaged(file: str | Path, why: object) -> ValueError:
    """Return the error for a file that is not what its writer wrote."""
    return ValueError(
        f"'{file}' must be a whole safetensors file, found it damaged or cut short "
        f"({one_line(why, 200)}); fetch, copy or save it again"
    )


def read_tensors(file: str | Path, check: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Args:
        file: a path.
        check: hold the values against the checksums, where the file has some.

    Raises:
        ValueError: no such file, a damaged one, or values that are not those that were written.
        RuntimeError: it can't be read.
    """
    with tensor_file(file) as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata() or {}
    if check:
        sums = Checksums(file, metadata)
        for name, tensor in tensors.items():
            sums.check(name, tensor)
    return tensors, metadata


class Checksums:
    """The SHA-256 of each tensor and of the metadata, as the file's own metadata has them.

    Files without them pass: those of older versions, and of other programs.

    Raises:
        ValueError: they are no checksums, or the metadata is not what was written.
    """

    def __init__(self, file: str | Path, metadata: dict[str, str]):
        self.file, self.sums = file, None
        if CHECKSUMS in metadata:
            try:
                self.sums = dict(json.loads(metadata[CHECKSUMS]))
            except (ValueError, TypeError, RecursionError) as error:
                raise damaged(file, error) from None
            self._require("", _of_metadata(metadata))

    def check(self, name: str, tensor: Tensor) -> None:
        """Raise ValueError if a tensor is not the one that was written."""
        if self.sums is not None:
            self._require(name, checksum(tensor))

    def _require(self, name: str, found: str) -> None:
        if self.sums is not None and self.sums.get(name) != found:
            raise damaged(
                self.file,
                f"{name or 'the metadata'} does not have the SHA-256 that it was saved with",
            )


def checksum(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes: safetensors itself has none."""
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    found.update(_bytes(tensor))
    return found.hexdigest()[:32]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _of_metadata(metadata: dict[str, str]) -> str:
    rest = sorted(item for item in metadata.items() if item[0] != CHECKSUMS)
    return hashlib.sha256(json.dumps(rest).encode()).hexdigest()[:32]


# --- writing

Content = bytes | Callable[[Any], object]  # or what writes into an opened file


class UnwritableError(RuntimeError):
    """A file or folder that can't be written; what was there before is whole."""

    def __init__(self, file: str | Path, error: OSError):
        self.error = error
        hint = _HINTS.get(error.errno or 0, "see what is wrong with the disk")
        super().__init__(
            f"{file} must be written, but that failed: {error.strerror or error}; {hint}, and try "
            f"again: what was saved before is whole"
        )


@contextlib.contextmanager
def beside(file: Path, content: Content) -> Iterator[Path]:
    """Write a file beside its place and flush it, for the caller to rename; removed if it is not.

    Raises:
        RuntimeError: it can't be written, or not be renamed.
        ValueError: something lies in its place that is no file.
    """
    made = None
    try:
        if file.exists() and not file.is_file():
            raise ValueError(f"'{file}' must be a file or not exist, found something else there")
        made, opened = _new_beside(file)
        with opened:
            if isinstance(content, bytes):
                opened.write(content)
            else:
                content(opened)
            opened.flush()
            os.fsync(opened.fileno())
            if fcntl is None:  # Windows renames no open file
                opened.close()
            yield made
        sync(file.parent)
    except OSError as error:
        raise UnwritableError(file, error) from error
    finally:
        with contextlib.suppress(OSError):
            if made is not None:
                made.unlink(missing_ok=True)


def write(file: str | Path, content: Content | str) -> Path:
    """Write a file whole or not at all; a link in its place is replaced, not followed.

    Raises:
        RuntimeError: it can't be written; what was there before stays.
    """
    file = Path(file)
    with beside(file, content.encode() if isinstance(content, str) else content) as made:
        os.replace(made, file)
    sweep(file.parent, file.name)
    return file


def tensor_content(
    tensors: dict[str, Tensor], metadata: dict[str, str], sums: bool = True
) -> Content:
    """Return what writes a safetensors file: equal tensors and metadata, equal bytes.

    With `sums`, checksums are added to the metadata. The format: an 8-byte length, a JSON header,
    the bytes (https://huggingface.co/docs/safetensors). One tensor at a time is copied.

    Raises:
        ValueError: a dtype that the format does not have.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # all aligned
    if sums:
        found = {"": _of_metadata(metadata)} | {name: checksum(tensors[name]) for name in order}
        metadata = {**metadata, CHECKSUMS: json.dumps(found)}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} can't be stored in safetensors, found {tensor.dtype}")
        end += tensor.numel() * tensor.element_size()
        kind, shape = _DTYPES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def put(opened: Any) -> None:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            opened.write(_bytes(tensors[name]))

    return put


def write_json(file: str | Path, entries: Any) -> Path:
    """Write JSON as `write` does."""
    return write(file, json.dumps(entries, indent=2, ensure_ascii=False) + "\n")


def sync(folder: Path) -> None:
    """Flush a folder's renames, where folders can be opened and flushed (not on every share)."""
    if os.name != "posix":
        return
    try:
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


@contextlib.contextmanager
def whole_folder(folder: str | Path, last: str = "config.json") -> Iterator[Path]:
    """Yield an empty folder to write files into, which then become `folder`'s by one rename.

    Where that can't be (`folder` holds files, which stay unless they are written again, or it is a
    mount point or the current folder), files are moved one by one. The one called `last`, without
    which nobody reads the folder, is removed before the first and comes at the end.

    Raises:
        RuntimeError: it can't be written.
    """
    folder = Path(folder).resolve()
    made, held = None, None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fixed = os.path.ismount(folder) or os.getcwd() == str(folder)
        fresh = is_new(folder) and not fixed and os.access(folder.parent, os.W_OK)
        made = name_beside(folder if fresh else folder / folder.name)
        made.mkdir(parents=True)
        held = os.open(made, os.O_RDONLY) if os.name == "posix" else None
        if held is not None:
            _held(held)
        yield made
        sync(made)
        if fresh:
            if folder.exists():
                shutil.copymode(folder, made)
                folder.rmdir()
            os.rename(made, folder)
        else:
            (folder / last).unlink(missing_ok=True)
            for name in sorted(os.listdir(made), key=lambda name: (name == last, name)):
                os.replace(made / name, folder / name)
        sync(folder.parent if fresh else folder)
    except (OSError, UnwritableError) as error:
        why = error.error if isinstance(error, UnwritableError) else error
        raise UnwritableError(folder, why) from error
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        if held is not None:
            os.close(held)


# --- what killed processes leave


def name_beside(file: Path) -> Path:
    """Return a name that nobody could have foreseen, and by which `leftovers` knows a file."""
    return file.with_name(f".{file.name}.{secrets.token_hex(8)}.tmp")


def _new_beside(file: Path) -> tuple[Path, Any]:
    while True:
        made = name_beside(file)
        opened = open(made, "xb")  # noqa: SIM115 (it is the caller's)
        if _held(opened.fileno()):
            return made, opened
        opened.close()


def _held(opened: int) -> bool:
    """Lock what is being written, so that nobody sweeps it; return False if somebody just did."""
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks: nothing is swept there
            fcntl.flock(opened, fcntl.LOCK_EX)
    return os.fstat(opened).st_nlink > 0


def leftovers(folder: Path, name: str) -> list[Path]:
    """Return what writes of `name` left in a folder when their process was killed."""
    form = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{16}}\.tmp")
    with contextlib.suppress(OSError):
        return [folder / at for at in sorted(os.listdir(folder)) if form.fullmatch(at)]
    return []


def is_new(folder: Path) -> bool:
    """Return whether a folder is missing or empty, but for what killed writes of it left."""
    for where in (folder.parent, folder):
        sweep(where, folder.name)
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def sweep(folder: Path, name: str) -> None:
    """Remove the leftovers that no process is writing any more."""
    for left in leftovers(folder, name) if fcntl is not None else ():
        with contextlib.suppress(OSError):
            opened = os.open(left, os.O_RDONLY | NOFOLLOW | NONBLOCK)
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if left.is_dir():
                    shutil.rmtree(left)
                else:
                    left.unlink()
            finally:
                os.close(opened)
