"""The `minilora` command: call the library, print."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

import minilora
from minilora.cli import interrupt
from minilora.cli.arguments import build_parser
from minilora.cli.sources import (
    base_of,
    check_adapter,
    check_new_folder,
    data_files,
    device,
    encode_files,
    load,
)
from minilora.data import check_streamed, pack, streamed
from minilora.files import one_line
from minilora.loading import fetch, load_model, save_pretrained, save_quantized
from minilora.lora import check_alpha, check_dropout, check_rank, sizes
from minilora.peft import save_adapter
from minilora.planning import from_arguments
from minilora.quantization import QuantizedLinear
from minilora.report import check_keep, truncate
from minilora.training import Ranks, check_free, check_out, leave, sharded, torchrun_number


def _check_going_on(options: argparse.Namespace) -> None:
    """Refuse options that an adapter which is there has settled."""
    if options.parallel == "fsdp":
        raise ValueError("--adapter is read whole, and --parallel fsdp reads in parts; use ddp")
    plain = build_parser().parse_args(["train", "MODEL", "--data", "FILE", "--out", "OUT"])
    names = ("r", "alpha", "dropout", "rslora", "targets", "exclude", "dora", "init", "bias",
             "modules_to_save")  # fmt: skip
    given = [name for name in names if getattr(options, name) != getattr(plain, name)]
    if given:
        flag = given[0].replace("_", "-")
        raise ValueError(
            f"--adapter goes on with an adapter as it is, found --{flag} too; leave out one of them"
        )


def _train(options: argparse.Namespace) -> int:
    check_rank(options.r)
    if options.alpha is not None:
        check_alpha(options.alpha, "--alpha")
    check_dropout(options.dropout)
    if options.adapter is not None:
        _check_going_on(options)
    if torchrun_number("RANK", 0) == 0:  # before the slow part
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
    train_data = None if options.stream else data_files(options.data, options)
    valid_data = data_files(options.valid, options) if options.valid else None

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
        model, tokenizer = load(options, sharded(Ranks("fsdp", device(options)), inject))
    else:
        model, tokenizer = load(options)
    train: Any = (
        streamed(
            options.data,
            tokenizer,
            options.max_length,
            options.all_tokens,
            options.pack,
            options.skip_bad,
            options.parse_special,
        )
        if train_data is None
        else encode_files(train_data, tokenizer, options)
    )
    if options.pack and not options.stream:
        train = pack(train, options.max_length)
    valid = encode_files(valid_data, tokenizer, options) if valid_data is not None else None
    if options.parallel != "fsdp" and options.adapter is None:
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
    if torchrun_number("RANK", 0) > 0:
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
    data = data_files(options.data, options)
    model, tokenizer = load(options)
    examples = encode_files(data, tokenizer, options)
    found = minilora.evaluate(model, examples, batch_size=options.batch_size)
    print(json.dumps(vars(found)) if options.json else found)
    return 0


def _generate(options: argparse.Namespace) -> int:
    model, tokenizer = load(options)
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
    check_new_folder(out, "--out")
    model, tokenizer = load(options)
    small = any(isinstance(m, QuantizedLinear) for m in model.modules())
    minilora.merge(model, keep=None, mode="dequantize" if small else None)
    minilora.eject(model)
    save_pretrained(model, out, tokenizer)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    print(f"merged model in {out}, weights in {dtype}")
    return 0


def _export(options: argparse.Namespace) -> int:
    check_new_folder(options.new, "NEW")
    check_adapter(options.out, "OUT")
    model, _ = load_model(base_of(options.out, options.model), dtype=None)
    minilora.load(model, options.out)
    print(minilora.export(model, options.new, r=options.r, dtype=options.dtype))
    print(minilora.check(options.new))
    return 0


def _check(options: argparse.Namespace) -> int:
    readers = minilora.check(options.out)
    print(readers)
    return 0 if all(reader.takes for reader in readers) else 1


def _quantize(options: argparse.Namespace) -> int:
    check_new_folder(options.out, "--out")
    options.quantize = options.format
    model, tokenizer = load(options)
    save_quantized(model, options.out, tokenizer)
    print(f"{options.format} model in {options.out}: {sizes(model)}")
    return 0


def _targets(options: argparse.Namespace) -> int:
    model, _ = load(options)
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
        check_new_folder(options.truncate, "--truncate")
    for folder in folders.values():
        check_adapter(folder, "OUT" if folder == options.out else "--against")
    options.model = base_of(options.out, options.model)
    files = {key: getattr(options, key) for key in ("data", "train", "outside")}
    data = {key: data_files(names, options) for key, names in files.items() if names}
    model, tokenizer = load(options)
    for name, folder in folders.items():
        minilora.load(model, folder, name)
    examples = {}
    for key, some in data.items():
        whole = encode_files(some, tokenizer, options)
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
    interrupt.end_by_exception()
    options = build_parser().parse_args(arguments)
    try:
        return _COMMANDS[options.command](options)
    except (ValueError, TypeError, RuntimeError, OSError, MemoryError) as error:
        said = str(error) or f"{type(error).__name__} without a word"
        print(one_line(f"minilora {options.command}: {said}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"minilora {options.command}: interrupted", file=sys.stderr)
        return 130
