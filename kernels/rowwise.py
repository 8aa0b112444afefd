"""The passes between a decoder's products, keeping for backward only what they read.

    rms_norm   y = w ∘ u,   u = x ρ,   ρ = 1 / sqrt(mean(x²) + eps),   w = weight + offset
               grad_x = ρ (h − u · mean(h ∘ u)),  h = G ∘ w          grad_w = Σ G ∘ u
    swiglu     y = silu(a) ∘ b
               grad_a = G ∘ b ∘ silu'(a)                             grad_b = G ∘ silu(a)
    geglu      likewise, of gelu(a) = a (1 + tanh(√(2/π) (a + 0.044715 a³))) / 2

Ordinary autograd keeps x widened to f32, and silu(a) beside a. Here ρ, u and silu(a) are formed
again in the backward pass, which costs a pass over a row where a layer's products cost hundreds.
Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"; Shazeer 2020, "GLU Variants
Improve Transformer".
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .workspace import fresh


def _unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return u and ρ, in f32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide * scale, scale


def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: int | None) -> Tensor:
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
        act, act_backward = _ACTS[ctx.act]
        grad_gate = grad_up = None
        if ctx.needs_input_grad[0]:
            grad_gate = act_backward(grad_out * up, gate)
        if ctx.needs_input_grad[1]:
            grad_up = grad_out * act(gate)
        return grad_gate, grad_up, None


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
