"""Where the time of a training step, or of writing a token, goes: seconds by kind of operation.

    PYTHONPATH=benchmarks python benchmarks/breakdown.py [--step NAME ...] [--decode FORM ...]
        [--model smollm2-135m] [--rows 4] [--tokens 256]

`--step` takes names of `train_step.py --list`; `--decode` takes `int8`, `int4` or `float32` (the
model of `deployment.py`, batch 1, blocks compiled, 64 tokens after 512, divided by 64; the prompt's
pass is taken off). Each runs in a process of its own under torch's profiler, after runs that
compile and warm up; a kind's seconds are those its operations spend in themselves, "outside" is
what the clock says beyond them: Python between the operations. The profiler slows small operations,
so shares matter, not the total. Rows are added to benchmarks/results/breakdown.csv.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from train_providers import LR, MODELS, build, providers, text_rows
from train_step import conditions, save

RESULTS = Path(__file__).parent / "results" / "breakdown.csv"
NEW, PROMPT = 64, 512
KINDS = (  # the first whose prefix fits
    ("products of bytes", ("minilora::int8_blocks", "minilora::int4_blocks", "aten::_int_mm")),
    ("products", ("aten::mm", "aten::addmm", "aten::mv", "aten::addmv", "minilora::int8_rows",
                  "minilora::int4_rows")),
    ("attention", ("aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product", "aten::_softmax")),
    ("decoding weights", ("minilora::nf4", "minilora::int4_weight")),
    ("optimizer", ("aten::_fused_adam",)),
    ("copies and casts", ("aten::copy_", "aten::_to_copy", "aten::clone", "aten::cat",
                          "aten::zero_", "aten::fill_")),
    ("compiled passes", ("graph_", "cpp_fused", "kernel_")),
    ("passes of torch", ("aten::",)),
)  # fmt: skip
COLUMNS = ("what", "model", "rows", "tokens", "name", "kind", "seconds", "share", "processor",
           "flags", "threads", "torch", "commit", "date")  # fmt: skip


def kind_of(name: str) -> str:
    return next((kind for kind, prefixes in KINDS if name.startswith(prefixes)), "outside")


def by_kind(run: Callable[[], object]) -> dict[str, float]:
    """Return the seconds of one call by kind of operation; they add up to what the clock says."""
    found = {kind: 0.0 for kind, _ in KINDS}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        start = time.perf_counter()
        run()
        whole = time.perf_counter() - start
    for event in seen.key_averages():
        kind = kind_of(event.key)
        if kind in found:
            found[kind] += event.self_cpu_time_total / 1e6
    return found | {"outside": max(0.0, whole - sum(found.values()))}


def step_by_kind(name: str, model: str, rows: int, tokens: int) -> dict[str, float]:
    with ExitStack() as stack:
        made, loss_of = build(model, providers()[name], stack)
        trained = [p for p in made.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR, fused=True)
        ids = text_rows(model, rows, tokens, 1)[0]

        def step() -> None:
            loss_of(ids).backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(2):
            step()
        return by_kind(step)


@torch.no_grad()
def token_by_kind(form: str) -> dict[str, float]:
    import deployment

    import minilora

    model, tokenizer = deployment.merged_model()
    made = model if form == "float32" else deployment.stored(model, form)
    prompt = deployment.held_out_text(tokenizer, PROMPT)

    def write(count: int) -> None:
        minilora.generate(made, [prompt], max_new_tokens=count, compile=True)

    for count in (1, NEW + 1):  # compiles both
        write(count)
    one, whole = by_kind(lambda: write(1)), by_kind(lambda: write(NEW + 1))
    return {kind: max(0.0, whole[kind] - one[kind]) / NEW for kind in whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [name for name, provider in providers().items() if provider.adapters]
    parser.add_argument("--step", nargs="+", default=[], metavar="NAME", choices=names)
    parser.add_argument("--decode", nargs="+", default=[], choices=("int8", "int4", "float32"))
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        what, name = options.worker
        torch.set_num_threads(options.threads)
        torch._inductor.config.cpp.enable_kernel_profile = True  # else they have no events
        setting = (options.model, options.rows, options.tokens)
        found = step_by_kind(name, *setting) if what == "step" else token_by_kind(name)
        print(json.dumps(found))
        return
    asked = [("step", name) for name in options.step] + [("decode", f) for f in options.decode]
    if not asked:
        parser.error("nothing to look into; give --step NAME or --decode FORM")
    options.r, options.targets = 8, "all"
    common = {k: v for k, v in conditions(options).items() if k in COLUMNS}
    rows: list[dict[str, object]] = []
    for what, name in asked:
        done = subprocess.run(
            [sys.executable, __file__, "--worker", what, name, "--model", options.model, "--rows",
             str(options.rows), "--tokens", str(options.tokens), "--threads", str(options.threads)],
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        found = json.loads(done.stdout.splitlines()[-1])
        whole = sum(found.values())
        print(f"{what} {name}: {whole:.4g} s")
        for kind, seconds in sorted(found.items(), key=lambda pair: -pair[1]):
            print(f"  {kind}: {seconds:.4g} s, {seconds / whole:.0%}")
            size = (
                {"model": "smollm2-135m", "rows": 1, "tokens": PROMPT} if what == "decode" else {}
            )
            rows.append(common | size | {
                "what": what, "name": name, "kind": kind, "seconds": f"{seconds:.4g}",
                "share": f"{seconds / whole:.3f}",
            })  # fmt: skip
    save(rows, options.csv, COLUMNS)


if __name__ == "__main__":
    main()
