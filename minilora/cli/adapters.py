"""`minilora export`, `check` and `explain`: verbs on a trained adapter."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import minilora
from minilora.cli.arguments import DATA_HELP, DTYPES, ENCODING, arg, integer, positive, verb
from minilora.cli.run_file import trained_on
from minilora.cli.sources import (
    adapter_of,
    base_of,
    check_data_is_read,
    check_gguf,
    check_new_files,
    check_new_folder,
    data_files,
    device,
    encode_files,
    load,
    load_adapter,
    names_of,
    write_modelfile,
)
from minilora.files import counted, ticking
from minilora.loading import NAMES, export_gguf, fetch, load_model
from minilora.peft import adapter_folder, save_adapter
from minilora.report import check_keep, truncate

# Flags of explain.
_DATA = {"data": "held-out data", "train": "training data", "outside": "outside"}
_SETS = tuple(f"--{name}" for name in _DATA)
_FILES: dict[str, Any] = {"nargs": "+", "metavar": "FILE"}


@verb(
    "export",
    "out",
    arg("new", type=Path, nargs="?", metavar="NEW", help="a new or empty folder"),
    arg("--gguf", type=Path, metavar="FILE", help="write a GGUF file, for llama.cpp and Ollama"),
    arg(
        "--ollama", metavar="BASE", help="and a Modelfile beside it: a GGUF file, or Ollama's name"
    ),
    "--model",
    arg("--r", type=positive, help="rank; needed for DoRA, else it stays"),
    arg("--dtype", default="float32", choices=DTYPES[1:], help="of the factors (default: float32)"),
)
def export(options: argparse.Namespace) -> int:
    """Write an adapter as plain LoRA that PEFT, vLLM and llama.cpp read alike."""
    if options.new is None and options.gguf is None:
        raise ValueError("export needs a new folder, or --gguf FILE, found neither")
    if options.new is not None:
        check_new_folder(options.new, "NEW")
    check_gguf(options.gguf, options.ollama)
    folder = adapter_of(options.out, "OUT")
    base = base_of(folder, options.model)
    with ticking("loading the model"):
        model, _ = load_model(base, dtype=None, device="cpu")
        minilora.load(model, folder)
    how = {"r": options.r, "dtype": options.dtype}
    if options.new is not None:
        print(minilora.export(model, options.new, **how))
        print(minilora.check(options.new))
    if options.gguf is not None:
        made = export_gguf(model, options.gguf, **how)
        print(f"GGUF adapter in {options.gguf}: {len(made.layers)} layers, {made.exactness}")
        base = str(fetch(base)) if base in NAMES else base
        if base.lower().endswith(".gguf") and Path(base).is_file():
            files = (shlex.quote(name) for name in (base, str(options.gguf)))
            print("in llama.cpp: llama-cli -m {} --lora {}".format(*files))
    if options.ollama is not None:
        write_modelfile(options.gguf, f"FROM {options.ollama}", f"ADAPTER ./{options.gguf.name}")
    return 0


@verb("check", "out")
def check(options: argparse.Namespace) -> int:
    """Say which programs read an adapter folder, and why."""
    readers = minilora.check(adapter_folder(options.out))
    print(readers)
    return 0 if all(reader.takes for reader in readers) else 1


def _check_explain(options: argparse.Namespace) -> None:
    """Refuse what would fail after the slow part; put folders in the place of adapters' names."""
    check_keep(options.keep)
    check_data_is_read(options, *_SETS)
    check_new_files({"--json": options.json, "--html": options.html})
    if options.truncate is not None:
        check_new_folder(options.truncate, "--truncate")
    options.out = adapter_of(options.out, "OUT")
    if options.against is not None:
        options.against = adapter_of(options.against, "--against")


@verb(
    "explain",
    "out",
    "--model",
    "--device",
    arg("--dtype", default="auto", choices=DTYPES[:3], help="of the base"),
    arg("--data", help=f"held-out data: {DATA_HELP}", **_FILES),
    arg("--train", help="data it was trained on", **_FILES),
    arg("--outside", help="text outside the task", **_FILES),
    arg(
        "--examples",
        type=positive,
        default=200,
        needs=_SETS,
        help="of each, evenly picked (default: 200)",
    ),
    arg(
        "--ablate",
        type=integer,
        default=32,
        needs=("--data",),
        help="examples to ablate on, or 0 (default: 32)",
    ),
    arg(
        "--words",
        nargs="+",
        default=(),
        metavar="WORD",
        needs=("--data",),
        help="whose attention to measure",
    ),
    arg("--against", type=Path, metavar="OUT", help="another adapter's folder"),
    arg("--keep", type=float, default=0.95, help="energy to keep (default: 0.95)"),
    "--batch-size",
    arg("--json", type=Path, metavar="FILE", help="write everything as JSON"),
    arg("--html", type=Path, metavar="FILE", help="write one page with plots"),
    arg("--truncate", type=Path, metavar="FOLDER", help="write the adapter at suggested ranks"),
    *ENCODING,
)
def explain(options: argparse.Namespace) -> int:
    """Say what an adapter changed, and whether it matters."""
    _check_explain(options)
    options.model = base_of(options.out, options.model)
    data = {key: data_files(names, options) for key in _DATA if (names := getattr(options, key))}
    learned = trained_on(options.out, options.data or [])
    if device(options).type == "mps":  # which has no float64
        options.device = "cpu"
    model, tokenizer = load(options)
    folders = [options.out, *([options.against] if options.against is not None else [])]
    names = names_of(folders) if options.against is not None else ["default"]
    for name, folder in zip(names, folders, strict=True):
        load_adapter(model, folder, name, flag=False)
    examples: dict[str, Any] = {}
    about = {"adapter": str(options.out), "base": options.model}
    if options.against is not None:
        about["compared with"] = str(options.against)
    for key, some in data.items():
        rows = encode_files(some, tokenizer, options)
        count = min(len(rows), options.examples)
        examples[key] = [rows[i * len(rows) // count] for i in range(count)]
        files = ", ".join(some.files)
        about[_DATA[key]] = f"{files} ({count} of {counted(len(rows), 'example')})"
    explanation = minilora.explain(
        model,
        names[0],
        **examples,
        against=None if options.against is None else names[1],
        words=options.words,
        tokenizer=tokenizer,
        keep=options.keep,
        ablate_examples=options.ablate,
        batch_size=options.batch_size,
        progress=sys.stderr.isatty() or 5.0,  # seconds between two lines of a log
        about=about,
    )
    print(explanation)
    if learned:
        print(f"note: the adapter was trained on {', '.join(learned)}: that is not held out")
    if options.json is not None:
        print(f"JSON in {explanation.to_json(options.json)}")
    if options.html is not None:
        print(f"page in {explanation.to_html(options.html)}")
    if options.truncate is not None:
        lower = "truncated"
        while lower in names:
            lower += "_"
        fit = truncate(model, names[0], lower, keep=options.keep)
        save_adapter(model, options.truncate, lower)
        print(f"adapter at the suggested ranks in {options.truncate}, error {fit.error:.3g}")
    return 0
