"""The arguments of the `minilora` command."""

import argparse
from pathlib import Path
from typing import NoReturn

import minilora
from minilora.files import one_line, short
from minilora.planning import add_arguments
from minilora.quantization import FORMATS

MODEL_HELP = "a Hugging Face folder, a .gguf file, or smollm2-135m (fetched once)"
DATA_HELP = (
    '.jsonl with "text", "prompt" and "completion", or chat "messages" on each line; or .txt, '
    "one document a file, cut into windows of --max-length tokens"
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit with code 2 after one line of readable length, whatever was typed."""
        super().error(one_line(message, 500))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    parser = _Parser(
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
    train.add_argument(
        "--adapter", type=Path, help="folder with an adapter to go on with, on any data"
    )
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
    generate.add_argument("--seed", type=_integer)
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
        "--ablate", type=_integer, default=32, help="examples to ablate on, 0 for none (default 32)"
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
    run.add_argument("--max-steps", type=_integer)
    run.add_argument("--minutes", type=float, help="training time at most")
    run.add_argument("--schedule", choices=("cosine", "linear", "constant"), default="cosine")
    run.add_argument("--eval-every", type=_integer, metavar="STEPS")
    run.add_argument("--save-every", type=_integer, metavar="STEPS")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
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
    run.add_argument("--seed", type=_integer, default=0)
    run.add_argument(
        "--patience",
        type=_integer,
        metavar="N",
        help="stop after N evaluations without a better one",
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
    if _integer(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, found {text}")
    return int(text)


def _integer(text: str) -> int:
    """Read a whole number of at most ten digits."""
    digits = text.removeprefix("-")
    if not digits.isascii() or not digits.isdigit() or len(digits) > 10:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at most ten digits, found {short(text)}"
        )
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
        "--block-size", type=_integer, default=64, help="weights that share a scale (default 64)"
    )


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", type=Path, help="folder with the adapter's two files")


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-length", type=_length, default=512, help="tokens kept of an example")
    parser.add_argument("--all-tokens", action="store_true", help="learn prompts too")
    parser.add_argument(
        "--skip-bad", type=int, default=0, metavar="N", help="leave out bad rows, N at most"
    )
    parser.add_argument(
        "--parse-special",
        action=argparse.BooleanOptionalAction,
        help="read names of control tokens in texts as tokens (default: where a text begins as the "
        "chat template's do)",
    )
