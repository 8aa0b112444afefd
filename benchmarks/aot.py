"""Compile every Triton kernel ahead of time, without a GPU, and read what comes out.

    make aot                            # every kernel, tile, dtype, architecture → results/aot.csv
    python benchmarks/aot.py --chosen   # those that the test suite compiles → results/aot.csv
    python benchmarks/aot.py shrink     # those whose name contains the word, printed only

Registers, stack and shared memory come from `cuobjdump -res-usage`, instructions from
`cuobjdump -sass`; both ship in triton's wheel. What must hold stands in `problems`.
"""

import concurrent.futures
import csv
import functools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minilora.kernels.triton import lora, stored
from minilora.kernels.triton.cross_entropy import launch_exponents
from minilora.kernels.triton.dropout import launch_drop
from minilora.kernels.triton.int8 import launch_int8_gemm
from minilora.kernels.triton.launch import Launch
from minilora.kernels.triton.tiles import SHARED_MEMORY, Tile, drop_tile, exponents_tile

RESULTS = Path(__file__).parent / "results" / "aot.csv"
ARCHITECTURES = (80, 90)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.int32: "*i32", torch.int8: "*i8", torch.uint8: "*u8",
}  # fmt: skip
COUNTED = {
    "hmma": r"\bHMMA\.",
    "imma": r"\bIMMA\.",
    "hgmma": r"\bHGMMA\.",
    "igmma": r"\bIGMMA\.",
    "async_copies": r"\bLDGSTS\b",
    "loads_128": r"\bLDG\.E\.\S*\b128\b",
    "local": r"\b(?:LDL|STL)\b",
    "instructions": r"(?m)^\s+/\*[0-9a-f]{4,}\*/",
    "padding": r"\bNOP\b",  # behind the last instruction
}


class Case(NamedTuple):
    """One kernel as some layer would launch it, on one architecture."""

    name: str
    arch: int
    dtype: str
    launch: Launch

    @property
    def key(self):
        return f"{self.name} {self.dtype} sm_{self.arch}"


class Compiled(NamedTuple):
    """What one compiled kernel uses."""

    registers: int
    stack: int
    shared: int
    counts: dict[str, int]
    sass: str


