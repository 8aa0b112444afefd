"""The state of a run on the disk: tensors in safetensors, the rest as JSON in its metadata.

One file, renamed into place, is whole or absent; a state of two files could be half of each. The
one before it is kept, so a newest one that a crash or a bad disk damaged costs one save, not a run.
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from minilora.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from minilora.training.lock import LOCK_FILE
from minilora.training.monitor import METRICS_FILE, read_metrics

STATE_FILE = "state.safetensors"
PREVIOUS_FILE = "state.previous.safetensors"
ADAM = ("step", "exp_avg", "exp_avg_sq")
_VERSION = 4
_HINTS = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, or raise the quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "name a folder on a file system that can be written",
    errno.EACCES: "make the folder writable, or name another one",
    errno.EPERM: "make the folder writable, or name another one",
}


def has_state(out: Path) -> bool:
    """Tell whether there is a state to go on from."""
    return (out / STATE_FILE).is_file() or (out / PREVIOUS_FILE).is_file()


def check_out(out: Path, resume: bool, begun: bool | None = None) -> None:
    """Raise ValueError unless a run may write into `out`: nothing of another run is overwritten.

    Args:
        out: the run's folder.
        resume: whether it is to go on from what is there.
        begun: whether a run was killed in it; None: if its lock's file is there.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, found a file at {out}; name another place")
    if resume:
        begun = (out / LOCK_FILE).exists() if begun is None else begun
        if not (has_state(out) or begun):
            raise ValueError(
                f"resume needs {out / STATE_FILE}, and there is none; start without resume, or "
                f"name the folder of an earlier run"
            )
        return
    if has_state(out):
        raise ValueError(
            f"{out} holds the state of an earlier run; pass resume=True (--resume) to continue it, "
            f"or another folder to start anew"
        )
    metrics = out / METRICS_FILE
    logged = metrics.is_file() and any(row["step"] > 0 for row in read_metrics(metrics))
    if logged or (out / CONFIG_FILE).exists():
        found = METRICS_FILE if logged else CONFIG_FILE
        raise ValueError(
            f"out must not hold another adapter or run, found {found} in {out}; name another "
            f"folder, or remove that one"
        )


def unwritable(place: Path, error: OSError) -> RuntimeError:
    """Return the error for a file that could not be written."""
    hint = _HINTS.get(error.errno or 0, "see what is wrong with the disk")
    return RuntimeError(
        f"{place} must be written, but that failed: {error.strerror or error}; {hint}, then go on "
        f"with resume=True (--resume): what was saved before is whole"
    )


def sweep(out: Path) -> None:
    """Remove what writes that were killed left beside the files."""
    for folder in (out, out / "last"):
        for name in (STATE_FILE, CONFIG_FILE, WEIGHTS_FILE, METRICS_FILE):
            for aside in folder.glob(f".{name}.*tmp"):
                aside.unlink()


class _OtherVersionError(ValueError):
    """A state that another version of minilora wrote."""


def save_state(folder: Path, tensors: dict[str, Tensor], facts: dict) -> None:
    """Write the state aside, flush it to the disk and rename it into place.

    The newest before it stays as the previous one; at every moment one of the two is whole.

    Raises:
        RuntimeError: it can't be written; the states that were there stay.
    """
    plain = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
    told = {"version": _VERSION, "sha256": digest(plain), **facts}
    newest, previous = folder / STATE_FILE, folder / PREVIOUS_FILE
    aside = folder / f".{STATE_FILE}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _write(aside, serialize(plain, {"minilora_run": json.dumps(told)}))
            if newest.is_file():
                os.replace(newest, previous)
            try:
                os.replace(aside, newest)
            except BaseException:  # a second Ctrl-C too
                if previous.is_file() and not newest.exists():
                    os.replace(previous, newest)
                raise
            _sync_folder(folder)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(newest, error) from error


def _write(file: Path, content: bytes) -> None:
    with open(file, "wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def _sync_folder(folder: Path) -> None:
    """Flush the renames, where folders can be opened."""
    if os.name != "posix":
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def digest(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of names and bytes: safetensors itself has no checksum."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """Read the newest state, or the one before where the newest is missing or damaged.

    A damaged newest state is replaced by the previous one, so that the next save can't push the
    good one out.

    Returns:
        The tensors, and the facts with a remark under `"fallback"` (None for the newest).

    Raises:
        ValueError: no state that is whole, or one of another version.
    """
    newest, previous = folder / STATE_FILE, folder / PREVIOUS_FILE
    try:
        tensors, facts = _read(newest)
        return tensors, facts | {"fallback": None}
    except _OtherVersionError:  # whole, for another minilora: it stays where it is
        raise
    except ValueError as error:
        if not previous.is_file():
            raise
        try:
            tensors, facts = _read(previous)
        except _OtherVersionError:
            raise
        except ValueError:
            raise error from None
    why = "is damaged" if newest.exists() else "is missing (a save was cut short)"
    os.replace(previous, newest)
    return tensors, facts | {
        "fallback": f"{newest} {why}: going on from the state before it, of step {facts['step']}"
    }


def _read(file: Path) -> tuple[dict[str, Tensor], dict]:
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            facts = json.loads((opened.metadata() or {})["minilora_run"])
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise damaged(file, error) from None
    if not isinstance(facts, dict):
        raise damaged(file, facts)
    if facts.get("version") != _VERSION:
        raise _OtherVersionError(
            f"{file} has state version {facts.get('version')!r}, this minilora reads {_VERSION}; "
            f"finish the run with the version that began it"
        )
    if facts.get("sha256") != digest(tensors):
        raise damaged(file, "its SHA-256 is not the one written in it")
    return tensors, facts


def damaged(file: Path, why: object) -> ValueError:
    """Return the error for a file that is no state, or not a whole one."""
    return ValueError(
        f"{file} must be a state that minilora wrote, but reading it failed ({why!r:.200}); start "
        f"anew in another folder"
    )


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[Tensor, str]
) -> dict[str, Tensor]:
    """Return the optimizer's per-parameter tensors as `optimizer.<key>.<parameter's name>`."""
    return {
        f"optimizer.{key}.{names[parameter]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: dict[Tensor, str],
    tensors: dict[str, Tensor],
    like: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Put back what `optimizer_tensors` returned; `like` lays a value out as a parameter is."""
    # Fused kernels read the step on the parameter's device; the others keep it on the processor.
    fused = optimizer.defaults["fused"]
    for parameter, name in names.items():
        if f"optimizer.step.{name}" in tensors:
            state = {key: tensors[f"optimizer.{key}.{name}"] for key in ADAM}
            at = parameter.device if fused else torch.device("cpu")
            optimizer.state[parameter] = {
                key: value.to(at, copy=True) if key == "step" else like(parameter, value)
                for key, value in state.items()
            }
