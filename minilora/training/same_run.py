"""Compare a saved run with the one that is to continue it: settings, adapter, base and data."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.files import checksum
from minilora.lora import Survey
from minilora.training.adamw import ADAM, is_narrow
from minilora.training.config import TrainConfig


def digest(survey: Survey, adapter: str, whole: Callable[[Tensor], Tensor]) -> str:
    """Return a hash of an adapter; `whole` gathers a tensor that may be sharded."""
    factors = survey.factors(adapter)
    values: dict[str, Tensor] = {
        f"{fqn}.{key}": value
        for fqn, one in factors.items()
        for key, value in one.state_dict().items()
    } | dict(survey.copies_of(adapter))
    rows = [[fqn, one.options()] for fqn, one in factors.items()]
    rows += [[name, checksum(whole(value))] for name, value in values.items()]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]


def check_same_run(folder: Path, saved: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Compare what defines two runs; raise ValueError, or return remarks on what may differ."""
    here = json.loads(json.dumps(here))  # tuples become lists, as in the file
    remarks = []
    for field in dataclasses.fields(TrainConfig):
        key = field.name
        default = json.loads(json.dumps(field.default))
        old, value = saved["config"].get(key, default), here["config"][key]
        if old != value and not field.metadata["may_differ"]:
            raise ValueError(
                f"a resumed run must keep its settings, but {key} was {old!r} and is {value!r}; "
                f"set it back, or start anew in another folder"
            )
        if old != value and key == "lr":
            remarks.append(f"lr was {old!r} and is {value!r} from here on")
    if saved["compute"] != here["compute"]:
        raise ValueError(
            f"a resumed run must compute in the same dtype, but autocast and compute_dtype were "
            f"{saved['compute']} and are {here['compute']}; set dtype in the config, and "
            f"compute_dtype as for the first run"
        )
    old, new = saved["adapter"], here["adapter"]
    other = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if other:
        changed = ", ".join(f"{k} was {old.get(k)!r} and is {new.get(k)!r}" for k in other)
        raise ValueError(
            f"{folder} holds the state of another adapter: {changed}; use the first run's "
            f"settings, or start anew in another folder"
        )
    others = saved.get("others", here["others"])  # which older states have not
    for name, value in here["others"].items():
        if others.get(name) != value:
            raise ValueError(
                f"{folder} holds the state of a run beside another adapter {name!r}: its factors "
                f"or options are not what they were; load the same one"
            )
    rest = here["rest"] if saved["rest"] else {}  # which a state of FSDP2 has not
    for fqn, row in (here["base"] | rest).items():
        if (saved["base"] | saved["rest"]).get(fqn) != row:
            raise ValueError(
                f"{folder} holds the state of a run on another base: the weights of {fqn} are not "
                f"what they were (or not in that dtype); load the same base"
            )
    if saved["loss"] != here["loss"]:  # a name: it may be the same function all the same
        remarks.append(f"the loss was {saved['loss']} and is {here['loss']} from here on")
    if saved["products"] != here["products"]:
        remarks.append(
            f"quantized layers were multiplied (forward and backward) by "
            f"{', '.join(saved['products'])} and are by {', '.join(here['products'])} from here on "
            f"(another processor, a C compiler gone or come, or another compute=): losses differ "
            f"from an unbroken run's"
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

    That is `parameter.<name>` and `buffer.<name>` of all; `best.<name>` of all parameters or none;
    `optimizer.<key>.<name>` of the parameters that have had a gradient, and
    `optimizer.wide.<name>` of those that are trained by a copy.
    """
    wanted = {f"parameter.{name}": p for name, p in trained.items()}
    wanted |= {f"buffer.{name}": b for name, b in buffers.items()}
    if any(key.startswith("best.") for key in tensors):
        wanted |= {f"best.{name}": p for name, p in trained.items()}
    for name, p in trained.items():
        wide = torch.empty(p.shape, dtype=torch.float32, device="meta") if is_narrow(p) else p
        if is_narrow(p):
            wanted[f"optimizer.wide.{name}"] = wide
        if f"optimizer.step.{name}" in tensors:
            wanted |= {f"optimizer.{key}.{name}": wide for key in ADAM[1:]}
            wanted[f"optimizer.step.{name}"] = torch.zeros((), dtype=torch.float32)
    for key in sorted(tensors.keys() | wanted.keys()):
        found, must = (
            f"{list(held[key].shape)} in {held[key].dtype}" if key in held else "nothing"
            for held in (tensors, wanted)
        )
        if found != must:
            raise ValueError(
                f"{file} must hold the tensors of this adapter, but under {key} there must be "
                f"{must}, found {found}; use the first run's settings (if you did, the file is "
                f"damaged: start anew in another folder)"
            )
