"""Time one frozen linear per storage format: decoding, forward, and the gradient of its input.

    python benchmarks/linear.py [--shape 1536 576] [--rows 1 16 128 512 1024 4096] [--rounds 7]
        [--dtype auto] [--only NAME ...] [--compile]

Providers: plain bfloat16 and float32, INT8 and INT4 through integers and dequantized, NF4, and
bitsandbytes' NF4, all of these on inputs of `--dtype` (auto: the fastest here), eager and, with
`--compile`, compiled too (but for bitsandbytes). All run in one process, in interleaved rounds; a
row has the median, the spread (third over first quartile) and the ratios to plain bfloat16 and
float32 in the same run. `forward` is inference, `both` a forward and the input's gradient. Rows are
added to benchmarks/results/linear.csv.
"""

import argparse
import csv
import importlib.metadata
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import minilora
from minilora.quantization import Quantization
from minilora.quantization.linear import QuantizedLinear

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "int8": ("int8", "int8"),
    "int8, dequantized": ("int8", "dequantize"),
    "int8, auto": ("int8", "auto"),
    "int4, 64": ("int4", "int8"),
    "int4, 64, dequantized": ("int4", "dequantize"),
    "nf4": ("nf4", "auto"),
}


def providers(N: int, K: int, dtype: torch.dtype, compiled: bool) -> dict[str, nn.Module]:
    """Return the layers to compare; those that are not plain are made for inputs of `dtype`."""
    torch.manual_seed(0)
    weight = torch.randn(N, K)
    found: dict[str, nn.Module] = {}
    for kind in (torch.bfloat16, torch.float32):
        layer = nn.Linear(K, N, bias=False, dtype=kind)
        layer.weight = nn.Parameter(weight.to(kind), requires_grad=False)
        found[str(kind).removeprefix("torch.")] = layer
    for name, (format, way) in WAYS.items():
        spec = Quantization(format, compute=way, grad_compute=way)
        found[name] = QuantizedLinear.from_weight(weight.to(dtype), spec).eval()
    if compiled:
        pairs = [
            (f"{name}, compiled", torch.compile(m, dynamic=False)) for name, m in found.items()
        ]
        found |= dict(pairs)  # type: ignore[arg-type]
    theirs = bitsandbytes_linear(weight.to(dtype))
    if theirs is not None:
        found["bitsandbytes nf4"] = theirs
    return found


def bitsandbytes_linear(weight: Tensor) -> nn.Module | None:
    """Return bitsandbytes' layer, or None where it is not installed."""
    try:
        import bitsandbytes
    except ImportError:
        return None
    N, K = weight.shape
    layer = bitsandbytes.nn.Linear4bit(
        K, N, bias=False, quant_type="nf4", compute_dtype=weight.dtype
    )
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    return layer.to("cpu")


def timed(function: Callable[[], object], seconds: float = 0.05) -> float:
    """Return the seconds of one call, the mean over as many as fit into `seconds`."""
    calls, start = 0, time.perf_counter()
    while True:
        function()
        calls += 1
        took = time.perf_counter() - start
        if took >= seconds:
            return took / calls


def version(package: str) -> str:
    """Return the installed version of a package, or nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """Return the short name of the checked-out commit."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        check=False, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    return done.stdout.strip()


def forward(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return layer(x)

    return run


def both(layer: nn.Module, x: Tensor, grad_out: Tensor) -> Callable[[], object]:
    def run() -> object:
        leaf = x.detach().requires_grad_()
        layer(leaf).backward(grad_out)
        return leaf.grad

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(1536, 576), metavar=("N", "K"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128, 512, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--only", nargs="+", help="these providers alone")
    parser.add_argument("--compile", action="store_true", help="compiled layers too")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks/results/linear.csv")
    options = parser.parse_args()
    N, K = options.shape
    dtype = minilora.hardware().dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    layers = providers(N, K, dtype, options.compile)
    layers = {name: m for name, m in layers.items() if name in (options.only or layers)}
    rows = []

    def measure(what: str, M: int, runs: dict[str, Callable[[], object]], per: float) -> None:
        for run in runs.values():
            run()
        found: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, run in runs.items():
                found[name].append(timed(run))
        plain = {n: statistics.median(found[n]) for n in ("bfloat16", "float32") if n in found}
        for name, times in found.items():
            low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
            rows.append({
                "what": what, "provider": name, "dtype": str(dtype).removeprefix("torch."),
                "N": N, "K": K, "M": M,
                "ns_per_weight": f"{middle / per * 1e9:.4f}", "spread": f"{high / low:.2f}",
                **{f"to_{n}": f"{middle / plain[n]:.2f}" if n in plain else ""
                   for n in ("bfloat16", "float32")},
                "rounds": options.rounds,
                "processor": minilora.hardware().name, "flags": " ".join(minilora.hardware().flags),
                "threads": torch.get_num_threads(), "torch": torch.__version__,
                "bitsandbytes": version("bitsandbytes"), "commit": commit(),
            })  # fmt: skip
            row = rows[-1]
            shown = [row[key] for key in ("ns_per_weight", "spread", "to_bfloat16", "to_float32")]
            print(f"{what:8} M={M:5} {name:32}", *shown, flush=True)

    small: dict[str, QuantizedLinear] = {
        name: m for name, m in layers.items() if isinstance(m, QuantizedLinear)
    }
    decode: dict[str, Callable[[], object]] = {n: m.dequantize for n, m in small.items()}
    if decode:
        measure("decode", 0, decode, N * K)
    for M in options.rows:
        ins, outs = {}, {}
        for name in layers:
            kind = getattr(torch, name.partition(",")[0], dtype)
            kind = kind if isinstance(kind, torch.dtype) and kind.is_floating_point else dtype
            ins[name], outs[name] = torch.randn(M, K).to(kind), torch.randn(M, N).to(kind)
        measure("forward", M, {n: forward(m, ins[n]) for n, m in layers.items()}, N * K)
        measure("both", M, {n: both(m, ins[n], outs[n]) for n, m in layers.items()}, N * K)
    new = not options.csv.exists()
    with open(options.csv, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
