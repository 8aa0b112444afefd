"""One LoRA linear on a CUDA device: is it right, and how long it and each of its launches take.

Stages of `gpu.py`. Times are medians: `ms` as eager code meets it, `graph_ms` replayed as a CUDA
graph, so without the host's part, `host_us` what the host needs to enqueue it.
"""

import contextlib
import functools
import gc
import importlib.util
import os
import statistics
import time
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn
from torch.nn import functional as F

SMOKE = os.environ.get("SMOKE") == "1"
RANK, ALPHA, DROPOUT, DTYPE = 16, 32, 0.1, torch.bfloat16
DEVICE = "cpu" if SMOKE else "cuda"
FORMATS = (None, "int8", "nf4", "int4")
SHAPES = ((8192, 4096, 4096), (8192, 4096, 14336), (2048, 2048, 2048))  # M, K, N
FEW_ROWS = (1, 16, 64, 256)


def installed(name):
    return importlib.util.find_spec(name) is not None


# --- measuring


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def median_ms(call, graph=False, ms=60):
    if DEVICE == "cpu":
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)
    from triton.testing import do_bench, do_bench_cudagraph

    if graph:
        return do_bench_cudagraph(call, rep=ms // 2, return_mode="median")
    return do_bench(call, warmup=15, rep=ms, return_mode="median")


def host_us(call, repeats=10):
    """Return the microseconds to enqueue a call, the GPU being allowed to lag."""
    times = []
    for _ in range(repeats):
        synchronize()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(times)


def relative(found, exact):
    exact = exact.double()
    return ((found.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def env(rows):
    """Versions, and the two rates that everything is held against."""
    import platform

    for name in ("transformers", "peft", "bitsandbytes", "safetensors", "numpy", "pytest"):
        try:
            rows.add(name, value=version(name))
        except PackageNotFoundError:
            rows.add(name, value="none")
    rows.add("python", value=platform.python_version())
    if DEVICE == "cpu":
        return
    rows.add("memory, GB", value=torch.cuda.mem_get_info()[1] / 1e9)
    a = torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE)
    source = torch.randn(2**28, device=DEVICE)
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source))
    rows.add("copy", ms=ms, tb_s=2 * source.nbytes / ms / 1e9)
    ms = median_ms(lambda: a @ a.t())
    rows.add("8192³ in bf16", ms=ms, tflops=2 * 8192**3 / ms / 1e9)


# --- what is compared


class Eager(nn.Module):
    """LoRA by separate torch ops, as written in most libraries."""

    def __init__(self, base, p):
        super().__init__()
        self.base = base.requires_grad_(False)
        N, K = base.weight.shape
        self.A = nn.Parameter(torch.randn(RANK, K, device=DEVICE, dtype=DTYPE) / K**0.5)
        self.B = nn.Parameter(torch.randn(N, RANK, device=DEVICE, dtype=DTYPE) / RANK**0.5)
        self.p = p

    def forward(self, x):
        dropped = F.dropout(x, self.p)
        return self.base(x) + dropped @ self.A.t() @ self.B.t() * (ALPHA / RANK)


def plain(K, N):
    return nn.Linear(K, N, device=DEVICE, dtype=DTYPE)


def ours(K, N, format=None, backend="triton", p=DROPOUT, r=RANK, dtype=DTYPE):
    import minilora

    model = nn.Sequential(nn.Linear(K, N, device=DEVICE, dtype=dtype))
    if format is not None:
        minilora.quantize(model, format, targets=["0"])
    minilora.inject(model, r=r, alpha=2 * r, targets=["0"], exclude=[], dropout=p, backend=backend)
    model[0].adapters["default"].lora_B.data.normal_(std=r**-0.5)
    return model


def peft(K, N, four_bit=False, p=DROPOUT, narrow=True):
    """Return PEFT's layer; `narrow`: factors in bf16, not in f32, as it makes them."""
    import peft

    layer = plain(K, N)
    if four_bit:
        import bitsandbytes as bnb

        small = bnb.nn.Linear4bit(K, N, compute_dtype=DTYPE, quant_type="nf4")
        small.to(DTYPE).load_state_dict(layer.state_dict())  # it decodes to what it was made from
        layer = small.to(DEVICE)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=p, target_modules=["0"], init_lora_weights=False
    )
    model = peft.get_peft_model(nn.Sequential(layer), config)
    for parameter in model.parameters():
        if parameter.requires_grad and narrow:
            parameter.data = parameter.data.to(DTYPE)
    return model


