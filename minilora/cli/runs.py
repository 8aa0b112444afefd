"""`minilora resume` and `minilora repeat`: runs from their folder alone."""

import argparse
import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from minilora.cli.arguments import VERBS, arg, verb
from minilora.cli.run_file import (
    file_hashes,
    more_inputs,
    read_run,
    replaced,
    versions,
    without_resume,
)
from minilora.cli.sources import check_new_folder
from minilora.files import flags_of, read_tensors
from minilora.peft import WEIGHTS_FILE
from minilora.training import RUN_FILE, TrainConfig


def _read_alone(out: Path) -> dict[str, Any]:
    """Read what can be run again by one process."""
    found = read_run(out)
    if found.get("processes") != 1:
        raise ValueError(
            f"the run had {found.get('processes')} processes; give torchrun the command in "
            f"{out / RUN_FILE}"
        )
    return found


@contextmanager
def _parsed_in(folder: str | Path, words: list[str]) -> Iterator[argparse.Namespace]:
    """Within the block this is the current folder; give a command's options, read there."""
    from minilora.cli.command import build_parser

    here = os.getcwd()
    os.chdir(folder)
    try:
        yield build_parser().parse_args(words)
    finally:
        os.chdir(here)


def _again(out: Path, words: list[str], folder: str) -> int:
    """Run a command, with `out` as its folder, from where it was given.

    `out` is named as it is, unless that would be another one from there.
    """
    if not Path(folder).is_dir():
        raise ValueError(
            f"the run began in {folder}, which is not there; make it, or pass all flags"
        )
    if not Path(folder).samefile("."):
        out = out.absolute()
    with _parsed_in(folder, words) as options:
        options.out, options.argv = out, words
        return VERBS[words[0]][0](options)


LIMITS = {  # and their other spellings
    flags_of(field)[0]: flags_of(field)
    for field in dataclasses.fields(TrainConfig)
    if field.name in ("epochs", "max_steps", "max_minutes")
}


@verb(
    "resume",
    arg("out", type=Path, metavar="OUT", help="folder of a run that was stopped"),
    *(arg(flag, metavar="N", help="another limit than the run began with") for flag in LIMITS),
)
def resume(options: argparse.Namespace) -> int:
    """Continue a stopped run, as its folder says."""
    run = _read_alone(options.out)
    words = without_resume(run["command"])
    for flag, spellings in LIMITS.items():
        value = getattr(options, flag[2:].replace("-", "_"))
        if value is not None and words[0] == "tune":
            raise ValueError(f"{flag} is for a run's folder, found a tuning's; leave it out")
        words = words if value is None else replaced(words, spellings, value)
    return _again(options.out, [*words, "--resume"], run["folder"])


@verb(
    "repeat",
    arg("out", type=Path, metavar="OUT", help="folder of a finished run"),
    arg("new", type=Path, metavar="NEW", help="a new or empty folder"),
)
def repeat(options: argparse.Namespace) -> int:
    """Run a training again, and say whether the same bits came out."""
    out, new = options.out, options.new
    run = _read_alone(out)
    if run["command"][0] == "tune":
        raise ValueError(f"repeat takes the folder of one run, found a tuning's; name one in {out}")
    check_new_folder(new, "NEW")
    if not (out / WEIGHTS_FILE).is_file():
        raise ValueError(
            f"repeat takes the folder of a finished run, found no adapter in {out}; finish it with "
            f"minilora resume"
        )
    wanted, were = read_tensors(out / WEIGHTS_FILE)
    folder = run["folder"] if Path(run["folder"]).is_dir() else "."
    with _parsed_in(folder, run["command"]) as began:
        names = [*began.data, *(began.valid or ()), *more_inputs(began)]
        now = file_hashes(names)
    other = sorted(name for name in {*now, *run["data"]} if now.get(name) != run["data"].get(name))
    if other:
        raise ValueError(
            f"data and settings must be as they were, found others in {', '.join(other)}"
        )
    for name, version in versions().items():
        if version != run["versions"].get(name):
            print(f"{name} was {run['versions'].get(name)} and is {version}")
    words = without_resume(run["command"])
    tied = run.get("train", {}).get("max_minutes") is not None
    if tied:
        print("--minutes ties a run to the clock, so the same bits can hardly come out")
    code = _again(new, words, run["folder"])
    if code != 0:
        return code
    found, facts = read_tensors(new / WEIGHTS_FILE)
    if any(facts.get(key) != were.get(key) for key in ("minilora_base", "minilora_rest")):
        print("the base is not what it was: weights that were sampled differ")
    if found.keys() != wanted.keys():
        print("the adapters have other layers")
        return 1
    if all(torch.equal(found[name], value) for name, value in wanted.items()):
        print(f"bit-equal: the adapter in {new} is that in {out}")
        return 0
    largest = max(float((found[name] - value).abs().max()) for name, value in wanted.items())
    why = ["--minutes ties a run to the clock"] * tied
    why += ["it was resumed with other words than it began with"] * ("began" in run)
    print("; ".join([f"not bit-equal: the adapters differ by up to {largest:.3g}", *why]))
    return 1
