"""Decoding NF4, INT4 and INT8 against their formulas in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sweeps import examples
from triton_cases import DEVICE, DTYPES, Output, assert_as_exact, needs_kernels, operand

needs_kernels()

from minilora.kernels import DYNAMIC_CODE, NF4_TABLE  # noqa: E402
from minilora.kernels.triton import decode, tiles  # noqa: E402
from minilora.kernels.triton.launch import cdiv  # noqa: E402
from minilora.kernels.triton.tiles import Tile  # noqa: E402

TABLE = torch.tensor(NF4_TABLE, device=DEVICE)
CODE = DYNAMIC_CODE.to(DEVICE)


def nf4_storage(n, block, double):
    """Random codes of n weights; operands as the kernels take them, and the weights in float64.

    Also what the weights would be if nothing cancelled: a scale is a sum of a code and an offset.
    """
    packed = torch.randint(256, (4 * cdiv(n, 8),), dtype=torch.uint8, device=DEVICE)
    codes = torch.stack([packed // 16, packed % 16], 1).reshape(-1)[:n].long()
    blocks = cdiv(n, block)
    if double:
        absmax = torch.randint(256, (blocks,), dtype=torch.uint8, device=DEVICE)
        absmax2, offset = operand(cdiv(blocks, 256)).abs(), operand(1).abs()
        second = absmax2.double().repeat_interleave(256)[:blocks]
        summands = CODE.double()[absmax.long()] * second, offset.double()
        scales, sizes = summands[0] + summands[1], summands[0].abs() + summands[1]
    else:
        absmax, absmax2, offset = operand(blocks).abs(), None, None
        scales = sizes = absmax.double()
    scales, sizes = (t.repeat_interleave(block)[:n] for t in (scales, sizes))
    values = TABLE.double()[codes]
    return (packed, absmax, absmax2, offset, CODE, TABLE), values * scales, values.abs() * sizes


def int4_storage(n, k, group):
    """Random codes of `[n, k]`; operands, integers q · s, and channel scales."""
    packed = torch.randint(256, (n, k // 2), dtype=torch.uint8, device=DEVICE)
    steps = torch.randint(1, 19, (n, k // group), dtype=torch.uint8, device=DEVICE)
    channel = operand(n).abs() / 126
    q = torch.cat([packed % 16, packed // 16], 1).double() - 8
    q.clamp_(min=-7)  # 0 is no code: it stands for −8, and −8 · 18 is no int8
    packed = torch.where(packed % 16 == 0, packed + 1, packed)
    packed = torch.where(packed // 16 == 0, packed + 16, packed)
    return packed, steps, channel, q * steps.double().repeat_interleave(group, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@examples(5, 10)
@given(
    n=st.sampled_from([1, 2, 63, 64, 500, 1024, 3001]),
    block=st.sampled_from([32, 64, 256]),
    double=st.booleans(),
)
def test_decode_nf4_matches_float64(dtype, n, block, double):
    operands, exact, size = nf4_storage(n, block, double)
    out = Output(1, n, dtype=dtype)
    tile = Tile(0, 1024 // block, 0, 0, 4, 1)
    decode.launch_decode_nf4(*operands, block, out.tensor, tile).run()
    assert_as_exact(out.checked()[0], exact, exact.to(dtype), size=size)


@pytest.mark.parametrize("dtype", DTYPES)
@examples(5, 10)
@given(
    n=st.sampled_from([1, 5, 16, 17]),
    k=st.sampled_from([1, 2, 3, 5]),
    group=st.sampled_from([32, 64, 128]),
    turned=st.booleans(),
)
def test_decode_int4_matches_float64(dtype, n, k, group, turned):
    k *= group
    packed, steps, channel, exact = int4_storage(n, k, group)
    for kind, scale in ((dtype, channel), (torch.int8, None)):
        out = Output(*((k, n) if turned else (n, k)), dtype=kind)
        view = out.tensor.t() if turned else out.tensor
        tile = Tile(0, 16, 64, 0, 4, 1)
        decode.launch_decode_int4(packed, steps, scale, group, view, tile).run()
        found = out.checked().t() if turned else out.checked()
        if scale is None:
            assert torch.equal(found.double(), exact)
        else:
            truth = exact * channel.double()[:, None]
            assert_as_exact(found, truth, truth.to(dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("turned", [False, True])
def test_decode_int8_scales_or_turns(dtype, turned):
    codes = torch.randint(-127, 128, (37, 70), dtype=torch.int8, device=DEVICE)
    scale = None if dtype == torch.int8 else operand(37).abs()
    out = Output(*((70, 37) if turned else (37, 70)), dtype=dtype)
    view = out.tensor.t() if turned else out.tensor
    decode.launch_decode_int8(codes, scale, view, Tile(0, 32, 32, 0, 4, 1)).run()
    found = out.checked().t() if turned else out.checked()
    exact = codes.double() * (1 if scale is None else scale.double()[:, None])
    assert_as_exact(found.double(), exact, exact.to(dtype if scale is not None else torch.float32))


def test_chosen_tiles_cover_small_and_large_matrices():
    for half in (16, 48, 64, 2048, 5504):
        for turned in (False, True):
            tile = tiles.int4_tile(half, turned)
            assert tile.n * tile.k == 8192
            assert tile.k % 16 == 0
    assert {tiles.nf4_tile(block).n * block for block in (32, 64, 4096)} == {16384}