class _Widened(torch.autograd.Function):
    """One product `[x | S] [W | s·B]ᵀ`; x and W lie in buffers with room for the rank."""

    @staticmethod
    def forward(ctx, x, A, B, wide_x, wide_w, wide_wt):
        K = x.shape[1]
        torch.mm(wide_x[:, :K], A.t(), out=wide_x[:, K:])
        wide_w[:, K:] = B * (ALPHA / RANK)
        ctx.save_for_backward(wide_x, A, B, wide_wt)
        return wide_x @ wide_w.t()

    @staticmethod
    def backward(ctx, grad_out):
        wide_x, A, B, wide_wt = ctx.saved_tensors
        K, N = A.shape[1], grad_out.shape[1]
        wide_g = ctx_buffer(grad_out.shape[0], N + RANK)
        wide_g[:, :N] = grad_out  # a producer that writes there would save this copy
        torch.mm(grad_out, B * (ALPHA / RANK), out=wide_g[:, N:])
        wide_wt[N:] = A
        grad_s, s = wide_g[:, N:], wide_x[:, K:]
        return (
            wide_g @ wide_wt, grad_s.t() @ wide_x[:, :K], grad_out.t() @ s * (ALPHA / RANK),
            None, None, None,
        )  # fmt: skip


def ctx_buffer(M, width):
    return torch.empty(M, width, device=DEVICE, dtype=DTYPE)


class Widened(nn.Module):
    def __init__(self, M, K, N):
        super().__init__()
        self.A = nn.Parameter(torch.randn(RANK, K, device=DEVICE, dtype=DTYPE) / K**0.5)
        self.B = nn.Parameter(torch.randn(N, RANK, device=DEVICE, dtype=DTYPE) / RANK**0.5)
        self.x = torch.randn(M, K + RANK, device=DEVICE, dtype=DTYPE)
        self.w = torch.randn(N, K + RANK, device=DEVICE, dtype=DTYPE) / K**0.5
        self.wt = torch.randn(N + RANK, K, device=DEVICE, dtype=DTYPE) / K**0.5

    def forward(self, x):  # x stands for what its producer has written into self.x
        return _Widened.apply(x, self.A, self.B, self.x, self.w, self.wt)


def _to_fp8(x, scale=None):
    """Return e4m3 codes and a scale a row; `scale` multiplies the columns first."""
    wide = x.float() if scale is None else x.float() * scale
    t = wide.abs().amax(1, keepdim=True).clamp(min=1e-12) / 448
    return (wide / t).to(torch.float8_e4m3fn), t


class _FP8(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, B, w8, ws, quantize):
        x8, xs = quantize(x)
        y = torch._scaled_mm(
            x8, w8.t(), scale_a=xs, scale_b=ws.t(), out_dtype=DTYPE, use_fast_accum=True
        )
        s = x @ A.t()
        ctx.save_for_backward(x, A, B, s, w8, ws)
        ctx.quantize = quantize
        return y.addmm_(s, B.t(), alpha=ALPHA / RANK)

    @staticmethod
    def backward(ctx, grad_out):
        from minilora.kernels.triton.decode import launch_decode_int8
        from minilora.kernels.triton.tiles import CODES_TILE

        x, A, B, s, w8, ws = ctx.saved_tensors
        g8, gs = ctx.quantize(grad_out, ws.t())
        turned = torch.empty(w8.shape[::-1], dtype=torch.int8, device=DEVICE)
        launch_decode_int8(w8.view(torch.int8), None, turned.t(), CODES_TILE).run()
        turned = turned.view(torch.float8_e4m3fn)
        one = torch.ones(1, w8.shape[1], device=DEVICE)
        grad_x = torch._scaled_mm(
            g8, turned.t(), scale_a=gs, scale_b=one, out_dtype=DTYPE, use_fast_accum=True
        )
        grad_s = grad_out @ B * (ALPHA / RANK)
        grad_x.addmm_(grad_s, A)
        return grad_x, grad_s.t() @ x, grad_out.t() @ s * (ALPHA / RANK), None, None, None


