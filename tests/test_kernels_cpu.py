"""The products in C for few rows: against float64, built once, and done without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.kernels import cpu, int4_rows, int8_rows

needs_compiler = pytest.mark.skipif(cpu.compiler() is None, reason="there is no C compiler")


def int8_operands(M, N, K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=generator)
    codes = torch.randint(-127, 128, (N, K), generator=generator, dtype=torch.int8)
    return x, codes, torch.rand(N, generator=generator) + 0.1


def int4_operands(M, N, K, group, seed=0):
    x, _, scales = int8_operands(M, N, K, seed)
    generator = torch.Generator().manual_seed(seed)
    nibbles = torch.randint(1, 16, (2, N, K // 2), generator=generator, dtype=torch.uint8)
    steps = torch.randint(1, 19, (N, K // group), generator=generator, dtype=torch.uint8)
    return x, nibbles[0] | nibbles[1] << 4, steps, scales


def int8_weight(codes, scales):
    return codes.double() * scales.double()[:, None]


def int4_weight(packed, steps, scales, group):
    q = torch.cat([packed % 16, packed // 16], dim=1).double() - 8
    return q * steps.double().repeat_interleave(group, dim=1) * scales.double()[:, None]


def assert_right(y, x, weight):
    room = x.double().abs() @ weight.abs().t() * 1e-6  # sums in f32
    assert y.dtype == torch.float32
    assert ((y.double() - x.double() @ weight.t()).abs() <= room).all()


@pytest.fixture(scope="module", params=["this processor", "any processor"])
def library(request, tmp_path_factory):
    if cpu.compiler() is None:
        pytest.skip("there is no C compiler")
    plain = ("-U__x86_64__",) if request.param == "any processor" else ()
    return cpu.load(cpu.build(tmp_path_factory.mktemp("built"), plain))


@settings(max_examples=60)
@given(
    M=st.integers(0, 17),
    N=st.integers(0, 40),
    K=st.sampled_from([0, 1, 7, 8, 15, 16, 31, 576, 577]),
    seed=st.integers(0, 99),
)
def test_int8_rows_are_right_and_do_not_depend_on_each_other(library, M, N, K, seed):
    x, *stored = int8_operands(M, N, K, seed)
    y = cpu.run(library.minilora_int8_rows, x, *stored)
    assert_right(y, x, int8_weight(*stored))
    rows = [cpu.run(library.minilora_int8_rows, x[i : i + 1], *stored) for i in range(M)]
    assert torch.equal(y, torch.cat([y[:0], *rows]))


@settings(max_examples=60)
@given(
    M=st.integers(0, 17),
    N=st.integers(0, 40),
    group=st.sampled_from([2, 8, 32, 64, 128]),
    groups=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_int4_rows_are_right_and_do_not_depend_on_each_other(library, M, N, group, groups, seed):
    """Groups that end in the middle of a half row too."""
    x, *stored = int4_operands(M, N, group * groups, group, seed)
    y = cpu.run(library.minilora_int4_rows, x, *stored, group=group)
    assert_right(y, x, int4_weight(*stored, group))
    rows = [
        cpu.run(library.minilora_int4_rows, x[i : i + 1], *stored, group=group) for i in range(M)
    ]
    assert torch.equal(y, torch.cat([y[:0], *rows]))


def test_strides_and_offsets_are_respected(library):
    x, codes, scales = int8_operands(6, 20, 96)
    x, *stored = x[1::2, ::3], codes[:, ::3], scales.repeat_interleave(2)[::2]
    assert_right(cpu.run(library.minilora_int8_rows, x, *stored), x, int8_weight(*stored))


def test_nothing_beside_the_result_is_written_and_nan_is_kept(library):
    for name, (x, *stored), sizes in (
        ("int8", int8_operands(5, 7, 33), [33]),
        ("int4", int4_operands(5, 7, 64, 32), [64, 32]),
    ):
        x[2, sizes[0] - 1] = torch.nan
        x[3, 0] = torch.inf
        whole = torch.full((7, 7), 7.0)
        pointers = [tensor.data_ptr() for tensor in (x, *stored, whole[1:6])]
        getattr(library, f"minilora_{name}_rows")(*pointers, 5, 7, *sizes)
        assert (whole[[0, 6]] == 7).all()
        weight = int8_weight(*stored) if name == "int8" else int4_weight(*stored, 32)
        finite = [0, 1, 4]
        assert_right(whole[1:6][finite], x[finite], weight)
        assert whole[3].isnan().all() and not whole[4].isfinite().any()


def test_the_number_of_threads_changes_no_bit():
    operands = int8_operands(3, 200, 96)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(int8_rows(*operands))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_op_is_one_for_torch(name):
    def operands(M):
        return int8_operands(M, 8, 32) if name == "int8" else (*int4_operands(M, 8, 32, 32), 32)

    op = getattr(torch.ops.minilora, f"{name}_rows")
    torch.library.opcheck(op, operands(3), test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda *parts: op(*parts) + 1, fullgraph=True, dynamic=True)
    for M in (1, 5):
        torch.testing.assert_close(compiled(*operands(M)), op(*operands(M)) + 1)


@needs_compiler
def test_a_library_is_built_once(tmp_path, monkeypatch):
    first = cpu.build(tmp_path / "new")
    assert [file.name for file in (tmp_path / "new").iterdir()] == [first.name]
    made = first.stat().st_mtime_ns
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("built again"))
    assert cpu.build(tmp_path / "new") == first and first.stat().st_mtime_ns == made


@needs_compiler
def test_it_brings_no_second_openmp(tmp_path):
    """Two would start twice as many threads as there are cores, waiting for each other."""
    built = cpu.build(tmp_path).read_bytes()
    assert b"GOMP_parallel" in built and b"libgomp" not in built


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler -O2"])
def test_without_a_compiler_torch_computes_it(tmp_path, monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path))
    cpu.native.cache_clear()
    try:
        assert cpu.native() is None
        x, *stored = int8_operands(3, 9, 40)
        assert_right(int8_rows(x, *stored), x, int8_weight(*stored))
        x, *stored = int4_operands(3, 9, 96, 32)
        assert_right(int4_rows(x, *stored, 32), x, int4_weight(*stored, 32))
    finally:
        cpu.native.cache_clear()
    assert not list(tmp_path.rglob("*.so"))


def test_a_cache_that_can_not_be_written_or_opened_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    assert cpu.build(tmp_path / "file" / "kernels") is None
    (tmp_path / "torn.so").write_bytes(b"\x7fELF")
    assert cpu.load(tmp_path / "torn.so") is None
    assert cpu.load(None) is None


def test_importing_builds_nothing(tmp_path):
    code = "from minilora.kernels import cpu; assert cpu.native.cache_info().misses == 0"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_second_import_under_a_bare_name_does_no_harm():
    """transformers looks for Hugging Face's `kernels`, and in the repository's root finds ours."""
    code = "import minilora, kernels; assert kernels.cpu is not minilora.kernels.cpu"
    place = Path(cpu.__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONSAFEPATH": "", "PYTHONPATH": str(place)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
