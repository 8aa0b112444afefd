"""The products in C for few rows: against float64, built once, and done without."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from blocks_oracle import half_steps
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import read_by

import minilora
from minilora.kernels import NF4_TABLE, cpu, int4, int4_codes, nf4, private_folder, reference
from minilora.kernels.cpu import int4_blocks, int4_rows, int8_blocks, int8_rows
from minilora.kernels.workspace import workspace

needs_blocks = pytest.mark.skipif(not cpu.has_blocks(), reason="no AVX2, or no C compiler")
needs_compiler = pytest.mark.skipif(cpu.native() is None, reason="no C compiler that will do")


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


def built(folder, plain=False):
    """Return the library that the first compiler which will do makes."""
    found = [
        cpu.library.build(folder, c, ("-DPLAIN",) if plain else ()) for c in cpu.library.compilers()
    ]
    return next(library for library in found if library is not None)


@pytest.fixture(scope="module")
def put(tmp_path_factory):
    """Put a library that was built once into folders, as if it had been built there."""
    once = tmp_path_factory.mktemp("once") / "built"
    built(once)
    (file,) = once.glob("*.so")

    def put(folder):
        private_folder(folder)
        return Path(shutil.copy2(file, folder / file.name))

    return put


@pytest.fixture(scope="module", params=["this processor", "any processor"])
def library(request, tmp_path_factory):
    if cpu.native() is None:
        pytest.skip("no C compiler that will do")
    return built(tmp_path_factory.mktemp("built"), request.param == "any processor")


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
    for name, (drawn, *stored), sizes in (
        ("int8", int8_operands(5, 7, 33), [33]),
        ("int4", int4_operands(5, 7, 64, 32), [64, 32]),
    ):
        among = torch.full((7, drawn.shape[1]), torch.nan)  # reading beside x would show
        x = among[1:6].copy_(drawn)
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


def nf4_operands(n, block, seed=0):
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (-(-n // 2),), generator=generator, dtype=torch.uint8)
    return packed, torch.rand(-(-n // block), generator=generator) + 0.1


PAIRS = torch.tensor([[NF4_TABLE[byte // 16], NF4_TABLE[byte % 16]] for byte in range(256)])


@settings(max_examples=60)
@given(n=st.integers(1, 700), block=st.sampled_from([2, 32, 64, 256, 4096]), seed=st.integers(0, 9))
def test_nf4_weights_are_table_times_scale_rounded_once(library, n, block, seed):
    """Odd lengths and last blocks that are not full too; beside `out` nothing is written."""
    packed, absmax = nf4_operands(n, block, seed)
    whole = torch.full((n + 2,), 7.0)
    operands = (packed, absmax, PAIRS, whole[1:-1])
    library.minilora_nf4_weights(*(t.data_ptr() for t in operands), n, block)
    scales = absmax.repeat_interleave(block)[:n]
    wanted = PAIRS.double()[packed.long()].reshape(-1)[:n] * scales.double()
    assert torch.equal(whole[1:-1], wanted.float())
    assert whole[0] == whole[-1] == 7


@settings(max_examples=60)
@given(
    N=st.integers(1, 9),
    group=st.sampled_from([2, 8, 32, 64]),
    groups=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_int4_weights_are_codes_times_steps(library, N, group, groups, seed):
    """Groups that begin in the low half and end in the high one too."""
    _, packed, steps, scales = int4_operands(1, N, group * groups, group, seed)
    whole = torch.full((N + 2, group * groups), 7.0)
    operands = (packed, steps, whole[1:-1])
    library.minilora_int4_weights(*(t.data_ptr() for t in operands), *whole[1:-1].shape, group)
    wanted = int4_weight(packed, steps, torch.ones_like(scales), group)
    assert torch.equal(whole[1:-1].double(), wanted)
    assert (whole[[0, -1]] == 7).all()


@needs_compiler
@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_layers_decode_alike_in_c_and_in_torch(monkeypatch, format):
    """Both products to the bit, compiled ones to f32's rounding; and they are right."""
    model = torch.nn.Sequential(torch.nn.Linear(192, 40, bias=False))
    how = read_by(format, compute="dequantize", grad_compute="dequantize")
    (layer,) = minilora.quantize(model, format, **how)
    x, G, frozen, decoded = torch.randn(33, 192), torch.randn(33, 40), layer.frozen(), []

    @torch.no_grad()
    def both(x, G):
        y = frozen.linear_forward(x, *frozen.tensors)
        return y, frozen.linear_grad_x(G, *frozen.tensors)

    module = {"nf4": nf4, "int4": int4}[format]
    real = getattr(module, f"{format}_weights")
    monkeypatch.setattr(
        module, f"{format}_weights", lambda *given: decoded.append(real) or real(*given)
    )
    in_c = both(x, G)
    assert len(decoded) == 2
    torch.testing.assert_close(torch.compile(both)(x, G), in_c)
    assert len(decoded) == 4  # by C here too
    monkeypatch.setattr(module, "can_decode", lambda out: False)
    assert all(map(torch.equal, in_c, both(x, G)))
    W = layer.dequantize().double()
    torch.testing.assert_close(in_c[0].double(), x.double() @ W.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(in_c[1].double(), G.double() @ W, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_what_is_decoded_is_seen_by_tracers_and_stays_on_its_device():
    """A recorded graph decodes anew; another default device is none of the decoder's business."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 8, bias=False))
    minilora.quantize(model, "nf4")
    x = torch.randn(20, 64)
    with torch.no_grad():
        wanted = model(x)
        graph = torch.fx.experimental.proxy_tensor.make_fx(model)(x)
        workspace(torch.Size((8, 64)), torch.float32, x.device).zero_()
        torch.testing.assert_close(graph(x), wanted)
    code = """
import torch, minilora
torch.set_default_device("meta")
for format in ("nf4", "int4"):
    with torch.device("cpu"):
        model = minilora.quantize(torch.nn.Sequential(torch.nn.Linear(64, 8)), format)
        x = torch.randn(20, 64)
    with torch.no_grad():
        assert model(x).isfinite().all()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@needs_compiler
def test_operands_that_do_not_fit_are_refused_before_c_reads_them():
    packed, absmax = nf4_operands(128, 64)
    out = torch.empty(128)
    cpu.nf4_weights(packed, absmax, PAIRS, 64, out)
    for bad in (
        (packed[1:], absmax, PAIRS, 64, out),
        (packed, absmax[1:], PAIRS, 64, out),
        (packed, absmax, PAIRS[1:], 64, out),
        (packed, absmax, PAIRS, 63, out),
        (packed, absmax, PAIRS, 0, out),
        (packed, absmax.double(), PAIRS, 64, out),
        (packed, absmax, PAIRS, 64, torch.empty(256)[::2]),
    ):
        with pytest.raises((TypeError, ValueError), match="nf4_weights takes "):
            cpu.nf4_weights(*bad)
    _, packed, steps, _ = int4_operands(1, 3, 64, 32)
    out = torch.empty(3, 64)
    cpu.int4_weights(packed, steps, 32, out)
    for bad in (
        (packed[1:], steps, 32, out),
        (packed, steps[:, 1:], 32, out),
        (packed, steps, 64, out),
        (packed, steps, 0, out),
        (packed, steps.int(), 32, out),
        (packed, steps, 32, out.double()),
        (packed, steps, 32, torch.empty(64, 3).t()),
    ):
        with pytest.raises((TypeError, ValueError), match="int4_weights takes "):
            cpu.int4_weights(*bad)


def test_the_number_of_threads_changes_no_bit():
    operands = int8_operands(3, 200, 96)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(int8_rows(*operands))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_reference_is_the_oracle():
    x, codes, scales = int8_operands(3, 7, 31)
    found = reference.int8_rows(x.double(), codes, scales.double())
    torch.testing.assert_close(found, x.double() @ int8_weight(codes, scales).t())
    x, packed, steps, scales = int4_operands(3, 7, 64, 32)
    found = reference.int4_rows(x.double(), packed, steps, scales.double(), 32)
    torch.testing.assert_close(found, x.double() @ int4_weight(packed, steps, scales, 32).t())


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_op_is_one_for_torch(name):
    """One graph serves any number of rows."""

    def operands(M):
        return int8_operands(M, 8, 32) if name == "int8" else (*int4_operands(M, 8, 32, 32), 32)

    op, graphs = getattr(torch.ops.minilora, f"{name}_rows"), []
    torch.library.opcheck(op, operands(3), test_utils=("test_schema", "test_faketensor"))

    def seen(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda *parts: op(*parts) + 1, fullgraph=True, dynamic=True, backend=seen
    )
    for M in (2, 3, 5, 16):
        torch.testing.assert_close(compiled(*operands(M)), op(*operands(M)) + 1)
    assert len(graphs) == 1
    inductor = torch.compile(lambda *parts: op(*parts) + 1, fullgraph=True, dynamic=True)
    torch.testing.assert_close(inductor(*operands(3)), op(*operands(3)) + 1)


def test_operands_that_do_not_fit_are_refused():
    """C would read beside them, and return something."""
    x, codes, scales = int8_operands(2, 5, 64)
    for width in (32, 128):
        with pytest.raises(
            ValueError, match=rf"x in torch.float32 \[2, 64\], found torch.float32 \[2, {width}\]"
        ):
            int8_rows(torch.randn(2, width), codes, scales)
    with pytest.raises(
        ValueError, match=r"scales in .* \[5\], .* \[1\]; pass operands of one layer"
    ):
        int8_rows(x, codes, scales[:1])
    with pytest.raises(TypeError, match=r"x in torch.float32 .* found torch.bfloat16 \[2, 64\]"):
        int8_rows(x.bfloat16(), codes, scales)
    x, packed, steps, scales = int4_operands(2, 5, 64, 32)
    with pytest.raises(ValueError, match=r"x in torch.float32 \[2, 64\], found .* \[2, 32\]"):
        int4_rows(x[:, :32], packed, steps, scales, 32)
    with pytest.raises(ValueError, match=r"steps in torch.uint8 \[5, 4\], found .* \[5, 2\]"):
        int4_rows(x, packed, steps, scales, 16)
    for group in (0, -32, 48):
        with pytest.raises(ValueError, match=f"divide the 64 inputs, found groups of {group}"):
            int4_rows(x, packed, steps[:, : 64 // group if group > 0 else 2], scales, group)
    x, codes, scales = int8_operands(2, 5, 64)
    compiled = torch.compile(lambda x: int8_rows(x, codes, scales), fullgraph=True)
    with pytest.raises(Exception, match=r"int8_rows takes x in"):
        compiled(x[:, :32])


def in_blocks(x, codes, scales, across):
    """Return the product, what it should be, and how far off each result may be."""
    wanted = reference.int8_blocks(x.double(), codes.double(), scales.double(), across)
    weight = codes.double().abs() if across else codes.double().abs().T * scales.double()
    rows = x * scales if across else x
    bound = half_steps(rows, codes.T if across else codes) @ weight
    return int8_blocks(x, codes, scales, across), wanted, bound * 1.001 + 1e-5 * wanted.abs()


@needs_blocks
@settings(max_examples=80)
@given(
    M=st.integers(0, 8),
    N=st.integers(1, 70),
    K=st.sampled_from([1, 3, 16, 17, 63, 64, 65, 130, 192]),
    kind=st.sampled_from(
        ["normal", "extreme codes", "codes themselves", "one loud", "tiny", "huge"]
    ),
    across=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blocks_are_off_by_half_a_step_at_most(M, N, K, kind, across, seed):
    """Rows as long as can be along the codes too, where 16 bits hold only what the scale leaves."""
    x, codes, scales = int8_operands(M, N, K, seed)
    x = torch.randn(M, N, generator=torch.Generator().manual_seed(seed)) if across else x
    if kind in ("extreme codes", "codes themselves"):
        codes = (codes.sign() * 127).to(torch.int8)
    if kind == "codes themselves" and M:  # in no other direction are sums as large
        x = (codes.T if across else codes)[torch.arange(M) % (K if across else N)].float()
        x = x / scales if across else x
    if kind == "one loud":
        x[:, -1:] *= 1e4
    x = x * {"tiny": 1e-25, "huge": 1e30}.get(kind, 1)
    y, wanted, bound = in_blocks(x, codes, scales, across)
    assert y.dtype == torch.float32 and y.shape == wanted.shape
    assert ((y.double() - wanted).abs() <= bound).all()
    rows = [int8_blocks(x[i : i + 1], codes, scales, across) for i in range(M)]
    assert torch.equal(y, torch.cat([y[:0], *rows])), "a row follows from that row alone"


@needs_blocks
@pytest.mark.parametrize("across", [False, True])
def test_blocks_of_small_whole_numbers_are_exact(across):
    """With a 63 in every block its step is 1 and nothing is rounded: the integers are left."""
    generator = torch.Generator().manual_seed(0)
    for M, N, K in ((1, 1, 64), (5, 40, 192), (64, 128, 320)):
        codes = torch.randint(-30, 31, (N, K), generator=generator, dtype=torch.int8)
        J = N if across else K
        x = torch.randint(-20, 21, (M, J), generator=generator).float()
        x[:, ::64] = 63
        y = int8_blocks(x, codes, torch.ones(N), across)
        assert torch.equal(
            y.double(), x.double() @ (codes.double() if across else codes.double().T)
        )


@needs_blocks
@settings(max_examples=40)
@given(
    M=st.integers(0, 5),
    N=st.integers(1, 40),
    group=st.sampled_from([2, 32, 64]),
    groups=st.integers(1, 5),
    across=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blocks_of_four_bit_codes_are_those_of_their_bytes(M, N, group, groups, across, seed):
    x, packed, steps, scales = int4_operands(M, N, group * groups, group, seed)
    x = torch.randn(M, N) if across else x
    codes = int4_codes(packed, steps).clone()
    found = int4_blocks(x, packed, steps, scales, group, across)
    assert torch.equal(found, int8_blocks(x, codes, scales, across))


@needs_blocks
@pytest.mark.parametrize("across", [False, True])
def test_blocks_keep_nan_and_zero_and_do_not_depend_on_threads(across):
    x, codes, scales = int8_operands(1000, 100, 200)
    x = torch.randn(1000, 100) if across else x
    x[3], x[4, 7], x[5, 99], x[6, 0] = 0, torch.nan, torch.inf, -torch.inf
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(int8_blocks(x, codes, scales, across))
    torch.set_num_threads(before)
    y = found[0]
    assert (y[3] == 0).all() and y[4:7].isnan().all()
    others = torch.cat([y[:3], y[7:]])
    assert others.isfinite().all() and (others != 0).all()
    for one in found[1:]:
        assert torch.equal(one.nan_to_num(), y.nan_to_num())
    strided = int8_blocks(x.repeat(1, 2)[::2, : x.shape[1]], codes.T.contiguous().T, scales, across)
    assert torch.equal(strided.nan_to_num(), y[::2].nan_to_num())


@needs_blocks
def test_blocks_write_nothing_beside_their_result(monkeypatch):
    """Result and working memory end where they should, in every shape of rest."""
    guarded = []

    def reused(count, dtype, device):
        guarded.append(torch.full((count + 64,), 7, dtype=dtype))
        return guarded[-1][:count]

    monkeypatch.setattr(cpu, "reused", reused)
    for M, N, K in ((1, 1, 2), (4, 17, 66), (7, 31, 126)):
        for across in (False, True):
            x, packed, steps, scales = int4_operands(M, N, K, 2)
            x = torch.randn(M, N) if across else x
            J, L = (N, K) if across else (K, N)
            whole = torch.full((M + 2, L), 7.0)
            work = reused(cpu.native().minilora_blocks_bytes(M, J, L, 1), torch.uint8, None)
            parts = (x, packed, steps, scales, whole[1:], work)
            cpu.native().minilora_int4_blocks(*(t.data_ptr() for t in parts), M, J, L, across, 2)
            assert (whole[[0, -1]] == 7).all()
            assert torch.equal(whole[1:-1], int4_blocks(x, packed, steps, scales, 2, across))
            int8_blocks(x, int4_codes(packed, steps).clone(), scales, across)
    assert len(guarded) == 18 and all((tensor[-64:] == 7).all() for tensor in guarded)


@needs_blocks
@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("across", [False, True])
def test_blocks_are_one_op_for_torch(name, across):
    def operands(M):
        four_bits = int4_operands(M, 64, 64, 32)
        return (*four_bits, 32, across) if name == "int4" else (*int8_operands(M, 64, 64), across)

    op = getattr(torch.ops.minilora, f"{name}_blocks")
    torch.library.opcheck(op, operands(3), test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda *parts: op(*parts) + 1, fullgraph=True, dynamic=True)
    for M in (2, 5):
        torch.testing.assert_close(compiled(*operands(M)), op(*operands(M)) + 1)


@needs_blocks
def test_operands_that_do_not_fit_blocks_are_refused():
    x, codes, scales = int8_operands(2, 5, 64)
    with pytest.raises(ValueError, match=r"int8_blocks takes x in .* \[2, 64\], .* \[2, 63\]"):
        int8_blocks(x[:, 1:], codes, scales, False)
    with pytest.raises(ValueError, match=r"int8_blocks takes x in .* \[2, 5\], .* \[2, 64\]"):
        int8_blocks(x, codes, scales, True)
    with pytest.raises(ValueError, match=r"takes scales in .* \[5\], found .* \[4\]"):
        int8_blocks(x, codes, scales[1:], False)
    with pytest.raises(TypeError, match="takes x in torch.float32 .*, found torch.bfloat16"):
        int8_blocks(x.bfloat16(), codes, scales, False)
    with pytest.raises(TypeError, match=r"takes codes in torch.int8 .*, found torch.uint8"):
        int8_blocks(x, codes.view(torch.uint8), scales, False)
    compiled = torch.compile(lambda x: int8_blocks(x, codes, scales, False), fullgraph=True)
    with pytest.raises(Exception, match="takes x in"):
        compiled(x[:, 1:])
    x, packed, steps, scales = int4_operands(2, 5, 64, 32)
    with pytest.raises(ValueError, match=r"steps in torch.uint8 \[5, 4\], found .* \[5, 2\]"):
        int4_blocks(x, packed, steps, scales, 16, False)
    with pytest.raises(TypeError, match="takes codes in torch.uint8 .* found torch.int8"):
        int4_blocks(x, packed.view(torch.int8), steps, scales, 32, False)


@needs_compiler
def test_without_avx2_there_are_no_blocks(tmp_path, monkeypatch):
    assert not built(tmp_path, plain=True).minilora_has_blocks()
    monkeypatch.setattr(cpu, "has_blocks", lambda: False)
    x, codes, scales = int8_operands(2, 5, 64)
    with pytest.raises(RuntimeError, match="need a processor with AVX2 and a C compiler, and one"):
        int8_blocks(x, codes, scales, False)


@needs_compiler
def test_a_library_is_built_once_and_again_when_it_is_torn(tmp_path, monkeypatch):
    assert built(tmp_path / "new") is not None
    (file,) = (tmp_path / "new").iterdir()
    whole = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("built again"))
        assert built(tmp_path / "new") is not None
    torn = tmp_path / "torn" / file.name  # a path of its own: an open library is not read again
    torn.parent.mkdir(mode=0o700)
    torn.write_bytes(whole[:100])
    torn.chmod(0o700)
    assert built(tmp_path / "torn") is not None
    assert torn.stat().st_size == len(whole)


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners here")
def test_a_library_that_others_could_have_written_is_not_loaded(tmp_path, put):
    file = put(tmp_path / "new")
    assert file.stat().st_mode & 0o777 == 0o700
    assert file.parent.stat().st_mode & 0o777 == 0o700
    for path in (file, file.parent):
        before = path.stat().st_mode
        path.chmod(0o777)
        assert cpu.library._open(file) is None
        path.chmod(before)
    assert cpu.library._open(file) is not None


@needs_compiler
def test_it_brings_no_second_openmp(tmp_path, put):
    """Two would start twice as many threads as there are cores, waiting for each other."""
    code = put(tmp_path).read_bytes()
    assert b"GOMP_parallel" in code and b"libgomp" not in code


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners here")
@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_a_library_below_a_folder_that_others_can_change_is_not_loaded(
    tmp_path, monkeypatch, put, mode
):
    """Another user could swap the folder after the check; in a sticky one nobody can."""
    shared = tmp_path / "shared"
    folder = shared / "minilora" / "kernels"
    file = put(folder)
    shared.chmod(mode)
    assert (cpu.library._open(file) is None) == (not mode & 0o1000)
    made = cpu.library.build(folder, cpu.library.compilers()[0])
    assert (made is None) == (not mode & 0o1000)
    monkeypatch.setenv("MINILORA_CACHE", str(shared / "minilora"))
    cpu.native.cache_clear()
    try:
        assert cpu.native() is not None  # built for this process alone
    finally:
        cpu.native.cache_clear()


@needs_compiler
@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="no /proc here")
def test_the_file_that_was_checked_is_the_one_that_is_loaded(tmp_path, monkeypatch, put):
    """Whatever lies under the name when it is loaded."""
    file = put(tmp_path / "new")
    planted, check = tmp_path / "planted", os.fstat
    planted.write_text("not a library")

    def swapped(opened):
        found = check(opened)
        os.replace(planted, file)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", swapped)
        assert cpu.library._open(file) is not None
    assert file.read_text() == "not a library"
    assert cpu.library._open(file) is None
    link = tmp_path / "new" / "link.so"
    link.symlink_to(file)
    assert cpu.library._open(link) is None


def test_every_folder_of_the_cache_is_made_for_this_user_alone(tmp_path):
    made = private_folder(tmp_path / "a" / "b" / "c")
    assert made == (tmp_path / "a" / "b" / "c").resolve()
    if os.name == "posix":
        for level in (made, made.parent, made.parent.parent):
            assert level.stat().st_mode & 0o777 == 0o700
        made.parent.chmod(0o777)
        with pytest.raises(PermissionError, match="others could write to this folder.*a/b'"):
            private_folder(made)


@pytest.mark.skipif(getattr(os, "getuid", lambda: 1)() != 0, reason="only root can give away")
def test_a_folder_that_a_group_can_change_is_private_if_the_group_is_the_users_own(tmp_path):
    """As all folders are that a user makes with umask 002."""
    shared, folder = tmp_path / "shared", tmp_path / "shared" / "minilora"
    private_folder(folder)
    shared.chmod(0o775)
    os.chown(shared, -1, os.getgid())
    assert private_folder(folder) == folder.resolve()
    for group in (1, 2**31 - 2):  # another one, and one without a name
        os.chown(shared, -1, group)
        with pytest.raises(PermissionError, match="others could write to this folder.*shared'"):
            private_folder(folder)


@pytest.mark.skipif(getattr(os, "getuid", lambda: 1)() != 0, reason="only root can give away")
def test_a_folder_of_another_user_is_no_place_for_a_cache(tmp_path):
    made = private_folder(tmp_path / "a" / "b")
    for level in (made, made.parent):
        os.chown(level, 12345, -1)
        with pytest.raises(PermissionError, match="others could write"):
            private_folder(made)
        os.chown(level, 0, -1)


def test_a_compiler_in_the_current_folder_is_not_run(tmp_path, monkeypatch):
    (tmp_path / "cc").write_text("#!/bin/sh\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", f".{os.pathsep}")
    assert cpu.library.compilers() == []
    monkeypatch.setenv("CC", "./cc -O1")  # asked for by its place
    assert cpu.library.compilers() == [["./cc", "-O1"]]


@needs_compiler
@pytest.mark.parametrize("case", ["no home", "no right"])
def test_where_there_is_no_cache_it_is_built_for_this_process_alone(monkeypatch, case):
    def denied(*_):
        raise PermissionError(13, "denied") if case == "no right" else RuntimeError("no home")

    monkeypatch.setattr("minilora.kernels.cpu.library.cache_folder", denied)
    cpu.native.cache_clear()
    try:
        assert cpu.native() is not None
    finally:
        cpu.native.cache_clear()


@pytest.mark.parametrize("case", ["false", "no-such-compiler -O2", "'"])
def test_where_nothing_can_be_built_torch_computes_the_same(tmp_path, monkeypatch, case):
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", case)
    cpu.native.cache_clear()
    try:
        assert cpu.native() is None
        monkeypatch.setattr(cpu, "_PANEL", 160)  # panels of four rows of W, and of one
        x, *stored = int8_operands(3, 9, 40)
        assert_right(int8_rows(x, *stored), x, int8_weight(*stored))
        assert torch.equal(int8_rows(x[1:2], *stored), int8_rows(x, *stored)[1:2])
        x, *stored = int4_operands(3, 9, 96, 32)
        assert_right(int4_rows(x, *stored, 32), x, int4_weight(*stored, 32))
        assert not cpu.can_decode(x)
    finally:
        cpu.native.cache_clear()
    assert not list(tmp_path.rglob("*.so"))


def test_a_folder_that_can_not_be_made_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    assert cpu.library.build(tmp_path / "file" / "kernels", ["cc"]) is None


def test_importing_builds_nothing(tmp_path):
    code = "from minilora.kernels import cpu; assert cpu.native.cache_info().misses == 0"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_second_import_under_a_bare_name_does_no_harm():
    """transformers looks for Hugging Face's `kernels`, and in the repository's root finds ours."""
    code = (
        "import minilora.kernels as ours, kernels, torch; q = torch.ones(1, 2, 3, 4); "
        "assert not hasattr(kernels, 'cpu'); ours.capped_attention(q, q, q, None, 1.0, 5.0)"
    )
    place = Path(cpu.__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONSAFEPATH": "", "PYTHONPATH": str(place)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
