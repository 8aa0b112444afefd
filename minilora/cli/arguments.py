"""The command's parser, the arguments that several verbs share, and how a verb names its own."""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from minilora.files import nearest, one_line, short
from minilora.quantization import FORMATS

Run = Callable[[argparse.Namespace], int]
# Name → what runs it, and its arguments: a shared one's name, an `arg`, or what adds some.
VERBS: dict[str, tuple[Run, tuple[Any, ...]]] = {}


class _Store(argparse.Action):
    """Store a value; a flag that is given again adds to its list, and one of one value must not.

    `needs` names the flags of which one must be given for this one to have an effect.
    """

    def __init__(self, *args: Any, needs: tuple[str, ...] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.needs = needs

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if option_string is not None and self.dest in parser.given:
            if self.nargs not in ("+", "*"):
                parser.error(f"{option_string} must be given once, found it twice; leave out one")
            values = [*getattr(namespace, self.dest), *values]
        parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the nearest flag; no value given is dropped."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for action in (None, "store"):
            self.register("action", action, _Store)
        self.given: set[str] = set()

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 after one line of readable length, whatever was typed."""
        self.exit(2, f"{self.prog}: {one_line(message, 500)} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; a flag that it doesn't know is said before what is missing.

        A word with white space in it is no flag: a prompt may begin with dashes.
        """
        self.given.clear()
        flags = "--" if self._subparsers else ""  # the words behind a command are its own
        own = itertools.takewhile(lambda word: word != "--" and word.startswith(flags), args or ())
        for word in own:
            if word.startswith("--") and word.split() == [word] and not self._knows(word):
                self._refuse(word)
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self._refuse(rest[0])
        for action in self._actions:
            needs = getattr(action, "needs", ())
            if action.dest in self.given and needs and not self._has_one(found, needs):
                self.error(without_effect(action.option_strings[0], needs))
        return found, rest

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Read a word; of a plain number say what it must be."""
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError:
            kind = {int: "a whole number", float: "a number"}.get(action.type)  # type: ignore[call-overload]
            if kind is None:
                raise
            said = f"must be {kind}, found {short(arg_string)}"
            raise argparse.ArgumentError(action, said) from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse what is none of the choices, and name the nearest."""
        if action.choices is None or value in action.choices:
            return
        hint = nearest(str(value), action.choices)
        if isinstance(action, argparse._SubParsersAction):  # --help lists them
            self.error(f"unknown command {short(value)}{hint}")
        known = ", ".join(map(str, action.choices))
        raise argparse.ArgumentError(action, f"must be one of {known}, found {short(value)}{hint}")

    def _has_one(self, found: argparse.Namespace, flags: tuple[str, ...]) -> bool:
        """Return whether one of some flags is on: its value is not the default."""
        names = [flag[2:].replace("-", "_") for flag in flags]
        return any(getattr(found, name) != self.get_default(name) for name in names)

    def _knows(self, word: str) -> bool:
        """Return whether a word's flag is known, or the beginning of one that is."""
        flag = word.partition("=")[0]
        return any(known.startswith(flag) for known in self._option_string_actions)

    def _refuse(self, word: str) -> NoReturn:
        hint = nearest(word.partition("=")[0], self._option_string_actions)
        self.error(f"unknown argument {short(word)}{hint}")


def without_effect(flag: str, needs: tuple[str, ...]) -> str:
    """Say that a flag has no effect without one of others."""
    return (
        f"{flag} does nothing without {' or '.join(needs)}, found none; pass "
        f"{'one of them' if needs[1:] else 'it'}, or leave {flag} out"
    )


def verb(name: str, *arguments: Any) -> Callable[[Run], Run]:
    """Make a function a verb of the command; its docstring is the verb's help."""

    def add(run: Run) -> Run:
        VERBS[name] = run, arguments
        return run

    return add


def arg(*flags: str, **settings: Any) -> Callable[[Any], Any]:
    """Return what adds an argument to a parser."""
    return lambda parser: parser.add_argument(*flags, **settings)


def add_arguments(parser: Any, *arguments: Any) -> None:
    """Add arguments: the name of a shared one, or what adds some to the parser."""
    for one in arguments:
        (_SHARED[one] if isinstance(one, str) else one)(parser)


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    if integer(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, found {text}")
    return int(text)


def integer(text: str) -> int:
    """Read a whole number of at most ten digits."""
    digits = text.removeprefix("-")
    if not digits.isascii() or not digits.isdigit() or len(digits) > 10:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at most ten digits, found {short(text)}"
        )
    return int(text)


def _length(text: str) -> int:
    if positive(text) < 2:
        raise argparse.ArgumentTypeError("must be at least 2: the first token is never learned")
    return int(text)


_MODEL = (
    "a Hugging Face folder, a .gguf file, a name on the hub (owner/name, @revision or :file.gguf "
    "may follow), or smollm2-135m; fetched once"
)
ADAPTER_HELP = "folder with the adapter's two files, or its name on the hub"
DATA_HELP = (
    "files, or folders of files: .jsonl, .json, .csv, .tsv or .parquet with text, prompt and "
    "completion, question and answer, chat messages, Alpaca's or ShareGPT's fields, or chosen and "
    "rejected answers (also .gz); "
    "or .txt, one document a file, cut into windows of --max-length tokens; or @docstrings; or a "
    "data set of the hub, owner/name"
)
DTYPES = ("auto", "float32", "bfloat16", "float16")
DTYPE_HELP = "auto is the fastest the device multiplies; float32 computes in float32 as well"


def _shared(flag: str, **settings: Any) -> tuple[str, Callable[[Any], Any]]:
    return flag, arg(flag, **settings)


_SHARED = dict((
    ("base", arg("model", metavar="MODEL", help=_MODEL)),
    _shared("model", metavar="MODEL",
            help=f"{_MODEL}; or an adapter's folder, which names its base"),
    _shared("--dtype", default="auto", choices=DTYPES,
            help=f"of the base (default: auto); {DTYPE_HELP}"),
    _shared("--device", default="auto", metavar="DEVICE",
            help="cpu, cuda, cuda:N or mps; auto (default): a GPU that torch can use, else cpu"),
    _shared("--quantize", choices=FORMATS, help="store the base's linears in fewer bits"),
    _shared("--block-size", type=integer, needs=("--quantize",),
            help="weights that share a scale in nf4 and int4 (default: 64)"),
    _shared("--adapter", type=Path, help=ADAPTER_HELP),
    _shared("--out", required=True, type=Path, help="a new or empty folder"),
    _shared("out", type=Path, metavar="OUT", help=ADAPTER_HELP),
    _shared("--model", help=f"default: what the adapter names as its base; {_MODEL}"),
    _shared("--data", required=True, nargs="+", metavar="FILE", help=DATA_HELP),
    _shared("--batch-size", type=positive, default=8, help="(default: 8)"),
    _shared("--max-length", type=_length, default=512,
            help="tokens kept of an example (default: 512)"),
    _shared("--all-tokens", action="store_true", help="learn prompts too"),
    _shared("--skip-bad", type=int, default=0, metavar="N", help="leave out bad rows, N at most"),
    _shared("--map", nargs="+", metavar="NAME=FIELD",
            help="which field of the records is which, as in prompt=question completion=reply"),
    _shared("--chat", action="store_true",
            help="put prompts and completions through the chat template as two turns"),
    _shared("--system", metavar="TEXT", help="system message of conversations that have none"),
    _shared("--last-turn", action="store_true", help="learn only the last answer of each"),
    _shared("--parse-special", action=argparse.BooleanOptionalAction,
            help="read names of control tokens in texts as tokens (default: where a text begins as "
            "the chat template's do)"),
    _shared("--temperature", type=float, default=0.0, help="0 (default) is greedy"),
    _shared("--top-k", type=positive, needs=("--temperature",),
            help="draw from that many of the likeliest tokens"),
    _shared("--top-p", type=float, needs=("--temperature",),
            help="draw from the likeliest tokens of that probability"),
    _shared("--seed", type=integer, help="of what is drawn (default: another each time)"),
))  # fmt: skip
_SETTINGS = ("--device", "--dtype", "--quantize", "--block-size")
MODEL, TRAINED = ("model", *_SETTINGS), ("base", *_SETTINGS)
ENCODING = (
    "--max-length",
    "--all-tokens",
    "--map",
    "--chat",
    "--system",
    "--last-turn",
    "--skip-bad",
    "--parse-special",
)
SAMPLING = ("--temperature", "--top-k", "--top-p", "--seed")
