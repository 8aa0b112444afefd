"""Frozen linears over 4-bit codes, in traceable torch: NF4 and INT4, decoded and multiplied.

NF4 (Dettmers et al. 2023, "QLoRA", section 3): row-major [N, K] as one line of n = N·K weights,

    w_i = table[q_i] · absmax[i // block]        absmax = offset + code8[a] · absmax2[b // 256]

two codes a byte, the earlier weight in the high nibble; `absmax` is stored as f32, or again
quantized to 8 bits (double quantization). INT4: symmetric, two-level scales,

    w_nk = q_nk · s_{n, k // group} · channel_n  q in −7..7, s in 1..18: q·s is an int8 code

so that an INT4 matrix widens to INT8's codes by integer arithmetic and shares its products.
Column j and column j + K/2 share a byte (low and high nibble): unpacking writes two runs.

Decoding goes through `workspace` in panels of whole rows, small enough that what lies between the
steps stays in cache. N out, K in. Bytes read: ~0.52 a weight; written: one dtype each.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .cpu import can_decode, int4_blocks, int4_rows, int4_weights, nf4_weights
from .int8 import (
    GRAD_X,
    add_bias,
    forward_product,
    is_few,
    is_recorded,
    scales_from_bits,
)
from .low_rank import FrozenLinear
from .workspace import workspace

_PANEL = 2**17  # weights decoded at a time
# QLoRA's codebook (appendix E): quantiles of N(0, 1), made symmetric around an exact 0.
NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def _pairs() -> Tensor:
    table = torch.tensor(NF4_TABLE, device="cpu")  # whatever the default device is
    byte = torch.arange(256, device="cpu")
    return torch.stack([table[byte // 16], table[byte % 16]], dim=1).view(torch.int64).reshape(-1)


# For each byte the two f32 weights it stands for, as one int64.
_PAIRS = _pairs()


def _decode_line(packed: Tensor, absmax: Tensor, block: int, out: Tensor) -> None:
    """Decode bytes `[n/2]` into `out [n]`; `absmax [⌈n/block⌉]` starts at out's first weight."""
    # index_select is several times faster than indexing by a tensor.
    values = torch.index_select(_PAIRS.to(packed.device), 0, packed.to(torch.int32))
    line = values.view(torch.float32)[: out.numel()]
    whole = out.numel() // block
    if whole:  # f32 products rounded once, as bitsandbytes does
        blocks = line[: whole * block].view(whole, block)
        out[: whole * block].view(whole, block).copy_(blocks.mul_(absmax[:whole, None]))
    if whole * block < out.numel():
        out[whole * block :].copy_(line[whole * block :].mul_(absmax[whole]))


def _dynamic_code() -> Tensor:
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middle = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*middle.tolist(), *(-middle).tolist()]
    return torch.tensor(sorted(values))


# The 256 values of bitsandbytes' signed 8-bit dynamic code, ascending: seven decades, of which
# decade i holds 2^i midpoints (Dettmers 2016, "8-Bit Approximations for Parallelism in Deep
# Learning", section 1.2).
DYNAMIC_CODE = _dynamic_code()


def nf4_absmax(absmax: Tensor, absmax2: Tensor | None, offset: Tensor | None) -> Tensor:
    """Return f32 scales `[blocks]`, undoing double quantization where there is one.

    Args:
        absmax: int32 bit patterns of f32 `[blocks]`, or uint8 codes `[blocks]`.
        absmax2: int32 bit patterns of f32 `[⌈blocks / 256⌉]`, or None.
        offset: int32 bit pattern of one f32 `[1]`, or None.
    """
    absmax = absmax.reshape(-1)
    if absmax2 is None or offset is None:
        return scales_from_bits(absmax)
    values = torch.index_select(DYNAMIC_CODE.to(absmax.device), 0, absmax.to(torch.int32))
    second = scales_from_bits(absmax2).repeat_interleave(256)[: len(values)]
    return values * second + scales_from_bits(offset)


