"""Tables of what `gpu.py` measured: rows of one card each, but for `machines`."""

import json
import re
from collections.abc import Iterable

from csv_tables import Row, last_of, newest, read, table

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
FORMATS = ("", "int8", "nf4", "int4")
COLUMNS = (("4096", "0.0"), ("4096", "0.1"), ("14336", "0.0"), ("14336", "0.1"))  # N, dropout


def _stage(name: str, card: str) -> list[Row]:
    return read("gpu", stage=name, gpu=card)


def _caption(text: str, rows: list[Row]) -> str:
    """Return a line of conditions: the text, then the cards and commits of rows."""
    cards, commits = (
        " and ".join(dict.fromkeys(r[key] for r in rows)) for key in ("gpu", "commit")
    )
    return f"*{text[:1].upper()}{text[1:]}; {cards.replace('NVIDIA ', '')}, commit {commits}.*\n\n"


def _rates(card: str) -> tuple[float, float]:
    """Return the measured TB/s of a copy and TFLOP/s of a product."""
    found = last_of(_stage("env", card), "what")
    return float(found["copy"]["tb_s"]), float(found["8192³ in bf16"]["tflops"])


def _failure(row: Row) -> str:
    """Return in a few words why a row has no time."""
    error = row["error"]
    if "OutOfMemory" in error:
        return "out of memory"
    return "failed in Inductor" if "Inductor" in error else "not measured"


def machines() -> str:
    lines = []
    for card in (H100, H200):
        last, found = _stage("env", card)[-1], last_of(_stage("env", card), "what")
        copy, product = _rates(card)
        versions = [found[name]["value"] for name in ("transformers", "peft", "bitsandbytes")]
        lines.append(
            [card.removeprefix("NVIDIA "), last["commit"], last["driver"], last["torch"],
             last["triton"], *versions, f"{copy:.2f}", f"{product:.0f}"]
        )  # fmt: skip
    text = (
        "*TB/s of a copy are bytes read and written; TFLOP/s are a product's of 8192³ in bf16. "
        "No table below holds rows of two cards.*\n\n"
    )
    head = (
        "card | commit | driver | torch | Triton | transformers | peft | bitsandbytes | TB/s | "
        "TFLOP/s"
    )
    return text + table(head, lines)


def checks() -> str:
    rows = newest(_stage("checks", H100), "commit")
    lines = []
    for dtype in ("bfloat16", "float16"):
        for format in FORMATS:
            some = [r for r in rows if (r["dtype"], r["format"]) == (dtype, format)]
            errors = [f"{max(float(r[key]) for r in some if r[key]):.4f}"
                      for key in ("y", "grad_x", "grad_A", "grad_B")]  # fmt: skip
            right, same = (sum(r[key] == "True" for r in some) for key in ("ok", "repeats"))
            lines.append([format or "plain", dtype, len(some), right, *errors, same])
    text = (
        '`backend="triton"`, forward and backward; M 1 to 8192, widths 576 to 14336, r = 8 to 256, '
        "dropout 0 and 0.1; the largest relative error (of norms) against float64 on the device"
    )
    head = "base | dtype | cases | right | y | grad_x | grad_A | grad_B | three runs equal"
    return _caption(text, rows) + table(head, lines)


def layers() -> str:
    rows = [r for r in _stage("layers", H100) if r["M"] == "8192"]
    found = {(r["what"], r["N"], r["p"]): r for r in rows}
    lines = []
    for name in dict.fromkeys(r["what"] for r in rows):
        cells, host = [], []
        for column in COLUMNS:
            row = found.get((name, *column))
            if row is None or not row["graph_ms"]:
                cells.append(_failure(row) if row else "–")
                continue
            alone = float(found[("linear alone", *column)]["graph_ms"])
            cells.append(f"{float(row['graph_ms']):.2f} ({float(row['graph_ms']) / alone:.2f})")
            host.append(float(row["host_us"]))
        lines.append(
            [name, *cells, " to ".join(dict.fromkeys(f"{t:.0f}" for t in (min(host), max(host))))]
        )
    text = (
        "one linear, 8192 × 4096 → N in bf16, r = 16, forward and all gradients: milliseconds of "
        "the GPU alone (replayed as a CUDA graph, median), times `linear alone` in brackets, and "
        "microseconds that eager code needs to enqueue it; – was not measured"
    )
    head = "program | 4096 | 4096, dropout | 14336 | 14336, dropout | host, µs"
    return _caption(text, rows) + table(head, lines)


