"""`minilora merge`, `quantize`, `targets` and `fetch`: verbs on a model."""

import argparse
from pathlib import Path

import minilora
from minilora.cli.arguments import ADAPTER_HELP, DTYPE_HELP, DTYPES, arg, positive, verb
from minilora.cli.sources import check_new_folder, load
from minilora.loading import fetch as fetch_model
from minilora.loading import save_pretrained
from minilora.lora import sizes
from minilora.quantization import FORMATS, quantized_layers


@verb(
    "merge",
    "model",
    arg(
        "--dtype",
        default="stored",
        choices=("stored", *DTYPES),
        help=f"of the base; stored (default) is what the model's file has, {DTYPE_HELP}",
    ),
    arg("--adapter", required=True, type=Path, help=ADAPTER_HELP),
    "--out",
)
def merge(options: argparse.Namespace) -> int:
    """Write base + adapter as a Hugging Face folder."""
    check_new_folder(options.out, "--out")
    model, tokenizer = load(options)
    mode = "dequantize" if quantized_layers(model) else None
    minilora.merge(model, keep=None, mode=mode)
    minilora.eject(model)
    save_pretrained(model, options.out, tokenizer)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    print(f"merged model in {options.out}, weights in {dtype}")
    return 0


@verb(
    "quantize",
    "model",
    "--dtype",
    arg("--format", required=True, choices=FORMATS, dest="quantize"),
    "--block-size",
    "--out",
)
def quantize(options: argparse.Namespace) -> int:
    """Write a model stored in 8 or 4 bits."""
    check_new_folder(options.out, "--out")
    model, tokenizer = load(options)
    save_pretrained(model, options.out, tokenizer)
    print(f"{options.quantize} model in {options.out}: {sizes(model)}")
    return 0


@verb(
    "targets",
    "model",
    "--dtype",
    arg("--targets", nargs="+", metavar="NAME", default="all-linear"),
    arg("--exclude", nargs="+", metavar="NAME", default=()),
    arg("--r", type=positive, default=8, help="(default: 8)"),
)
def targets(options: argparse.Namespace) -> int:
    """List the linear layers and what would be adapted."""
    model, _ = load(options)
    print(minilora.targets(model, options.targets, exclude=options.exclude, r=options.r))
    return 0


@verb("fetch", arg("name", nargs="?", default="smollm2-135m"))
def fetch(options: argparse.Namespace) -> int:
    """Fetch a small real model into the cache."""
    print(fetch_model(options.name))
    return 0
