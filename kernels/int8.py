"""Frozen linears over INT8 codes, in traceable torch: both products from one stored matrix.

    W ≈ diag(scale) Q            Q int8 [N, K] in −127..127, scale f32 [N]: max|row| / 127
    Y = X Wᵀ + b                 grad_X = G W

Ways to multiply, chosen apart for each direction; the first two are both asked for as "int8":

    "int8"        rows of X are quantized too, X ≈ diag(t) P:   Y = t ∘ (P Qᵀ) ∘ scaleᵀ
                  rows of G ∘ scaleᵀ alike:                     grad_X = u ∘ (R Q)
    "blocks"      likewise in blocks of 64 along a row, to 7 bits (`cpu/blocks.c`): on a CPU with
                  AVX2 but no VNNI or AMX
    "dequantize"  Q is cast to X's dtype, which holds ±127 exactly: Y = (X Qᵀ) ∘ scaleᵀ

Inference may multiply up to 16 rows of X straight from the codes, unquantized (`few`).

M tokens, K in, N out. Integer products accumulate in int32, exactly while K, N < 2³¹ / 127².
Bytes: 1 per weight read in both directions; M·K (M·N) codes written and read.
Rounding is done in f32 and clamped: in bf16 the value 127.4 rounds to 128, which wraps to −128.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .cpu import int8_blocks, int8_rows
from .low_rank import FrozenLinear
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
        return x.to(torch.int8), torch.ones(len(x), 1, device=x.device)
    largest = x.abs().amax(dim=1, keepdim=True).to(torch.float32)
    # The bound keeps a row of subnormals from a scale of 0.
    scales = (largest / 127).clamp_(min=1e-37).masked_fill_(largest == 0, 1.0)
    codes = (x.to(torch.float32) / scales).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scales


def _can_multiply(M: int, K: int, N: int, device: torch.device) -> bool:
    if max(K, N) > LONGEST:
        return False
    # cuBLAS wants more than 16 rows, and sizes that are multiples of 8.
    return device.type == "cpu" or (M > 16 and K % 8 == 0 and N % 8 == 0)


def int8_product(x: Tensor, codes: Tensor, outliers: int = 0) -> Tensor:
    """Return `x @ codes` in f32 by an integer product, rows of x quantized on the way.

    Args:
        x: `[M, J]` floating point.
        codes: int8 `[J, L]`, any strides.
        outliers: this many columns of x, those with the largest magnitudes, are multiplied in f32
            instead and don't widen the other columns' scales. Which they are depends on all rows.

    Returns:
        f32 `[M, L]`.

    Dettmers et al. 2022, "LLM.int8()", section 3.2 (there by a threshold).
    """
    outliers = min(outliers, x.shape[1] // 16) if len(x) else 0
    if not outliers:
        quantized, scales = quantize_rows(x)
        return torch._int_mm(quantized, codes).to(torch.float32).mul_(scales)
    columns = x.abs().amax(dim=0).topk(outliers).indices
    quantized, scales = quantize_rows(x.index_fill(1, columns, 0))
    y = torch._int_mm(quantized, codes).to(torch.float32).mul_(scales)
    return y.addmm_(x[:, columns].to(torch.float32), codes[columns].to(torch.float32))


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """Add `[N]` to y `[M, N]` in place, if there is one."""
    return y if bias is None else y.add_(bias.to(y.dtype))


def int8_forward(
    x: Tensor, codes: Tensor, bits: Tensor, bias: Tensor | None, outliers: int = 0
) -> Tensor:
    """Return `x Wᵀ + b` through integers, in x's dtype; sums and scales in f32."""
    if not _can_multiply(len(x), *codes.shape[::-1], x.device):
        return int8_forward_dequantized(x, codes, bits, bias)
    y = int8_product(x, codes.t(), outliers).mul_(scales_from_bits(bits))
    return add_bias(y, bias).to(x.dtype)