class FP8(nn.Module):
    """A base in e4m3 with a scale a row of W and of x, multiplied by torch._scaled_mm."""

    def __init__(self, K, N):
        super().__init__()
        self.weight = plain(K, N).weight.detach()
        self.w8, self.ws = _to_fp8(self.weight)
        self.A = nn.Parameter(torch.randn(RANK, K, device=DEVICE, dtype=DTYPE) / K**0.5)
        self.B = nn.Parameter(torch.randn(N, RANK, device=DEVICE, dtype=DTYPE) / RANK**0.5)
        self.quantize = torch.compile(_to_fp8, dynamic=False)

    def forward(self, x):
        return _FP8.apply(x, self.A, self.B, self.w8, self.ws, self.quantize)


def contenders(M, K, N, p):
    """Return what is timed, by name."""
    found = {
        "linear alone": lambda: plain(K, N).requires_grad_(False),
        "torch eager": lambda: Eager(plain(K, N), p),
        "minilora torch": lambda: ours(K, N, backend="torch", p=p),
        "minilora triton": lambda: ours(K, N, p=p),
    }
    for f in FORMATS[1:]:
        found[f"minilora torch {f}"] = lambda f=f: ours(K, N, f, "torch", p)
        found[f"minilora triton {f}"] = lambda f=f: ours(K, N, f, "triton", p)
    if installed("peft"):
        found["peft"] = lambda: peft(K, N, p=p, narrow=False)
        found["peft, bf16 factors"] = lambda: peft(K, N, p=p)
        if installed("bitsandbytes") and not SMOKE:
            found["peft + bitsandbytes nf4"] = lambda: peft(K, N, True, p=p)
    if p == 0 and not SMOKE:
        found["widened product"] = lambda: Widened(M, K, N)
        found["fp8 base"] = lambda: FP8(K, N)
    if (K, N) == (4096, 4096) and p:
        found["torch eager, compiled"] = lambda: torch.compile(Eager(plain(K, N), p), dynamic=False)
        for f in (None, "int8", "nf4"):
            found[f"minilora torch {f or 'bf16'}, compiled"] = lambda f=f: torch.compile(
                ours(K, N, f, "torch", p), dynamic=False
            )
    return found


# --- is it right


def cases():
    """Return layer shapes that reach every tile of tiles.py on sm_90: (M, K, N, R, p)."""
    if SMOKE:
        return [(20, 64, 48, 8, 0.1)]
    few = [(M, 4096, 4096, 16, 0.0) for M in (1, 16, 40, 64)]
    middle = [(M, 2048, 2048, r, p) for M in (100, 512, 1000) for r, p in ((16, 0.1), (64, 0.0))]
    many = [(4096, 4096, 4096, r, p) for r in (8, 32, 64, 128, 256) for p in (0.0, 0.1)]
    odd = [(2050, 576, 1536, 16, 0.1), (2048, 4100, 4104, 16, 0.1), (513, 1000, 1000, 24, 0.1)]
    return [*many, *few, *middle, *odd, *((*shape, RANK, DROPOUT) for shape in SHAPES)]


def drawn_mask(M, K, p):
    """Return the dropout mask `[M, K]` in float64, 1 / (1 − p) where kept, of the next draw."""
    from minilora.kernels.dropout import hashed_mask, row_seeds

    seed = row_seeds(torch.empty(M, K, device=DEVICE))
    return hashed_mask(seed, M, K, p).double() / (1 - p)


