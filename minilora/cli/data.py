"""`minilora data`."""

import argparse
import sys

from minilora.cli.arguments import DATA_HELP, ENCODING, arg, verb
from minilora.cli.sources import adapter_in_place, data_files, encode_files
from minilora.data import duplicates, endless, lengths, shown
from minilora.loading import read_tokenizer


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
        print(f"{name}: {len(examples)} examples, tokens: {lengths(examples)}")
        if count := endless(examples, tokenizer.stop_ids):
            print(
                f"{name}: {count} of them end without a token that stops generation (cut at "
                f"--max-length {options.max_length}, or parts of a document)"
            )
    for line in duplicates(sets, tokenizer):
        print(line)
    if options.valid is None:
        print("no --valid: nothing here is held out to measure what was learned by")
    colors = sys.stdout.isatty()
    if options.show > 0:
        print(f"learned is {'green' if colors else 'what stands in ⟦⟧'}:")
    for example in sets["train"][: max(0, options.show)]:
        print(shown(example, tokenizer, colors))
        print("-" * 20)
    return 0