def few_rows() -> str:
    prefix = "few rows, "
    rows = [r for r in newest(_stage("layers", H200), "commit") if r["what"].startswith(prefix)]
    found = {(r["what"], r["M"]): r for r in rows}
    counts = list(dict.fromkeys(r["M"] for r in rows))
    lines = [
        [name.removeprefix(prefix)]
        + [f"{float(found[name, M]['graph_ms']):.3f}" for M in counts]
        + [f"{float(found[name, M]['host_us']):.0f}" for M in counts]
        for name in dict.fromkeys(r["what"] for r in rows)
    ]
    text = (
        "one linear, M × 4096 → 4096 in bf16, r = 16, forward alone, as text is written: "
        "milliseconds of the GPU alone (replayed as a CUDA graph, median) and microseconds that "
        "eager code needs to enqueue it, by M"
    )
    head = " | ".join(["program", *(f"{M}, ms" for M in counts), *(f"{M}, µs" for M in counts)])
    return _caption(text, rows) + table(head, lines)


# Ours: (name, format, the launches whose times are summed); what torch does for the same operands.
LAUNCHES = (
    ("shrink", "", (("shrink", 0),), ("x Aᵀ",)),
    ("product with branch, forward", "", (("low_rank_gemm", 0),), ("F.linear", "y.addmm_(S, Bᵀ)")),
    ("expand_grad and its sums", "", (("expand_grad", 0), ("sum_partials", 0), ("sum_partials", 1)),
     ("G B", "Gᵀ S")),
    ("tall_product and its sum", "", (("tall_product", 0), ("sum_partials", 2)), ("grad_sᵀ x",)),
    ("product with branch, backward", "", (("low_rank_gemm", 1),), ("G W",)),
    ("quantize_shrink of x", "int8", (("quantize_shrink", 0),), ()),
    ("product with branch, forward", "int8", (("int8_gemm", 0),), ("_int_mm, x Qᵀ",)),
    ("quantize_shrink of the gradient", "int8", (("quantize_shrink", 1),), ()),
    ("codes turned over", "int8", (("decode_int8", 0),), ("e4m3 turned over",)),
    ("product with branch, backward", "int8", (("int8_gemm", 1),), ("_int_mm, G Q",)),
    ("decoding", "nf4", (("decode_nf4", 0),), ()),
    ("decoding", "int4", (("decode_int4", 0),), ()),
    ("a product, a scale a row", "fp8", (), ("_scaled_mm, by rows",)),
    ("rows to e4m3, compiled", "fp8", (), ("to e4m3, compiled",)),
    ("mask drawn, x multiplied by it", "", (), ("mask drawn in bool", "x ∘ mask")),
    ("native_dropout", "", (), ("native_dropout",)),
)  # fmt: skip


def kernels() -> str:
    rows = [r for r in newest(_stage("kernels", H100), "commit") if r["r"]]
    copy, product = _rates(H100)
    lines = []
    for name, format, launches, torch in LAUNCHES:
        cells: list[str] = []
        for N in ("4096", "14336"):
            some = [r for r in rows if r["N"] == N]
            mine = [_nth(some, what, format, i) for what, i in launches]
            theirs = [_nth(some, what, "", 0) for what in torch]
            cells += [_ms(mine), _share(mine, copy, product), _ms(theirs)]
        beside = " + ".join(f"`{what}`" for what in torch)
        lines.append([name, format or "bf16", *cells, beside or "–"])
    text = (
        "each launch of a linear 8192 × 4096 → N with r = 16 and dropout 0.1, replayed as a CUDA "
        f"graph. Share: a product's of {product:.0f} TFLOP/s, else a launch's of a copy's "
        f"{copy:.2f} TB/s. Ours draw the mask themselves, torch's `x Aᵀ`, `grad_sᵀ x` and `G W` "
        "lack it, `G W` the branch too. Stored codes are made up, from 1 to 18"
    )
    head = "what | base | 4096, ms | share | torch, ms | 14336, ms | share | torch, ms | torch's"
    return _caption(text, rows) + table(head, lines)


def _nth(rows: list[Row], what: str, format: str, i: int) -> Row:
    return [r for r in rows if (r["what"], r["format"]) == (what, format)][i]


def _ms(rows: list[Row]) -> str:
    return f"{sum(float(r['graph_ms']) for r in rows):.3f}" if rows else "–"


def _share(rows: list[Row], copy: float, product: float) -> str:
    """Return the share of a product's rate, or of a copy's over all launches' bytes."""
    if not rows:
        return "–"
    if rows[0]["tflops"]:
        return f"{float(rows[0]['tflops']) / product:.2f}"
    ms = [float(r["graph_ms"]) for r in rows]
    moved = sum(m * float(r["tb_s"]) for m, r in zip(ms, rows, strict=True))
    return f"{moved / sum(ms) / copy:.2f}"


