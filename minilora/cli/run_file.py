"""`run.toml`: what a run was, written as it begins and read again later."""

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

import minilora
from minilora.data import files_in
from minilora.files import leftovers, one_line, write
from minilora.loading import TOKENIZER_FILES
from minilora.lora import AdapterConfig
from minilora.peft import CONFIG_FILE, WEIGHTS_FILE, find_pair
from minilora.training import LAST, RUN_FILE, TrainConfig, torchrun_number


class RunFile:
    """What it takes to run a command again, in `run.toml`; of a resumed run, also what it began as.

    As a callback of `fit` it is written with a run's first line: the run, or its resumption, has
    been accepted. Files are hashed when it is made, as the run begins; a run that a tuning made has
    the hashes of the tuning's file.
    """

    def __init__(self, options: argparse.Namespace, tuning: "RunFile | None" = None):
        self.file = options.out / RUN_FILE
        if self.file.is_file() and _began(self.file) is None:
            raise ValueError(
                f"{self.file} would be written over with the run's settings, found somebody else's "
                f"file there; rename it, or name another folder"
            )
        if tuning is None:
            names = options.data, options.valid or (), more_inputs(options)
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
            *(f"{name} = {_quoted(found)}" for name, found in versions().items()),
        ]
        self.accepted = False

    def write(self) -> None:
        """Replace the file, whole."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write(self.file, "\n".join([*self.lines, *_lines(self.settings)]) + "\n")

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Write the file; where an error ends the block before anything else is kept, remove it.

        A folder that was made for it goes too. A run that is stopped leaves it, for `resume`.
        """
        folder = self.file.parent
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        fresh = not self.file.exists()
        self.write()
        try:
            yield
        except Exception:
            with suppress(OSError):
                if fresh and os.listdir(folder) == [RUN_FILE]:
                    self.file.unlink()
                    for each in made:
                        each.rmdir()
            raise

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


def replaced(words: list[str], flags: Sequence[str], value: str) -> list[str]:
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


def more_inputs(options: argparse.Namespace) -> list[str]:
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
    while (out := out.resolve()) not in seen:
        seen.add(out)
        inside = out.name == LAST and not (out / RUN_FILE).is_file()
        try:
            run = read_run(out.parent if inside else out)
        except (ValueError, RuntimeError, OSError):
            return
        yield run
        for name in _given(run["command"], "--adapter"):
            out = Path(run["folder"], name)


def rows_of(out: Path) -> dict[str, Any]:
    """Return what an adapter's `run.toml` says of the rows that it learned; see `form_of`.

    An adapter that went on with another one has learned that one's rows too.
    """
    found: dict[str, Any] = {}
    for run in _runs_before(out) if find_pair(out)[0].is_file() else ():
        rows = run.get("rows", {})
        found.setdefault("chat", rows.get("chat"))
        found["questions"] = max(found.get("questions", 0), rows.get("questions", 2))
    return found


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


def versions() -> dict[str, str]:
    """Return what decides about bits beside settings and data."""
    hardware = minilora.hardware()
    return {
        "minilora": minilora.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{hardware.name}, {torch.get_num_threads()} threads",
    }


def read_run(out: Path) -> dict[str, Any]:
    """Read and check the `run.toml` of a folder."""
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
        tables = "data", "versions", "rows", "train"
        if not all(isinstance(found.get(table, {}), dict) for table in tables):
            raise ValueError(f"{', '.join(tables)} must be tables")
        words, folder, data = found["command"], found["folder"], found["data"]
        strings = [*words, folder, *data, *data.values(), *found["versions"].values()]
        if words[0] not in ("train", "tune") or not all(isinstance(each, str) for each in strings):
            raise ValueError("its command must be train or tune")
        rows = found.get("rows", {})
        chat, questions = rows.get("chat", False), rows.get("questions", 1)
        if type(chat) is not bool or type(questions) is not int or questions < 0:
            raise ValueError("[rows] must say chat = true or false, and how many questions")
    except (
        ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError
    ) as error:  # fmt: skip
        raise ValueError(f"{file} is damaged: {one_line(error, 200)}") from None
    return found
