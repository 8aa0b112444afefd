"""Causal attention with a backward pass by matrix products over chunks of queries.

    P = softmax(s·Q Kᵀ) below the diagonal        O = P V
    dV = Pᵀ dO    dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O))    dQ = s·dS K    dK = s·dSᵀ Q

B sequences, T tokens, H query heads over H / G key heads of width D. The forward pass is torch's
flash kernel. Its backward kernel takes 1.6 to 2.6 times as long as these products on two cores
with AMX, at 256 to 1024 tokens (benchmarks/NOTES.md): here a chunk of 128 queries meets only the
keys before its end, all G heads of a group in one product, and P is formed again from Q, K and the
log-sums the forward kept. Nothing `[T, T]` is kept; `[B·H, 128, T]` exists at a time. The passes
over it go through `torch.compile`, so this is for models that are compiled anyway; and for bf16
where this CPU multiplies that slowly, with products in f32: torch's backward kernel is several
times slower in bf16 there, its forward is not (benchmarks/NOTES.md).
In bf16 and f16 scores and dO Vᵀ are rounded once more than in torch's kernel: dQ has up to twice
its error (0.5 % against 0.26 %), which is what dK and dV have in both.
FlashAttention-2's algebra: Dao 2023, arXiv:2307.08691, section 2.3.2.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .probe import is_slow
from .versions import FLASH_GROUPS_HEADS

_QUERIES = 128  # rows of a chunk
_flash = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def _weights(
    scores: Tensor, grad_p: Tensor, log_sums: Tensor, dots: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return P and s·dS `[X, G, c, end]` of the last c of `end` tokens, in the scores' dtype."""
    rows, end = scores.shape[-2:]
    seen = torch.arange(end, device=scores.device) <= torch.arange(
        end - rows, end, device=scores.device
    ).unsqueeze(1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    p = torch.where(seen, (scores.to(wide) * scale - log_sums).exp(), 0.0)
    grad_s = p * (grad_p.to(wide) - dots) * scale
    return p.to(scores.dtype), grad_s.to(scores.dtype)


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_weights, dynamic=True)


def _backward(
    weights: Callable[..., tuple[Tensor, Tensor]],
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, D = q.shape
    heads = k.shape[1]
    X, G = B * heads, H // heads
    wide = log_sums.dtype
    narrow, compute = q.dtype, wide if is_slow(q.dtype) else q.dtype
    keys, values = k.reshape(X, T, D).to(compute), v.reshape(X, T, D).to(compute)
    dots = (grad_out.to(wide) * out.to(wide)).sum(-1)
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k = torch.zeros(X, T, D, dtype=wide, device=q.device)
    grad_v = torch.zeros_like(grad_k)
    for start in range(0, T, _QUERIES):
        end = min(start + _QUERIES, T)
        shape = (X, G, end - start, end)
        queries, grads = (t[:, :, start:end].reshape(X, -1, D).to(compute) for t in (q, grad_out))
        sums, dot = (t[:, :, start:end].reshape(*shape[:3], 1) for t in (log_sums, dots))
        scores = torch.bmm(queries, keys[:, :end].transpose(1, 2)).view(shape)
        grad_p = torch.bmm(grads, values[:, :end].transpose(1, 2)).view(shape)
        p, grad_s = (t.view(X, -1, end) for t in weights(scores, grad_p, sums, dot, scale))
        grad_v[:, :end] += torch.bmm(p.transpose(1, 2), grads)
        grad_k[:, :end] += torch.bmm(grad_s.transpose(1, 2), queries)
        grad_q[:, :, start:end] = torch.bmm(grad_s, keys[:, :end]).view(B, H, -1, D)
    return grad_q, grad_k.to(narrow).view(k.shape), grad_v.to(narrow).view(v.shape)


# One opaque operation: its loop depends on T, which a traced graph may leave open.
@torch.library.custom_op("minilora::causal_attention_backward", mutates_args=())
def _backward_op(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(_compiled(), grad_out, q, k, v, out, log_sums, scale)


@_backward_op.register_fake
def _(grad_out, q, k, v, out, log_sums, scale):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return torch's flash attention and its log-sums `[B, H, T]`."""
    if not FLASH_GROUPS_HEADS:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return _flash(q, k, v, 0.0, True, scale=scale)  # type: ignore[misc]


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, fused: bool) -> Tensor:
        out, log_sums = _forward(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, log_sums)
        ctx.scale, ctx.fused = scale, fused
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        saved = (*ctx.saved_tensors, ctx.scale)
        if ctx.fused:
            return *_backward_op(grad_out, *saved), None, None
        return *_backward(_weights, grad_out, *saved), None, None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend from each token to itself and those before it.

    Args:
        q: `[B, H, T, D]`.
        k: `[B, H / G, T, D]`, each head read by G query heads in a row.
        v: like k.
        scale: what q·k is multiplied by, usually 1/√D.

    Returns:
        `[B, H, T, D]` in q's dtype.
    """
    recorded = torch.is_grad_enabled() and q.device.type == "cpu" and _flash is not None
    traced = torch.compiler.is_compiling()
    if recorded and (traced or is_slow(q.dtype)):
        return _CausalAttention.apply(q, k, v, scale, traced)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
