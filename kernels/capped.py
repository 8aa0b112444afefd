"""Attention whose scores are capped, which torch's kernels lack, over chunks of queries.

    t = tanh(s·Q Kᵀ / c)    P = softmax(c·t over the keys seen)    O = P V
    dV = Pᵀ dO    dS = s·P ∘ (dO Vᵀ − rowsum(P ∘ dO Vᵀ)) ∘ (1 − t²)    dQ = dS K    dK = dSᵀ Q

B sequences, T queries and S keys of width D, H query heads over K key heads, c the cap. A chunk of
128 queries meets the keys before its end, or, with a mask, all of them; all H / K heads of a group
are in one product. Scores are in f32 (f64 for f64) once they are multiplied. Kept for the backward
pass are Q, K, V and the mask: P is formed again there, so that `[B·H, 128, S]` exists at a time.
One opaque operation each way, as the loops depend on T, which a traced graph may leave open.
Gemma Team 2024, "Gemma 2", section 2.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .probe import product_dtype

_QUERIES = 128  # rows of a chunk


def _chunks(q: Tensor, k: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, int, Tensor]]:
    """Yield rows of queries, how many keys they meet, and which of them each sees."""
    T, S, heads = q.shape[2], k.shape[2], k.shape[1]
    if mask is not None:
        mask = mask.expand(*mask.shape[:2], T, S)
        groups = (1, 1) if mask.shape[1] == 1 else (heads, q.shape[1] // heads)
        mask = mask.unflatten(1, groups)
    for start in range(0, T, _QUERIES):
        rows = slice(start, min(start + _QUERIES, T))
        if mask is None:
            end = S - T + rows.stop
            all_seen = torch.ones(rows.stop - start, end, dtype=torch.bool, device=q.device)
            yield rows, end, all_seen.tril(S - T + start)
        else:
            yield rows, S, mask[..., rows, :]


def _weights(
    queries: Tensor, keys: Tensor, seen: Tensor, group: int, scale: float, cap: float
) -> tuple[Tensor, Tensor]:
    """Return P and t of `[B, K, G·c, D]` queries, both `[B, K, G, c, end]` in f32 or wider."""
    scores = torch.matmul(queries, keys.mT).unflatten(2, (group, -1))
    t = (scores.to(torch.promote_types(scores.dtype, torch.float32)) * (scale / cap)).tanh_()
    least = torch.finfo(t.dtype).min  # a row that sees nothing stays finite
    return torch.where(seen, t * cap, least).softmax(-1), t


@torch.library.custom_op("minilora::capped_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float
) -> Tensor:
    B, H, _, D = q.shape
    compute, heads = product_dtype(q), k.shape[1]
    keys, values = k.to(compute), v.to(compute)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for rows, end, seen in _chunks(q, k, mask):
        queries = q[:, :, rows].reshape(B, heads, -1, D).to(compute)
        p, _ = _weights(queries, keys[:, :, :end], seen, H // heads, scale, cap)
        part = torch.matmul(p.flatten(2, 3).to(compute), values[:, :, :end])
        out[:, :, rows] = part.view(B, H, -1, D)
    return out


@_forward.register_fake
def _(q, k, v, mask, scale, cap):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("minilora::capped_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, _, D = q.shape
    compute, heads = product_dtype(q), k.shape[1]
    keys, values = k.to(compute), v.to(compute)
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_k, grad_v = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (k, v))
    for rows, end, seen in _chunks(q, k, mask):
        queries, grads = (t[:, :, rows].reshape(B, heads, -1, D).to(compute) for t in (q, grad_out))
        p, t = _weights(queries, keys[:, :, :end], seen, H // heads, scale, cap)
        grad_p = torch.matmul(grads, values[:, :, :end].mT).view(p.shape).to(wide)
        along = (p * grad_p).sum(-1, keepdim=True)
        grad_s = (grad_p.sub_(along).mul_(p) * (1 - t * t)).mul_(scale)
        if mask is not None:  # a row that sees nothing weighs constants
            grad_s.masked_fill_(~seen, 0.0)
        p, grad_s = (part.flatten(2, 3).to(compute) for part in (p, grad_s))
        grad_v[:, :, :end] += torch.matmul(p.mT, grads)
        grad_k[:, :, :end] += torch.matmul(grad_s.mT, queries)
        grad_q[:, :, rows] = torch.matmul(grad_s, keys[:, :, :end]).view(B, H, -1, D)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


@_backward.register_fake
def _(grad_out, q, k, v, mask, scale, cap):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale, ctx.cap = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad_out, *ctx.saved_tensors, ctx.scale, ctx.cap), None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float
) -> Tensor:
    """Attend with scores `cap · tanh(scale · q·k / cap)`.

    Args:
        q: `[B, H, T, D]`.
        k: `[B, H / G, S, D]`, each head read by G query heads in a row.
        v: like k.
        mask: bool, True where a query may attend, that broadcasts to `[B, H, T, S]`; None: the
            queries are the last T of the S tokens, and each sees itself and those before it.
        scale: what q·k is multiplied by, usually 1/√D.
        cap: above 0; what no score exceeds.

    Returns:
        `[B, H, T, D]` in q's dtype, or under autocast in its.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    return _forward(q, k, v, mask, scale, cap)
