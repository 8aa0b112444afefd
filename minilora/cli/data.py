"""`minilora compare`, `data` and `eval`: verbs on files of data."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import minilora
from minilora.cli.arguments import (
    ADAPTER_HELP,
    DATA_HELP,
    ENCODING,
    MODEL,
    arg,
    integer,
    positive,
    verb,
)
from minilora.cli.run_file import trained_on
from minilora.cli.sources import (
    adapter_in_place,
    adapter_of,
    check_new_files,
    data_files,
    encode_files,
    load,
    load_adapter,
    names_of,
)
from minilora.data import duplicates, endless, lengths, shown
from minilora.files import counted
from minilora.loading import read_tokenizer
from minilora.running import BASE


@verb(
    "compare",
    *MODEL,
    arg("adapters", nargs="*", type=Path, metavar="OUT", help=ADAPTER_HELP),
    "--data",
    arg("--no-base", action="store_true", help="the first adapter stands for the base"),
    arg("--outside", nargs="+", metavar="FILE", help=f"outside the task: {DATA_HELP}"),
    arg("--train", nargs="+", metavar="FILE", help="data it was trained on, for over-fitting"),
    arg(
        "--max-new-tokens",
        type=positive,
        default=64,
        needs=("--right",),
        help="of an answer (default: 64)",
    ),
    arg("--right", metavar="HOW", help="answers too: exact, or a regular expression"),
    "--batch-size",
    arg("--seed", type=integer, default=0, help="of the bootstrap (default: 0)"),
    arg("--json", type=Path, metavar="FILE", help="write everything as JSON"),
    arg("--html", type=Path, metavar="FILE", help="write one page with the intervals drawn"),
    *ENCODING,
)
def compare(options: argparse.Namespace) -> int:
    """Say which adapter is better on held-out data, and how sure that is."""
    given = [*adapter_in_place(options), *options.adapters]
    if not given:
        raise ValueError(
            f"compare needs an adapter's folder, found the model {options.model} alone; name one "
            "or more behind it"
        )
    check_new_files({"--json": options.json, "--html": options.html})
    folders = [adapter_of(name, "OUT") for name in given]
    files = {key: getattr(options, key) for key in ("data", "outside", "train")}
    data = {key: data_files(names, options) for key, names in files.items() if names}
    learned = [trained_on(folder, options.data) for folder in folders]
    model, tokenizer = load(options)
    names = names_of(folders)
    for name, folder in zip(names, folders, strict=True):
        load_adapter(model, folder, name)
    examples: dict[str, Any] = {
        key: encode_files(some, tokenizer, options) for key, some in data.items()
    }
    found = minilora.compare(
        model,
        names if options.no_base else [BASE, *names],
        tokenizer=tokenizer,
        right=options.right,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        seed=options.seed,
        progress=True,
        **examples,
    )
    print(found)
    for name, own in zip(names, learned, strict=True):
        if own:
            print(f"note: {name} was trained on {', '.join(own)}: its loss there is not held out")
    if options.json is not None:
        print(f"JSON in {found.to_json(options.json)}")
    if options.html is not None:
        print(f"page in {found.to_html(options.html)}")
    return 0


@verb(
    "data",
    arg("files", nargs="+", metavar="FILE", help=DATA_HELP),
    arg(
        "--model",
        required=True,
        help="whose tokenizer and chat template are used; an adapter's folder stands for its base",
    ),
    arg("--valid", nargs="+", metavar="FILE", help="held-out data"),
    arg("--test", nargs="+", metavar="FILE", help="data for the last word"),
    arg("--show", type=int, default=3, metavar="N", help="examples to print (default: 3)"),
    *ENCODING,
)
def data(options: argparse.Namespace) -> int:
    """Say what training will see of your data, token by token."""
    names = {"train": options.files, "valid": options.valid, "test": options.test}
    files = {name: data_files(some, options) for name, some in names.items() if some}
    adapter_in_place(options)
    tokenizer = read_tokenizer(options.model)
    sets = {name: encode_files(some, tokenizer, options) for name, some in files.items()}
    for name, examples in sets.items():
        print(f"{name}: {counted(len(examples), 'example')}, tokens: {lengths(examples)}")
        if count := endless(examples, tokenizer.stop_ids):
            print(
                f"{name}: {counted(count, 'example')} without a token at the end that stops "
                f"generation (cut at --max-length {options.max_length}, or parts of a document)"
            )
    for line in duplicates(sets, tokenizer):
        print(line)
    if options.valid is None:
        print("no --valid: no rows are held out, so there is nothing to measure the adapter on")
    colors = sys.stdout.isatty()
    if options.show > 0:
        print(f"learned is {'green' if colors else 'what stands in ⟦⟧'}:")
    for example in sets["train"][: max(0, options.show)]:
        print(shown(example, tokenizer, colors))
        print("-" * 20)
    if 0 < options.show < len(sets["train"]):
        print(f"{options.show} of {len(sets['train'])} examples; --show N prints more")
    return 0


@verb(
    "eval",
    *MODEL,
    "--adapter",
    "--data",
    "--batch-size",
    arg("--json", action="store_true", help="print one JSON object"),
    *ENCODING,
)
def evaluate(options: argparse.Namespace) -> int:
    """Print loss and perplexity on files."""
    data = data_files(options.data, options)
    model, tokenizer = load(options)
    examples = encode_files(data, tokenizer, options)
    result = minilora.evaluate(model, examples, batch_size=options.batch_size, progress=True)
    print(json.dumps(vars(result)) if options.json else result)
    return 0
