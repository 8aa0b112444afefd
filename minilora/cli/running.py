"""`minilora eval` and `minilora generate`."""

import argparse
import json
import sys

import minilora
from minilora.cli.arguments import ENCODING, MODEL, SAMPLING, arg, positive, verb
from minilora.cli.sources import data_files, encode_files, load
from minilora.files import ticking


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


@verb(
    "generate",
    *MODEL,
    "--adapter",
    arg("prompts", nargs="+", metavar="PROMPT"),
    arg("--max-new-tokens", type=positive, default=64, help="(default: 64)"),
    *SAMPLING,
    arg("--chat", action="store_true", help="ask through the chat template"),
    arg("--system", metavar="TEXT", needs=("--chat",), help="system message"),
    arg("--compile", action="store_true", help="faster tokens after some ten seconds; needs g++"),
)
def generate(options: argparse.Namespace) -> int:
    """Continue a prompt."""
    model, tokenizer = load(options)
    if tokenizer.chat_template is not None and not options.chat:
        print(
            "prompts are continued as they are; --chat asks them through the chat template, as "
            "questions and conversations are trained on",
            file=sys.stderr,
        )
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "chat", "system", "compile")
    settings = {name: getattr(options, name) for name in names}
    with ticking("writing"):
        texts = minilora.generate(model, options.prompts, tokenizer=tokenizer, **settings)
    print(*texts, sep="\n")
    return 0
