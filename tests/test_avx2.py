"""The core of the suite once more with the instruction sets of a common laptop.

oneDNN and ATen choose their kernels when a process starts, so this needs a process of its own. It
also needs an Inductor cache of its own: in torch 2.13 the cache's key leaves ATEN_CPU_CAPABILITY
out, so code made for 16 lanes is compiled for 8 and leaves half of its output unwritten (and the
other way round writes past the end); `test_inductor_cache_confuses_vector_widths` tells when this
is fixed. An empty cache costs half a minute of C++ compilers, so what Inductor compiles is left
to `--wide`.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
CORE = ["kernels_low_rank", "kernels_cross_entropy", "lora_layer", "lora_switching"]
LIMIT = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is x86's"
)


def python(arguments, cache, **environment):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)} | environment
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def test_core_passes_under_an_avx2_limit(tmp_path, pytestconfig):
    """Over 5 s: four files of tests, in a process of their own."""
    some = [] if pytestconfig.getoption("--wide") else ["-k", "not compiled"]
    words = ["-q", "-p", "no:cacheprovider", *some, *(f"{TESTS}/test_{name}.py" for name in CORE)]
    code = "import sys, pytest, torch; print(torch.backends.cpu.get_cpu_capability()); "
    code += f"sys.exit(pytest.main({words}))"
    done = python(["-c", code], tmp_path, **LIMIT)
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.startswith("AVX2\n")


@pytest.mark.wide  # two empty caches take a minute of C++ compilers
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512" or shutil.which("g++") is None,
    reason="needs a CPU with AVX-512 and a compiler",
)
def test_inductor_cache_confuses_vector_widths(tmp_path):
    """Fails once torch keeps the two apart: then the cache folder above can go."""
    code = "import torch; x = torch.ones(24); y = torch.compile(lambda x: x * 3)(x); "
    code += "print(int((y == 3).sum()))"
    assert python(["-c", code], tmp_path).stdout.strip() == "24"
    assert python(["-c", code], tmp_path, **LIMIT).stdout.strip() == "16"
