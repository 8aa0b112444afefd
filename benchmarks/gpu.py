"""Time the LoRA linear on a CUDA device: our kernels beside what else is installed.

    python benchmarks/gpu.py            # → results/gpu.csv; needs a CUDA device

A shape is timed only after our output and gradients have been held against float64. Times are
medians of `triton.testing.do_bench`, forward + backward in bf16 with dropout 0.1, r = 16. Each row
names the GPU and says which share of its measured copy bandwidth (compulsory bytes a second) and of
its measured bf16 matmul rate (2 FLOPs × products a second) the call reaches.
"""

import csv
import importlib.util
import sys
from pathlib import Path

import torch
from torch import nn

RESULTS = Path(__file__).parent / "results" / "gpu.csv"
RANK, ALPHA, DROPOUT, DTYPE = 16, 32, 0.1, torch.bfloat16
DEVICE = "cuda"  # a test of `check` sets another
FEW_ROWS = (16, 4096, 4096)  # M, K, N: checked, not timed; 4-bit weights are decoded in the GEMM
sys.path.insert(0, str(Path(__file__).parent))  # traffic.py; PYTHONSAFEPATH leaves it out


class Eager(nn.Module):
    """LoRA by separate torch ops, as written in most libraries."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        N, K = base.weight.shape
        self.A = nn.Parameter(torch.randn(RANK, K, device=DEVICE, dtype=DTYPE) / K**0.5)
        self.B = nn.Parameter(torch.randn(N, RANK, device=DEVICE, dtype=DTYPE) / RANK**0.5)
        self.p = DROPOUT

    def forward(self, x):
        dropped = nn.functional.dropout(x, self.p)
        return self.base(x) + dropped @ self.A.t() @ self.B.t() * (ALPHA / RANK)


def plain(K, N):
    return nn.Linear(K, N, device=DEVICE, dtype=DTYPE)


def ours(K, N, format=None, backend="triton"):
    import minilora

    model = nn.Sequential(plain(K, N))
    if format is not None:
        minilora.quantize(model, format, targets=["0"])
    minilora.inject(
        model, r=RANK, alpha=ALPHA, targets=["0"], exclude=[], dropout=DROPOUT, backend=backend
    )
    model[0].adapters["default"].lora_B.data.normal_(std=RANK**-0.5)
    return model


def peft(K, N, four_bit=False):
    import peft

    layer = plain(K, N)
    if four_bit:
        import bitsandbytes as bnb

        small = bnb.nn.Linear4bit(K, N, compute_dtype=DTYPE, quant_type="nf4")
        small.to(DTYPE).load_state_dict(layer.state_dict())  # it decodes to what it was made from
        layer = small.to(DEVICE)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=["0"],
        init_lora_weights=False,
    )  # fmt: skip
    model = peft.get_peft_model(nn.Sequential(layer), config)
    for parameter in model.parameters():
        if parameter.requires_grad:  # made in f32, in which the branch would be multiplied then
            parameter.data = parameter.data.to(DTYPE)
    return model


def contenders(K, N):
    """Return what is timed, by name; makers of packages that are missing are left out."""
    found = {
        "linear alone": lambda: plain(K, N).requires_grad_(False),
        "torch eager": lambda: Eager(plain(K, N)),
        "torch eager, compiled": lambda: torch.compile(Eager(plain(K, N)), dynamic=False),
        "minilora torch (addmm_)": lambda: ours(K, N, backend="torch"),
        "minilora triton": lambda: ours(K, N),
    }
    found |= {f"minilora triton {f}": lambda f=f: ours(K, N, f) for f in ("int8", "nf4", "int4")}
    if importlib.util.find_spec("peft"):
        found["peft"] = lambda: peft(K, N)
        if importlib.util.find_spec("bitsandbytes"):
            found["peft + bitsandbytes nf4"] = lambda: peft(K, N, True)
    return found


def drawn_mask(M, K):
    """Return the dropout mask `[M, K]` in float64, 1 / (1 − p) where kept, of the next draw."""
    from minilora.kernels.dropout import hashed_mask

    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=DEVICE)
    return hashed_mask(seed, M, K, DROPOUT).double() / (1 - DROPOUT)


def check(format, M, K, N):
    """Raise unless output and gradients are as near to float64 as bf16 (int8 rows) allows."""
    torch.manual_seed(0)
    model = ours(K, N, format).train()
    x = torch.randn(M, K, device=DEVICE, dtype=DTYPE, requires_grad=True)
    grad = torch.randn(M, N, device=DEVICE, dtype=DTYPE)
    torch.manual_seed(1)
    y = model(x)
    y.backward(grad)
    torch.manual_seed(1)
    keep = drawn_mask(M, K)
    layer = model[0]
    factors = layer.adapters["default"]
    A, B = (t.detach().double() for t in (factors.lora_A, factors.lora_B))
    W, x64, g64, s = layer.base.weight.double(), x.detach().double(), grad.double(), ALPHA / RANK
    dropped = x64 * keep
    exact = {
        "y": x64 @ W.t() + layer.base.bias.double() + s * (dropped @ A.t()) @ B.t(),
        "grad_x": g64 @ W + s * (g64 @ B @ A) * keep,
        "grad_A": s * (g64 @ B).t() @ dropped, "grad_B": s * g64.t() @ (dropped @ A.t()),
    }  # fmt: skip
    found = {"y": y, "grad_x": x.grad, "grad_A": factors.lora_A.grad, "grad_B": factors.lora_B.grad}
    limit = 3e-2 if format == "int8" else 1e-2
    for name, value in found.items():
        error = ((value.double() - exact[name]).norm() / exact[name].norm()).item()
        if not error < limit:
            raise SystemExit(
                f"{format or 'bf16'} {name} of {M} × {K} → {N} must be within {limit} of float64, "
                f"found {error:.1e}; nothing is timed"
            )


def rates():
    """Return bytes a second of a copy and FLOPs a second of a bf16 product, measured here."""
    from triton.testing import do_bench

    source = torch.empty(2**28, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    copy = do_bench(lambda: target.copy_(source), return_mode="median") / 1e3
    a = torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE)
    product = do_bench(lambda: a @ a, return_mode="median") / 1e3
    return 2 * source.nbytes / copy, 2 * 8192**3 / product


def time_step(model, M, K, N):
    """Return the median milliseconds of a forward and backward pass."""
    from triton.testing import do_bench

    x = torch.randn(M, K, device=DEVICE, dtype=DTYPE, requires_grad=True)
    grad = torch.randn(M, N, device=DEVICE, dtype=DTYPE)
    model.train()
    return do_bench(
        lambda: model(x).backward(grad),
        grad_to_none=[x, *(p for p in model.parameters() if p.requires_grad)],
        return_mode="median",
    )


def rows(shapes):
    """Yield a line per shape and contender."""
    import traffic

    bandwidth, flops = rates()
    for M, K, N in shapes:
        for name, make in contenders(K, N).items():
            torch.manual_seed(0)
            milliseconds = time_step(make(), M, K, N)
            format = next((f for f in ("int8", "nf4", "int4") if name.endswith(f)), None)
            moved = None  # not counted for the others
            if name.startswith("minilora triton"):
                moved = sum(map(traffic.compulsory, traffic.launches(M, K, N, format)))
            elif name in ("torch eager", "peft", "peft + bitsandbytes nf4"):
                moved = traffic.eager(M, K, N, format)
            seconds = milliseconds / 1e3
            work = 4 * M * K * N + (0 if name == "linear alone" else 6 * M * RANK * (K + N))
            yield {
                "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
                "M": M, "K": K, "N": N, "what": name, "ms": round(milliseconds, 4),
                "bandwidth_share": "" if moved is None else round(moved / seconds / bandwidth, 3),
                "matmul_share": round(work / seconds / flops, 3),
            }  # fmt: skip


def main():
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device, and torch sees none; nothing was timed")
        return 2
    import traffic

    for shape in (FEW_ROWS, *traffic.SHAPES):  # other shapes have other tiles
        for format in traffic.FORMATS:
            check(format, *shape)
    with open(RESULTS, "w", newline="", encoding="utf-8") as file:
        writer = None
        for line in rows(traffic.SHAPES):
            if writer is None:
                writer = csv.DictWriter(file, line, lineterminator="\n")
                writer.writeheader()
            writer.writerow(line)
            print(*line.values(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