def passes() -> str:
    rows = [r for r in newest(_stage("kernels", H100), "commit") if not r["r"] and r["ms"]]
    lines = [[r["what"], f"{float(r['ms']):.2f}", f"{float(r['tflops']):.0f}"] for r in rows]
    text = (
        "forward and backward in bf16, medians of eager calls: head and loss over 8192 rows of "
        "4096 and 128256 tokens; causal attention of 2 × 4096 tokens, 32 heads of 128 over 8 of "
        "keys. FLOPs count 2 products forward and 5 backward, half of each seen"
    )
    return _caption(text, rows) + table("what | ms | TFLOP/s", lines)


STEPS = (
    "training steps (forward, backward, AdamW) of models with random weights, eager if not said; "
    "8b: all linears, dropout 0.1; 3b: q_proj and v_proj, no dropout; the fastest of the steps "
    "after the first; host: milliseconds until all of it was enqueued, waits included"
)


def steps(card: str) -> list[Row]:
    """Return the last row of each program in each setting that ran whole models on a card."""
    keys = ("what", "format", "compiled", "rows", "length")
    rows = (r for r in _stage("models", card) if "profile" not in r["what"])
    kept = {tuple(r[key] for key in keys): r for r in rows}
    return sorted(kept.values(), key=lambda r: r["what"].split(",")[0], reverse=True)


def _step(row: Row) -> list[str]:
    """Return what names a row, and its times."""
    model, _, program = row["what"].partition(", ")
    shape = f"{model}, r = {row['r']}, {row['rows']} × {row['length']}"
    program += ", compiled" * (row["compiled"] == "True")
    found = [_failure(row), "–", "–"]
    if row["ms"]:
        found = [f"{float(row['tokens_s']):,.0f}", f"{float(row['ms']):.0f}",
                 f"{float(row['host_us']) / 1e3:.0f}"]  # fmt: skip
    return [shape, program, row["format"] or "bf16", *found]


HEAD = "model, rows × tokens | program | base | tokens/s | ms | host, ms"


def models() -> str:
    rows = steps(H200)
    lines = []
    for row in rows:
        peak, planned = row["peak_gb"], row["planned_gb"]
        cells = [f"{float(value):.2f}" if value else "–" for value in (peak, planned)]
        error = f"{100 * (float(planned) / float(peak) - 1):+.1f} %" if peak and planned else "–"
        lines.append([*_step(row), *cells, error])
    text = STEPS + "; GB (10⁹) that torch's allocator held at most, beside the plan"
    return _caption(text, rows) + table(f"{HEAD} | peak GB | planned GB | plan's error", lines)


def models_h100() -> str:
    rows = steps(H100)
    text = STEPS + "; no peaks, as a compilation that had failed before held a model of some 6 GB"
    return _caption(text, rows) + table(HEAD, map(_step, rows))


def no_op() -> str:
    rows = newest(read("no_op_cuda"), "commit")
    lines = []
    for row in rows:
        program = row["program"] + " triton" * (row["backend"] == "triton")
        program += ", compiled" * (row["compiled"] == "True")
        peak, planned = row["peak_gb"], row["planned_gb"]
        error = f"{100 * (float(planned) / float(peak) - 1):+.1f} %" if peak and planned else "–"
        host = f"{float(row['host_ms']):.0f}" if peak else row["error"][:40]
        model = f"{row['model']}, r = {row['r']}, {row['rows']} × {row['length']}"
        cells = [f"{float(value):.2f}" if value else "–" for value in (peak, planned)]
        lines.append([model, program, row["base"], *cells, error, row["launches"], host])
    last = rows[-1]
    text = (
        f"*Training steps on a GPU that computes nothing (`benchmarks/no_op_cuda.py`): GB (10⁹) "
        f"that torch's allocator held at most, beside the plan; launches and milliseconds of the "
        f"host in a step, of this processor ({last['processor']}), one thread, other work beside; "
        f"models and settings as above, smollm2: all linears, no dropout; torch {last['torch']}, "
        f"commit {last['commit']}.*\n\n"
    )
    head = (
        "model, rows × tokens | program | base | peak GB | planned GB | error | launches | host, ms"
    )
    return text + table(head, lines)


def no_op_beside() -> str:
    """Peaks of one commit on a real GPU and on the one that computes nothing."""
    real = {(r["what"], r["format"], r["compiled"]): r for r in steps(H200) if r["peak_gb"]}
    lines = []
    for row in read("no_op_cuda", commit=next(iter(real.values()))["commit"]):
        program = row["program"] + " triton" * (row["backend"] == "triton")
        format = row["base"] if row["base"] != "bf16" else ""
        beside = real[f"{row['model']}, {program}", format, row["compiled"]]["peak_gb"]
        name = program + ", compiled" * (row["compiled"] == "True")
        peaks = [f"{float(value):.2f}" for value in (beside, row["peak_gb"])]
        lines.append([row["model"], name, row["base"], *peaks])
    text = _caption("peaks in GB (10⁹), runs as in the table of whole models", list(real.values()))
    return text + table("model | program | base | H200 | computes nothing", lines)


