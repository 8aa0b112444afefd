"""Frozen linears over INT8 codes, in traceable torch: both products from one stored matrix.

    W ≈ diag(scale) Q            Q int8 [N, K] in −127..127, scale f32 [N]: max|row| / 127
    Y = X Wᵀ + b                 grad_X = G W

Ways to multiply, chosen apart for each direction; the first two are both asked for as "int8":

    "int8"        rows of X are quantized too, X ≈ diag(t) P:   Y = t ∘ (P Qᵀ) ∘ scaleᵀ
                  rows of G ∘ scaleᵀ alike:                     grad_X = u ∘ (R Q)
    "blocks"      the same in blocks of 64 along a row, to 7 bits (`cpu/blocks.c`): on a CPU with
                  AVX2 but no VNNI or AMX
    "dequantize"  Q is cast to X's dtype, which holds ±127 exactly: Y = (X Qᵀ) ∘ scaleᵀ
                  on CUDA W is decoded by one launch (`decoding.py`), in X's dtype: Y = X Wᵀ

Inference may multiply up to 16 rows of X straight from the codes, unquantized (`few`): one token's
product is bound by the bytes of the codes, which a cast reads and writes several times over.

M tokens, K in, N out. Integer products accumulate in int32, exactly while K, N < 2³¹ / 127².
Bytes: 1 per weight read in both directions; M·K (M·N) codes written and read.
Rounding is done in f32 and clamped: in bf16 the value 127.4 rounds to 128, which wraps to −128.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .cpu import int8_blocks, int8_rows
from .decoding import decoded, decodes
from .low_rank import Products, dense_forward
from .workspace import workspace

_FEW = 16  # rows up to which reading the codes is what a product costs
LONGEST = 2**31 // 127**2  # products of codes that one int32 can sum
COMPUTE = ("auto", "int8", "dequantize")


def scales_from_bits(bits: Tensor) -> Tensor:
    """View the int32 bit patterns of f32 scales as what they stand for, same shape.

    Modules store scales as integers, because `.to(torch.bfloat16)`, `.half()` and FSDP2's
    mixed-precision policy cast every floating-point parameter they see.
    """
    return bits.view(torch.float32)


def quotient(x: Tensor, divisor: float) -> Tensor:
    """Return x / divisor, rounded once on every device.

    By a number CUDA multiplies with its rounded reciprocal, so codes would differ from a CPU's.
    """
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row symmetrically: `x ≈ codes · scales`, scale = max|row| / 127.

    Args:
        x: `[M, K]` floating point; not changed.

    Returns:
        Codes int8 `[M, K]` in −127..127, rounded half to even, and scales f32 `[M, 1]`. A row of
        zeros has scale 1. A row with NaN or Inf has a scale that is not finite, so that its
        outputs show it.
    """
    if x.shape[1] == 0:
        return x.to(torch.int8), torch.ones(len(x), 1, dtype=torch.float32, device=x.device)
    largest = x.abs().amax(dim=1, keepdim=True).to(torch.float32)
    # The bound keeps a row of subnormals from a scale of 0.
    scales = quotient(largest, 127).clamp_(min=1e-37).masked_fill_(largest == 0, 1.0)
    codes = (x.to(torch.float32) / scales).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scales