def check(format, M, K, N, r=RANK, p=DROPOUT, dtype=DTYPE, times=1):
    """Return errors against float64 by name, and whether `times` runs agree to the bit."""
    torch.manual_seed(M + N)
    model = ours(K, N, format, p=p, r=r, dtype=dtype).train()
    layer = model[0]
    factors = layer.adapters["default"]
    x = torch.randn(M, K, device=DEVICE, dtype=dtype, requires_grad=True)
    grad = torch.randn(M, N, device=DEVICE, dtype=dtype)
    runs = []
    for _ in range(times):
        for leaf in (x, *factors.parameters()):
            leaf.grad = None
        torch.manual_seed(1)
        y = model(x)
        y.backward(grad)
        runs.append([y.detach(), x.grad, factors.lora_A.grad, factors.lora_B.grad])
    torch.manual_seed(1)
    keep = drawn_mask(M, K, p) if p else 1.0
    A, B = (t.detach().to(dtype).double() for t in (factors.lora_A, factors.lora_B))
    W, x64, g64, s = layer.base.weight.double(), x.detach().double(), grad.double(), 2.0
    dropped = x64 * keep
    exact = [
        x64 @ W.t() + layer.base.bias.double() + s * (dropped @ A.t()) @ B.t(),
        g64 @ W + s * (g64 @ B @ A) * keep,
        s * (g64 @ B).t() @ dropped,
        s * g64.t() @ (dropped @ A.t()),
    ]
    errors = map(relative, runs[0], exact)
    same = all(torch.equal(a, b) for run in runs for a, b in zip(runs[0], run, strict=True))
    return dict(zip(("y", "grad_x", "grad_A", "grad_B"), errors, strict=True)), same


def holds(format, errors):
    """Return whether errors are what bf16 and f16 products (int8: rounded rows) make."""
    limits = {"y": 3e-2, "grad_x": 3e-2} if format == "int8" else {}
    return all(error < limits.get(name, 1e-2) for name, error in errors.items())


def checks(rows, shard=0, shards=1):
    """Hold output and every gradient against float64 in the tiles that are used."""
    bad = 0
    for M, K, N, r, p in cases()[shard::shards]:
        for dtype in (torch.bfloat16, torch.float16) if r <= 32 else (torch.bfloat16,):
            for format in FORMATS:
                if format == "int4" and K % 64:
                    continue
                case = {"M": M, "K": K, "N": N, "r": r, "p": p, "format": format}
                case["dtype"] = str(dtype).removeprefix("torch.")
                try:
                    errors, same = check(format, M, K, N, r, p, dtype, times=3)
                except Exception as error:  # the next kernel may be right
                    bad += 1
                    rows.add("kernels", ok=False, **case, error=f"{error!s:.300}")
                    continue
                good = same and holds(format, errors)
                bad += not good
                rows.add("kernels", ok=good, **case, repeats=same, **errors)
    return bad


# --- how fast


def step_of(model, M, K, N):
    """Return a call that runs forward and backward."""
    x = torch.randn(M, K, device=DEVICE, dtype=DTYPE, requires_grad=True)
    grad = torch.randn(M, N, device=DEVICE, dtype=DTYPE)
    leaves = [x, *(t for t in model.train().parameters() if t.requires_grad)]

    def step():
        for leaf in leaves:
            leaf.grad = None
        model(x).backward(grad)

    return step


def timed(rows, name, call, work=0, graph=True, **row):
    """Add a row of medians, or of what went wrong: one that fails must not end the others."""
    try:
        call()
        row["ms"] = median_ms(call, ms=30)
        row["host_us"] = host_us(call)
        best = row["ms"]
        if DEVICE == "cuda" and graph:
            try:
                best = row["graph_ms"] = median_ms(call, graph=True, ms=30)
            except RuntimeError as error:  # something waits for the GPU
                row["error"] = f"no graph: {error!s:.80}"
                synchronize()
        if work:
            row["tflops"] = work / best / 1e9
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error!s:.200}"
    rows.add(name, **row)


def few_rows(rows):
    """Add a forward pass of few tokens, as text is generated."""
    K = N = 64 if SMOKE else 4096
    for M in (1, 4) if SMOKE else FEW_ROWS:
        x = torch.randn(M, K, device=DEVICE, dtype=DTYPE)
        makers = {
            f"few rows, minilora {backend} {f or 'bf16'}": (lambda f=f, b=backend: ours(K, N, f, b))
            for backend in ("torch", "triton")
            for f in FORMATS
        }
        if installed("peft") and installed("bitsandbytes") and not SMOKE:
            makers["few rows, peft + bitsandbytes nf4"] = lambda: peft(K, N, True)
        for name, make in makers.items():
            model = make().eval().requires_grad_(False)
            forward = torch.no_grad()(functools.partial(model, x))
            timed(rows, name, forward, M=M, K=K, N=N, r=RANK)


