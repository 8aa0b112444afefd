"""The `minilora` command."""

import argparse
import json
import sys
from collections.abc import Sequence

import minilora
from minilora import planning
from minilora.cli import (  # noqa: F401 - their verbs
    adapters,
    chatting,
    data,
    interrupt,
    models,
    pages,
    runs,
    training,
    tuning,
)
from minilora.cli.arguments import ENCODING, VERBS, Parser, add_arguments, verb
from minilora.cli.sources import check_data_is_read, encoding, encoding_flags
from minilora.files import one_line, said, ticking
from minilora.kernels import out_of_memory


def _encoding(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser.add_argument_group("data, as for train"), *ENCODING)


@verb("plan", planning.add_arguments, _encoding)
def _plan(options: argparse.Namespace) -> int:
    """Do I need a GPU? Memory, time and cost."""
    check_data_is_read(options, "--data")
    with ticking("planning"):
        plan = planning.from_arguments(options, encoding(options), encoding_flags(options))
    print(json.dumps(plan.to_dict()) if options.json else plan)
    return 0


# What takes less memory, by the option of the verbs that have it.
_LESS = {
    "quantize": "--quantize nf4",
    "batch_size": "a smaller --batch-size",
    "max_length": "a smaller --max-length",
    "device": "--device cpu",
}


def _lacking(error: BaseException, options: argparse.Namespace) -> str | None:
    """Return what to say of an error for lack of memory, None of any other."""
    device = out_of_memory(error)
    if device is None:
        return None
    ways = [way for name, way in _LESS.items() if hasattr(options, name)]
    ways = [way for way in ways if device not in way]
    found = one_line(error, 120) or "no more to be had"
    less = f"; what takes less: {', '.join(ways)}" if ways else ""
    return f"the memory of the {device.upper()} is used up ({found}){less}"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    parser = Parser(
        prog="minilora",
        description="Fine-tune language models with LoRA, on the machine you have.",
        epilog="example: minilora train smollm2-135m --data train.jsonl --out out/v1 --minutes 3",
    )
    parser.add_argument("--version", action="version", version=minilora.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    first = ("train", "tune", "eval", "generate", "chat", "resume", "repeat")
    for name in dict.fromkeys((*first, *VERBS)):
        run, arguments = VERBS[name]
        add_arguments(commands.add_parser(name, help=(run.__doc__ or "").rstrip(".")), *arguments)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; bad input is one line on stderr and exit code 2, Ctrl-C is 130."""
    interrupt.end_by_exception()
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    if not words:
        parser.print_help(sys.stderr)
        return 2
    options = parser.parse_args(words)
    options.argv = words
    try:
        return VERBS[options.command][0](options)
    except (ValueError, TypeError, RuntimeError, OSError, MemoryError) as error:
        text = _lacking(error, options) or said(error) or f"{type(error).__name__} without a word"
        print(one_line(f"minilora {options.command}: {text}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"minilora {options.command}: interrupted", file=sys.stderr)
        return 130