def nf4_dequantize(
    packed: Tensor, absmax: Tensor, block: int, shape: torch.Size, out: Tensor
) -> Tensor:
    """Decode a whole matrix into `out [N, K]`, panel by panel.

    Args:
        packed: uint8 `[⌈N·K / 2⌉]`.
        absmax: f32 `[⌈N·K / block⌉]`.
        block: weights that share a scale.
        shape: `[N, K]`.
        out: where to; its dtype is what weights are rounded to.
    """
    n, line = shape.numel(), out.view(-1)
    if out.dtype == torch.float32 and block % 2 == 0 and can_decode(out):
        pairs = _PAIRS.view(torch.float32).view(256, 2)
        nf4_weights(packed.contiguous(), absmax.contiguous(), pairs, block, line)
        return out
    step = max(1, _PANEL // (2 * block)) * 2 * block
    for start in range(0, n, step):
        stop = min(n, start + step)
        scales = absmax[start // block : -(-stop // block)]
        _decode_line(packed[start // 2 : -(-stop // 2)], scales, block, line[start:stop])
    return out


# Opaque to the compiler, which does not vectorize the look-up (6 times slower on a CPU) and would
# have to trace the loop over panels. `like`, x or grad_out, gives the dtype; without it the calls
# of both passes would be one call, whose result is kept from the forward to the backward pass.
@torch.library.custom_op("minilora::nf4_weight", mutates_args=())
def _nf4_weight_op(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    N: int,
    K: int,
    block: int,
    like: Tensor,
) -> Tensor:
    # Not the workspace: the compiler may decode a second matrix before it has read the first.
    out = torch.empty(N, K, dtype=like.dtype, device=packed.device)
    scales = nf4_absmax(absmax, absmax2, offset)
    return nf4_dequantize(packed.reshape(-1), scales, block, out.shape, out)


@_nf4_weight_op.register_fake
def _(packed, absmax, absmax2, offset, N, K, block, like):
    return packed.new_empty((N, K), dtype=like.dtype)


def _nf4_weight(like, packed, absmax, absmax2, offset, sizes) -> Tensor:
    N, K, block = sizes
    if torch.compiler.is_compiling():
        return _nf4_weight_op(packed, absmax, absmax2, offset, N, K, block, like)
    shape = torch.Size((N, K))
    out = workspace(shape, like.dtype, packed.device)
    scales = nf4_absmax(absmax, absmax2, offset)
    return nf4_dequantize(packed.reshape(-1), scales, block, shape, out)


def nf4_linear(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, int],
    block: int,
) -> FrozenLinear:
    """Return the pair of products for NF4 storage: decode in x's dtype, then the dense ones.

    Args:
        packed: uint8 codes, `⌈N·K / 2⌉` of them in any shape.
        absmax: as for `nf4_absmax`.
        absmax2: likewise.
        offset: likewise.
        bias: `[N]` or None.
        shape: (N, K).
        block: weights that share a scale.
    """
    sizes = (*shape, block)

    def forward(x, packed, absmax, absmax2, offset, bias):
        W = _nf4_weight(x, packed, absmax, absmax2, offset, sizes)
        return F.linear(x, W, None if bias is None else bias.to(x.dtype))

    def grad_x(grad_out, packed, absmax, absmax2, offset, bias):
        W = _nf4_weight(grad_out, packed, absmax, absmax2, offset, sizes)
        return torch.mm(grad_out, W)

    return FrozenLinear((packed, absmax, absmax2, offset, bias), forward, grad_x)


def int4_codes(packed: Tensor, steps: Tensor, group: int) -> Tensor:
    """Widen INT4 storage to INT8 codes: `q · s`, int8 `[N, K]`.

    Args:
        packed: uint8 `[N, K/2]`, column j low, column j + K/2 high, each q + 8.
        steps: uint8 `[N, K/group]`, s in 1..18.
        group: weights of a row that share s; K is a multiple of it.
    """
    N, half = packed.shape
    K = 2 * half
    out = workspace(torch.Size((N, K)), torch.int8, packed.device)
    rows = N if torch.compiler.is_compiling() else max(1, 4 * _PANEL // max(1, K))
    for start in range(0, N, rows):
        panel = packed[start : start + rows]
        q = out[start : start + rows]
        q[:, :half] = (panel & 15).view(torch.int8)
        q[:, half:] = (panel >> 4).view(torch.int8)
        q -= 8
        s = steps[start : start + rows].view(torch.int8)
        q.view(len(q), -1, group).mul_(s[:, :, None])
    return out


def _int4_decoded(packed: Tensor, steps: Tensor, group: int, out: Tensor) -> Tensor:
    if not can_decode(out):
        return out.copy_(int4_codes(packed, steps, group))
    int4_weights(packed.contiguous(), steps.contiguous(), group, out)
    return out


# Opaque to the compiler, and with `like`, for the same reasons as `_nf4_weight_op`.
@torch.library.custom_op("minilora::int4_weight", mutates_args=())
def _int4_weight_op(packed: Tensor, steps: Tensor, group: int, like: Tensor) -> Tensor:
    out = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=like.dtype, device=packed.device)
    return _int4_decoded(packed, steps, group, out)


@_int4_weight_op.register_fake
def _(packed, steps, group, like):
    return packed.new_empty((packed.shape[0], 2 * packed.shape[1]), dtype=like.dtype)


def _int4_weight(packed: Tensor, steps: Tensor, group: int, like: Tensor) -> Tensor:
    """Return `q · s` in f32 `[N, K]`, for a product of floats on a CPU."""
    if torch.compiler.is_compiling():
        return _int4_weight_op(packed, steps, group, like)
    shape = torch.Size((packed.shape[0], 2 * packed.shape[1]))
    return _int4_decoded(packed, steps, group, workspace(shape, like.dtype, packed.device))


def int4_linear(
    packed: Tensor,
    steps: Tensor,
    bits: Tensor,
    bias: Tensor | None,
    group: int,
    forward: str,
    backward: str,
    outliers: int = 0,
    few: bool = False,
) -> FrozenLinear:
    """Return the pair of products for INT4 storage: INT8's, once widened to its codes.

    Args:
        packed: as for `int4_codes`.
        steps: likewise.
        bits: int32 `[N]`, bit patterns of f32 channel scales.
        bias: `[N]` or None.
        group: as for `int4_codes`.
        forward: `"int8"`, `"blocks"` or `"dequantize"`, for Y.
        backward: likewise, for grad_X.
        outliers: as for `int8_product`, in the forward.
        few: whether up to 16 rows are multiplied straight from the codes.
    """

    def codes(x, packed, steps, way):
        if way == "dequantize" and x.dtype == torch.float32 and x.device.type == "cpu":
            return _int4_weight(packed, steps, group, x)
        return int4_codes(packed, steps, group)

    def blocks(x, packed, steps, bits, across):
        return int4_blocks(x.float(), packed, steps, scales_from_bits(bits), group, across)

    def linear_forward(x, packed, steps, bits, bias):
        if few and is_few(x):
            y = int4_rows(x.to(torch.float32), packed, steps, scales_from_bits(bits), group)
            return add_bias(y, bias).to(x.dtype)
        if forward == "blocks" and not outliers and x.dtype != torch.float64:
            return add_bias(blocks(x, packed, steps, bits, False), bias).to(x.dtype)
        return forward_product(forward, outliers)(x, codes(x, packed, steps, forward), bits, bias)

    def linear_grad_x(grad_out, packed, steps, bits, bias):
        if backward == "blocks" and not is_recorded() and grad_out.dtype != torch.float64:
            return blocks(grad_out, packed, steps, bits, True).to(grad_out.dtype)
        return GRAD_X[backward](grad_out, codes(grad_out, packed, steps, backward), bits, bias)

    return FrozenLinear((packed, steps, bits, bias), linear_forward, linear_grad_x)
