"""The `minilora` command: parse arguments, call the library, print."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import minilora
from minilora.adapter_config import read_config
from minilora.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from minilora.checkpoint import save_adapter
from minilora.data import Example
from minilora.data_files import DataFiles, check_streamed, streamed
from minilora.injection import check_alpha, check_dropout
from minilora.models import fetch, load_model, save_pretrained
from minilora.packing import pack
from minilora.planning.arguments import add_arguments, from_arguments
from minilora.quantization import FORMATS, QuantizedLinear
from minilora.quantized_models import is_quantized_folder, load_quantized, save_quantized
from minilora.report import truncate
from minilora.report.comparison import check_keep
from minilora.sizes import sizes
from minilora.training.lock import check_free
from minilora.training.ranks import Ranks, common_dtype, leave
from minilora.training.sharded_loading import sharded
from minilora.training.state import check_out

MODEL_HELP = "a Hugging Face folder, a .gguf file, or smollm2-135m (fetched once)"
DATA_HELP = (
    '.jsonl with "text", "prompt" and "completion", or chat "messages" on each line; or .txt, '
    "one document a file, cut into windows of --max-length tokens"
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minilora",
        description="Fine-tune language models with LoRA, on the machine you have.",
        epilog="example: minilora train smollm2-135m --data train.jsonl --out out/v1 --minutes 3",
    )
    parser.add_argument("--version", action="version", version=minilora.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train an adapter")
    _add_model(train)
    _add_quantize(train)
    train.add_argument("--data", nargs="+", required=True, metavar="FILE", help=DATA_HELP)
    train.add_argument("--valid", nargs="+", metavar="FILE", help="held-out data, as --data")
    train.add_argument("--out", required=True, type=Path, help="folder for adapter and metrics")
    train.add_argument("--resume", action="store_true", help="continue the run in --out")
    _add_lora(train.add_argument_group("adapter"))
    _add_run(train.add_argument_group("run"))
    _add_data_options(train)
    _add_data_path(train.add_argument_group("data path"))

    evaluation = commands.add_parser("eval", help="loss and perplexity on a file")
    _add_model(evaluation)
    _add_quantize(evaluation)
    _add_adapter(evaluation)
    evaluation.add_argument("--data", nargs="+", required=True, metavar="FILE", help=DATA_HELP)
    evaluation.add_argument("--batch-size", type=_positive, default=8)
    evaluation.add_argument("--json", action="store_true", help="print one JSON object")
    _add_data_options(evaluation)

    generate = commands.add_parser("generate", help="continue a prompt")
    _add_model(generate)
    _add_quantize(generate)
    _add_adapter(generate)
    generate.add_argument("prompts", nargs="+", metavar="PROMPT")
    generate.add_argument(
        "--max-new-tokens", type=_positive, default=64, help="default %(default)s"
    )
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    generate.add_argument("--top-k", type=_positive)
    generate.add_argument("--top-p", type=float)
    generate.add_argument("--seed", type=int)
    generate.add_argument("--chat", action="store_true", help="ask through the chat template")
    generate.add_argument(
        "--compile", action="store_true", help="faster tokens after some ten seconds; needs g++"
    )

    merge = commands.add_parser("merge", help="write base + adapter as a Hugging Face folder")
    _add_model(merge, stored=True)
    merge.add_argument("--adapter", required=True, type=Path, help="folder with the two files")
    merge.add_argument("--out", required=True, type=Path, help="a new or empty folder")

    export = commands.add_parser(
        "export", help="write an adapter as plain LoRA that PEFT, vLLM and llama.cpp read alike"
    )
    export.add_argument("out", type=Path, metavar="OUT", help="folder with the adapter")
    export.add_argument("new", type=Path, metavar="NEW", help="a new or empty folder")
    export.add_argument(
        "--model", help=f"default: what the adapter names as its base; {MODEL_HELP}"
    )
    export.add_argument("--r", type=_positive, help="rank; needed for DoRA, else it stays")
    export.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of the factors written (default %(default)s)",
    )

    check = commands.add_parser("check", help="say which programs read an adapter folder, and why")
    check.add_argument("out", type=Path, metavar="OUT", help="folder with the adapter")

    targets = commands.add_parser(
        "targets", help="list the linear layers and what would be adapted"
    )
    _add_model(targets)
    targets.add_argument("--targets", nargs="+", metavar="NAME")
    targets.add_argument("--exclude", nargs="+", metavar="NAME", default=())
    targets.add_argument("--r", type=_positive, default=8)

    add_arguments(commands.add_parser("plan", help="do I need a GPU? memory, time and cost"))

    _add_explain(commands.add_parser("explain", help="what an adapter changed, and does it matter"))

    smaller = commands.add_parser("quantize", help="write a model stored in 8 or 4 bits")
    _add_model(smaller)
    smaller.add_argument("--format", required=True, choices=FORMATS)
    _add_block_size(smaller)
    smaller.add_argument("--out", required=True, type=Path, help="a new or empty folder")

    fetching = commands.add_parser("fetch", help="fetch a small real model into the cache")
    fetching.add_argument("name", nargs="?", default="smollm2-135m")
    return parser


def _add_explain(explain: argparse.ArgumentParser) -> None:
    explain.add_argument("out", type=Path, metavar="OUT", help="folder with the adapter")
    explain.add_argument(
        "--model", help=f"default: what the adapter names as its base; {MODEL_HELP}"
    )
    explain.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the base"
    )
    explain.add_argument("--data", nargs="+", metavar="FILE", help=f"held-out data: {DATA_HELP}")
    explain.add_argument("--train", nargs="+", metavar="FILE", help="data it was trained on")
    explain.add_argument("--outside", nargs="+", metavar="FILE", help="text outside the task")
    explain.add_argument(
        "--examples", type=_positive, default=200, help="of each, evenly picked (default 200)"
    )
    explain.add_argument(
        "--ablate", type=int, default=32, help="examples to ablate on, 0 for none (default 32)"
    )
    explain.add_argument(
        "--words", nargs="+", default=(), metavar="WORD", help="whose attention to measure"
    )
    explain.add_argument("--against", type=Path, metavar="OUT", help="another adapter's folder")
    explain.add_argument("--keep", type=float, default=0.95, help="energy to keep (default 0.95)")
    explain.add_argument("--batch-size", type=_positive, default=8)
    explain.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    explain.add_argument("--html", type=Path, metavar="FILE", help="write one page with plots")
    explain.add_argument(
        "--truncate", type=Path, metavar="FOLDER", help="write the adapter at the suggested ranks"
    )
    _add_data_options(explain)


def _add_lora(lora: argparse._ArgumentGroup) -> None:
    lora.add_argument(  # torchrun takes --r for the beginning of an option of its own
        "--r", "--rank", dest="r", type=_positive, default=8, help="rank (default %(default)s)"
    )
    lora.add_argument("--alpha", type=float, help="scaling is alpha / r (default: r)")
    lora.add_argument("--dropout", type=float, default=0.0, help="default %(default)s")
    lora.add_argument("--rslora", action="store_true", help="scaling is alpha / sqrt(r)")
    lora.add_argument(
        "--targets", nargs="+", metavar="NAME", help="default: all linears but the head"
    )
    lora.add_argument("--exclude", nargs="+", metavar="NAME", default=())
    lora.add_argument("--dora", action="store_true", help="train row lengths apart")
    lora.add_argument("--init", default="kaiming", help="kaiming (default), pissa, olora, …")
    lora.add_argument("--bias", default="none", choices=("none", "all", "lora_only"))
    lora.add_argument(
        "--modules-to-save",
        nargs="+",
        metavar="NAME",
        default=(),
        help="train whole copies of these",
    )


def _add_run(run: argparse._ArgumentGroup) -> None:
    defaults = minilora.TrainConfig()
    run.add_argument("--lr", type=float, default=defaults.lr, help="default %(default)s")
    run.add_argument(
        "--lora-plus-ratio",
        type=float,
        default=defaults.lora_plus_ratio,
        metavar="RATIO",
        help="LoRA+: lora_B learns at RATIO times the rate (default %(default)s)",
    )
    run.add_argument(
        "--batch-size", type=_positive, default=defaults.batch_size, help="default %(default)s"
    )
    run.add_argument(
        "--accumulate", type=_positive, default=1, help="micro-batches a step (default 1)"
    )
    run.add_argument("--epochs", type=float, help="default 1, unless another limit is given")
    run.add_argument("--max-steps", type=int)
    run.add_argument("--minutes", type=float, help="training time at most")
    run.add_argument("--schedule", choices=("cosine", "linear", "constant"), default="cosine")
    run.add_argument("--eval-every", type=int, metavar="STEPS")
    run.add_argument("--save-every", type=int, metavar="STEPS")
    run.add_argument("--checkpointing", action="store_true", help="less memory, more time")
    run.add_argument(
        "--max-memory",
        type=float,
        metavar="GB",
        help="of this process on a CPU: what would take more is computed in smaller passes",
    )
    run.add_argument(
        "--compile", action="store_true", help="faster steps after half a minute; needs g++"
    )
    run.add_argument(
        "--plan", action="store_true", help="say memory and time before, and what they were after"
    )
    run.add_argument("--seed", type=int, default=0)
    run.add_argument(
        "--patience", type=int, metavar="N", help="stop after N evaluations without a better one"
    )
    run.add_argument(
        "--sample", nargs="+", metavar="PROMPT", help="continue these at each evaluation"
    )
    run.add_argument(
        "--parallel",
        choices=("ddp", "fsdp"),
        help="under torchrun: each process holds the model (ddp), or a part of every weight (fsdp)",
    )


def _add_data_path(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--pack", action="store_true", help="several documents in a row, kept apart")
    group.add_argument(
        "--stream", action="store_true", help="read .jsonl as it is needed; needs a limit on steps"
    )
    group.add_argument("--token-cache", type=Path, metavar="FOLDER", help="keep encoded data there")


def _positive(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, found {text!r}")
    return int(text)


def _length(text: str) -> int:
    if _positive(text) < 2:
        raise argparse.ArgumentTypeError("must be at least 2: the first token is never learned")
    return int(text)


def _add_model(parser: argparse.ArgumentParser, stored: bool = False) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    choices: tuple[str, ...] = ("auto", "float32", "bfloat16", "float16")
    what = "auto is the fastest this machine multiplies; float32 computes in float32 as well"
    if stored:
        choices, what = ("stored", *choices), "stored is what the model's file has"
    parser.add_argument(
        "--dtype",
        default=choices[0],
        choices=choices,
        help=f"of the base (default %(default)s); {what}",
    )


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quantize", choices=FORMATS, help="store the base's linears in fewer bits while reading"
    )
    _add_block_size(parser)


def _add_block_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--block-size", type=int, default=64, help="weights that share a scale (default 64)"
    )


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", type=Path, help="folder with the adapter's two files")


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-length", type=_length, default=512, help="tokens kept of an example")
    parser.add_argument("--all-tokens", action="store_true", help="learn prompts too")


def _check_adapter(folder: Path, what: str) -> None:
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"{what} must name a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, found no "
            f"{CONFIG_FILE} in {folder}"
        )


def _base_of(adapter: Path, model: str | None) -> str:
    """Return the model that was asked for, or else the one that an adapter names as its base."""
    named = model or read_config(adapter / CONFIG_FILE).get("base_model_name_or_path")
    if not named:
        raise ValueError(f"{adapter / CONFIG_FILE} must name its base, found none; pass --model")
    return named


def _check_new_folder(out: Path, what: str) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{what} must be a new or empty folder, found files at {out}; nothing is overwritten, "
            f"so name another one"
        )


def _load(options: argparse.Namespace, prepare=None):
    adapter = getattr(options, "adapter", None)
    if adapter is not None:
        _check_adapter(adapter, "--adapter")  # before the slow part
    dtypes: dict[str, Any] = {"auto": "auto", "stored": None}
    dtype = dtypes[options.dtype] if options.dtype in dtypes else getattr(torch, options.dtype)
    if getattr(options, "parallel", None) is not None and dtype == "auto":
        dtype = common_dtype(options.parallel)
    format = getattr(options, "quantize", None)
    if format is not None or is_quantized_folder(options.model):
        block_size = getattr(options, "block_size", 64)
        model, tokenizer = load_quantized(
            options.model, format, block_size=block_size, dtype=dtype, prepare=prepare
        )
    else:
        model, tokenizer = load_model(options.model, dtype=dtype, prepare=prepare)
    if adapter is not None:
        minilora.load(model, adapter)
    return model, tokenizer


def _data(files: Sequence[str], options: argparse.Namespace) -> DataFiles:
    return DataFiles(files, options.max_length, options.all_tokens)


def _examples(data: DataFiles, tokenizer, options: argparse.Namespace) -> list[Example]:
    """Encode and say what became of the files; of several processes one does."""
    examples, report = data.examples(tokenizer, getattr(options, "token_cache", None))
    if int(os.environ.get("RANK", "0")) == 0:  # torchrun's
        for line in report:
            print(line, file=sys.stderr)
    return examples


def _train(options: argparse.Namespace) -> int:
    if options.alpha is not None:
        check_alpha(options.alpha, "--alpha")
    check_dropout(options.dropout)
    if int(os.environ.get("RANK", "0")) == 0:  # before the slow part
        check_free(options.out)
        check_out(options.out, options.resume)
    config = minilora.TrainConfig(
        lr=options.lr,
        lora_plus_ratio=options.lora_plus_ratio,
        batch_size=options.batch_size,
        accumulate=options.accumulate,
        epochs=options.epochs,
        max_steps=options.max_steps,
        max_minutes=options.minutes,
        schedule=options.schedule,
        eval_every=options.eval_every,
        save_every=options.save_every,
        checkpointing=options.checkpointing,
        max_memory=options.max_memory,
        compile=options.compile,
        seed=options.seed,
        patience=options.patience,
        parallel=options.parallel,
        # An f32 base would else be multiplied in what is fastest here.
        dtype="float32" if options.dtype == "float32" else "auto",
    )
    if options.sample and not options.valid:
        raise ValueError("--sample writes at each evaluation, which needs --valid, found none")
    if options.plan and options.stream:
        raise ValueError("--plan counts the examples, which --stream does not know; leave one out")
    if options.stream:  # before the slow part
        if options.token_cache is not None:
            raise ValueError(
                "--token-cache keeps what is encoded before a run, and --stream encodes during it; "
                "leave one out"
            )
        check_streamed(options.data)
    train_data = None if options.stream else _data(options.data, options)
    valid_data = _data(options.valid, options) if options.valid else None

    def inject(model) -> None:
        torch.manual_seed(options.seed)
        minilora.inject(
            model,
            options.r,
            options.alpha,
            targets=options.targets or "all-linear",
            exclude=options.exclude,
            dropout=options.dropout,
            rslora=options.rslora,
            dora=options.dora,
            init=options.init,
            bias=options.bias,
            modules_to_save=options.modules_to_save,
        )

    if options.parallel == "fsdp":  # each process reads its part alone
        model, tokenizer = _load(options, sharded(Ranks("fsdp"), inject))
    else:
        model, tokenizer = _load(options)
    train: Any = (
        streamed(options.data, tokenizer, options.max_length, options.all_tokens, options.pack)
        if train_data is None
        else _examples(train_data, tokenizer, options)
    )
    if options.pack and not options.stream:
        train = pack(train, options.max_length)
    valid = _examples(valid_data, tokenizer, options) if valid_data is not None else None
    if options.parallel != "fsdp":
        inject(model)
    result = minilora.fit(  # torchrun ends the others when one fails
        model,
        train,
        valid,
        config=config,
        out=options.out,
        resume=options.resume,
        sample=_sampler(options.sample, tokenizer) if options.sample else None,
        plan=options.plan,
    )
    leave()
    if result.stopped == "interrupted":
        return 130
    if int(os.environ.get("RANK", "0")) > 0:
        return 0
    if result.before is not None and result.best is not None:
        print(f"held out before: {result.before}")
        print(f"held out after:  {result.best} (step {result.best_step})")
    print(f"{result.steps} steps in {result.minutes:.1f} minutes; adapter in {options.out}")
    return 0


def _sampler(prompts: Sequence[str], tokenizer) -> Callable[[Any], str]:
    """Return what continues the prompts, greedily."""

    longest = max(len(tokenizer.encode(prompt)) for prompt in prompts)

    def sample(model) -> str:
        room = max(1, min(32, model.config.max_position_embeddings - longest))
        texts = minilora.generate(model, prompts, tokenizer=tokenizer, max_new_tokens=room)
        return " | ".join(f"{a}{b}" for a, b in zip(prompts, texts, strict=True))

    return sample


def _eval(options: argparse.Namespace) -> int:
    data = _data(options.data, options)
    model, tokenizer = _load(options)
    examples = _examples(data, tokenizer, options)
    found = minilora.evaluate(model, examples, batch_size=options.batch_size)
    print(json.dumps(vars(found)) if options.json else found)
    return 0


def _generate(options: argparse.Namespace) -> int:
    model, tokenizer = _load(options)
    texts = minilora.generate(
        model,
        options.prompts,
        tokenizer=tokenizer,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        chat=options.chat,
        compile=options.compile,
    )
    for text in texts:
        print(text)
    return 0


def _merge(options: argparse.Namespace) -> int:
    out = options.out
    _check_new_folder(out, "--out")
    model, tokenizer = _load(options)
    small = any(isinstance(m, QuantizedLinear) for m in model.modules())
    minilora.merge(model, keep=None, mode="dequantize" if small else None)
    minilora.eject(model)
    save_pretrained(model, out, tokenizer)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    print(f"merged model in {out}, weights in {dtype}")
    return 0


def _export(options: argparse.Namespace) -> int:
    _check_new_folder(options.new, "NEW")
    _check_adapter(options.out, "OUT")
    model, _ = load_model(_base_of(options.out, options.model), dtype=None)
    minilora.load(model, options.out)
    print(minilora.export(model, options.new, r=options.r, dtype=options.dtype))
    print(minilora.check(options.new))
    return 0


def _check(options: argparse.Namespace) -> int:
    readers = minilora.check(options.out)
    print(readers)
    return 0 if all(reader.takes for reader in readers) else 1


def _quantize(options: argparse.Namespace) -> int:
    _check_new_folder(options.out, "--out")
    options.quantize = options.format
    model, tokenizer = _load(options)
    save_quantized(model, options.out, tokenizer)
    print(f"{options.format} model in {options.out}: {sizes(model)}")
    return 0


def _targets(options: argparse.Namespace) -> int:
    model, _ = _load(options)
    targets = options.targets or "all-linear"
    print(minilora.targets(model, targets, exclude=options.exclude, r=options.r))
    return 0


def _explain(options: argparse.Namespace) -> int:
    check_keep(options.keep)
    for file in (options.json, options.html):
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"{file} must lie in a folder that is there, found no {file.parent}")
    folders = {"default": options.out}
    if options.against is not None:
        folders["other"] = options.against
    if options.truncate is not None:
        _check_new_folder(options.truncate, "--truncate")
    for folder in folders.values():
        _check_adapter(folder, "OUT" if folder == options.out else "--against")
    options.model = _base_of(options.out, options.model)
    files = {key: getattr(options, key) for key in ("data", "train", "outside")}
    data = {key: _data(names, options) for key, names in files.items() if names}
    model, tokenizer = _load(options)
    for name, folder in folders.items():
        minilora.load(model, folder, name)
    examples = {}
    for key, some in data.items():
        whole = _examples(some, tokenizer, options)
        count = min(len(whole), options.examples)
        examples[key] = [whole[i * len(whole) // count] for i in range(count)]
    found = minilora.explain(
        model,
        "default",
        data=examples.get("data"),
        train=examples.get("train"),
        outside=examples.get("outside"),
        against="other" if "other" in folders else None,
        words=options.words,
        tokenizer=tokenizer,
        keep=options.keep,
        ablate_examples=options.ablate,
        batch_size=options.batch_size,
        progress=sys.stderr.isatty(),
    )
    print(found)
    if options.json is not None:
        print(f"JSON in {found.to_json(options.json)}")
    if options.html is not None:
        print(f"page in {found.to_html(options.html)}")
    if options.truncate is not None:
        fit = truncate(model, "default", "truncated", keep=options.keep)
        save_adapter(model, options.truncate, "truncated")
        print(f"adapter at the suggested ranks in {options.truncate}, error {fit.error:.3g}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    found = from_arguments(options)
    print(json.dumps(found.to_dict()) if options.json else found)
    return 0


def _fetch(options: argparse.Namespace) -> int:
    print(fetch(options.name))
    return 0


_COMMANDS = {
    "train": _train,
    "eval": _eval,
    "generate": _generate,
    "merge": _merge,
    "export": _export,
    "check": _check,
    "targets": _targets,
    "plan": _plan,
    "explain": _explain,
    "quantize": _quantize,
    "fetch": _fetch,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; bad input is one line on stderr and exit code 2, Ctrl-C is 130."""
    options = _parser().parse_args(arguments)
    try:
        return _COMMANDS[options.command](options)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        print(f"minilora {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"minilora {options.command}: interrupted", file=sys.stderr)
        return 130
