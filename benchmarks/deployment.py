"""Tokens per second and perplexity of a merged model stored in INT8 against transformers in f32.

    python benchmarks/deployment.py [--new 64] [--prompt 512] [--rounds 5] [--quality-tokens 512]
        [--only NAME ...]

SmolLM2-135M with an adapter of r=8 on every linear (random, B of standard deviation 1e-3: what it
says does not matter here) is merged in f32. transformers gets the same merged weights; ours runs
them in f32, and as INT8 and INT4 with the head. Prefill is one pass over the prompt that gives the
last token's logits; decode writes `--new` tokens after it, batch 1, greedy, each with its library's
own cache and loop. Rounds are interleaved; a figure is the median, `spread` the slowest over the
fastest round. Quality is the perplexity of one text (docstrings of the standard library), fed
through the cache 16 tokens at a time, so that INT8 computes as it does when decoding. Rows are
added to benchmarks/results/deployment.csv.
"""

import argparse
import copy
import csv
import importlib.util
import math
import statistics
import subprocess
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import minilora
from minilora.loading.fetching import fetch
from minilora.loading.model import load_model
from minilora.lora.layer import lora_layers
from minilora.models.blocks import KVCache

ROOT = Path(__file__).resolve().parents[1]
FED = 16  # tokens at a time, for quality


def adapted(model: Any) -> Any:
    """Put the adapter on every linear of the blocks."""
    torch.manual_seed(0)
    minilora.inject(model, r=8, alpha=16)
    for layer in lora_layers(model).values():
        factors = layer.adapters["default"]
        nn.init.normal_(factors.lora_B, std=1e-3)
    return model.eval()


def merged_model() -> tuple[Any, Any]:
    """Return SmolLM2 in f32 with the adapter merged into it, and its tokenizer."""
    model, tokenizer = load_model(fetch("smollm2-135m"), dtype=torch.float32)
    minilora.merge(adapted(model), keep=None)
    return minilora.eject(model).eval(), tokenizer


def in_transformers(model: Any) -> nn.Module:
    """Return transformers' Llama with the same weights, in f32 and eager mode."""
    import transformers

    shape = model.config.to_dict(torch.float32)
    config = transformers.LlamaConfig(**{k: v for k, v in shape.items() if k != "architectures"})
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(model.state_dict())
    return theirs


def stored(model: Any, format: str) -> Any:
    """Return a copy with every linear and the head in INT8 or INT4."""
    small = minilora.quantize(copy.deepcopy(model), format)
    return minilora.quantize(small, format, targets=["lm_head"])


def our_runs(
    model: Any, prompt: list[int], new: int, compile: bool = False
) -> dict[str, Callable[[], object]]:
    """Return prefill and generation (prefill included) of our model."""
    ids = torch.tensor([prompt])

    def prefill() -> object:
        cache = KVCache(model, 1, len(prompt))
        return model(ids, cache=cache, last=1)

    return {
        "prefill": prefill,
        "generate": lambda: minilora.generate(model, [prompt], max_new_tokens=new, compile=compile),
    }


def their_runs(model: Any, prompt: list[int], new: int) -> dict[str, Callable[[], object]]:
    """Return the same of transformers' model."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
    return {
        "prefill": lambda: model(ids, use_cache=True, logits_to_keep=1),
        "generate": lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **settings),
    }


def llama_cpp_runs(prompt: list[int], new: int) -> dict[str, Callable[[], object]]:
    """Return the same of llama.cpp, which reads the file as it is."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(fetch("smollm2-135m")), n_ctx=len(prompt) + new, n_threads=torch.get_num_threads(),
        n_threads_batch=torch.get_num_threads(), n_batch=len(prompt), verbose=False,
    )  # fmt: skip

    def run(count: int) -> None:
        model.reset()
        tokens = model.generate(prompt, temp=0.0, reset=False)
        for _ in range(count):
            next(tokens)

    return {"prefill": lambda: run(1), "generate": lambda: run(new)}


