"""`minilora resume` and `minilora repeat`: runs from their folder alone."""

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import minilora
from minilora.cli.arguments import VERBS, arg, verb
from minilora.cli.sources import check_new_folder
from minilora.data import files_in
from minilora.files import flags_of, leftovers, one_line, read_tensors, write
from minilora.loading import TOKENIZER_FILES
from minilora.lora import AdapterConfig
from minilora.peft import CONFIG_FILE, WEIGHTS_FILE
from minilora.training import TrainConfig, torchrun_number

RUN_FILE = "run.toml"


class RunFile:
    """What it takes to run a command again, in `run.toml`; of a resumed run, also what it began as.

    As a callback of `fit` it is written with a run's first line: the run, or its resumption, has
    been accepted. Files are hashed when it is made, as the run begins.

    Args:
        options: the command's.
        tuning: the file of the tuning that made the run, whose hashes are the run's.

    Attributes:
        data, held_out, more: hashes of the files of `--data`, `--valid`, and of what else counts.
    """

    def __init__(self, options: argparse.Namespace, tuning: "RunFile | None" = None):
        self.file = options.out / RUN_FILE
        if self.file.is_file() and _began(self.file) is None:
            raise ValueError(
                f"{self.file} would be written over with the run's settings, found somebody else's "
                f"file there; rename it, or name another folder"
            )
        if tuning is None:
            names = options.data, options.valid or (), _more_inputs(options)
            self.data, self.held_out, self.more = map(file_hashes, names)
        else:
            self.data, self.held_out, self.more = tuning.data, tuning.held_out, tuning.more
        hashes = self.data | self.held_out | self.more
        self.settings: dict[str, Mapping[str, Any]] = {}
        command = f"command = [{', '.join(map(_quoted, without_resume(options.argv)))}]"
        began = (options.resume and _began(self.file)) or command
        self.lines = [
            "# Read by `minilora resume` and `minilora repeat`.",
            *([] if began == command else [f"began{began.removeprefix('command')}"]),
            command,
            f"folder = {_quoted(os.getcwd())}",
            f"processes = {torchrun_number('WORLD_SIZE', 1)}",
            "",
            "[data]",
            *(f"{_quoted(k)} = {_quoted(v)}" for k, v in hashes.items()),
            "",
            "[versions]",
            *(f"{name} = {_quoted(found)}" for name, found in _versions().items()),
        ]
        self.accepted = False

    def write(self) -> None:
        """Replace the file, whole."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write(self.file, "\n".join([*self.lines, *_lines(self.settings)]) + "\n")

    def on_log(self, line: str) -> None:
        """Write it once."""
        if not self.accepted:
            self.accepted = True
            self.write()


def _lines(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the settings that a run has, chosen ones too, for people who read the file."""
    lines = []
    kinds: tuple[Any, ...] = (TrainConfig, AdapterConfig)
    default = {field.name: field.default for kind in kinds for field in dataclasses.fields(kind)}
    for table, values in settings.items():
        lines += ["", f"[{table}]"]
        none = {k: "none" for k, v in values.items() if v is None and default[k] is not None}
        said = {**values, **none}.items()  # as config files spell it
        lines += [f"{k} = {_value(v)}" for k, v in said if v not in (None, (), {}, [])]
    return lines


def without_resume(words: Sequence[str]) -> list[str]:
    """Return a command without `--resume`, which may be cut short."""
    return [word for word in words if not _is(word, "--resume")]


def _is(word: str, flag: str) -> bool:
    name = word.partition("=")[0]
    return len(name) > 3 and flag.startswith(name)


def _with(words: list[str], flags: Sequence[str], value: str) -> list[str]:
    """Return a command in which a flag, by all its spellings, has another value."""

    def ours(word: str) -> bool:
        return any(_is(word, flag) for flag in flags)

    kept = [
        word
        for before, word in zip(["", *words], words, strict=False)
        if not ours(word) and not (ours(before) and "=" not in before)
    ]
    return [*kept, flags[0], value]


def _began(file: Path) -> str | None:
    """Return the line with the command that a run began with, as `command = …`, or None."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    found = [line for line in lines if line.startswith(("began = ", "command = "))]
    return f"command{found[0].removeprefix('began').removeprefix('command')}" if found else None


def _value(value: Any) -> str:
    """Write a setting as TOML."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_quoted(k)} = {_value(v)}' for k, v in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    return _quoted(value) if isinstance(value, str) else json.dumps(value)


def _quoted(text: str) -> str:
    """Write a string of TOML; half a surrogate pair, as in a path that is not UTF-8, is refused."""
    if not text.isprintable() and any("\ud800" <= each <= "\udfff" for each in text):
        raise ValueError(f"paths and arguments must be UTF-8, found {text!r:.80}; rename the file")
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def only_written(out: Path) -> bool:
    """Whether a run ended before anything of it was kept but, in whole or in part, `run.toml`."""
    if torchrun_number("WORLD_SIZE", 1) > 1 or not out.is_dir():
        return False
    there = {file.name for file in out.iterdir()}
    return bool(there) and there <= {RUN_FILE, *(file.name for file in leftovers(out, RUN_FILE))}


