"""`minilora train`."""

import argparse
import dataclasses
import itertools
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import minilora
from minilora.cli.arguments import ENCODING, TRAINED, add_arguments, arg, verb
from minilora.cli.card import write_card
from minilora.cli.run_file import RunFile, only_written
from minilora.cli.sources import data_files, device, encode_files, encoding, load
from minilora.data import IGNORE, Example, check_streamed, hold_out, pack, streamed
from minilora.files import add_flags, counted, given, read_options, short
from minilora.lora import AdapterConfig
from minilora.running import context_of
from minilora.training import (
    FitResult,
    Ranks,
    TrainConfig,
    check_board,
    check_free,
    check_out,
    chosen_epochs,
    chosen_lr,
    leave,
    sharded,
    torchrun_number,
)


def groups(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that stand in groups of their own."""
    add_arguments(
        parser.add_argument_group("data"),
        *ENCODING,
        arg("--pack", action="store_true", help="several documents in a row, kept apart"),
        arg("--stream", action="store_true", help="read .jsonl as needed; needs a limit on steps"),
        arg("--token-cache", type=Path, metavar="FOLDER", help="keep encoded data there"),
        arg(
            "--allow-shared",
            action="store_true",
            help="take held-out rows that are trained on too, which are refused otherwise (with "
            "--stream they are said)",
        ),
    )
    add_flags(parser.add_argument_group("adapter"), AdapterConfig)
    add_flags(parser.add_argument_group("run"), TrainConfig)


def _share(text: str) -> float:
    """Read a share (`5%`, `0.05`) or a number of rows (from 1)."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not (0 < value < 1 or (value >= 1 and value.is_integer() and not text.endswith("%"))):
        raise argparse.ArgumentTypeError(
            f"must be a share below 100%, as 5%, or a number of rows, found {short(text)}"
        )
    return value


@verb(
    "train",
    *TRAINED,
    "--data",
    arg("--valid", nargs="+", metavar="FILE", help="held-out data, as --data"),
    arg(
        "--hold-out",
        type=_share,
        metavar="SHARE",
        help="instead of --valid: hold out this share of --data, as in 5%%, or so many rows",
    ),
    arg("--out", required=True, type=Path, help="folder for adapter and metrics"),
    arg(
        "--config",
        type=Path,
        metavar="FILE",
        help="TOML with tables [train] and [adapter]; the flags below go before it",
    ),
    arg("--resume", action="store_true", help="continue the run in --out"),
    arg("--adapter", type=Path, help="folder with an adapter to go on with, on any data"),
    arg("--plan", action="store_true", help="say memory and time before, and what they were after"),
    arg("--sample", nargs="+", metavar="PROMPT", help="continue these at each evaluation"),
    groups,
)
def train(options: argparse.Namespace) -> int:
    """Train an adapter."""
    adapter, config = settings(options)
    _check(options, adapter, config)
    if options.resume and only_written(options.out):
        print("nothing of the run had been kept; it begins anew", file=sys.stderr)
        options.resume = False
    if torchrun_number("RANK", 0) == 0:  # before the slow part
        check_free(options.out)
        check_out(options.out, options.resume)
    encode = read_data(options)
    file = RunFile(options) if torchrun_number("RANK", 0) == 0 else None
    with nullcontext() if file is None or options.resume else file.begun():
        result, config = _fit(options, adapter, config, encode, file)
    leave()
    if result.stopped == "interrupted":
        return 130
    if file is None:
        return 0
    write_card(options, file, config, result, adapter)
    _conclude(options, result, file.settings["rows"])
    return 0


def _fit(
    options: argparse.Namespace,
    adapter: dict[str, Any],
    config: TrainConfig,
    encode: Callable[[Any], tuple[Any, Any]],
    file: RunFile | None,
) -> tuple[FitResult, TrainConfig]:
    """Load, encode and train; return the result, and the configuration with its learning rate."""

    def inject(model: Any) -> None:
        torch.manual_seed(config.seed)
        minilora.inject(model, **adapter)

    whole = config.parallel != "fsdp"  # else each process reads its part alone
    prepare = None if whole else sharded(Ranks("fsdp", device(options)), inject)
    model, tokenizer = load(options, config.parallel, prepare)
    rows, held_out = encode(tokenizer)
    if whole and options.adapter is None:
        inject(model)
    lr = chosen_lr(config, minilora.summary(model).base)
    if file is not None:
        epochs = chosen_epochs(config, len(rows)) if isinstance(rows, list) else config.epochs
        file.settings["train"] = config.to_dict() | {"epochs": epochs, "lr": lr}
        file.settings["rows"] = form_of(rows, tokenizer)
        if options.adapter is None:
            file.settings["adapter"] = dataclasses.asdict(AdapterConfig(**adapter))
    sample = None
    if options.sample:
        chat = options.chat or is_chat(held_out if options.stream else rows, tokenizer)
        sample = _sampler(options.sample, tokenizer, chat, options.system)
    result = minilora.fit(  # torchrun ends the others when one fails
        model,
        rows,
        held_out,
        config=config,
        out=options.out,
        resume=options.resume,
        callbacks=[] if file is None else [file],
        sample=sample,
        plan=options.plan,
    )
    if options.stream and torchrun_number("RANK", 0) == 0:
        print(f"{', '.join(options.data)}: {rows.source.report}", file=sys.stderr)
    return result, dataclasses.replace(config, lr=lr)


def _conclude(options: argparse.Namespace, result: FitResult, rows: Mapping[str, Any]) -> None:
    """Print what a run came to, and what to do next with an adapter that learned such rows."""
    out = shlex.quote(str(options.out))
    if result.before is not None and result.best is not None:
        print(f"held out before: {result.before}")
        print(f"held out after:  {result.best} (step {result.best_step})")
    print(f"{counted(result.steps, 'step')}; adapter in {options.out}")
    print(next_step(out, rows))


def next_step(out: str, rows: Mapping[str, Any]) -> str:
    """Return the line that says how to try an adapter that learned such rows."""
    if rows.get("chat", True):
        return f"talk to it: minilora chat {out}"
    return f'try it: minilora generate {out} "PROMPT"'


def settings(options: argparse.Namespace) -> tuple[dict[str, Any], TrainConfig]:
    """Return the adapter's and the run's settings: a flag goes before the file."""
    tables = {"adapter": AdapterConfig, "train": TrainConfig}
    file = read_options(options.config, tables) if options.config else {}
    adapter, run = (file.get(name, {}) | given(options, kind) for name, kind in tables.items())
    AdapterConfig(**adapter)  # checks
    if options.dtype == "float32":  # which would else be multiplied in what is fastest here
        run.setdefault("dtype", "float32")
    return adapter, TrainConfig(**run)


def _check(options: argparse.Namespace, adapter: dict[str, Any], config: TrainConfig) -> None:
    """Refuse options that contradict each other, or that this installation can't serve."""
    check_board(config.log, options.out)
    if options.adapter is not None:
        if config.parallel == "fsdp":
            raise ValueError("--adapter is read whole, and --parallel fsdp reads in parts; use ddp")
        if adapter:
            raise ValueError(
                f"--adapter goes on with an adapter as it is, found "
                f"--{next(iter(adapter)).replace('_', '-')} too; leave out one of them"
            )
    if options.hold_out and (options.valid or options.stream):
        other = "--valid" if options.valid else "--stream"
        raise ValueError(
            f"--hold-out takes rows away from --data, found {other} too; leave one out"
        )
    if options.sample and not (options.valid or options.hold_out):
        raise ValueError(
            "--sample writes at each evaluation, which needs --valid or --hold-out, found none"
        )
    if config.loss != "ce" and (options.pack or options.plan):
        flag = "--pack" if options.pack else "--plan"
        raise ValueError(f"{flag} knows texts, and --loss {config.loss} takes pairs; leave one out")
    if options.plan and options.stream:
        raise ValueError("--plan counts the examples, which --stream does not know; leave one out")
    if options.stream and options.token_cache is not None:
        raise ValueError(
            "--token-cache keeps what is encoded before a run, and --stream encodes during it; "
            "leave one out"
        )


def read_data(options: argparse.Namespace) -> Callable[[Any], tuple[Any, Any]]:
    """Read the files, before the model; return what encodes them with its tokenizer."""
    if options.stream:
        check_streamed(options.data)
    rows = None if options.stream else data_files(options.data, options)
    held_out = data_files(options.valid, options) if options.valid else None

    def encode(tokenizer: Any) -> tuple[Any, Any]:
        examples: Any
        if rows is None:
            examples = streamed(options.data, tokenizer, encoding(options), options.pack)
        else:
            examples = encode_files(rows, tokenizer, options)
        kept = held_out and encode_files(held_out, tokenizer, options)
        if rows is not None:
            if kept and not options.allow_shared:
                _refuse_shared(examples, kept)
            if options.hold_out:
                every = len(examples)
                examples, kept = hold_out(examples, options.hold_out)
                if torchrun_number("RANK", 0) == 0:
                    print(f"held out: {len(kept)} of {every} examples", file=sys.stderr)
            examples = pack(examples, options.max_length) if options.pack else examples
        return examples, kept

    return encode


def _refuse_shared(examples: list[Example], held_out: list[Example]) -> None:
    """Raise if a held-out example is trained on."""
    learned = {example.own_ids for example in examples}
    shared = [i for i, example in enumerate(held_out) if example.own_ids in learned]
    if shared:
        raise ValueError(
            f"--valid must hold rows that --data does not, found {len(shared)} of "
            f"{len(held_out)} in both (the first is example {shared[0]}); `minilora data` lists "
            "them; take them out, or pass --allow-shared"
        )


def _sampler(
    prompts: list[str], tokenizer: Any, chat: bool, system: str | None
) -> Callable[[Any], str]:
    """Return what continues the prompts, or answers them as the chat template asks, greedily."""
    asked = [
        tokenizer.encode_chat([{"role": "user", "content": one}]) if chat else tokenizer.encode(one)
        for one in prompts
    ]
    longest = max(map(len, asked)) + (len(tokenizer.encode(system)) if chat and system else 0)

    def sample(model: Any) -> str:
        room = int(max(1, min(32, context_of(model) - longest)))
        texts = minilora.generate(
            model, prompts, tokenizer=tokenizer, max_new_tokens=room, chat=chat,
            system=system if chat else None,
        )  # fmt: skip
        between = " → " if chat else ""
        return " | ".join(f"{a}{between}{b}" for a, b in zip(prompts, texts, strict=True))

    return sample


def form_of(examples: Any, tokenizer: Any) -> dict[str, Any]:
    """Return what `run.toml` says of the rows: as `chat`, and with how many `questions` at most.

    Nothing of a stream, whose rows are not known yet, without a chat template, and with one that
    writes nothing before an answer.
    """
    if not isinstance(examples, list) or tokenizer.chat_template is None:
        return {}
    before = _before_answer(tokenizer)
    if not before:
        return {}
    if not is_chat(examples, tokenizer):
        return {"chat": False}
    turns = [{"role": role, "content": "?"} for role in ("user", "assistant")]
    try:
        two = tokenizer.encode_chat(2 * turns, add_generation_prompt=False)
    except ValueError:  # a template for one question alone
        two = []
    if _count(before, two) != 2:  # or one that writes earlier turns otherwise
        return {"chat": True}
    some = examples[:: -(-len(examples) // 1000)]  # enough to tell
    return {
        "chat": True,
        "questions": max(_count(before, part) for e in some for part in _parts(e)),
    }


def _parts(example: Example) -> Iterator[Sequence[int]]:
    """Yield the ids of each document that is packed into an example."""
    ends = list(itertools.accumulate(example.lengths or (len(example.input_ids),)))
    for start, end in itertools.pairwise([0, *ends]):
        yield example.input_ids[start:end]


def _count(part: list[int], ids: Sequence[int]) -> int:
    """Count how often some ids stand in others."""
    places = (i for i, token in enumerate(ids) if token == part[0])
    return sum(list(ids[i : i + len(part)]) == part for i in places)


def is_chat(examples: Any, tokenizer: Any) -> bool:
    """Return whether examples are conversations: answers stand where the chat template puts them.

    That is: the first learned token follows what the template writes before an answer.
    """
    if not isinstance(examples, list) or tokenizer.chat_template is None:
        return False
    before = _before_answer(tokenizer)
    for example in examples[:1]:
        learned = [label != IGNORE for label in example.labels]
        at = learned.index(True)
        return bool(before) and list(example.input_ids[max(0, at - len(before)) : at]) == before
    return False


def _before_answer(tokenizer: Any) -> list[int]:
    """Return the ids that the chat template writes before an answer, as far as they are known."""
    turn = [{"role": "user", "content": "?"}]
    try:
        asked = tokenizer.encode_chat(turn, add_generation_prompt=True)
        return asked[len(tokenizer.encode_chat(turn, add_generation_prompt=False)) :]
    except ValueError:  # a template that wants more
        return []
