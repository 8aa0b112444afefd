"""The passes between a decoder's products, keeping for backward only what they read.

    rms_norm   y = w ∘ u,   u = x ρ,   ρ = 1 / sqrt(mean(x²) + eps),   w = weight + offset
               grad_x = ρ (h − u · mean(h ∘ u)),  h = G ∘ w          grad_w = Σ G ∘ u
    swiglu     y = silu(a) ∘ b
               grad_a = G ∘ b ∘ silu'(a)                             grad_b = G ∘ silu(a)
    geglu      likewise, of gelu(a) = a (1 + tanh(√(2/π) (a + 0.044715 a³))) / 2
    rotary     rotary embeddings: pairs of a head's numbers, turned by an angle

Ordinary autograd keeps x widened to f32, and silu(a) beside a. Here ρ, u and silu(a) are formed
again in the backward pass, which costs a pass over a row where a layer's products cost hundreds.
In bf16 on a CPU each is one pass in C (`cpu/passes.c`) where that can be compiled; a traced graph
and other dtypes take torch's operations.
Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"; Shazeer 2020, "GLU Variants
Improve Transformer".
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .cpu.passes import (
    gated_back_pass,
    gated_pass,
    norm_back_pass,
    norm_pass,
    rotary_pass,
    takes,
)
from .workspace import fresh


def _unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return u and ρ, in f32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide * scale, scale


def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: int | None) -> Tensor:
    if takes(x, weight) and weight.shape == x.shape[-1:]:
        return norm_pass(x, weight, eps, offset)
    unit = _unit(x, eps)[0]
    if offset is None:
        return weight * unit.to(x.dtype)
    return fresh((unit * (weight.to(unit.dtype) + offset)).to(x.dtype))


def _silu_backward(grad_out: Tensor, gate: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(grad_out, gate)
    s = gate.sigmoid()  # torch's own pass has no derivative
    return grad_out * (s * (1 + gate * (1 - s)))


def _gelu(gate: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh")


def _gelu_backward(grad_out: Tensor, gate: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.aten.gelu_backward(grad_out, gate, approximate="tanh")
    c = math.sqrt(2 / math.pi)
    t = (c * (gate + 0.044715 * gate**3)).tanh()
    slope = 1 + t + gate * (1 - t * t) * (c * (1 + 3 * 0.044715 * gate * gate))
    return grad_out * slope / 2


_ACTS: dict[str, tuple[Any, Any]] = {
    "silu": (F.silu, _silu_backward),
    "gelu": (_gelu, _gelu_backward),
}


def _gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    if takes(gate, up) and gate.shape == up.shape:
        return gated_pass(gate, up, act == "gelu")
    return _ACTS[act][0](gate) * up


class _RMSNorm(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(_rms_norm)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.eps, ctx.offset = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        only_x = ctx.needs_input_grad == (True, False, False, False)
        if only_x and weight.shape == x.shape[-1:] and _passes(grad_out, x, weight):
            return norm_back_pass(grad_out, x, weight, ctx.eps, ctx.offset or 0), None, None, None
        unit, scale = _unit(x, ctx.eps)
        grad = grad_out.to(unit.dtype)
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            h = grad * (weight if ctx.offset is None else weight.to(grad.dtype) + ctx.offset)
            along = (h * unit).mean(-1, keepdim=True)
            grad_x = ((h - unit * along) * scale).to(x.dtype)
        if ctx.needs_input_grad[1]:
            rows = (grad * unit).reshape(-1, x.shape[-1])
            grad_w = rows.sum(0).to(weight.dtype)
        return grad_x, grad_w, None, None


class _Gated(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(_gated)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.act = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if gate.shape == up.shape and _passes(grad_out, gate, up):
            return *gated_back_pass(grad_out, gate, up, ctx.act == "gelu"), None
        act, act_backward = _ACTS[ctx.act]
        grad_gate = grad_up = None
        if ctx.needs_input_grad[0]:
            grad_gate = act_backward(grad_out * up, gate)
        if ctx.needs_input_grad[1]:
            grad_up = grad_out * act(gate)
        return grad_gate, grad_up, None


def _passes(*tensors: Tensor) -> bool:
    """Return whether a gradient is formed in C: there is no second derivative of it."""
    return not torch.is_grad_enabled() and takes(*tensors)


def _recorded(*tensors: Tensor) -> bool:
    """Return whether backward will run; else plain operations do, which also have tangents."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: int | None = None) -> Tensor:
    """Return `(weight + offset) · x / sqrt(mean(x²) + eps)`, the mean over each row.

    Args:
        x: `[..., D]` floating point; kept for backward as it is. Narrower ones are normed in f32.
        weight: `[D]`.
        eps: what keeps a row of zeros from a division by zero.
        offset: added to the weight in f32, in which the product is formed, too, and rounded once;
            None: nothing, and the unit row is rounded to x's dtype before it is weighted.

    Returns:
        `[..., D]` in x's dtype, or without an offset what that and the weight's promote to.
    """
    if _recorded(x, weight):
        return _RMSNorm.apply(x, weight, eps, offset)
    return _rms_norm(x, weight, eps, offset)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) · up`, both `[..., I]`, kept for backward."""
    return (_Gated.apply if _recorded(gate, up) else _gated)(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return `gelu(gate) · up` with the tanh's gelu, both `[..., I]`, kept for backward."""
    return (_Gated.apply if _recorded(gate, up) else _gated)(gate, up, "gelu")


class _Rotary(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotary_pass(x, cos, sin, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return rotary(grad_out, *ctx.saved_tensors, back=True), None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """Turn each pair (x_i, x_{i + half}) of rows by its angle; rotary embeddings.

    Args:
        x: `[B, H, T, D]`; what lies behind 2 · half stays.
        cos, sin: `[1 or B, 1, T, half]` of the angles, in x's dtype.
        back: turn by the negative angles.

    Returns:
        `[B, H, T, D]`.
    """
    if takes(x, cos, sin):
        if not back and _recorded(x):
            return _Rotary.apply(x, cos, sin)
        if not _recorded(x):
            return rotary_pass(x, cos, sin, back)
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    sin = -sin if back else sin
    turned = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat((*turned, rest) if rest.shape[-1] else turned, dim=-1)
