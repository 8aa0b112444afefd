"""Compile every Triton kernel ahead of time, without a GPU, and read what comes out.

    python benchmarks/aot.py            # every kernel × tile × dtype × {sm_80, sm_90} → results/aot.csv
    python benchmarks/aot.py shrink     # those whose name contains the word, printed only

Registers, stack and shared memory come from `cuobjdump -res-usage`, instructions from
`cuobjdump -sass`; both ship in triton's wheel.
"""

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

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.int32: "*i32", torch.int8: "*i8", torch.uint8: "*u8",
}  # fmt: skip
COUNTED = {
    "hmma": r"\bHMMA\.", "imma": r"\bIMMA\.", "hgmma": r"\bHGMMA\.", "igmma": r"\bIGMMA\.",
    "async_copies": r"\b(?:LDGSTS|UTMALDG)\b", "loads_128": r"\bLDG\.E\.128",
    "local": r"\b(?:LDL|STL)\b",
}  # fmt: skip


class Compiled(NamedTuple):
    """What one compiled kernel uses."""

    registers: int
    stack: int
    shared: int
    counts: dict[str, int]
    sass: str


def specialized(launch):
    """Return the signature, constants and attributes Triton gives these arguments at run time."""
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
            signature[name], divisible = "fp32", False
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