def layers(rows):
    """Few rows forward, then forward and backward of one linear beside what else is installed."""
    few_rows(rows)
    for M, K, N in ((20, 64, 64),) if SMOKE else SHAPES:
        for p in (0.0, 0.1):
            for name, make in contenders(M, K, N, p).items():
                torch.manual_seed(0)
                gc.collect()
                try:
                    step = step_of(make(), M, K, N)
                except Exception as error:
                    rows.add(name, M=M, K=K, N=N, r=RANK, p=p, error=f"{error!s:.200}")
                    continue
                work = 4 * M * K * N
                timed(rows, name, step, work, M=M, K=K, N=N, r=RANK, p=p)


def made(*shape, dtype=DTYPE):
    """Return an operand of a launch."""
    if dtype.is_floating_point:
        return torch.randn(shape, device=DEVICE, dtype=dtype)
    if dtype == torch.int64:
        return torch.tensor([1234567], device=DEVICE)
    if dtype == torch.int32:  # the bits of scales; of codes as they are, since zeros spare power
        return (torch.rand(shape, device=DEVICE) / 50).view(torch.int32)
    least, most = (-127, 127) if dtype == torch.int8 else (0, 255)
    return torch.randint(least, most + 1, shape, device=DEVICE).to(dtype)


def library(M, K, N):
    """Return what cuBLAS and torch do for the same operands, by name."""
    x, G, W, y, bias = made(M, K), made(M, N), made(N, K), made(M, N), made(N)
    A, B, S = made(RANK, K), made(N, RANK), made(M, RANK)
    mask = torch.rand(M, K, device=DEVICE) > 0.1
    found = {
        "F.linear": lambda: F.linear(x, W, bias),
        "y.addmm_(S, Bᵀ)": lambda: y.addmm_(S, B.t()),
        "y = S Bᵀ, then y += x Wᵀ": lambda: torch.addmm(torch.mm(S, B.t()), x, W.t(), out=y),
        "G W": lambda: G @ W,
        "x Aᵀ": lambda: x @ A.t(),
        "G B": lambda: G @ B,
        "Gᵀ S": lambda: G.t() @ S,
        "grad_sᵀ x": lambda: S.t() @ x,
        "x ∘ mask": lambda: x * mask,
        "mask drawn in bool": lambda: torch.empty_like(x, dtype=torch.bool).bernoulli_(0.9),
        "native_dropout": lambda: torch.native_dropout(x, 0.1, True),
    }
    if SMOKE:
        return found
    q, xq, gq = (torch.randint(-127, 128, shape, device=DEVICE, dtype=torch.int8)
                 for shape in ((N, K), (M, K), (M, N)))  # fmt: skip
    x8, w8 = x.to(torch.float8_e4m3fn), W.to(torch.float8_e4m3fn)
    one = torch.ones((), device=DEVICE)
    by_row = torch.ones(M, 1, device=DEVICE), torch.ones(1, N, device=DEVICE)
    options, quantize = {"out_dtype": DTYPE, "use_fast_accum": True}, torch.compile(_to_fp8)
    return found | {
        "_int_mm, x Qᵀ": lambda: torch._int_mm(xq, q.t()),
        "_int_mm, G Q": lambda: torch._int_mm(gq, q),
        "_scaled_mm, one scale": lambda: torch._scaled_mm(x8, w8.t(), one, one, **options),
        "_scaled_mm, by rows": lambda: torch._scaled_mm(x8, w8.t(), *by_row, **options),
        "to e4m3, compiled": lambda: quantize(x),
        "e4m3 turned over": lambda: w8.view(torch.int8).t().contiguous(),
    }


