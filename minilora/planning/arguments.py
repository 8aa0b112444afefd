"""The arguments of `minilora plan`, and the plan they ask for."""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minilora.data import Encoding, read_data
from minilora.files import on_hub, short
from minilora.loading import NAMES, read_tokenizer
from minilora.planning.machines import DEVICES, name_of
from minilora.planning.plans import Plan, plan
from minilora.planning.shapes import PRESETS
from minilora.quantization import FORMATS
from minilora.text import Tokenizer

_PASSED = (
    "r", "targets", "exclude", "batch_size", "accumulate", "epochs", "quantize", "dtype",
    "checkpointing", "compile", "device", "ranks", "parallel", "dropout", "block_size", "memory_gb",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `minilora plan` takes; sizes are checked by `plan`."""
    add = parser.add_argument
    known = ", ".join(PRESETS)
    add("model", metavar="MODEL", help=f"a folder, config.json, .gguf, hub name, or: {known}")
    add("--data", nargs="+", metavar="FILE", help="as for train; counted by the model's tokenizer")
    add("--examples", type=int, metavar="N", help="rows, where the data is not at hand (1000)")
    add("--epochs", type=float, help="default: as many as train makes")
    run = parser.add_argument_group("run, as for train")
    add = run.add_argument
    add("--r", "--rank", dest="r", type=int, default=8, help="default 8")
    add("--targets", nargs="+", metavar="NAME", default="all-linear")
    add("--exclude", nargs="+", metavar="NAME", default=())
    add("--dropout", type=float, default=0.0)
    add("--batch-size", type=int, default=8, help="default 8")
    add("--accumulate", type=int, default=1, help="default 1")
    add("--checkpointing", action="store_true")
    add("--compile", action="store_true")
    add("--quantize", choices=FORMATS)
    add("--block-size", type=int, needs=("--quantize",))
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--ranks", type=int, default=1, help="processes (default 1)")
    add("--parallel", choices=("ddp", "fsdp"))
    place = parser.add_argument_group("machine")
    add = place.add_argument
    known = f"auto (default: the GPU here, else the CPU), cpu, cuda, cuda:N, {', '.join(DEVICES)}"
    add("--device", "--gpu", default="auto", metavar="NAME", help=known)
    add(
        "--memory",
        dest="memory_gb",
        type=float,
        metavar="GB",
        help="that may be used, in 10⁹ bytes",
    )
    add("--untimed", action="store_true", help="time no blocks: faster, rougher")
    add("--price", nargs="+", default=(), metavar="[NAME=]PRICE", help="of an hour")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def from_arguments(
    options: argparse.Namespace, encoding: Encoding, reading: Sequence[str] = ()
) -> Plan:
    """Make the plan; `encoding` says how data is read, and `reading` are its flags for train."""
    data: Any = 1000 if options.examples is None else options.examples
    if options.data:
        if options.examples is not None:
            raise ValueError("--examples stands for data that is not at hand, found --data too")
        tokenizer = _tokenizer(options.model)
        data, report = read_data(options.data, tokenizer, **vars(encoding))
        print(f"{', '.join(options.data)}: {report}", file=sys.stderr)
    asked = {name: getattr(options, name) for name in _PASSED} | {"length": encoding.max_length}
    if options.block_size is None:  # that of the format
        del asked["block_size"]
    prices, timed = _prices(options), not options.untimed
    found = plan(options.model, data, prices=prices, timed=timed, **asked)
    if not options.data:
        return found
    named = shlex.join(["--data", *options.data, *reading])
    command = found.advice.command.replace("--data train.jsonl", named)
    return dataclasses.replace(found, advice=dataclasses.replace(found.advice, command=command))


def _tokenizer(model: str) -> Tokenizer:
    place = Path(model)
    here = place.is_dir() or (place.is_file() and place.suffix != ".json")
    if model in NAMES or here or on_hub(model) is not None:
        return read_tokenizer(model)
    raise ValueError(
        f"--data is counted by the model's tokenizer, found none at {short(model)}; pass the "
        f"model's folder, or the number of rows (--examples) and their length (--max-length)"
    )


def _prices(options: argparse.Namespace) -> dict[str, float]:
    """Read `--price 0.4 a100-80gb=1.5`: of `--device`, or of another by name."""
    own = name_of(options.device)
    found: dict[str, float] = {}
    for text in options.price:
        name, _, number = text.rpartition("=")
        name = name_of(name) if name else own
        try:
            found[name] = float(number)
        except ValueError:
            raise ValueError(
                f"--price must be a number, or NAME=number, found {short(text)}"
            ) from None
    return found
