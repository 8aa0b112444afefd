"""Bytes that the LoRA linear moves: what it must, what our grids issue, what separate ops move.

    python benchmarks/traffic.py        # → results/traffic.csv

Two numbers for a kernel. *Compulsory*: each operand of a launch once, partial buffers counted as
written and as read again. *Issued*: what the programs of the grid load and store, before any cache;
`counted` measures it in Triton's interpreter and `issued` predicts it (a test holds them equal).
The eager path is the same layer by torch ops, each reading and writing its operands once.
"""

import collections
import contextlib
import csv
import sys
from pathlib import Path

import torch

from minilora.kernels.triton import lora, stored

RESULTS = Path(__file__).parent / "results" / "traffic.csv"
SHAPES = ((8192, 4096, 4096), (8192, 4096, 14336), (2048, 2048, 2048))  # M, K, N
RANK, DROPOUT = 16, 0.1
FORMATS = (None, "int8", "nf4", "int4")


def compulsory(launch):
    """Return the bytes of a launch with every tensor argument moved once.

    Buffers of partial sums and a weight decoded into the workspace are arguments of two launches,
    so they count as written and as read.
    """
    return sum(a.nbytes for a in launch.args if isinstance(a, torch.Tensor))


def _tiles(launch):
    """Return, per argument, how often the grid loads or stores each of its elements."""
    name, sizes, values = launch.kernel.__name__, launch.constants, dict(
        zip(launch.kernel.arg_names, launch.args, strict=False)
    )  # fmt: skip
    rows = -(-values["M"] // sizes["BLOCK_M"]) if "BLOCK_M" in sizes and "M" in values else 1
    if name in ("low_rank_gemm", "int8_gemm"):
        columns = -(-values["N"] // sizes["BLOCK_N"])
        per_row = dict.fromkeys(("w_ptr", "q_ptr", "b_ptr", "bias_ptr"), rows)
        return per_row | dict.fromkeys(("x_ptr", "p_ptr", "t_ptr", "s_ptr"), columns)
    if name == "decode_int4":  # a step is loaded for each run of 16 bytes
        return {"steps_ptr": sizes["GROUP"] // 16, "channel_ptr": launch.grid[1]}
    if name == "decode_int8":
        return {"scale_ptr": launch.grid[1]}
    if name in ("shrink", "quantize_shrink"):
        again = 2 if name == "quantize_shrink" else 1
        return {"a_ptr": rows, "x_ptr": again, "c_ptr": again * rows}
    if name == "expand_grad":
        return {"b_ptr": rows, "s_ptr": launch.grid[1]}
    if name == "tall_product":
        return {"u_ptr": launch.grid[0], "x_ptr": launch.grid[2]}
    return {}


def issued(launch):
    """Return the bytes that the programs of a launch load and store, before any cache.

    Scalars, tables and the second scales of NF4 are left out: a few bytes a program.
    """
    times = _tiles(launch)
    total = 0
    for name, value in zip(launch.kernel.arg_names, launch.args, strict=False):
        if isinstance(value, torch.Tensor) and name not in SMALL:
            total += value.nbytes * times.get(name, 1)
    return total


SMALL = ("seed_ptr", "table_ptr", "code_ptr", "absmax2_ptr", "offset_ptr")


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(M, K, N, format=None, arch=90, R=RANK, p=DROPOUT, make=meta):
    """List what one LoRA linear launches, forward and backward with dropout, bias and all grads."""
    x, y, s, grad_s = make(M, K), make(M, N), make(M, R), make(M, R)
    A, B, bias = make(R, K), make(N, R), make(N)
    seed = make(1, dtype=torch.int64) if p else None
    if format is None:
        w = make(N, K)
        return [
            lora.plan_shrink(x, A, seed, p, s, 1.0, arch),
            lora.plan_gemm(x, w.t(), bias, s, B.t(), 2.0, None, 0.0, y, arch),
            *lora.plan_factors(y, x, A, B, s, 2.0, seed, p, grad_s, A, B, arch),
            lora.plan_gemm(y, w, None, grad_s, A, 1.0, seed, p, x, arch),
        ]
    sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
    from aot import stored_weight

    w, way = stored_weight(format, N, K), "int8" if format == "int8" else "dequantize"
    return [
        *stored.plan_forward(w, x, bias, A, B, 2.0, seed, p, way, y, s, arch),
        *stored.plan_backward(w, y, x, A, B, s, 2.0, seed, p, way, grad_s, x, A, B, arch),
    ]


def eager(M, K, N, format=None, R=RANK, size=2):
    """Return the bytes of the same layer by separate torch ops in bf16, as PEFT runs it.

    Forward: y = linear(x); d = dropout(x), which writes a mask; s = d Aᵀ; u = s Bᵀ; u · scaling;
    y + u. Backward: u' = G · scaling; grad_B, grad_s, grad_A, grad_d; mask · grad_d / (1 − p);
    G W; their sum. A quantized weight is decoded to bf16 first, in both directions.
    """
    MK, MN, KN, MR, KR, NR = M * K, M * N, K * N, M * R, K * R, N * R
    decode = 0
    if format is not None:
        stored_bytes = {"int8": 1.0, "nf4": 0.516, "int4": 0.516}[format]
        decode = stored_bytes * KN + size * KN
    forward = size * (MK + KN + MN) + decode  # linear
    forward += size * 2 * MK + MK  # dropout: reads x, writes d and a mask of bytes
    forward += size * (MK + KR + MR) + size * (MR + NR + MN)  # the two products
    forward += size * 2 * MN + size * 3 * MN  # scaling, sum
    backward = size * 2 * MN  # scaling
    backward += size * (MN + MR + NR) + size * (MN + NR + MR)  # grad_B, grad_s
    backward += size * (MR + MK + KR) + size * (MR + KR + MK)  # grad_A, grad_d
    backward += size * 2 * MK + MK  # mask
    backward += size * (MN + KN + MK) + decode + size * 3 * MK  # G W, and its sum with grad_d
    return round(forward + backward)


def rows():
    """Yield a line per shape and format: compulsory bytes, eager's, and what the grid issues."""
    for M, K, N in SHAPES:
        for format in FORMATS:
            found = launches(M, K, N, format)
            ours, theirs = sum(map(compulsory, found)), eager(M, K, N, format)
            yield {
                "M": M, "K": K, "N": N, "R": RANK, "weight": format or "bf16", "arch": "sm_90",
                "launches": len(found), "compulsory_mb": round(ours / 1e6, 1),
                "eager_mb": round(theirs / 1e6, 1), "ratio": round(ours / theirs, 3),
                "issued_mb": round(sum(map(issued, found)) / 1e6, 1),
            }  # fmt: skip


@contextlib.contextmanager
def _watched(ranges, loads, stores):
    """Record the bytes that interpreted loads and stores touch, by argument."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def record(into, pointers, mask):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        touched = pointers.data[mask.data]
        for name, start, stop in ranges:
            into[name] += size * int(((touched >= start) & (touched < stop)).sum())

    def watched_load(self, ptrs, mask, *rest):
        record(loads, ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def watched_store(self, ptrs, value, mask, *rest):
        record(stores, ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


def counted(launch):
    """Run a launch in the interpreter; return bytes loaded and stored by argument name."""
    ranges = []
    for name, value in zip(launch.kernel.arg_names, launch.args, strict=False):
        if isinstance(value, torch.Tensor):
            extent = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1
            start = value.data_ptr()
            ranges.append((name, start, start + extent * value.element_size()))
    loads, stores = collections.Counter(), collections.Counter()
    with _watched(ranges, loads, stores):
        launch.run()
    return +loads, +stores


def main():
    with open(RESULTS, "w", newline="", encoding="utf-8") as file:
        writer = None
        for line in rows():
            writer = writer or csv.DictWriter(file, line, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(line)
            print(*line.values())


if __name__ == "__main__":
    main()