def _more_inputs(options: argparse.Namespace) -> list[str]:
    """Return the files besides data that an adapter depends on; it has a sample of its base."""
    more = [options.config]
    if options.adapter is not None and Path(options.adapter).is_dir():
        more += [Path(options.adapter) / WEIGHTS_FILE, Path(options.adapter) / CONFIG_FILE]
    if Path(options.model).is_dir():
        more += [Path(options.model) / name for name in ("config.json", *TOKENIZER_FILES)]
    return [str(file) for file in more if file is not None and Path(file).is_file()]


def file_hashes(names: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of each file, and of those in each folder, by its path."""
    found = {}
    for file in files_in(names):
        name = str(file)
        if name.startswith("@"):  # comes with Python, whose version is written down
            continue
        with open(file, "rb") as opened:
            digest = hashlib.sha256()
            while block := opened.read(2**20):
                digest.update(block)
        found[name] = f"sha256:{digest.hexdigest()}"
    return found


def trained_on(out: Path, names: Sequence[str]) -> list[str]:
    """Return which of these files the run of an adapter learned, as far as its `run.toml` says.

    An adapter that went on with another one has learned what that one had.
    """
    found: dict[str, None] = {}
    hashes = file_hashes(names)
    for run in _runs_before(out):
        data, held_out = (_given(run["command"], flag) for flag in ("--data", "--valid"))
        learned = {
            digest
            for name, digest in run["data"].items()
            if _lies_in(name, data) and not _lies_in(name, held_out)
        }
        no_files = [name for name in names if not Path(name).exists()]  # of Python, or of the hub
        same = [name for name in no_files if _set_of(name) in map(_set_of, data)]
        found |= dict.fromkeys([*same, *(n for n, digest in hashes.items() if digest in learned)])
    return list(found)


def _runs_before(out: Path) -> Iterator[dict[str, Any]]:
    """Yield the run of an adapter, and those of the adapters that it went on with."""
    seen: set[Path] = set()
    while out.resolve() not in seen:
        seen.add(out.resolve())
        try:
            run = _read(out if (out / RUN_FILE).is_file() else out.parent)  # of out/last, too
        except (ValueError, RuntimeError, OSError):
            return
        yield run
        for name in _given(run["command"], "--adapter"):
            out = Path(run["folder"], name)


def _lies_in(file: str, names: set[str]) -> bool:
    return not {Path(file), *Path(file).parents}.isdisjoint(map(Path, names))


def _set_of(name: str) -> str:
    """Return a name of Python's data, whose training set goes by two, as one."""
    return name.removesuffix("/train") if name.startswith("@") else name


def _given(words: list[str], flag: str) -> set[str]:
    """Return a flag's words; not parsed, as another version may have had other flags."""
    found: set[str] = set()
    for i, word in enumerate(words):
        if _is(word, flag):
            value = word.partition("=")[2]
            behind = itertools.takewhile(lambda each: not each.startswith("-"), words[i + 1 :])
            found |= set([value] if value else behind)
    return found


def _versions() -> dict[str, str]:
    hardware = minilora.hardware()
    return {
        "minilora": minilora.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{hardware.name}, {torch.get_num_threads()} threads",
    }


def _read(out: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:
        raise RuntimeError(
            f"{RUN_FILE} is read with Python 3.11 or newer; pass all flags"
        ) from None
    file = out / RUN_FILE
    if not file.is_file():
        raise ValueError(f"OUT must be the folder of a run, found no {RUN_FILE} in {out}")
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
        words, folder, data = found["command"], found["folder"], found["data"]
        strings = [*words, folder, *data, *data.values(), *found["versions"].values()]
        if words[0] not in ("train", "tune") or not all(isinstance(each, str) for each in strings):
            raise ValueError("its command must be train or tune")
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {one_line(error, 200)}") from None
    return found


def _read_alone(out: Path) -> dict[str, Any]:
    """Read what can be run again by one process."""
    found = _read(out)
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
    """Run a command, with `out` as its folder, from where it was given."""
    if not Path(folder).is_dir():
        raise ValueError(
            f"the run began in {folder}, which is not there; make it, or pass all flags"
        )
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
    out = options.out.absolute()
    run = _read_alone(out)
    words = without_resume(run["command"])
    for flag, spellings in LIMITS.items():
        value = getattr(options, flag[2:].replace("-", "_"))
        if value is not None and words[0] == "tune":
            raise ValueError(f"{flag} is for a run's folder, found a tuning's; leave it out")
        words = words if value is None else _with(words, spellings, value)
    return _again(out, [*words, "--resume"], run["folder"])


@verb(
    "repeat",
    arg("out", type=Path, metavar="OUT", help="folder of a finished run"),
    arg("new", type=Path, metavar="NEW", help="a new or empty folder"),
)
def repeat(options: argparse.Namespace) -> int:
    """Run a training again, and say whether the same bits came out."""
    out, new = options.out.absolute(), options.new.absolute()
    run = _read_alone(out)
    if run["command"][0] == "tune":
        raise ValueError(f"repeat takes the folder of one run, found a tuning's; name one in {out}")
    check_new_folder(new, "NEW")
    wanted, were = read_tensors(out / WEIGHTS_FILE)
    folder = run["folder"] if Path(run["folder"]).is_dir() else "."
    with _parsed_in(folder, run["command"]) as began:
        names = [*began.data, *(began.valid or ()), *_more_inputs(began)]
        now = file_hashes(names)
    other = sorted(name for name in {*now, *run["data"]} if now.get(name) != run["data"].get(name))
    if other:
        raise ValueError(
            f"data and settings must be as they were, found others in {', '.join(other)}"
        )
    for name, version in _versions().items():
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
