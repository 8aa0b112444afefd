"""The LoRA linear over quantized weights: two `torch.library` operators, and autograd between them.

    minilora::lora_stored           X, parts, b, A, B, s, seed, p, … → Y, S
    minilora::lora_stored_backward  G, X, parts, A, B, S, s, seed, p, …, wanted → grads

Two ways to multiply, chosen apart for each direction, as in kernels/int8.py: "int8" quantizes rows
beside the skinny product and multiplies integers; "dequantize" decodes the weight into a buffer and
goes on as over a plain one. The buffer is torch's: its allocator hands the same memory to the next
layer. Kept for backward: as in lora.py. For few rows, a GEMM that decodes 4-bit weights itself
was no faster (benchmarks/NOTES.md).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..workspace import is_plain
from .decode import launch_decode_int4, launch_decode_int8, launch_decode_nf4
from .int8 import launch_int8_gemm, launch_quantize
from .launch import Launch, architecture, precision, run_all
from .lora import new_gradients, plan_factors, plan_gemm, plan_shrink, plan_tall
from .tiles import CODES_TILE, TURNED_ROWS, int4_tile, int8_tile, nf4_tile, quantize_tile


class Weight(NamedTuple):
    """A stored matrix `[N, K]`: its format, its block or group, and the tensors of it.

    int8: codes, scale bits. int4: codes, steps, scale bits. nf4: codes, table, absmax bits; or
    codes, table, absmax codes, absmax2 bits, offset bits, dynamic code.
    """

    format: str
    N: int
    K: int
    block: int
    parts: list[Tensor]

    def scales(self) -> Tensor:
        """Return a f32 scale per output (not NF4)."""
        return self.parts[-1].view(torch.float32)

    def nf4(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
        """Return packed, absmax, absmax2, offset, code, table as the kernels take them."""
        packed, table, absmax = self.parts[0].reshape(-1), self.parts[1], self.parts[2].reshape(-1)
        if len(packed) % 4:  # read as int32
            packed = torch.nn.functional.pad(packed, (0, -len(packed) % 4))
        if len(self.parts) == 3:
            return packed, absmax.view(torch.float32), None, None, table, table
        absmax2, offset = (t.view(torch.float32) for t in self.parts[3:5])
        return packed, absmax, absmax2, offset, self.parts[5], table


def plan_decoded(w: Weight, out: Tensor) -> Launch:
    """Return the launch that fills `out [N, K]`: weights in its dtype, or codes for int8."""
    if w.format == "nf4":
        return launch_decode_nf4(*w.nf4(), w.block, out, nf4_tile(w.block))
    scales = None if out.dtype == torch.int8 else w.scales()
    if w.format == "int4":
        tile = int4_tile(w.parts[0].shape[1], out.stride(1) != 1)
        return launch_decode_int4(w.parts[0], w.parts[1], scales, w.block, out, tile)
    return launch_decode_int8(w.parts[0], scales, out, CODES_TILE)


def _codes(w: Weight, turned: bool) -> tuple[Tensor, list[Launch]]:
    """Return int8 codes `[N, K]`, or laid out as `[K, N]` and viewed so, and how to make them."""
    if w.format == "int8" and not turned:
        return w.parts[0], []
    shape = (w.K, w.N) if turned else (w.N, w.K)
    codes = w.parts[0].new_empty(shape, dtype=torch.int8)
    codes = codes.t() if turned else codes
    return codes, [plan_decoded(w, codes)]


def _decoded(w: Weight, dtype: torch.dtype) -> tuple[Tensor, list[Launch]]:
    out = w.parts[0].new_empty(w.N, w.K, dtype=dtype)
    return out, [plan_decoded(w, out)]


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def plan_forward(
    w: Weight, x: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float,
    seed: Tensor | None, p: float, way: str, y: Tensor, s: Tensor, arch: int,
) -> list[Launch]:  # fmt: skip
    """Return the launches that fill y `[M, N]` and s `[M, R]`."""
    M, R = x.shape[0], A.shape[0]
    if way == "int8":
        q, launches = _codes(w, False)
        codes, t = _quantized(x)
        tile = quantize_tile(R, x.dtype, arch, precision(x))
        launches.append(launch_quantize(x, None, A, seed, p, codes, t, s, 1.0, tile))
        tile = int8_tile(M, w.N, R, x.dtype, arch, False)
        launches.append(
            launch_int8_gemm(
                codes, t, q.t(), w.scales(), bias, s, B.t(), scaling, None, 0.0, y, tile
            )
        )
        return launches
    shrink = plan_shrink(x, A, seed, p, s, 1.0, arch)
    dense, launches = _decoded(w, x.dtype)
    gemm = plan_gemm(x, dense.t(), bias, s, B.t(), scaling, None, 0.0, y, arch)
    return [*launches, shrink, gemm]


def plan_backward(
    w: Weight, grad_out: Tensor, x: Tensor, A: Tensor, B: Tensor, s: Tensor, scaling: float,
    seed: Tensor | None, p: float, way: str, grad_s: Tensor,
    grad_x: Tensor | None, grad_A: Tensor | None, grad_B: Tensor | None, arch: int,
) -> list[Launch]:  # fmt: skip
    """Return the launches that fill grad_s `[M, R]` and what is given of the gradients."""
    if way == "dequantize" or grad_x is None:
        factors = (grad_out, x, A, B, s, scaling, seed, p, grad_s, grad_A, grad_B, arch)
        launches = plan_factors(*factors)
        if grad_x is None:
            return launches
        dense, decode = _decoded(w, x.dtype)
        gemm = plan_gemm(grad_out, dense, None, grad_s, A, 1.0, seed, p, grad_x, arch)
        return [*launches, *decode, gemm]
    M, R = x.shape[0], A.shape[0]
    codes, t = _quantized(grad_out)
    tile = quantize_tile(R, x.dtype, arch, precision(x))
    launches = [
        launch_quantize(
            grad_out, w.scales(), B.t(), None, 0.0, codes, t, grad_s, scaling, tile
        )
    ]  # fmt: skip
    if grad_B is not None:
        launches += plan_tall(s, grad_out, None, 0.0, grad_B.t(), scaling, arch)
    if grad_A is not None:
        launches += plan_tall(grad_s, x, seed, p, grad_A, 1.0, arch)
    q, decode = _codes(w, M >= TURNED_ROWS)
    tile = int8_tile(M, w.K, R, x.dtype, arch, seed is not None)
    gemm = launch_int8_gemm(codes, t, q, None, None, grad_s, A, 1.0, seed, p, grad_x, tile)
    return [*launches, *decode, gemm]


def _forward(
    x: Tensor, parts: list[Tensor], bias: Tensor | None, A: Tensor, B: Tensor, scaling: float,
    seed: Tensor | None, p: float, format: str, block: int, way: str, grad_way: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = x.new_empty(x.shape[0], B.shape[0])
    s = x.new_empty(x.shape[0], A.shape[0])
    A, B = A.to(x.dtype), B.to(x.dtype)
    w = Weight(format, B.shape[0], x.shape[1], block, parts)
    arch = architecture(x.device)
    launches = plan_forward(w, x, bias, A, B, scaling, seed, p, way, y, s, arch)
    run_all(launches, not is_plain(x))
    return y, s


def _backward(
    grad_out: Tensor, x: Tensor, parts: list[Tensor], A: Tensor, B: Tensor, s: Tensor,
    scaling: float, seed: Tensor | None, p: float, format: str, block: int, way: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = new_gradients((x, A, B), wanted)
    given = [g if want else None for g, want in zip(grads, wanted, strict=True)]
    grad_s = s.new_empty(s.shape)
    w = Weight(format, B.shape[0], x.shape[1], block, parts)
    launches = plan_backward(
        w, grad_out, x, A.to(x.dtype), B.to(x.dtype), s, scaling, seed, p, way, grad_s,
        *given, architecture(x.device),
    )  # fmt: skip
    run_all(launches, not is_plain(grad_out))
    return grads[0], grads[1], grads[2]


_forward_op = torch.library.triton_op("minilora::lora_stored", mutates_args={})(_forward)
_backward_op = torch.library.triton_op("minilora::lora_stored_backward", mutates_args={})(_backward)


@_forward_op.register_fake
def _forward_shape(x, parts, bias, A, B, *rest):
    return x.new_empty((x.shape[0], B.shape[0])), x.new_empty((x.shape[0], A.shape[0]))


@_backward_op.register_fake
def _backward_shape(grad_out, x, parts, A, B, *rest):
    return tuple(new_gradients((x, A, B), rest[-1]))


def _keep(ctx, inputs, output):
    x, parts, _, A, B, scaling, seed, p, format, block, _, grad_way = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, A, B, output[1], seed, *parts)
    ctx.options = (scaling, p, format, block, grad_way)


def _differentiate(ctx, grad_out, _):
    x, A, B, s, seed, *parts = ctx.saved_tensors
    nothing = [None] * len(parts)  # a list of inputs wants a list of gradients
    if grad_out is None:
        return None, nothing, *[None] * 10
    scaling, p, format, block, way = ctx.options
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[3], needs[4]]
    traced = torch.is_grad_enabled() or not is_plain(grad_out)
    backward = torch.ops.minilora.lora_stored_backward if traced else _backward
    grads = backward(
        grad_out.to(x.dtype), x, parts, A, B, s, scaling, seed, p, format, block, way, wanted
    )
    grad_x, grad_A, grad_B = (g if want else None for g, want in zip(grads, wanted, strict=True))
    return grad_x, nothing, None, grad_A, grad_B, *[None] * 7


_forward_op.register_autograd(_differentiate, setup_context=_keep)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _keep(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *grads):
        grad_x, _, *rest = _differentiate(ctx, *grads)
        return grad_x, None, *rest


def lora_stored(
    x: Tensor, parts: list[Tensor], bias: Tensor | None, A: Tensor, B: Tensor, scaling: float,
    format: str, block: int, way: str, grad_way: str, seed: Tensor | None = None, p: float = 0.0,
) -> Tensor:  # fmt: skip
    """Compute `x Ŵᵀ + bias + scaling · D(x) Aᵀ Bᵀ` for a quantized Ŵ.

    Args:
        x: `[M, K]` f32, f16 or bf16, any strides; kept for backward.
        parts: what stores Ŵ, see `Weight`; contiguous, frozen.
        bias: `[N]` or None.
        A: `[R, K]`, any floating dtype, cast to x's for the products.
        B: `[N, R]`, as A.
        scaling: alpha / r, or alpha / sqrt(r) under rsLoRA.
        format: "int8", "nf4" or "int4".
        block: weights that share a scale (int8 has none: 0).
        way: "int8" (not NF4) or "dequantize", for Y.
        grad_way: the same for the input's gradient.
        seed: int64 `[S]`, one for each M / S rows, that the dropout mask is a hash of; or None.
        p: the probability to drop.

    Returns:
        `[M, N]` in x's dtype.
    """
    how = (format, block, way, grad_way)
    if is_plain(x):
        return _Eager.apply(x, parts, bias, A, B, float(scaling), seed, float(p), *how)[0]
    return torch.ops.minilora.lora_stored(x, parts, bias, A, B, scaling, seed, p, *how)[0]
