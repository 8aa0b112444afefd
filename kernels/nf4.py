"""NF4 storage (Dettmers et al. 2023, "QLoRA", section 3): decoded, then multiplied as any weight.

A row-major matrix [N, K] as one line of n = N·K weights, two codes a byte, the earlier weight in
the high nibble:

    w_i = table[q_i] · absmax[i // block]        absmax = offset + code8[a] · absmax2[b // 256]

`absmax` is stored as f32, or again quantized to 8 bits (double quantization). Decoding goes through
`workspace` in panels, on a CPU small enough that what lies between the steps stays in cache. On
CUDA the products decode by one launch (`decoding.py`).
Bytes read: ~0.52 a weight; written: one dtype each.
"""

import torch
from torch import Tensor

from .cpu import can_decode, nf4_weights
from .decoding import decoded, decodes
from .int8 import scales_from_bits
from .low_rank import Products, decoded_products
from .workspace import is_traced, panel, placed, workspace

_PANEL = 2**17  # weights decoded at a time
# QLoRA's codebook (appendix E): quantiles of N(0, 1), made symmetric around an exact 0.
NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def _pairs() -> Tensor:
    # Whatever the defaults are when this is imported.
    table = torch.tensor(NF4_TABLE, dtype=torch.float32, device="cpu")
    byte = torch.arange(256, device="cpu")
    return torch.stack([table[byte // 16], table[byte % 16]], dim=1).view(torch.int64).reshape(-1)


# For each byte the two f32 weights it stands for, as one int64.
_PAIRS = _pairs()


def _dynamic_code() -> Tensor:
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        middle = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*middle.tolist(), *(-middle).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


# The 256 values of bitsandbytes' signed 8-bit dynamic code, ascending: seven decades, of which
# decade i holds 2^i midpoints (Dettmers 2016, "8-Bit Approximations for Parallelism in Deep
# Learning", section 1.2).
DYNAMIC_CODE = _dynamic_code()


def _absmax(absmax: Tensor, *second: Tensor) -> Tensor:
    """Return f32 scales `[blocks]` from their bits, or undoing double quantization."""
    absmax = absmax.reshape(-1)
    if not second:
        return scales_from_bits(absmax)
    absmax2, offset = second
    values = torch.index_select(placed(DYNAMIC_CODE, absmax.device), 0, absmax.to(torch.int32))
    scales = scales_from_bits(absmax2).repeat_interleave(256)[: len(values)]
    return values * scales + scales_from_bits(offset)


def _decode_line(packed: Tensor, absmax: Tensor, block: int, out: Tensor) -> None:
    """Decode bytes `[n/2]` into `out [n]`; `absmax [⌈n/block⌉]` starts at out's first weight."""
    # index_select is several times faster than indexing by a tensor.
    values = torch.index_select(placed(_PAIRS, packed.device), 0, packed.to(torch.int32))
    line = values.view(torch.float32)[: out.numel()]
    whole = out.numel() // block
    if whole:  # f32 products rounded once, as bitsandbytes does
        blocks = line[: whole * block].view(whole, block)
        out[: whole * block].view(whole, block).copy_(blocks.mul_(absmax[:whole, None]))
    if whole * block < out.numel():
        out[whole * block :].copy_(line[whole * block :].mul_(absmax[whole]))


def nf4_decode(parts: tuple[Tensor, ...], block: int, out: Tensor) -> Tensor:
    """Decode a whole matrix into `out [N, K]`, whose dtype the weights are rounded to.

    Args:
        parts: uint8 codes, `⌈N·K / 2⌉` of them in any shape, and the scales: int32 bit patterns of
            f32 `[⌈N·K / block⌉]`; or uint8 codes of as many, int32 bits of their scales, one for
            256, and int32 bits `[1]` of the offset.
        block: weights that share a scale.
        out: where to; contiguous.
    """
    packed, absmax = parts[0].reshape(-1), _absmax(*parts[1:])
    n, line = out.numel(), out.view(-1)
    if out.dtype == torch.float32 and block % 2 == 0 and can_decode(out):
        pairs = _PAIRS.view(torch.float32).view(256, 2)
        nf4_weights(packed, absmax, pairs, block, line)
        return out
    step = max(1, panel(_PANEL, out.device) // (2 * block)) * 2 * block
    for start in range(0, n, step):
        stop = min(n, start + step)
        scales = absmax[start // block : -(-stop // block)]
        _decode_line(packed[start // 2 : -(-stop // 2)], scales, block, line[start:stop])
    return out


# Opaque to the compiler, which does not vectorize the look-up (6 times slower on a CPU) and would
# have to trace the loop over panels. `like`, x or grad_out, gives the dtype; without it the calls
# of both passes would be one call, whose result is kept from the forward to the backward pass.
@torch.library.custom_op(
    "minilora::nf4_weight",
    mutates_args=(),
    schema="(Tensor[] parts, SymInt N, SymInt K, SymInt block, Tensor like) -> Tensor",  # for 2.6
)
def _weight_op(parts: list[Tensor], N: int, K: int, block: int, like: Tensor) -> Tensor:
    # Not the workspace: the compiler may decode a second matrix before it has read the first.
    out = torch.empty(N, K, dtype=like.dtype, device=like.device)
    return nf4_decode(tuple(parts), block, out)


@_weight_op.register_fake
def _(parts, N, K, block, like):
    return like.new_empty((N, K))


def nf4_products(N: int, K: int, block: int) -> Products:
    """Return the products of a frozen linear `[N, K]` in NF4; they take `nf4_decode`'s parts."""

    def decode(like: Tensor, *parts: Tensor) -> Tensor:
        if decodes(like):
            return decoded(like, parts, "nf4", N, K, block)
        if is_traced(like):
            return _weight_op(list(parts), N, K, block, like)
        out = workspace(torch.Size((N, K)), like.dtype, like.device)
        return nf4_decode(parts, block, out)

    return decoded_products(decode)
