"""Model, data and folders as the command line names them."""

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import minilora
from minilora.cli.arguments import ENCODING, without_effect
from minilora.data import DataFiles, Encoding, Example
from minilora.files import absent, folder_below, is_new, on_hub, short, ticking, write
from minilora.kernels import resolve_device
from minilora.loading import base_name, load_model
from minilora.lora import check_adapter_name, lora_layers
from minilora.peft import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_folder,
    base_formats,
    find_pair,
    read_config,
)
from minilora.quantization import FORMATS
from minilora.training import common_dtype, torchrun_number


def adapter_of(name: Path, what: str) -> Path:
    """Return the folder of an adapter, downloaded if the hub has one of that name, or raise."""
    folder = adapter_folder(name)
    if not find_pair(folder)[0].is_file():
        found = f"found no {CONFIG_FILE} in {folder}" if folder.is_dir() else absent(folder)
        raise ValueError(
            f"{what} must name a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, {found}"
            f"{folder_below(folder, CONFIG_FILE)}"
        )
    return folder


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return a name for the adapter in each folder: the folder's, with a number if it is taken."""
    taken: list[str] = []
    for folder in folders:
        name = re.sub(r"[^A-Za-z0-9_\-]", "_", folder.resolve().name) or "adapter"
        free = (name, *(f"{name}_{n}" for n in range(2, len(folders) + 3)))
        taken.append(next(each for each in free if _is_name(each) and each not in taken))
    return taken


def _is_name(name: str) -> bool:
    """Whether an adapter may have a name: "base" and those of torch's own are taken."""
    try:
        return bool(check_adapter_name(name))
    except ValueError:
        return False


def base_of(adapter: Path, model: str | None) -> str:
    """Return the model that was asked for, or else the one that an adapter names as its base."""
    if model:
        return model
    read_config(find_pair(adapter)[0])  # which checks it, before the slow part
    named = base_name(adapter)
    if named is None:
        raise ValueError(f"{adapter / CONFIG_FILE} must name its base, found none; pass --model")
    if named.startswith((".", "/")) and not os.path.exists(named):
        raise ValueError(
            f"{adapter / CONFIG_FILE} names its base by the path {named}, found nothing there "
            f"from {os.getcwd()}; go where it was trained, or name the base"
        )
    name = on_hub(named)
    # Ours may name a path from another folder, PEFT's a model of the hub.
    if name is not None and name.revision is None and base_formats(adapter):
        print(f"the base, {named}, is no folder here; the hub is asked for it", file=sys.stderr)
    return named


def is_adapter(model: str) -> bool:
    """Whether a folder that stands for a model is an adapter's."""
    return find_pair(Path(model))[0].is_file()


def adapter_in_place(options: argparse.Namespace) -> list[Path]:
    """Where MODEL is an adapter's folder, put its base there and return the folder, else none."""
    if not is_adapter(options.model):
        return []
    folder = Path(options.model)
    options.model = base_of(folder, None)
    return [folder]


def check_new_folder(out: Path, what: str) -> None:
    """Raise unless a folder is new or empty."""
    if not is_new(out):
        raise ValueError(
            f"{what} must be a new or empty folder, found files at {out}; nothing is overwritten, "
            f"so name another one"
        )


def check_new_files(files: Mapping[str, Path | None]) -> None:
    """Raise unless each file that a flag names can be a new one, and none is named twice."""
    named = {flag: file for flag, file in files.items() if file is not None}
    for flag, file in named.items():
        if not file.parent.is_dir():
            raise ValueError(
                f"{flag} must name a file in a folder that is there, found no folder "
                f"{file.parent}; make it"
            )
        if os.path.lexists(file):
            raise ValueError(
                f"{flag} must name a new file, found {file}, which is there; nothing is "
                f"overwritten, so name another one"
            )
    if len({file.resolve() for file in named.values()}) < len(named):
        raise ValueError(f"{' and '.join(named)} must name different files, found {file} twice")


def check_gguf(file: Path | None, ollama: object) -> None:
    """Raise unless a GGUF file that was asked for can be a new one."""
    if file is None and ollama:
        raise ValueError("--ollama goes with --gguf, found none; pass --gguf FILE")
    if file is not None and file.suffix.lower() != ".gguf":
        raise ValueError(f"--gguf must name a file that ends in .gguf, found {file}")
    modelfile = file.parent / "Modelfile" if file is not None and ollama else None
    check_new_files({"--gguf": file, "--ollama": modelfile})


def write_modelfile(file: Path, *lines: str) -> None:
    """Write what Ollama makes a model of, beside a GGUF file."""
    made = write(file.parent / "Modelfile", "".join(f"{line}\n" for line in lines))
    print(f"Modelfile in {made}; ollama create NAME -f {made}")


