"""The `minilora` command: parse arguments, call the library, print."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import minilora
from minilora.models import fetch, load_model, save_pretrained
from minilora.records import encode_records, read_records

MODEL_HELP = "a Hugging Face folder, a .gguf file, or smollm2-135m (fetched once)"
DATA_HELP = (
    '.jsonl with "text", "prompt" and "completion", or chat "messages" on each line; or .txt, '
    "one document a file"
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
    train.add_argument("--data", nargs="+", required=True, metavar="FILE", help=DATA_HELP)
    train.add_argument("--valid", nargs="+", metavar="FILE", help="held-out data, as --data")
    train.add_argument("--out", required=True, type=Path, help="folder for adapter and metrics")
    train.add_argument("--resume", action="store_true", help="continue the run in --out")
    lora = train.add_argument_group("adapter")
    lora.add_argument("--r", type=int, default=8, help="rank (default %(default)s)")
    lora.add_argument("--alpha", type=float, help="scaling is alpha / r (default: r)")
    lora.add_argument("--dropout", type=float, default=0.0, help="default %(default)s")
    lora.add_argument("--rslora", action="store_true", help="scaling is alpha / sqrt(r)")
    lora.add_argument(
        "--targets", nargs="+", metavar="NAME", help="default: all linears but the head"
    )
    lora.add_argument("--exclude", nargs="+", metavar="NAME", default=())
    run = train.add_argument_group("run")
    defaults = minilora.TrainConfig()
    run.add_argument("--lr", type=float, default=defaults.lr, help="default %(default)s")
    run.add_argument(
        "--batch-size", type=int, default=defaults.batch_size, help="default %(default)s"
    )
    run.add_argument("--accumulate", type=int, default=1, help="micro-batches a step (default 1)")
    run.add_argument("--epochs", type=float, help="default 1, unless another limit is given")
    run.add_argument("--max-steps", type=int)
    run.add_argument("--minutes", type=float, help="training time at most")
    run.add_argument("--schedule", choices=("cosine", "linear", "constant"), default="cosine")
    run.add_argument("--eval-every", type=int, metavar="STEPS")
    run.add_argument("--save-every", type=int, metavar="STEPS")
    run.add_argument("--checkpointing", action="store_true", help="less memory, more time")
    run.add_argument("--seed", type=int, default=0)
    _add_data_options(train)

    evaluation = commands.add_parser("eval", help="loss and perplexity on a file")
    _add_model(evaluation)
    _add_adapter(evaluation)
    evaluation.add_argument("--data", nargs="+", required=True, metavar="FILE", help=DATA_HELP)
    evaluation.add_argument("--batch-size", type=int, default=8)
    evaluation.add_argument("--json", action="store_true", help="print one JSON object")
    _add_data_options(evaluation)

    generate = commands.add_parser("generate", help="continue a prompt")
    _add_model(generate)
    _add_adapter(generate)
    generate.add_argument("prompts", nargs="+", metavar="PROMPT")
    generate.add_argument("--max-new-tokens", type=int, default=64, help="default %(default)s")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    generate.add_argument("--top-k", type=int)
    generate.add_argument("--top-p", type=float)
    generate.add_argument("--seed", type=int)
    generate.add_argument("--chat", action="store_true", help="ask through the chat template")

    merge = commands.add_parser("merge", help="write base + adapter as a Hugging Face folder")
    _add_model(merge)
    merge.add_argument("--adapter", required=True, type=Path, help="folder with the two files")
    merge.add_argument("--out", required=True, type=Path, help="a new folder")

    targets = commands.add_parser(
        "targets", help="list the linear layers and what would be adapted"
    )
    _add_model(targets)
    targets.add_argument("--targets", nargs="+", metavar="NAME")
    targets.add_argument("--exclude", nargs="+", metavar="NAME", default=())
    targets.add_argument("--r", type=int, default=8)

    fetching = commands.add_parser("fetch", help="fetch a small real model into the cache")
    fetching.add_argument("name", nargs="?", default="smollm2-135m")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of the base; auto (default) is the fastest this machine multiplies",
    )


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", type=Path, help="folder with the adapter's two files")


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-length", type=int, default=512, help="tokens kept of an example")
    parser.add_argument("--all-tokens", action="store_true", help="learn prompts too")


def _load(options: argparse.Namespace):
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    model, tokenizer = load_model(options.model, dtype=dtype)
    if getattr(options, "adapter", None) is not None:
        minilora.load(model, options.adapter)
    return model, tokenizer


def _examples(files: Sequence[str], tokenizer, options: argparse.Namespace):
    examples, report = encode_records(
        read_records(files),
        tokenizer,
        max_length=options.max_length,
        completion_only=not options.all_tokens,
    )
    print(f"{', '.join(files)}: {report}", file=sys.stderr)
    return examples


def _train(options: argparse.Namespace) -> int:
    config = minilora.TrainConfig(
        lr=options.lr,
        batch_size=options.batch_size,
        accumulate=options.accumulate,
        epochs=options.epochs,
        max_steps=options.max_steps,
        max_minutes=options.minutes,
        schedule=options.schedule,
        eval_every=options.eval_every,
        save_every=options.save_every,
        checkpointing=options.checkpointing,
        seed=options.seed,
    )
    model, tokenizer = _load(options)
    train = _examples(options.data, tokenizer, options)
    valid = _examples(options.valid, tokenizer, options) if options.valid else None
    torch.manual_seed(options.seed)
    minilora.inject(
        model,
        options.r,
        options.alpha,
        targets=options.targets or "all-linear",
        exclude=options.exclude,
        dropout=options.dropout,
        rslora=options.rslora,
    )
    result = minilora.fit(
        model, train, valid, config=config, out=options.out, resume=options.resume
    )
    if result.stopped == "interrupted":
        return 130
    if result.before is not None and result.best is not None:
        print(f"held out before: {result.before}")
        print(f"held out after:  {result.best} (step {result.best_step})")
    print(f"{result.steps} steps in {result.minutes:.1f} minutes; adapter in {options.out}")
    return 0


def _eval(options: argparse.Namespace) -> int:
    model, tokenizer = _load(options)
    examples = _examples(options.data, tokenizer, options)
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
    )
    for text in texts:
        print(text)
    return 0


def _merge(options: argparse.Namespace) -> int:
    model, tokenizer = _load(options)
    minilora.merge(model, keep=None)
    minilora.eject(model)
    save_pretrained(model, options.out, tokenizer)
    print(f"merged model in {options.out}")
    return 0


def _targets(options: argparse.Namespace) -> int:
    model, _ = _load(options)
    targets = options.targets or "all-linear"
    print(minilora.targets(model, targets, exclude=options.exclude, r=options.r))
    return 0


def _fetch(options: argparse.Namespace) -> int:
    print(fetch(options.name))
    return 0


_COMMANDS = {
    "train": _train,
    "eval": _eval,
    "generate": _generate,
    "merge": _merge,
    "targets": _targets,
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
