"""Tile choice: a pure function, so it is tested without triton or a GPU."""

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora.kernels.triton import launch as launching
from minilora.kernels.triton import tiles
from minilora.kernels.triton.launch import Launch, precision, run_all

ARCHES = st.sampled_from([75, 80, 86, 89, 90, 100, 103, 120, 121, 200])
FLOATS = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@pytest.mark.parametrize(
    ("arch", "known"),
    [(75, 80), (80, 80), (86, 89), (89, 89), (90, 90), (100, 90), (120, 120), (200, 120)],
)
def test_an_unknown_architecture_takes_the_nearest_known_ones_tiles(arch, known):
    assert tiles.nearest(arch) == known
    for dtype in (torch.float32, torch.float16):
        mine = tiles.gemm_tile(4096, 4096, 16, dtype, arch, "ieee")
        assert mine == tiles.gemm_tile(4096, 4096, 16, dtype, known, "ieee")


@given(r=st.integers(1, 256))
def test_ranks_are_padded_to_a_power_of_two(r):
    found = tiles.padded(r)
    assert found >= max(r, 16)
    assert found == 16 or found < 2 * r
    assert found & (found - 1) == 0


@given(M=st.integers(0, 2**20), N=st.integers(1, 2**18), r=st.integers(1, 256), dtype=FLOATS,
       arch=ARCHES, precision=st.sampled_from(["ieee", "tf32"]))  # fmt: skip
def test_tiles_are_powers_of_two_whose_pipeline_fits(M, N, r, dtype, arch, precision):
    limit, size = tiles.SHARED_MEMORY[tiles.nearest(arch)], dtype.itemsize
    gemm = tiles.gemm_tile(M, N, r, dtype, arch, precision)
    assert gemm.stages * (gemm.m + gemm.n) * gemm.k * size <= limit
    shrink = tiles.shrink_tile(M, r, dtype, arch, precision)
    assert shrink.r >= r
    assert shrink.stages * (shrink.m + shrink.r) * shrink.k * size <= limit
    tall = tiles.tall_tile(r, dtype, arch)
    assert tall.stages * (tall.k + tall.r) * tall.m * size <= limit
    expand = tiles.expand_tile(r, dtype, arch)
    if expand is not None:
        assert expand.r >= r
        assert 8 * tiles.padded(r) <= 2 * size * expand.m  # partial sums cost less than a reread
        assert expand.stages * (expand.m + expand.r) * expand.n * size <= limit
    quantize = tiles.quantize_tile(r, dtype, arch, precision)
    assert quantize.stages * (quantize.m + quantize.r) * quantize.k * size <= limit
    if dtype == torch.float32 and precision == "ieee":  # each tile is one sum, in order
        assert max(gemm.k, shrink.k, quantize.k, tall.m) <= 32
        assert expand is None
    for tile in (gemm, shrink, tall, quantize, expand):
        for value in (tile or gemm)[:5]:
            assert value == 0 or value & (value - 1) == 0


def test_few_rows_are_spread_over_the_gpu():
    assert [tiles.rows_for(M, 64) for M in (1, 512, 2048, 4096, 8192, 10**6)] == [
        16, 16, 16, 32, 64, 64
    ]  # fmt: skip
    assert tiles.splits_for(1000, 50) == 1
    assert tiles.splits_for(16, 64) == 8
    assert tiles.splits_for(16, 3) == 3
    assert tiles.splits_for(0, 0) == 1


@pytest.mark.parametrize(("M", "N", "n"), [(512, 4096, 128), (8192, 256, 128), (1024, 4096, 256)])
def test_wide_tiles_are_taken_where_they_fill_the_gpu_too(M, N, n):
    """A GPU of 132 multiprocessors is half idle under 64 tiles of 128 × 256."""
    gemm = tiles.gemm_tile(M, N, 16, torch.bfloat16, 90, "ieee")
    integers = tiles.int8_tile(M, N, 16, torch.bfloat16, 90, False)
    assert gemm[:3] == (128, n, 64)
    assert integers[:3] == (128, n, 128)


class OnSecondGPU(torch.Tensor):
    """Says that it lies on a GPU, of which there is none here."""

    device = torch.device("cuda", 1)


