"""`minilora merge`, `quantize`, `targets` and `fetch`: verbs on a model."""

import argparse
from pathlib import Path

import minilora
from minilora.cli.arguments import ADAPTER_HELP, DTYPE_HELP, DTYPES, arg, positive, verb
from minilora.cli.sources import (
    adapter_in_place,
    check_gguf,
    check_new_folder,
    is_adapter,
    load,
    write_modelfile,
)
from minilora.files import ticking
from minilora.loading import FILE_TYPES, NAMES, is_quantized, save_gguf, save_pretrained
from minilora.loading import fetch as fetch_model
from minilora.lora import sizes
from minilora.quantization import FORMATS, quantized_layers


@verb(
    "merge",
    "model",
    "--device",
    arg(
        "--dtype",
        default="stored",
        choices=("stored", *DTYPES),
        help="of the folder that is written; stored (default) is what the base's folder has, to be "
        f"named where that is quantized or a GGUF file; {DTYPE_HELP}",
    ),
    arg("--adapter", type=Path, help=f"where MODEL is the base: {ADAPTER_HELP}"),
    arg(
        "--untie",
        action="store_true",
        help="where the adapter changes one of two layers that share a weight: give each its own",
    ),
    arg("--out", type=Path, help="a new or empty folder"),
    arg("--gguf", type=Path, metavar="FILE", help="write a GGUF file, for llama.cpp and Ollama"),
    arg(
        "--type",
        default="f16",
        choices=FILE_TYPES,
        needs=("--gguf",),
        help="of its matrices (default: f16)",
    ),
    arg("--ollama", action="store_true", help="write a Modelfile beside it"),
)
def merge(options: argparse.Namespace) -> int:
    """Write base + adapter as a Hugging Face folder or a GGUF file."""
    if options.out is None and options.gguf is None:
        raise ValueError("merge needs --out FOLDER, or --gguf FILE, found neither")
    if options.out is not None:
        check_new_folder(options.out, "--out")
    check_gguf(options.gguf, options.ollama)
    if options.adapter is None:
        if not is_adapter(options.model):
            raise ValueError(
                f"merge needs an adapter, found the model {options.model} alone; pass --adapter, "
                "or the adapter's folder as MODEL"
            )
        [options.adapter] = adapter_in_place(options)
    if options.out is None and options.dtype == "stored":
        options.dtype = "float32"  # rounded once, when the file is written
    packed = options.model in NAMES or options.model.lower().endswith(".gguf")
    _check_dtype(options, packed or is_quantized(Path(options.model)))
    model, tokenizer = load(options)
    few_bits = quantized_layers(model)
    _check_dtype(options, bool(few_bits))  # of one from the hub
    mode = "dequantize" if few_bits else None
    with ticking("merging"):
        minilora.merge(model, keep=None, mode=mode, untie=options.untie)
        minilora.eject(model)
    if options.out is not None:
        with ticking("writing"):
            save_pretrained(model, options.out, tokenizer)
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        print(f"merged model in {options.out}, weights in {dtype}")
    if options.gguf is not None:
        with ticking("writing"):
            save_gguf(model, options.gguf, tokenizer, type=options.type)
        print(f"merged model in {options.gguf}, {options.type}")
    if options.ollama:
        ends = [name for name, i in tokenizer.control.items() if i in tokenizer.stop_ids]
        stops = [f'PARAMETER stop "{name}"' for name in ends]
        write_modelfile(options.gguf, f"FROM ./{options.gguf.name}", *stops)
    return 0


def _check_dtype(options: argparse.Namespace, few_bits: bool) -> None:
    if options.dtype == "stored" and few_bits:
        raise ValueError(
            f"--dtype says in what a merged folder is stored, found none and a base in fewer bits "
            f"({options.model}); pass --dtype bfloat16, or float32 for the exact sum"
        )


@verb(
    "quantize",
    "base",
    "--device",
    "--dtype",
    arg("--format", required=True, choices=FORMATS, dest="quantize"),
    "--block-size",
    "--out",
)
def quantize(options: argparse.Namespace) -> int:
    """Write a model stored in 8 or 4 bits."""
    check_new_folder(options.out, "--out")
    model, tokenizer = load(options)
    with ticking("writing"):
        save_pretrained(model, options.out, tokenizer)
    print(f"{options.quantize} model in {options.out}: {sizes(model)}")
    return 0


@verb(
    "targets",
    "base",
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