def perplexity(model: Any, ids: list[int]) -> float:
    """Return the perplexity of a text of at least two tokens, `FED` tokens at a time."""
    cache = KVCache(model, 1, len(ids))
    text, parts = torch.tensor([ids]), []
    for start in range(0, len(ids) - 1, FED):
        fed = text[:, start : min(start + FED, len(ids) - 1)]
        logits = model(fed, cache=cache)[0].double()
        target = text[0, start + 1 : start + 1 + len(logits)]
        parts.append(nn.functional.cross_entropy(logits, target, reduction="none"))
    return math.exp(float(torch.cat(parts).mean()))


def held_out_text(tokenizer: Any, count: int) -> list[int]:
    """Return `count` tokens of a module that ships with every Python."""
    text = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text(encoding="utf-8")
    return tokenizer.encode(text[:20000])[:count]


def commit() -> str:
    """Return the short name of the checked-out commit."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return done.stdout.strip()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quality-tokens", type=int, default=512)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these beside transformers alone")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks/results/deployment.csv")
    options = parser.parse_args()
    model, tokenizer = merged_model()
    small, least = stored(model, "int8"), stored(model, "int4")
    beside = adapted(stored(load_model(fetch("smollm2-135m"), dtype=torch.float32)[0], "int8"))
    text = held_out_text(tokenizer, max(options.prompt, options.quality_tokens + 1))
    prompt = text[: options.prompt]
    runs = {
        "transformers float32": their_runs(in_transformers(model), prompt, options.new),
        "minilora float32": our_runs(model, prompt, options.new),
        "minilora float32 compiled": our_runs(model, prompt, options.new, True),
        "minilora int8": our_runs(small, prompt, options.new),
        "minilora int8 compiled": our_runs(small, prompt, options.new, True),
        "minilora int8 and adapter compiled": our_runs(beside, prompt, options.new, True),
        "minilora int4 compiled": our_runs(least, prompt, options.new, True),
    }
    if importlib.util.find_spec("llama_cpp"):
        runs["llama.cpp Q4_1"] = llama_cpp_runs(prompt, options.new)
    first = next(iter(runs))  # what the others are held against
    runs = {
        name: both for name, both in runs.items() if name in (options.only or runs) or name == first
    }
    asked = text[: options.quality_tokens + 1]
    forms = {"float32": model, "int8": small, "int4": least}
    quality = {form: perplexity(of, asked) for form, of in forms.items()}
    seconds: dict[tuple[str, str], list[float]] = {}
    for turn in range(options.rounds + 1):  # the first one warms up
        for name, both in runs.items():
            for what, run in both.items():
                began = time.perf_counter()
                run()
                if turn:
                    seconds.setdefault((name, what), []).append(time.perf_counter() - began)
    rows: list[dict[str, Any]] = []
    base: dict[str, float] = {}  # transformers' tokens a second
    weights = {form: sum(p.nbytes for p in of.parameters()) for form, of in forms.items()}
    for name in runs:
        first, whole = seconds[name, "prefill"], seconds[name, "generate"]
        # generate() reads the prompt too; its first token comes out of that.
        step = [(w - f) / (options.new - 1) for w, f in zip(whole, first, strict=True)]
        for what, times, tokens in (("prefill", first, options.prompt), ("decode", step, 1)):
            speed = tokens / statistics.median(times)
            base.setdefault(what, speed)
            form = name.split()[1] if "adapter" not in name else ""  # llama.cpp: not measured
            rows.append({
                "what": what, "provider": name, "prompt": options.prompt, "new": options.new,
                "rounds": options.rounds, "tokens_per_s": f"{speed:.2f}",
                "spread": f"{max(times) / min(times):.2f}",
                "to_transformers": f"{speed / base[what]:.2f}",
                "perplexity": f"{quality[form]:.3f}" if form in quality else "",
                "quality_tokens": options.quality_tokens,
                "weights_mb": f"{weights[form] / 1e6:.1f}" if form in weights else "",
                "processor": minilora.hardware().name, "threads": torch.get_num_threads(),
                "flags": " ".join(minilora.hardware().flags), "torch": torch.__version__,
                "commit": commit(),
            })  # fmt: skip
            print(*[f"{key} {value}" for key, value in list(rows[-1].items())[:9]], flush=True)
    new_file = not options.csv.exists()
    with open(options.csv, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        if new_file:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
