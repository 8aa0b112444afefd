"""`minilora tune`."""

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import minilora
from minilora.cli.arguments import TRAINED, add_arguments, arg, verb
from minilora.cli.card import write_card
from minilora.cli.run_file import RunFile, only_written, without_resume
from minilora.cli.sources import load
from minilora.cli.training import form_of, groups, next_step, read_data, settings
from minilora.files import flags_of, given, short
from minilora.lora import AdapterConfig
from minilora.training import (
    CHART_FILE,
    RATES,
    TrainConfig,
    Trial,
    Tuning,
    check_free,
    check_tuning,
)

_VARIED = ("r", "alpha", "targets")
_FLAGS = {field.name: flags_of(field) for field in fields(AdapterConfig)}


def _above_0(what: str, text: str) -> float:
    """Read a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be {what} above 0, found {short(text)}")
    return value


_RATE, _MINUTES = (partial(_above_0, what) for what in ("a finite number", "minutes,"))
# What `train` does not know; the rest of the words is a train command.
_OWN = (
    arg("--rates", nargs="+", type=_RATE, default=RATES, metavar="LR",
        help=f"learning rates to try (default: {' '.join(f'{rate:g}' for rate in RATES)})"),
    arg("--vary", nargs="+", default=[], metavar="NAME=VALUES", help="try each rate with each of "
        "these too, as in r=4,8,16 targets=q_proj+v_proj,all-linear"),
    arg("--budget", type=_MINUTES, metavar="MINUTES",
        help="that the whole should take; decides how many steps a run has"),
    arg("--resume", action="store_true", help="continue the tuning in --out"),
    arg("--out", required=True, type=Path, help="folder for the runs, a folder each"),
)  # fmt: skip


_REFUSED = (
    "stream", "lr", "loss", "beta", "gamma", "kto_weights", "max_minutes", "patience", "parallel"
)  # fmt: skip


def _groups(parser: argparse.ArgumentParser) -> None:
    """Add the groups of `train`; what tune refuses with a reason is not listed."""
    groups(parser)
    for action in parser._actions:
        if action.dest.rpartition(".")[2] in _REFUSED:
            action.help = argparse.SUPPRESS


@verb(
    "tune",
    *TRAINED,
    "--data",
    arg("--valid", required=True, nargs="+", metavar="FILE", help="held-out data, as --data"),
    arg("--config", type=Path, metavar="FILE", help="TOML with tables [train] and [adapter]"),
    *_OWN,
    _groups,
)
def tune(options: argparse.Namespace) -> int:
    """Find the learning rate: short runs, of which the better ones go on."""
    options.adapter = options.hold_out = None
    adapter, config = settings(options)
    if config.lr is not None:
        flag = "--lr" if "lr" in given(options, TrainConfig) else f"lr in {options.config}"
        raise ValueError(f"tune tries --rates, found {flag}; leave it out, or use train")
    if config.loss != "ce":
        raise ValueError(
            f"tune compares the loss of the next token, found --loss {config.loss}; leave it out"
        )
    if options.stream:
        raise ValueError("tune reads all data before the first step, found --stream; leave it out")
    adapters = [adapter | each for each in _variants(options.vary)]
    if options.resume and only_written(options.out):
        print("nothing of the tuning had been kept; it begins anew", file=sys.stderr)
        options.resume = False
    check_free(options.out)
    check_tuning(options.out, options.resume)
    encode = read_data(options)
    file = RunFile(options)
    with nullcontext() if options.resume else file.begun():
        model, tokenizer = load(options)
        rows, held_out = encode(tokenizer)
        file.settings["rows"] = form_of(rows, tokenizer)
        found = minilora.tune(
            model, rows, held_out, options.out, rates=options.rates, adapters=adapters,
            config=config, budget=options.budget, resume=options.resume,
        )  # fmt: skip
    file.write()
    for trial in found.trials:
        _write_run(options, file, trial, found)
    if found.result is None or found.chosen is None:
        return 130
    print(found)
    print(f"{found.minutes:.1f} minutes; chart in {options.out / CHART_FILE}")
    out = shlex.quote(str(options.out / found.chosen.name))
    print(next_step(out, file.settings["rows"]))
    return 0


def _variants(varied: Sequence[str]) -> list[dict[str, Any]]:
    """Return the adapters that `--vary` names: each value of each name with each of the others."""
    found: list[dict[str, Any]] = [{}]
    for one in varied:
        name, _, values = one.partition("=")
        if name not in _VARIED or not all(values.split(",")):
            raise ValueError(
                f"--vary takes {', '.join(_VARIED)} with values, as in r=4,8,16, found {short(one)}"
            )
        if any(name in each for each in found):
            raise ValueError(f"--vary takes each name once, found {name} twice")
        read = [_value(name, value) for value in values.split(",")]
        found = [each | {name: value} for each in found for value in read]
    return found


def _value(name: str, text: str) -> Any:
    if name == "targets":
        return text if text == "all-linear" else text.split("+")
    try:
        return int(text) if name == "r" else float(text)
    except ValueError:
        raise ValueError(f"--vary needs numbers for {name}, found {short(text)}") from None


def _command(options: argparse.Namespace, trial: Trial, steps: int) -> list[str]:
    """Return the words of `train` that run a trial."""
    own = argparse.ArgumentParser(add_help=False)  # what is not train's, or the trial's to say
    add_arguments(own, *_OWN)
    own.add_argument("--max-steps")
    for name in _VARIED:
        own.add_argument(*_FLAGS[name], dest=name, nargs="+" if name == "targets" else None)
    found, words = own.parse_known_args(without_resume(options.argv[1:]))
    for name in _VARIED:
        value = trial.adapter[name] if name in trial.adapter else getattr(found, name)
        if value is not None:
            words += [_FLAGS[name][0], *map(str, value if isinstance(value, list) else [value])]
    return ["train", *words, "--lr", repr(trial.lr), "--max-steps", str(steps)]


def _write_run(options: argparse.Namespace, file: RunFile, trial: Trial, found: Tuning) -> None:
    """Make a trial's folder one that `minilora resume` and `repeat` take."""
    folder = found.out / trial.name
    if not folder.is_dir():
        return
    words = [*_command(options, trial, found.steps), "--out", str(folder)]
    mine = argparse.Namespace(**vars(options) | {"out": folder, "argv": words})
    run = RunFile(mine, file)
    run.settings["rows"] = file.settings["rows"]
    run.write()
    if trial is found.chosen and found.result is not None:
        config = replace(settings(options)[1], lr=trial.lr)
        write_card(mine, run, config, found.result, dict(trial.adapter))