def is_recorded() -> bool:
    """Tell whether the backward pass is recorded itself, for second derivatives."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def int8_grad_x(grad_out: Tensor, codes: Tensor, bits: Tensor, bias: Tensor | None) -> Tensor:
    """Return `G W` through integers; the scales go into G before its rows are quantized.

    Where G's own gradient is recorded (second derivatives) it is dequantized: rounding has none.
    """
    if is_recorded() or not _can_multiply(len(grad_out), *codes.shape, grad_out.device):
        return int8_grad_x_dequantized(grad_out, codes, bits, bias)
    scaled = grad_out.to(torch.float32) * scales_from_bits(bits)
    return int8_product(scaled, codes).to(grad_out.dtype)


def int8_forward_blocks(
    x: Tensor, codes: Tensor, bits: Tensor, bias: Tensor | None, outliers: int = 0
) -> Tensor:
    """Return `x Wᵀ + b` through bytes, in x's dtype (float64 is dequantized).

    `outliers` as for `int8_product`.
    """
    if x.dtype == torch.float64:
        return int8_forward_dequantized(x, codes, bits, bias)
    scales, wide = scales_from_bits(bits), x.to(torch.float32)
    outliers = min(outliers, x.shape[1] // 16) if len(x) else 0
    if not outliers:
        return add_bias(int8_blocks(wide, codes, scales, False), bias).to(x.dtype)
    columns = wide.abs().amax(dim=0).topk(outliers).indices
    y = int8_blocks(wide.index_fill(1, columns, 0), codes, scales, False)
    y.addmm_(wide[:, columns], (codes[:, columns].to(torch.float32) * scales[:, None]).t())
    return add_bias(y, bias).to(x.dtype)


def int8_grad_x_blocks(
    grad_out: Tensor, codes: Tensor, bits: Tensor, bias: Tensor | None
) -> Tensor:
    """Return `G W` through bytes; dequantized in float64 and where G's own gradient is recorded."""
    if is_recorded() or grad_out.dtype == torch.float64:
        return int8_grad_x_dequantized(grad_out, codes, bits, bias)
    grad_x = int8_blocks(grad_out.to(torch.float32), codes, scales_from_bits(bits), True)
    return grad_x.to(grad_out.dtype)


def _cast(codes: Tensor, dtype: torch.dtype) -> Tensor:
    if codes.dtype == dtype:  # INT4's, decoded to floats
        return codes
    return workspace(codes.shape, dtype, codes.device).copy_(codes)


def int8_forward_dequantized(x: Tensor, codes: Tensor, bits: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x Wᵀ + b` by a floating product with the codes, exact in every dtype but for sums."""
    y = F.linear(x, _cast(codes, x.dtype))
    if y.dtype == torch.float64:
        return add_bias(y.mul_(scales_from_bits(bits)), bias)
    wide = y.to(torch.float32).mul_(scales_from_bits(bits))
    return add_bias(wide, bias).to(x.dtype)


def int8_grad_x_dequantized(
    grad_out: Tensor, codes: Tensor, bits: Tensor, bias: Tensor | None
) -> Tensor:
    """Return `G W`, the scales applied to G in f32."""
    scales = scales_from_bits(bits)
    scaled = grad_out * scales if grad_out.dtype == torch.float64 else grad_out.float() * scales
    return torch.mm(scaled.to(grad_out.dtype), _cast(codes, grad_out.dtype))


def int8_dequantize(codes: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W `[N, K]`: `codes · scale` in f32, rounded to `dtype`."""
    return (codes.to(torch.float32) * scales_from_bits(bits)[:, None]).to(dtype)


def int8_forward_few(
    x: Tensor, codes: Tensor, bits: Tensor, bias: Tensor | None, many: Callable[..., Tensor]
) -> Tensor:
    """Return `x Wᵀ + b`; up to 16 rows straight from the codes, in f32, rounded once at the end.

    One token's product is bound by the bytes of the codes, which casting them first reads and
    writes several times over. More rows go to `many`.
    """
    if not is_few(x):
        return many(x, codes, bits, bias)
    y = int8_rows(x.to(torch.float32), codes, scales_from_bits(bits))
    return add_bias(y, bias).to(x.dtype)


def is_few(x: Tensor) -> bool:
    """Tell whether rows of x are few enough to be multiplied straight from stored codes."""
    return 0 < len(x) <= _FEW and x.dtype != torch.float64 and x.device.type == "cpu"


def forward_product(way: str, outliers: int, few: bool = False) -> Callable[..., Tensor]:
    """Return the product for Y of a way (see above); with `few`, few rows from the codes."""
    product: Callable[..., Tensor] = int8_forward_dequantized
    if way != "dequantize":
        product = int8_forward_blocks if way == "blocks" else int8_forward
        product = functools.partial(product, outliers=outliers) if outliers else product
    return functools.partial(int8_forward_few, many=product) if few else product


GRAD_X = {
    "int8": int8_grad_x,
    "blocks": int8_grad_x_blocks,
    "dequantize": int8_grad_x_dequantized,
}


def int8_linear(
    codes: Tensor,
    bits: Tensor,
    bias: Tensor | None,
    forward: str,
    backward: str,
    outliers: int = 0,
    few: bool = False,
) -> FrozenLinear:
    """Return the pair of products for INT8 storage.

    Args:
        codes: int8 `[N, K]`.
        bits: int32 `[N]`, the bit patterns of f32 scales.
        bias: `[N]` or None.
        forward: `"int8"`, `"blocks"` or `"dequantize"`, for Y.
        backward: likewise, for grad_X.
        outliers: as for `int8_product`, in the forward.
        few: whether up to 16 rows are multiplied straight from the codes.
    """
    product = forward_product(forward, outliers, few)
    return FrozenLinear((codes, bits, bias), product, GRAD_X[backward])