def int8_decode(codes: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W `[N, K]`: `codes · scale` in f32, rounded to `dtype`."""
    return (codes.to(torch.float32) * scales_from_bits(bits)[:, None]).to(dtype)


class Codes(NamedTuple):
    """How the parts that store int8 codes `[N, K]` are read; scales f32 `[N]` are stored beside.

    `widen(like, *parts, floats)` returns the codes, or where `floats` says that they go on as
    such, perhaps their values in like's dtype. `rows(x, *parts, scales)` and
    `blocks(x, *parts, scales, across)` are products as `cpu.int8_rows` and `cpu.int8_blocks`.
    `weight(like, *parts, bits)` is W in like's dtype, where `decodes(like)`.
    """

    widen: Callable[..., Tensor]
    rows: Callable[..., Tensor]
    blocks: Callable[..., Tensor]
    weight: Callable[..., Tensor]


def _can_multiply(M: int, K: int, N: int, device: torch.device) -> bool:
    if max(K, N) > LONGEST:
        return False
    # cuBLAS wants more than 16 rows, and sizes that are multiples of 8.
    return device.type == "cpu" or (M > 16 and K % 8 == 0 and N % 8 == 0)


def _without_outliers(x: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """Return x with its `count` loudest columns at 0, and which these are (None: there are none).

    Multiplied in f32 beside the codes, they don't widen the other columns' scales. Which they are
    depends on all rows. Dettmers et al. 2022, "LLM.int8()", section 3.2 (there by a threshold).
    """
    count = min(count, x.shape[1] // 16) if len(x) else 0
    if not count:
        return x, None
    columns = x.abs().amax(dim=0).topk(count).indices
    return x.index_fill(1, columns, 0), columns


def _by_rows(x: Tensor, codes: Tensor, outliers: int = 0) -> Tensor:
    """Return f32 `x @ codes` for int8 codes `[J, L]`, rows of x quantized on the way."""
    rest, columns = _without_outliers(x, outliers)
    quantized, scales = quantize_rows(rest)
    y = torch._int_mm(quantized, codes).to(torch.float32).mul_(scales)
    if columns is None:
        return y
    return y.addmm_(x[:, columns].to(torch.float32), codes[columns].to(torch.float32))


def _by_blocks(
    read: Codes, x: Tensor, parts: list[Tensor], scales: Tensor, outliers: int
) -> Tensor:
    """Return `x Wᵀ` for x in f32, rounded in blocks on the way."""
    rest, columns = _without_outliers(x, outliers)
    y = read.blocks(rest, *parts, scales, False)
    if columns is None:
        return y
    codes = read.widen(x, *parts, False)[:, columns].to(torch.float32)
    return y.addmm_(x[:, columns], (codes * scales[:, None]).t())


def _cast(codes: Tensor, dtype: torch.dtype) -> Tensor:
    if codes.dtype == dtype:
        return codes
    return workspace(codes.shape, dtype, codes.device).copy_(codes)


def integer_products(
    read: Codes, forward: str, backward: str, outliers: int = 0, few: bool = False
) -> Products:
    """Return the products of a frozen linear whose weight is int8 codes times a scale an output.

    They take x or grad_out, the parts that `read` reads, the scales' bits `[N]` and the bias.

    Args:
        read: how the codes are stored.
        forward: `"int8"`, `"blocks"` or `"dequantize"`, for Y; float64 is never multiplied in
            blocks.
        backward: the same for grad_X; where G's own gradient is recorded (second derivatives) it
            is dequantized, as rounding has none.
        outliers: how many columns of x, those with the largest magnitudes, are multiplied in f32
            in the forward, a 16th of all at most.
        few: whether up to 16 rows are multiplied straight from the codes, in f32.
    """

    def linear_forward(x: Tensor, *stored: Tensor) -> Tensor:
        *parts, bits, bias = stored
        integers = forward == "int8" and _can_multiply(len(x), x.shape[1], len(bits), x.device)
        if not integers and decodes(x):
            return dense_forward(x, read.weight(x, *parts, bits), bias)
        scales, double = scales_from_bits(bits), x.dtype == torch.float64
        if few and 0 < len(x) <= _FEW and not double and x.device.type == "cpu":
            y = read.rows(x.to(torch.float32), *parts, scales)
        elif forward == "blocks" and not double:
            y = _by_blocks(read, x.to(torch.float32), parts, scales, outliers)
        else:
            codes = read.widen(x, *parts, forward == "dequantize")
            if integers:
                y = _by_rows(x, codes.t(), outliers).mul_(scales)
            else:
                y = F.linear(x, _cast(codes, x.dtype))
                y = (y if double else y.to(torch.float32)).mul_(scales)
        y = y if bias is None else y.add_(bias.to(y.dtype))
        return y.to(x.dtype)

    def linear_grad_x(grad_out: Tensor, *stored: Tensor) -> Tensor:
        *parts, bits, _ = stored
        recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        way = "dequantize" if recorded else backward
        if way != "int8" and decodes(grad_out):
            return torch.mm(grad_out, read.weight(grad_out, *parts, bits))
        scales, double = scales_from_bits(bits), grad_out.dtype == torch.float64
        wide = grad_out if double else grad_out.to(torch.float32)
        if way == "blocks" and not double:
            return read.blocks(wide, *parts, scales, True).to(grad_out.dtype)
        codes = read.widen(grad_out, *parts, way == "dequantize")
        if way == "int8" and _can_multiply(len(grad_out), *codes.shape, grad_out.device):
            return _by_rows(grad_out.to(torch.float32) * scales, codes).to(grad_out.dtype)
        scaled = (wide * scales).to(grad_out.dtype)
        return torch.mm(scaled, _cast(codes, grad_out.dtype))

    return linear_forward, linear_grad_x


def _as_stored(like: Tensor, codes: Tensor, floats: bool) -> Tensor:
    return codes


def _weight(like: Tensor, codes: Tensor, bits: Tensor) -> Tensor:
    return decoded(like, (codes, bits), "int8", *codes.shape, 0)


INT8_CODES = Codes(_as_stored, int8_rows, int8_blocks, _weight)  # parts: int8 [N, K]