@pytest.mark.parametrize("traceable", [False, True])
@pytest.mark.parametrize(("cls", "wanted"), [(OnSecondGPU, ["cuda:1"]), (torch.Tensor, [])])
def test_a_kernel_is_launched_where_its_tensors_are(monkeypatch, cls, wanted, traceable):
    """Mocked, device and kernel both: Triton itself takes the current device."""
    entered, launched = [], []

    @contextlib.contextmanager
    def current(device):
        entered.append(str(device))
        yield

    class Kernel:
        fn = None

        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((grid, len(args), options))

    monkeypatch.setattr("minilora.kernels.triton.launch.is_interpreted", lambda: False)
    monkeypatch.setattr("minilora.kernels.triton.launch._compiled", {})
    monkeypatch.setattr(torch.cuda, "device", current)
    wrapped = []
    monkeypatch.setattr(torch.library, "wrap_triton", lambda k: wrapped.append(k) or k)
    tensor = torch.ones(2).as_subclass(cls)
    tile = tiles.Tile(16, 16, 16, 16, 4, 3)
    run_all([Launch(Kernel(), (1,), (0.5, tensor), {"BLOCK": 16}, tile)], traceable)
    assert entered == wanted
    assert len(wrapped) == traceable  # outside of an operator it costs several launches
    options = {"BLOCK": 16, "enable_fp_fusion": True, "num_warps": 4, "num_stages": 3}
    assert launched == [((1,), 2, options)]


class Compiles:
    """A kernel that lists what it was compiled for, and what its compiled ones are launched on."""

    def __init__(self):
        self.fn, self.compiled, self.launched = object(), [], []

    def __getitem__(self, grid):
        def compile_and_launch(*args, **options):
            self.compiled.append(args)
            return {(*grid, 1, 1): lambda *args: self.launched.append(args)}

        return compile_and_launch


def test_a_compiled_kernel_is_found_by_all_that_triton_specializes_on(monkeypatch):
    monkeypatch.setattr(launching, "_compiled", {})
    tile, kernel = tiles.Tile(16, 16, 16, 16, 4, 3), Compiles()
    x, other = torch.zeros(64), torch.ones(64)
    args, constants = (x, 16, 0.5, None), {"BLOCK": 16}

    def run(args=args, constants=constants, tile=tile):
        before = len(kernel.compiled)
        Launch(kernel, (1,), args, constants, tile).run()
        return len(kernel.compiled) > before

    assert run()
    assert not run()
    assert not run((other, 16, 0.25, None))
    found = kernel.launched[-1]
    assert found[0] is other
    assert found[1:] == (16, 0.25, None, 16)  # constants behind the arguments
    changes = {0: (x.half(), x[1:33]), 1: (17, 1, 2**31 + 16), 2: (1,), 3: (x,)}
    for position, values in changes.items():
        for value in values:
            changed = (*args[:position], value, *args[position + 1 :])
            assert run(changed)
            assert not run(changed)
    assert run(constants={"BLOCK": 32})
    assert run(tile=tile._replace(warps=8))
    kernel.fn = object()
    assert run()


def test_compiled_kernels_of_endless_sizes_are_let_go(monkeypatch):
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(launching, "_MOST", 3)
    kernel, x = Compiles(), torch.zeros(64)
    for size in range(2, 20):
        Launch(kernel, (1,), (x, size), {}, tiles.Tile(16, 16, 16, 16)).run()
        assert len(launching._compiled) <= 3
    assert len(kernel.compiled) == 18


@pytest.mark.parametrize(
    ("setting", "value", "wanted"),
    [
        ("matmul", "tf32", "tf32"),
        ("matmul", "ieee", "ieee"),
        ("all", "tf32", "tf32"),
        ("legacy", "high", "tf32"),
        ("legacy", "highest", "ieee"),
    ],
)
def test_f32_follows_every_switch_of_torch(setting, value, wanted):
    """The old ones and the new one, after which torch's old getters raise."""
    x, new = torch.ones(2, 2), torch.backends.cuda.matmul
    if setting != "legacy" and not hasattr(new, "fp32_precision"):
        pytest.skip("torch before 2.9 has the old switch alone")
    assert precision(x) == "ieee"
    try:
        if setting == "legacy":
            torch.set_float32_matmul_precision(value)
        elif setting == "all":
            torch.backends.fp32_precision = value
        else:
            new.fp32_precision = value
        assert precision(x) == wanted
        assert precision(x.half()) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")
        if hasattr(new, "fp32_precision"):
            torch.backends.fp32_precision = new.fp32_precision = "none"
    assert torch.get_float32_matmul_precision() == "highest"
