"""The functions in C touch nothing beside their operands: pages around each can't be accessed.

Run in a process of its own, which dies where a function reaches over an end.
"""

import ctypes
import mmap
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from minilora.kernels import cpu

LIBRARY = cpu.native()
PAGE = mmap.PAGESIZE
SIZES = st.one_of(
    st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 129, 200, 257, 480, 481])
)


class Between:
    """Memory of so many bytes between two pages that can't be accessed, next to one of them."""

    def __init__(self, size, at_end, align=1):
        pages = max(1, -(-size // PAGE)) * PAGE
        self.map = mmap.mmap(-1, pages + 2 * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        for wall in (start, start + PAGE + pages):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), PAGE, 0) == 0
        self.at = start + PAGE + ((pages - size) // align * align if at_end else 0)


def check(name, operands, results, *numbers, work=None, short=0):
    """Call a function between walls, at either end; it must write what it writes elsewhere."""
    function = getattr(LIBRARY, f"minilora_{name}")
    want = [torch.empty_like(result) for result in results]
    free = [] if work is None else [torch.empty(work, dtype=torch.uint8)]
    function(*(t.data_ptr() for t in (*operands, *want, *free)), *numbers)
    for at_end in (True, False):
        memory = [Between(t.nbytes, at_end) for t in operands]
        for tensor, one in zip(operands, memory, strict=True):
            ctypes.memmove(one.at, tensor.data_ptr(), tensor.nbytes)
        memory += [Between(t.nbytes - short, at_end) for t in results]
        if work is not None:  # torch's memory is aligned to 64 bytes, which `work` relies on
            memory.append(Between(work, at_end, align=64))
        function(*(one.at for one in memory), *numbers)
        for one, tensor in zip(memory[len(operands) :], want, strict=False):
            got = torch.empty_like(tensor)
            ctypes.memmove(got.data_ptr(), one.at, got.nbytes)
            assert got.view(torch.uint8).equal(tensor.view(torch.uint8)), name


def codes(*shape):
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def stored(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def narrow(*shape):
    return torch.randn(shape, dtype=torch.bfloat16)


@seed(0)
@settings(max_examples=60, deadline=None, database=None)
@given(M=SIZES, N=SIZES, K=SIZES, data=st.data())
def products(M, N, K, data):
    x, scales = torch.randn(M, K), torch.rand(N)
    check("int8_rows", (x, codes(N, K), scales), [torch.empty(M, N)], M, N, K)
    half, K = K, 2 * K
    group = data.draw(st.sampled_from([d for d in range(1, K + 1) if K % d == 0]))
    packed, steps = stored(N, half), torch.randint(1, 19, (N, K // group), dtype=torch.uint8)
    parts, x = (packed, steps, scales), torch.randn(M, K)
    check("int4_rows", (x, *parts), [torch.empty(M, N)], M, N, K, group)
    check("int4_weights", parts[:2], [torch.empty(N, K)], N, K, group)
    n, block = M * half, 2 * data.draw(st.integers(1, 40))
    pairs, largest = torch.rand(256, 2), torch.rand(-(-n // block))
    check("nf4_weights", (stored(-(-n // 2)), largest, pairs), [torch.empty(n)], n, block)
    for across in (0, 1) if cpu.has_blocks() else ():
        J, L = (N, K) if across else (K, N)
        x, y = torch.randn(M, J), [torch.empty(M, L)]
        for name, read, more in (
            ("int8_blocks", (codes(N, K), scales), ()),
            ("int4_blocks", parts, (group,)),
        ):
            work = LIBRARY.minilora_blocks_bytes(M, J, L, len(more))
            check(name, (x, *read), y, M, J, L, across, *more, work=work)


@seed(0)
@settings(max_examples=60, deadline=None, database=None)
@given(M=SIZES, D=SIZES, flag=st.integers(0, 1), data=st.data())
def passes(M, D, flag, data):
    x, weight = narrow(M, D), narrow(D)
    y = [torch.empty_like(x)]
    check("norm_pass", (x, weight), y, M, D, flag, 1e-5, 1.0)
    check("norm_back_pass", (x, x, weight), y, M, D, 1e-5, 1.0)
    check("gated_pass", (x, x), y, M * D, flag)
    check("gated_back_pass", (x, x, x), y * 2, M * D, flag)
    half, T, H = data.draw(st.integers(0, D // 2)), min(M, 9), 3
    x, angles = narrow(2, H, T, D), narrow(T, half)
    strides = (H * T * D, T * D, D) * 2
    check("rotary_pass", (x, angles, angles), [x], 2, H, T, D, half, flag, 0, *strides)


@pytest.mark.skipif(LIBRARY is None or sys.platform != "linux", reason="no C compiler that will do")
@pytest.mark.parametrize("what", ["products", "passes", "short"])
def test_nothing_beside_the_operands_is_touched(what):
    if what == "passes" and not LIBRARY.minilora_has_passes():
        pytest.skip("no AVX2")
    command = [sys.executable, "-X", "faulthandler", __file__, what]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    expected = -signal.SIGSEGV if what == "short" else 0  # a result of one byte less than it has
    assert ended.returncode == expected, ended.stderr[-3000:]


if __name__ == "__main__":
    if sys.argv[1] == "short":
        check("int8_rows", (torch.ones(1, 4), codes(3, 4), torch.ones(3)), [torch.empty(1, 3)],
              1, 3, 4, short=1)  # fmt: skip
    else:
        globals()[sys.argv[1]]()