# Kernels by the first name that fits. The head's products are told from the others by their tile:
# 16 chunks of logits and as many gradients, 17.2 TFLOP in all, at the rate of the other products.
GROUPS = (
    ("head's products", "nvjet_sm90_tst_192x176"),
    ("loss", "exponents"),
    ("products of layers", "nvjet|cublasLt"),
    ("attention", "cudnn::|cudnn_generated"),
    ("dropout: numbers drawn", "distribution_elementwise"),
    ("dropout: x ∘ mask", "unrolled_elementwise_kernel<at::native::BinaryFunctor"),
    ("dropout: masked sums", "addcmul_cuda"),
    ("passes that draw dropout's mask", "triton_.*bitwise_xor|triton_.*rshift"),
    ("other passes", "triton_|at::native"),
    ("other", ""),
)


def profile() -> str:
    rows = [r for r in _stage("models", H200) if r["what"] == "profile: llama-3.1-8b, minilora"]
    found = last_of(rows, "compiled")
    columns = [_grouped(found[compiled]) for compiled in ("True", "False")]
    lines = [[name, *(f"{c[name]:.0f}" if name in c else "–" for c in columns)]
             for name in (*dict(GROUPS), "not among the 40 longest")]  # fmt: skip
    lines.append(["all", *(f"{float(found[c]['ms']):.0f}" for c in ("True", "False"))])
    text = (
        "milliseconds of the GPU by kernels in a forward and backward pass of llama-3.1-8b, "
        "2 × 4096 tokens, r = 16 on all linears, dropout 0.1, bf16; sorted by the kernels' names"
    )
    return _caption(text, rows) + table("what | compiled | eager", lines)


def _grouped(row: Row) -> dict[str, float]:
    """Return the milliseconds of a profile by group of kernels."""
    sums: dict[str, float] = {}
    for entry in row["value"].split("; "):
        ms, kernel = re.fullmatch(r"([\d.]+) ms \d+ x (.*)", entry, re.S).groups()
        group = next(name for name, pattern in GROUPS if re.search(pattern, kernel))
        sums[group] = sums.get(group, 0.0) + float(ms)
    sums["not among the 40 longest"] = float(row["ms"]) - sum(sums.values())
    return sums


def smollm2() -> str:
    rows = [*_stage("smollm2", H100), *_stage("ranks", H100)]
    found = last_of((r for r in rows if not r["what"].endswith("generate")), "what")
    run = found["smollm2-135m, docstrings"]
    before, after = run["losses"].split(" -> ")
    steps = run["value"].split(" steps")[0]
    both = json.loads(found["smollm2-135m, adapter's loss on both devices"]["value"])
    texts = last_of((r for r in rows if r["what"].endswith("generate")), "rows")
    merged = found["smollm2-135m, merged in f32"]
    lines = [
        [f"{steps} steps of 16 rows, evaluations not counted", f"{float(run['ms']):.0f} ms a step"],
        ["held-out loss, untrained and at its best", f"{before} → {after}"],
        ["peak memory", f"{run['peak_gb']} GB"],
        *([f"64 tokens written, {n} row{'s' * (n != '1')}", f"{float(r['tokens_s']):.0f} tokens/s"]
          for n, r in texts.items()),
        ["merged in f32, against the adapter at work", f"{float(merged['y']):.2g} of the largest "
         f"logit; unmerged to the bit: {_yes(merged)}"],
        ["the adapter's loss on the GPU and on the CPU, f32",
         " and ".join(f"{value:.6f}" for value in both.values())],
        ["6 steps, saved, and 6 more in a new model: the bits of 12 steps",
         _yes(found["smollm2-135m, resumed"])],
        *([f"`{name}` of one process, 3 steps: loss",
           " → ".join(f"{float(v):.2f}" for v in _losses(found[name])) + ", saved"]
          for name in ("torchrun, ddp", "torchrun, fsdp")),
    ]  # fmt: skip
    text = (
        "the demo's task on SmolLM2-135M in bf16, eager, beside a second small job on the same "
        "GPU; torchrun on random weights, over NCCL"
    )
    return _caption(text, rows) + table("what | found", lines)


def _yes(row: Row) -> str:
    return "yes" if row["ok"] == "True" else "no"


def _losses(row: Row) -> Iterable[str]:
    return re.findall(r"\d+\.\d+", row["value"])