def specialized(launch, number="fp32"):
    """Return the signature, constants and attributes Triton gives these arguments at run time.

    A Python number is an f32; in Inductor's graphs it is "fp64".
    """
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.args, strict=False)) | launch.constants
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        value = values[name]
        if name in launch.constants or value is None or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible = True  # torch's allocator aligns to 512 bytes
        elif isinstance(value, float):
            signature[name], divisible = number, False
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_launch(launch, arch):
    """Compile for sm_`arch` and read the machine code."""
    signature, constants, attributes = specialized(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {
        "num_warps": launch.tile.warps,
        "num_stages": launch.tile.stages,
        "enable_fp_fusion": True,
    }
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _tool("-res-usage", cubin)
        sass = _tool("-sass", cubin)
    counts = {name: len(re.findall(pattern, sass)) for name, pattern in COUNTED.items()}
    return Compiled(
        int(re.search(r"REG:(\d+)", usage)[1]),
        int(re.search(r"STACK:(\d+)", usage)[1]),
        kernel.metadata.shared,
        counts,
        sass,
    )


def _tool(option, cubin):
    command = [TOOLS / "cuobjdump", option, cubin]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def meta(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta")


def kinds(names):
    """Yield dtypes by name with torch's matmul precision set: f32 means exact products."""
    table = {"f16": torch.float16, "bf16": torch.bfloat16}
    before = torch.get_float32_matmul_precision()
    for name in names:
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        yield name, table.get(name, torch.float32)
    torch.set_float32_matmul_precision(before)


def lora_cases(arch, M, R, N=4096, K=4096, dtypes=("f16", "bf16", "f32", "tf32"), p=0.1):
    """The launches of one LoRA linear, forward and backward."""
    for label, dtype in kinds(dtypes):
        x, y, s = meta(M, K, dtype=dtype), meta(M, N, dtype=dtype), meta(M, R, dtype=dtype)
        w, bias = meta(N, K, dtype=dtype), meta(N, dtype=dtype)
        A, B = meta(R, K, dtype=dtype), meta(N, R, dtype=dtype)
        seed = meta(1, dtype=torch.int64) if p else None
        launches = {
            "forward": [
                lora.plan_shrink(x, A, seed, p, s, 1.0, arch),
                lora.plan_gemm(x, w.t(), bias, s, B.t(), 2.0, None, 0.0, y, arch),
            ],
            "backward": [
                *lora.plan_factors(y, x, A, B, s, 2.0, seed, p, s, A, B, arch),
                lora.plan_gemm(y, w, None, s, A, 1.0, seed, p, x, arch),
            ],
        }
        for direction, listed in launches.items():
            for launch in listed:
                drop = " dropout" if any(a is seed for a in launch.args if a is not None) else ""
                name = f"{launch.kernel.__name__} {direction} r{R} M{M}{drop}"
                yield Case(name, arch, label, launch)


def stored_weight(format, N, K):
    """A weight as `QuantizedLinear` hands it to the kernels, without values."""
    u8, i32 = torch.uint8, torch.int32
    if format == "int8":
        return stored.Weight(format, N, K, 0, [meta(N, K, dtype=torch.int8), meta(N, dtype=i32)])
    blocks = N * K // 64
    if format == "int4":
        steps = meta(N, K // 64, dtype=u8)
        return stored.Weight(
            format, N, K, 64, [meta(N, K // 2, dtype=u8), steps, meta(N, dtype=i32)]
        )
    table, code = meta(16, dtype=torch.float32), meta(256, dtype=torch.float32)
    second = [meta(-(-blocks // 256), dtype=i32), meta(1, dtype=i32), code]
    parts = [meta(N, K // 2, dtype=u8), table, meta(blocks, dtype=u8), *second]
    return stored.Weight(format, N, K, 64, parts)


def stored_cases(arch, M, R, format, way, dtypes=("f16", "bf16"), p=0.1, N=4096, K=4096):
    """What `lora_cases` does not have of a LoRA linear over a quantized weight."""
    for label, dtype in kinds(dtypes):
        w = stored_weight(format, N, K)
        x, y, s = meta(M, K, dtype=dtype), meta(M, N, dtype=dtype), meta(M, R, dtype=dtype)
        A, B, bias = meta(R, K, dtype=dtype), meta(N, R, dtype=dtype), meta(N, dtype=dtype)
        seed = meta(1, dtype=torch.int64) if p else None
        launches = {
            "forward": stored.plan_forward(w, x, bias, A, B, 2.0, seed, p, way, y, s, arch),
            "backward": stored.plan_backward(
                w, y, x, A, B, s, 2.0, seed, p, way, s, x, A, B, arch
            ),
        }  # fmt: skip
        plain = {"shrink", "low_rank_gemm", "expand_grad", "tall_product", "sum_partials"}
        for direction, listed in launches.items():
            for launch in listed:
                if launch.kernel.__name__ in plain:
                    continue
                drop = " dropout" if any(a is seed for a in launch.args if a is not None) else ""
                name = f"{launch.kernel.__name__} {direction} {format} {way} r{R} M{M}{drop}"
                yield Case(name, arch, label, launch)


def turned_cases(arch, dtype="bf16"):
    """The input gradient's integer GEMM on one tile: codes as stored, and turned over."""
    for label, kind in kinds((dtype,)):
        M, N, K, R = 8192, 4096, 4096, 16
        tile = Tile(64, 128, 128, 16, 4, 3)
        codes, t = meta(M, N, dtype=torch.int8), meta(M, dtype=torch.float32)
        s, A, y = meta(M, R, dtype=kind), meta(R, K, dtype=kind), meta(M, K, dtype=kind)
        for name, q in (
            ("codes as stored", meta(N, K, dtype=torch.int8)),
            ("codes turned over", meta(K, N, dtype=torch.int8).t()),
        ):
            launch = launch_int8_gemm(codes, t, q, None, None, s, A, 1.0, None, 0.0, y, tile)
            yield Case(f"int8_gemm backward, {name}", arch, label, launch)


def loss_cases(arch, dtypes=("f16", "bf16", "f32")):
    """The passes over a chunk of logits, with a cap and without."""
    for label, dtype in kinds(dtypes):
        for cap in (None, 30.0):
            logits, labels = meta(512, 131072, dtype=dtype), meta(512, dtype=torch.int64)
            sums, losses = (meta(512, 1, dtype=torch.float32) for _ in range(2))
            tile = exponents_tile(cap is not None)
            launch = launch_exponents(logits, labels, cap, sums, losses, tile)
            yield Case("exponents" + (" capped" if cap else ""), arch, label, launch)


def drop_cases(arch, dtypes=("f16", "bf16", "f32")):
    """Dropout in one pass, of rows that its wide tile divides and others."""
    for label, dtype in kinds(dtypes):
        for N in (4096, 576):
            x, seeds = meta(8192, N, dtype=dtype), meta(2, dtype=torch.int64)
            launch = launch_drop(x, seeds, 0.1, x, drop_tile(N))
            yield Case(f"drop {N}", arch, label, launch)


def all_cases():
    """Every kernel × tile × dtype × architecture that the tile functions can return."""
    for arch in ARCHITECTURES:
        for M in (16, 64, 512, 8192):
            for R in (16, 32, 64, 128, 256):
                for p in (0.0, 0.1):
                    yield from lora_cases(arch, M, R, p=p)
                    yield from stored_cases(arch, M, R, "int8", "int8", p=p)
                for format, way in QUANTIZED[1:]:
                    yield from stored_cases(arch, M, R, format, way)
        yield from turned_cases(arch)
        yield from loss_cases(arch)
        yield from drop_cases(arch)


def chosen_cases():
    """The cases that the test suite compiles: the main tile of every kernel."""
    for arch in ARCHITECTURES:
        yield from lora_cases(arch, 8192, 16, dtypes=("bf16",))
        yield from lora_cases(arch, 8192, 64, dtypes=("f16",))
        yield from lora_cases(arch, 8192, 16, dtypes=("f32",), p=0.0)
        yield from lora_cases(arch, 16, 16, dtypes=("f16",), p=0.0)
        for format, way in QUANTIZED:
            yield from stored_cases(arch, 8192, 16, format, way, dtypes=("bf16",))
            few = stored_cases(arch, 16, 16, format, way, dtypes=("f16",), p=0.0)
            yield from (case for case in few if "gemm" in case.name)
        yield from turned_cases(arch)
        yield from loss_cases(arch, dtypes=("bf16",))
        yield from drop_cases(arch, dtypes=("bf16",))


def distinct(cases):
    """Drop cases that give Triton the same source."""
    seen = {}
    for case in cases:
        identity = (*map(str, specialized(case.launch)), case.launch.kernel.__name__, case.arch)
        seen.setdefault((*identity, case.launch.tile[4:6]), case)
    return list({case.key: case for case in reversed(seen.values())}.values())[::-1]


# What is multiplied how; a way that is missing here launches kernels that another one has.
QUANTIZED = (
    ("int8", "int8"), ("int8", "dequantize"), ("nf4", "dequantize"),
    ("int4", "dequantize"), ("int4", "int8"),
)  # fmt: skip
# The operands that a kernel's loop copies to shared memory: block sizes by letter, per argument.
LOOPED = {
    "int8_gemm": {"p_ptr": "MK", "q_ptr": "KN"},
    "quantize_shrink": {"x_ptr": "MK", "a_ptr": "KR"},
    "low_rank_gemm": {"x_ptr": "MK", "w_ptr": "KN"},
    "shrink": {"x_ptr": "MK", "a_ptr": "KR"},
    "expand_grad": {"g_ptr": "MN", "b_ptr": "NR"},
    "tall_product": {"x_ptr": "MK", "u_ptr": "MR"},
}


def expected_copies(launch):
    """Return the 128-bit asynchronous copies of a pipeline that copies every operand so."""
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    total = 0
    for name, letters in LOOPED.get(launch.kernel.__name__, {}).items():
        if name == "q_ptr" and values["stride_qk"] != 1:
            continue  # codes of which a step's do not lie in a row: not asked for, see TURNED_ROWS
        size = values[name].element_size()
        for letter in letters:
            size *= launch.constants[f"BLOCK_{letter}"]
        total += max(1, size // (16 * 32 * launch.tile.warps))
    return total * launch.tile.stages


def problems(case, compiled):
    """Say what is wrong with a compiled kernel: an empty list is what must come out."""
    found, counts, kernel = [], compiled.counts, case.launch.kernel.__name__
    if compiled.stack or counts["local"]:
        found.append(f"{compiled.stack} bytes of stack, {counts['local']} local instructions")
    if compiled.registers > 255:
        found.append(f"{compiled.registers} registers")
    if compiled.shared > SHARED_MEMORY[case.arch]:
        found.append(f"{compiled.shared} bytes of shared memory")
    if kernel.startswith(("decode_", "exponents", "drop")) and not counts["loads_128"]:
        found.append("no 128-bit load")
    if kernel in LOOPED:
        # f32 asked for exactly has no tensor-core instruction on these architectures.
        if case.dtype != "f32" and not any(counts[n] for n in ("hmma", "imma", "hgmma", "igmma")):
            found.append("no tensor-core instruction")
        if counts["async_copies"] < expected_copies(case.launch):
            found.append(
                f"{counts['async_copies']} asynchronous copies where both operands take "
                f"{expected_copies(case.launch)}"
            )
    wide = "gemm" in kernel and case.dtype != "f32" and case.launch.tile.m >= 64
    if wide and case.arch == 90 and not counts["hgmma"] + counts["igmma"]:
        found.append("no warp-group tensor-core instruction")
    return found


def decoded(launch):
    """Return how many weights a program decodes, 0 for kernels that decode none."""
    kernel, sizes = launch.kernel.__name__, launch.constants
    if kernel == "decode_nf4":
        return sizes["BLOCK"] * sizes["SCALES"]
    if kernel == "decode_int4":
        return sizes["BLOCK_N"] * sizes["RUNS"] * 32
    return 0


def per_weight(launch, compiled):
    """Return the instructions that a decode kernel executes for each weight, or ""."""
    weights = decoded(launch)
    executed = compiled.counts["instructions"] - compiled.counts["padding"]
    return round(executed * 32 * launch.tile.warps / weights, 2) if weights else ""


def row(case, compiled):
    tile = case.launch.tile
    return {
        "kernel": case.launch.kernel.__name__,
        "case": case.name,
        "dtype": case.dtype,
        "arch": f"sm_{case.arch}",
        "tile": "x".join(map(str, tile[:4])),
        "warps": tile.warps,
        "stages": tile.stages,
        "registers": compiled.registers,
        "stack": compiled.stack,
        "shared": compiled.shared,
        **{n: count for n, count in compiled.counts.items() if n not in ("local", "padding")},
        "per_weight": per_weight(case.launch, compiled),
        "problems": "; ".join(problems(case, compiled)),
        "triton": triton.__version__,
    }


@functools.cache
def listed(name):
    """Return the distinct cases of `all_cases` or `chosen_cases`."""
    return distinct(globals()[name]())


def _row(index, name):
    """Compile one case in a worker process, which lists the cases anew: launches don't travel."""
    case = listed(name)[index]
    return row(case, compile_launch(case.launch, case.arch))


def rows(name, jobs=2, only=None, keys=None):
    """Compile the cases of `all_cases` or `chosen_cases` in parallel; yield their rows.

    `only` is a part of their keys, `keys` are whole ones; by default all are compiled.
    """
    cases = [(i, case.key) for i, case in enumerate(listed(name))]
    wanted = [i for i, key in cases if (not only or only in key) and (keys is None or key in keys)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        yield from pool.map(_row, wanted, [name] * len(wanted), chunksize=4)


def recorded():
    """Return the recorded rows by (case, dtype, arch)."""
    with open(RESULTS, newline="", encoding="utf-8") as file:
        return {(r["case"], r["dtype"], r["arch"]): r for r in csv.DictReader(file)}


def worse(found, before):
    """Say what got worse than the recorded row."""
    more = ("registers", "stack", "shared", "instructions")
    changes = [n for n in more if int(found[n]) > int(before[n])]
    changes += [n for n in ("async_copies",) if int(found[n]) < int(before[n])]
    return [f"{name} {before[name]} -> {found[name]}" for name in changes]


def main(arguments):
    # A chosen case may stand under another name among all: a test looks each up by its own.
    chosen = arguments == ["--chosen"]
    only = arguments[0] if arguments and not chosen else None
    compiled = {}
    for cases in ("chosen_cases",) if chosen else ("all_cases", "chosen_cases"):
        for line in rows(cases, jobs=os.cpu_count() or 1, only=only):
            compiled[line["case"], line["dtype"], line["arch"]] = line
            print(*(str(v) for v in line.values()), flush=True)
    found = list(compiled.values())
    if only is None:
        RESULTS.parent.mkdir(exist_ok=True)
        with open(RESULTS, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, found[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(found)
    bad = [line for line in found if line["problems"]]
    print(f"{len(found)} kernels compiled, {len(bad)} with problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
