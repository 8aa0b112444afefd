"""The state of a run in one file: tensors in safetensors, the rest as JSON in its metadata.

One file, renamed into place, is whole or absent; a state of two files could be half of each.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from minilora.adapter_files import CONFIG_FILE
from minilora.training.monitor import METRICS_FILE, read_metrics

STATE_FILE = "state.safetensors"
_VERSION = 2
# Settings that may differ when a run goes on: limits, the rate, and what only reports.
_FREE = {
    "epochs", "max_steps", "max_minutes", "lr", "eval_every", "eval_batch_size", "save_every",
    "log_every", "max_bad_steps",
}  # fmt: skip
_ADAM = ("step", "exp_avg", "exp_avg_sq")


def check_out(out: Path, resume: bool) -> None:
    """Raise ValueError unless a run may write into `out`: nothing of another run is overwritten."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, found a file at {out}; name another place")
    if resume:
        if not (out / STATE_FILE).is_file():
            raise ValueError(
                f"resume needs {out / STATE_FILE}, and there is none; start without resume, or "
                f"name the folder of an earlier run"
            )
        return
    if (out / STATE_FILE).exists():
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


def save_state(folder: Path, tensors: dict[str, Tensor], facts: dict) -> None:
    """Write the state aside, flush it to the disk and rename it into place."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{STATE_FILE}.{os.getpid()}.tmp"
    metadata = {"minilora_run": json.dumps({"version": _VERSION, **facts})}
    plain = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
    try:
        with open(aside, "wb") as file:
            file.write(serialize(plain, metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, folder / STATE_FILE)
    finally:
        aside.unlink(missing_ok=True)


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """Read a state that `save_state` wrote.

    Raises:
        ValueError: a damaged file, or one of another version.
    """
    file = folder / STATE_FILE
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            facts = json.loads((opened.metadata() or {})["minilora_run"])
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise damaged(file, error) from None
    if not isinstance(facts, dict):
        raise damaged(file, facts)
    if facts.get("version") != _VERSION:
        raise ValueError(
            f"{file} has state version {facts.get('version')!r}, this minilora reads {_VERSION}; "
            f"finish the run with the version that began it"
        )
    return tensors, facts


def damaged(file: Path, why: object) -> ValueError:
    """Return the error for a file that is no state, or not a whole one."""
    return ValueError(
        f"{file} must be a state that minilora wrote, but reading it failed ({why!r:.200}); start "
        f"anew in another folder"
    )


def check_same_run(folder: Path, saved: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Compare what defines two runs (`Run.identity`); return remarks on what may differ.

    Raises:
        ValueError: settings, adapter, base, computation or held-out examples differ.
    """
    here = json.loads(json.dumps(here))  # tuples become lists, as in the file
    remarks = []
    for key, value in here["config"].items():
        old = saved["config"].get(key)
        if old == value:
            continue
        if key not in _FREE:
            raise ValueError(
                f"a resumed run must keep its settings, but {key} was {old!r} and is {value!r}; "
                f"set it back, or start anew in another folder"
            )
        if key == "lr":
            remarks.append(f"lr was {old!r} and is {value!r} from here on")
    if saved["compute"] != here["compute"]:
        raise ValueError(
            f"a resumed run must compute in the same dtype, but autocast and compute_dtype were "
            f"{saved['compute']} and are {here['compute']}; set dtype in the config, and "
            f"compute_dtype as for the first run"
        )
    for key in saved["adapter"].keys() | here["adapter"].keys():
        old, new = saved["adapter"].get(key), here["adapter"].get(key)
        if old != new:
            raise ValueError(
                f"{folder} holds the state of another adapter: {key} was {old!r} and is {new!r}; "
                f"inject as for the first run"
            )
    for fqn, row in here["base"].items():
        if saved["base"].get(fqn) != row:
            raise ValueError(
                f"{folder} holds the state of a run on another base: the weights of {fqn} are not "
                f"what they were (or not in that dtype); load the same base"
            )
    if saved["valid"] != here["valid"]:
        raise ValueError(
            f"a resumed run must keep its held-out examples, or old and new losses could not be "
            f"compared, but valid was {saved['valid']} and is {here['valid']}; pass the same valid"
        )
    return remarks


def check_tensors(
    file: Path, tensors: dict[str, Tensor], trained: dict[str, Tensor], buffers: dict[str, Tensor]
) -> None:
    """Raise ValueError unless a state holds exactly what an adapter needs, in shape and dtype.

    Args:
        file: named in the message.
        tensors: `parameter.<name>` and `buffer.<name>` of all; `best.<name>` of all parameters or
            none; `optimizer.<key>.<name>` of the parameters that have had a gradient.
        trained: the adapter's parameters by name.
        buffers: what is frozen of it.
    """
    wanted = {f"parameter.{name}": p for name, p in trained.items()}
    wanted |= {f"buffer.{name}": b for name, b in buffers.items()}
    if any(key.startswith("best.") for key in tensors):
        wanted |= {f"best.{name}": p for name, p in trained.items()}
    for name, p in trained.items():
        if f"optimizer.step.{name}" in tensors:
            wanted |= {f"optimizer.{key}.{name}": p for key in _ADAM[1:]}
            wanted[f"optimizer.step.{name}"] = torch.zeros(())
    for key in sorted(tensors.keys() | wanted.keys()):
        found, must = (
            f"{list(kept[key].shape)} in {kept[key].dtype}" if key in kept else "nothing"
            for kept in (tensors, wanted)
        )
        if found != must:
            raise ValueError(
                f"{file} must hold the tensors of this adapter, but under {key} there must be "
                f"{must}, found {found}; inject as for the first run (if you did, the file is "
                f"damaged: start anew in another folder)"
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
    optimizer: torch.optim.Optimizer, names: dict[Tensor, str], tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` returned."""
    for parameter, name in names.items():
        if f"optimizer.step.{name}" in tensors:
            state = {key: tensors[f"optimizer.{key}.{name}"] for key in _ADAM}
            optimizer.state[parameter] = {
                key: value.clone() if key == "step" else value.to(parameter.device)
                for key, value in state.items()
            }
