"""`minilora data`."""

import argparse
import sys

from minilora.cli.arguments import DATA_HELP, ENCODING, arg, verb
from minilora.cli.sources import data_files, encode_files
from minilora.data import duplicates, lengths, shown
from minilora.loading import read_tokenizer


@verb(
    "data",
    arg("files", nargs="+", metavar="FILE", help=DATA_HELP),
    arg("--model", required=True, help="whose tokenizer and chat template are used"),
    arg("--valid", nargs="+", metavar="FILE", help="held-out data"),
    arg("--test", nargs="+", metavar="FILE", help="data for the last word"),
    arg("--show", type=int, default=3, metavar="N", help="examples to print (default: 3)"),
    *ENCODING,
)
def data(options: argparse.Namespace) -> int:
    """Say what training will see of your data, token by token."""
    names = {"train": options.files, "valid": options.valid, "test": options.test}
    files = {name: data_files(some, options) for name, some in names.items() if some}
    tokenizer = read_tokenizer(options.model)
    sets = {name: encode_files(some, tokenizer, options) for name, some in files.items()}
    for name, examples in sets.items():
        print(f"{name}: {len(examples)} examples, tokens: {lengths(examples)}")
    for line in duplicates(sets, tokenizer):
        print(line)
    colors = sys.stdout.isatty()
    if options.show > 0:
        print(f"learned is {'green' if colors else 'what stands in ⟦⟧'}:")
    for example in sets["train"][: max(0, options.show)]:
        print(shown(example, tokenizer, colors))
        print("-" * 20)
    return 0