def load(
    options: argparse.Namespace, parallel: str | None = None, prepare: Any = None
) -> tuple[Any, Any]:
    """Return the model that the options name, with its adapter, and the tokenizer."""
    adapter = getattr(options, "adapter", None)
    if hasattr(options, "adapter") and options.command != "train":
        named = options.model
        if (found := adapter_in_place(options)) and adapter is not None:
            raise ValueError(
                f"--adapter goes with a base, found MODEL {named}, which is an adapter; leave one "
                f"of them out, or name the base ({options.model})"
            )
        adapter = found[0] if found else adapter
    if adapter is not None:
        adapter = adapter_of(adapter, "--adapter")  # before the slow part
    target = device(options)
    dtype = None if options.dtype == "stored" else options.dtype
    if dtype == "auto" and target.type == "cpu" and parallel is not None:
        dtype = common_dtype(parallel)
    format = getattr(options, "quantize", None)
    more: dict[str, Any] = {"prepare": prepare}
    if (block_size := getattr(options, "block_size", None)) is not None:
        more["block_size"] = block_size
    with ticking(f"loading {options.model}", shown=torchrun_number("RANK", 0) == 0):
        model, tokenizer = load_model(options.model, format, dtype, target, **more)
        if adapter is not None:
            load_adapter(model, adapter, trainable=options.command == "train")
    return model, tokenizer


def load_adapter(
    model: Any, folder: Path, name: str = "default", trainable: bool = False, flag: bool = True
) -> None:
    """Load an adapter, and say where its base was stored in other bits than this one.

    `flag` is whether the command has one for that, to be named.
    """
    minilora.load(model, folder, name, trainable=trainable)
    layers, formats = lora_layers(model), base_formats(folder)
    was = {format for format in formats.values() if format in FORMATS}
    here = {layers[fqn].stored for fqn in formats if fqn in layers} & set(FORMATS)
    if was != here and torchrun_number("RANK", 0) == 0:
        flags = "".join(f" (--quantize {format})" for format in sorted(was) if flag)
        print(
            f"{folder} was trained on a base in {_listed(was)}{flags}, and this one is in "
            f"{_listed(here)}",
            file=sys.stderr,
        )


def _listed(formats: set[str]) -> str:
    return " and ".join(sorted(formats)) or "floating point"


def device(options: argparse.Namespace) -> torch.device:
    """Return where the model goes; under torchrun each process has a GPU of its own."""
    return resolve_device(getattr(options, "device", "cpu"))


def encoding(options: argparse.Namespace) -> Encoding:
    """Return how records become examples, as the options say."""
    return Encoding(
        options.max_length,
        completion_only=not options.all_tokens,
        chat_prompts=options.chat,
        parse_special=options.parse_special,
        skip_bad=options.skip_bad,
        fields=_fields(options.map),
        system=options.system,
        last_turn=options.last_turn,
    )


def encoding_flags(options: argparse.Namespace) -> list[str]:
    """Return the flags that say how records become examples, as they were given; no length."""
    words = []
    for flag in ENCODING[1:]:
        value = getattr(options, flag[2:].replace("-", "_"))
        if value is False and flag == "--parse-special":
            words.append("--no-parse-special")
        elif value is True:
            words.append(flag)
        elif value:
            words += [flag, *(value if isinstance(value, list) else [str(value)])]
    return words


def check_data_is_read(options: argparse.Namespace, *sets: str) -> None:
    """Raise where a flag says how data is read, and none of the flags in `sets` names any."""
    words = encoding_flags(options)
    if words and not any(getattr(options, flag[2:]) for flag in sets):
        raise ValueError(without_effect(words[0], sets))


def _fields(given: Sequence[str] | None) -> dict[str, str] | None:
    """Return the fields that `--map` names."""
    fields: dict[str, str] = {}
    for name, sign, field in (one.partition("=") for one in given or ()):
        if not (name and sign and field):
            raise ValueError(
                f"--map takes NAME=FIELD, as in question=frage where your rows call the question "
                f"frage, found {short(name + sign + field)}"
            )
        if name in fields:
            raise ValueError(f"--map takes each name once, found {short(name)} twice")
        fields[name] = field
    return fields or None


def data_files(files: Sequence[str], options: argparse.Namespace) -> DataFiles:
    """Read data files as the options say."""
    with ticking("reading the data", shown=torchrun_number("RANK", 0) == 0):
        return DataFiles(files, encoding(options))


def encode_files(data: DataFiles, tokenizer, options: argparse.Namespace) -> list[Example]:
    """Encode and say what became of the files; of several processes one does."""
    with ticking("encoding the data", shown=torchrun_number("RANK", 0) == 0):
        examples, report = data.encode(tokenizer, getattr(options, "token_cache", None))
    files = ", ".join(data.files)
    if not report.documents:
        raise ValueError(f"{files} must hold a row to learn from, found: {'; '.join(report.notes)}")
    if not examples:
        raise ValueError(
            f"{files} must hold something to learn, found none within the first "
            f"{options.max_length} tokens of any record; raise --max-length, or pass --all-tokens "
            f"to learn prompts too"
        )
    if torchrun_number("RANK", 0) == 0:  # torchrun's
        print(f"{files}: {report}", file=sys.stderr)
    return examples
