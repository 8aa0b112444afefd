"""The state of a run on the disk: tensors in safetensors, the rest as JSON in its metadata.

One file, renamed into place, is whole or absent; a state of two files could be half of each. The
one before it is kept, so a newest one that a crash or a bad disk damaged costs one save, not a run.
"""

import json
import os
from pathlib import Path

from torch import Tensor

from minilora.files import CHECKSUMS, UnwritableError, beside, read_tensors, tensor_content
from minilora.peft import CONFIG_FILE, WEIGHTS_FILE, settle_pair
from minilora.training.lock import LOCK_FILE, to_resume
from minilora.training.monitor import CURVE_FILE, METRICS_FILE, read_metrics

STATE_FILE = "state.safetensors"
PREVIOUS_FILE = "state.previous.safetensors"
LAST = "last"  # the folder of the newest adapter
_VERSION = 5


def has_state(out: Path) -> bool:
    """Return whether there is a state to go on from."""
    return (out / STATE_FILE).is_file() or (out / PREVIOUS_FILE).is_file()


def check_out(out: Path, resume: bool, begun: bool | None = None) -> None:
    """Raise ValueError unless a run may write into `out`: nothing of another run is overwritten.

    `begun` says whether a run was killed in it; None: if its lock's file is there.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, found a file at {out}; name another folder")
    if (out / LAST).is_symlink():
        raise ValueError(
            f"{out / LAST} must be a folder of its own, found a link; remove it: nothing is "
            f"written to where it leads"
        )
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
            f"{out} holds the state of an earlier run; continue it with {to_resume(out)}, or name "
            f"another folder to start anew"
        )
    metrics = out / METRICS_FILE
    logged = metrics.is_file() and any(row["step"] > 0 for row in read_metrics(metrics))
    if logged or (out / CONFIG_FILE).exists():
        found = METRICS_FILE if logged else CONFIG_FILE
        raise ValueError(
            f"out must not hold another adapter or run, found {found} in {out}; name another "
            f"folder, or remove that one"
        )


def resumable(out: Path, error: UnwritableError) -> RuntimeError:
    """Return the error for a run whose file could not be written."""
    return RuntimeError(f"{error}; go on with {to_resume(out)}")


def sweep(out: Path) -> None:
    """Finish or remove what writes that were killed left beside the files."""
    for folder in (out, out / LAST):
        settle_pair(folder)
        for name in (STATE_FILE, CONFIG_FILE, WEIGHTS_FILE, METRICS_FILE, CURVE_FILE):
            for aside in folder.glob(f".{name}.*tmp"):
                aside.unlink()


class _OtherVersionError(ValueError):
    """A state that another version of minilora wrote."""


def save_state(folder: Path, tensors: dict[str, Tensor], facts: dict) -> None:
    """Write the state aside, flush it to the disk and rename it into place.

    The newest before it stays as the previous one; at every moment one of the two is whole.
    """
    told = {"minilora_run": json.dumps({"version": _VERSION, **facts})}
    newest, previous = folder / STATE_FILE, folder / PREVIOUS_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with beside(newest, tensor_content(tensors, told)) as aside:
            if newest.is_file():
                os.replace(newest, previous)
            try:
                os.replace(aside, newest)
            except BaseException:  # a second Ctrl-C too
                if previous.is_file() and not newest.exists():
                    os.replace(previous, newest)
                raise
    except UnwritableError as error:
        raise resumable(folder, error) from error
    except OSError as error:
        raise resumable(folder, UnwritableError(newest, error)) from error


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """Read the newest state, or the one before where the newest is missing or damaged.

    The facts have a remark under `"fallback"`, None for the newest. One that is there and can't be
    read just now is no damage. Nothing on the disk changes: a run that goes on calls
    `settle_state`.
    """
    newest, previous = folder / STATE_FILE, folder / PREVIOUS_FILE
    try:
        tensors, facts = _read(newest)
        return tensors, facts | {"fallback": None}
    except ValueError as error:
        if isinstance(error, _OtherVersionError) or not previous.is_file():
            raise  # of another version it is whole, and stays where it is
        try:
            tensors, facts = _read(previous)
        except _OtherVersionError:
            raise
        except ValueError:
            raise error from None
    why = "is damaged" if newest.exists() else "is missing (a save was cut short)"
    return tensors, facts | {
        "fallback": f"{newest} {why}: going on from the state before it, of step {facts['step']}"
    }


def settle_state(folder: Path) -> None:
    """Put the state before a damaged newest one in its place: the next save would push it out."""
    os.replace(folder / PREVIOUS_FILE, folder / STATE_FILE)


def _read(file: Path) -> tuple[dict[str, Tensor], dict]:
    try:
        tensors, metadata = read_tensors(file)
        facts = json.loads(metadata["minilora_run"])
    except (KeyError, ValueError, RecursionError) as error:
        raise damaged(file, error) from None
    if not isinstance(facts, dict):
        raise damaged(file, facts)
    if facts.get("version") != _VERSION:
        raise _OtherVersionError(
            f"{file} has state version {facts.get('version')!r}, this minilora reads {_VERSION}; "
            f"finish the run with the version that began it"
        )
    if CHECKSUMS not in metadata:
        raise damaged(file, "it has no checksums")
    return tensors, facts


def damaged(file: Path, why: object) -> ValueError:
    """Return the error for a file that is no state, or not a whole one."""
    return ValueError(
        f"{file} must be a state that minilora wrote, but reading it failed ({why!r:.200}); start "
        f"anew in another folder"
    )
