"""The state of a run in one file: tensors in safetensors, the rest as JSON in its metadata.

One file, renamed into place, is whole or absent; a state of two files could be half of each.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minilora.training.config import TrainConfig

STATE_FILE = "state.safetensors"
_VERSION = 1
# Settings that may differ when a run goes on: limits, and what only reports.
_FREE = {"epochs", "max_steps", "max_minutes", "save_every", "log_every", "eval_batch_size"}


def save_state(folder: Path, tensors: dict[str, Tensor], facts: dict) -> None:
    """Write the state aside, flush it to the disk and rename it into place."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{STATE_FILE}.{os.getpid()}.tmp"
    metadata = {"minilora_run": json.dumps({"version": _VERSION, **facts})}
    try:
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, aside, metadata)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, folder / STATE_FILE)
    finally:
        aside.unlink(missing_ok=True)


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """Read a state that `save_state` wrote.

    Raises:
        ValueError: no state there, a damaged file, or one of another version.
    """
    file = folder / STATE_FILE
    if not file.is_file():
        raise ValueError(
            f"resume needs {file}, and there is none; start without resume, or name the folder of "
            f"an earlier run"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            facts = json.loads((opened.metadata() or {})["minilora_run"])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{file} must be a state that minilora wrote, but reading it failed ({error!r}); "
            f"start again without resume"
        ) from None
    if facts.get("version") != _VERSION:
        raise ValueError(
            f"{file} has state version {facts.get('version')!r}, this minilora reads {_VERSION}; "
            f"finish the run with the version that began it"
        )
    return tensors, facts


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
    optimizer: torch.optim.Optimizer, names: dict[Tensor, str], tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` returned."""
    for parameter, name in names.items():
        state = {
            key.split(".", 2)[1]: value
            for key, value in tensors.items()
            if key.startswith("optimizer.") and key.split(".", 2)[2] == name
        }
        optimizer.state[parameter] = {
            key: value.clone() if value.dim() == 0 else value.to(parameter.device)
            for key, value in state.items()
        }


def check_same_run(
    folder: Path,
    tensors: dict[str, Tensor],
    facts: dict,
    config: TrainConfig,
    dtype: torch.dtype | None,
    names: dict[Tensor, str],
) -> None:
    """Raise ValueError unless the state is of a run with these settings and parameters."""
    here = json.loads(json.dumps(config.to_dict()))  # tuples become lists, as in the file
    for key, value in facts["config"].items():
        if key not in _FREE and here.get(key) != value:
            raise ValueError(
                f"a resumed run must keep its settings, but {key} was {value!r} and is "
                f"{here.get(key)!r}; set it back, or start anew in another folder"
            )
    if str(dtype) != facts["dtype"]:
        raise ValueError(
            f"a resumed run must compute in the same dtype, but autocast was {facts['dtype']} and "
            f"is {dtype}; set dtype in the config"
        )
    for parameter, name in names.items():
        saved = tensors.get(f"parameter.{name}")
        if saved is None or saved.shape != parameter.shape:
            found = "none" if saved is None else f"shape {list(saved.shape)}"
            raise ValueError(
                f"{folder} holds the state of another adapter: {name} must have shape "
                f"{list(parameter.shape)}, found {found}; inject as for the first run"
            )
