"""Hold a saved run against the one that is to go on: same settings, adapter, base and data."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.training.config import TrainConfig
from minilora.training.state import ADAM

# Settings that may differ when a run goes on: limits, the rate, memory, and what only reports.
_FREE = {
    "epochs", "max_steps", "max_minutes", "lr", "eval_every", "eval_batch_size", "save_every",
    "log_every", "max_bad_steps", "patience", "parallel", "max_memory", "checkpointing",
}  # fmt: skip

_DEFAULTS = TrainConfig().to_dict()


def check_same_run(folder: Path, saved: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Compare what defines two runs (`Run.identity`); return remarks on what may differ.

    Raises:
        ValueError: settings, adapter, base, computation or held-out examples differ.
    """
    here = json.loads(json.dumps(here))  # tuples become lists, as in the file
    remarks = []
    for key, value in here["config"].items():
        old = saved["config"].get(key, _DEFAULTS[key])  # a setting newer than the state
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
    rest = saved.get("rest", {})  # not in states of before
    for fqn, row in (here["base"] | {n: r for n, r in here["rest"].items() if rest}).items():
        if (saved["base"] | rest).get(fqn) != row:
            raise ValueError(
                f"{folder} holds the state of a run on another base: the weights of {fqn} are not "
                f"what they were (or not in that dtype); load the same base"
            )
    old = saved.get("loss", here["loss"])  # not in states of before
    if old != here["loss"]:  # a name: it may be the same function all the same
        remarks.append(f"the loss was {old} and is {here['loss']} from here on")
    old = saved.get("products", here["products"])  # likewise
    if old != here["products"]:
        remarks.append(
            f"quantized layers were multiplied (forward and backward) by {', '.join(old)} and are "
            f"by {', '.join(here['products'])} from here on (another processor, "
            f"a C compiler gone or come, or another compute=): losses differ from an unbroken run's"
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
            wanted |= {f"optimizer.{key}.{name}": p for key in ADAM[1:]}
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