def other_tiles(M, K, N):
    """Return the fused product and the rounding of rows in tiles that are not chosen, by tile."""
    from minilora.kernels.triton.int8 import launch_quantize
    from minilora.kernels.triton.lora_forward import launch_gemm
    from minilora.kernels.triton.tiles import Tile

    x, W, y, bias, B, S = (
        made(M, K), made(N, K), made(M, N), made(N), made(N, RANK), made(M, RANK)
    )  # fmt: skip
    sizes = ((128, 256, 8, 3), (128, 256, 8, 4), (128, 128, 4, 4), (128, 128, 8, 4),
             (64, 256, 4, 4), (256, 128, 8, 3))  # fmt: skip
    found = {
        f"low_rank_gemm in {m} × {n} × 64, {warps} warps, {stages} stages": launch_gemm(
            x, W.t(), bias, S, B.t(), 2.0, None, 0.0, y, Tile(m, n, 64, 16, warps, stages)
        ).run
        for m, n, warps, stages in sizes
    }
    codes, t = torch.empty(M, N, dtype=torch.int8, device=DEVICE), torch.empty(M, device=DEVICE)
    scales = torch.rand(N, device=DEVICE)
    for m, k, warps, stages in (
        (16, 256, 4, 3), (16, 512, 8, 3), (32, 256, 8, 3), (16, 256, 8, 4), (64, 128, 8, 3),
    ):  # fmt: skip
        tile = Tile(m, 0, k, 16, warps, stages)
        launch = launch_quantize(y, scales, B.t(), None, 0.0, codes, t, S, 2.0, tile)
        found[f"quantize_shrink in {m} × {k}, {warps} warps, {stages} stages"] = launch.run
    return found


def alone(rows, name, call, **row):
    """Add a row of a call's time without the host's part."""
    flops = row.pop("flops", 0)
    try:
        ms = row["graph_ms"] = median_ms(call, graph=True, ms=15)
        if flops:
            row["tflops"] = flops / ms / 1e9
        if "bytes" in row:
            row["tb_s"] = row.pop("bytes") / ms / 1e9
    except Exception as error:
        row.pop("bytes", None)
        row["error"] = f"{type(error).__name__}: {error!s:.160}"
    rows.add(name, **row)


def passes(rows):
    """Add the loss over a large vocabulary and attention, forward and backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from minilora.kernels import linear_cross_entropy

    M, K, V = (20, 64, 97) if SMOKE else (8192, 4096, 128256)
    hidden, head = made(M, K).requires_grad_(), made(V, K) / K**0.5
    labels = torch.randint(V, (M,), device=DEVICE)
    timed(rows, "head and loss", lambda: linear_cross_entropy(hidden, head, labels).backward(),
          graph=False,
          work=4 * M * K * V, M=M, K=K, N=V)  # fmt: skip
    timed(rows, "head and loss, torch's", work=4 * M * K * V, M=M, K=K, N=V,
          call=lambda: F.cross_entropy((hidden @ head.t()).float(), labels).backward())  # fmt: skip
    B, H, G, T, D = (1, 4, 2, 16, 8) if SMOKE else (2, 32, 8, 4096, 128)
    q = made(B, H, T, D).requires_grad_()
    k, v = (made(B, G, T, D).requires_grad_() for _ in range(2))
    grad = made(B, H, T, D)
    work = 7 * B * H * T * T * D  # 2 products forward, 5 backward, half of each seen

    def attention(backend=None, repeat=False):
        keys, values = (t.repeat_interleave(H // G, 1) if repeat else t for t in (k, v))
        with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
            y = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
            y.backward(grad)

    ways = {"attention": attention}
    for name in () if SMOKE else ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        backend = getattr(SDPBackend, name)
        for repeat in (False, True):
            ways[
                f"attention, {name.split('_')[0].lower()}{', keys repeated' if repeat else ''}"
            ] = functools.partial(attention, backend, repeat)
    for name, call in ways.items():
        timed(rows, name, call, work=work, M=B, N=T)


def kernels(rows):
    """Each launch alone beside cuBLAS and torch, and other tiles of the product."""
    import aot
    import traffic

    passes(rows)
    aot.meta = made
    for M, K, N in ((20, 64, 64),) if SMOKE else SHAPES[:2]:
        flops, size = 2 * M * K * N, {"M": M, "K": K, "N": N, "r": RANK}
        for format in FORMATS:
            for launch in traffic.launches(M, K, N, format, make=made):
                name = launch.kernel.__name__
                alone(rows, name, launch.run, format=format, value=str(tuple(launch.tile)),
                      bytes=traffic.compulsory(launch), flops=flops if "gemm" in name else 0,
                      **size)  # fmt: skip
        for name, call in library(M, K, N).items():
            alone(rows, name, call, flops=flops, **size)
        for name, call in ({} if SMOKE else other_tiles(M, K, N)).items():
            alone(rows, name, call, flops=flops, **size)
