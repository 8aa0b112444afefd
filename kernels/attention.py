"""Causal attention with a backward pass by matrix products over chunks of queries.

    P = softmax(s·Q Kᵀ below the diagonal)        O = P V
    dV = Pᵀ dO    dS = P ∘ (dO Vᵀ − rowsum(P ∘ dO Vᵀ))    dQ = s·dS K    dK = s·dSᵀ Q

B sequences, T queries that are the last of S tokens, H query heads over H / G key heads of width D.
The forward pass is torch's flash kernel. Its backward kernel takes 1.1 to 9 times as long as these
products in bf16 on a processor with AMX, most in short rows (benchmarks/NOTES.md); in f32 it is
taken, but for T < S, where it would keep a mask. A chunk of queries meets only the keys before its
end, all G heads of a group in one product, and P is formed again from Q and K. Nothing `[T, S]` is
kept; `[B·H, chunk, S]` exists at a time. Scores, each row moved to around 0, P and dO Vᵀ are
rounded where torch's kernel rounds P and dS: dQ has 1.5 times its error in bf16 (0.4 % against
0.26 %), dK and dV have less than theirs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .devices import on_cpu
from .probe import is_slow
from .versions import FLASH_GROUPS_HEADS
from .workspace import is_transformed

_SCORES = 2**21  # in a chunk: 4 MiB of bf16 stay in a cache
_FEWEST, _MOST = 64, 256  # queries in a chunk


def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, D = q.shape
    heads, S = k.shape[1:3]
    X, G = B * heads, H // heads
    wide = torch.promote_types(q.dtype, torch.float32)
    narrow, compute = q.dtype, wide if is_slow(q.dtype) else q.dtype
    keys, values = k.reshape(X, S, D).to(compute), v.reshape(X, S, D).to(compute)
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k = torch.zeros(X, S, D, dtype=wide, device=q.device)
    grad_v = torch.zeros_like(grad_k)
    seen = torch.arange(S - T + 1, S + 1, device=q.device, dtype=wide)
    middle = lse - seen.log()  # what every score of a row would be, were they all alike
    chunk = min(max(_SCORES // (B * H * S), _FEWEST), _MOST)
    for start in range(0, T, chunk):
        stop = min(start + chunk, T)
        end = S - T + stop  # of the keys that they meet
        later = torch.full((stop - start, end), -torch.inf, dtype=compute, device=q.device)
        # Large scores would be rounded to multiples of more than P can bear. A product adds before
        # it rounds; by how much a row is moved softmax does not care.
        moved = later.triu_(S - T + start + 1) - middle[..., start:stop, None].to(compute)
        moved = moved.reshape(X, G * (stop - start), end)
        queries, grads = (t[:, :, start:stop].reshape(X, -1, D).to(compute) for t in (q, grad_out))
        p = torch.baddbmm(moved, queries, keys[:, :end].mT, alpha=scale).softmax(-1)
        grad_p = torch.bmm(grads, values[:, :end].mT)
        grad_s = torch.ops.aten._softmax_backward_data(grad_p, p, -1, compute)
        grad_v[:, :end] += torch.bmm(p.mT, grads)
        # beta=0: nothing is read of the first argument, and the scale comes before the rounding.
        part = torch.baddbmm(keys[:, :end], grad_s.mT, queries, beta=0, alpha=scale)
        grad_k[:, :end] += part
        part = torch.baddbmm(queries, grad_s, keys[:, :end], beta=0, alpha=scale)
        grad_q[:, :, start:stop] = part.view(B, H, -1, D)
    return grad_q, grad_k.to(narrow).view(k.shape), grad_v.to(narrow).view(v.shape)


# One opaque operation: its loop depends on T, which a traced graph may leave open.
@torch.library.custom_op("minilora::causal_attention_backward", mutates_args=())
def _backward_op(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(grad_out, q, k, v, lse, scale)


@_backward_op.register_fake
def _(grad_out, q, k, v, lse, scale):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values as torch's flash kernel for CPUs takes them."""
    if FLASH_GROUPS_HEADS or q.device.type != "cpu":
        return k, v
    return tuple(t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))  # type: ignore[return-value]


def _rule(q: Tensor, k: Tensor) -> dict[str, Any]:
    """Return what tells torch's kernels that each of the last tokens sees those before it."""
    T, S = q.shape[2], k.shape[2]
    if T == S:
        return {"is_causal": True}
    unseen = torch.full((T, S), -torch.inf, dtype=q.dtype, device=q.device).triu_(S - T + 1)
    return {"attn_mask": unseen}


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return what torch's flash kernel for CPUs does, and its log Σ exp of scores `[B, H, T]`."""
    k, v = _grouped(q, k, v)
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return run(q, k.to(q.dtype), v.to(q.dtype), **_rule(q, k), scale=scale)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return torch's causal attention, by its flash kernel on CPUs."""
    k, v = _grouped(q, k, v)
    before = k.shape[2] - q.shape[2]
    options: dict[str, Any] = {"scale": scale, "enable_gqa": True}
    if q.device.type == "cpu" or not before:
        return F.scaled_dot_product_attention(q, k, v, **_rule(q, k), **options)
    # Queries for all keys, so that no mask is needed, which flash kernels for GPUs do not take.
    q = F.pad(q, (0, 0, before, 0))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)[:, :, before:]


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, lse = _flash(q, k, v, scale)
        ctx.save_for_backward(q, k, v, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        run = _backward_op if torch.compiler.is_compiling() else _backward
        return *run(grad_out, *ctx.saved_tensors, ctx.scale), None


def _fits_flash(*tensors: Tensor) -> bool:
    """Return whether the flash kernel takes them: of one width, dense in it, not empty."""
    width = tensors[0].shape[-1]
    return all(t.shape[-1] == width and t.stride(-1) == 1 and t.numel() > 0 for t in tensors)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend from each of the last T of S tokens to itself and those before it.

    Args:
        q: `[B, H, T, D]`.
        k: `[B, H / G, S, D]`, each head read by G query heads in a row.
        v: like k.
        scale: what q·k is multiplied by, usually 1/√D.

    Returns:
        `[B, H, T, D]` in q's dtype, or under autocast in its.
    """
    device = q.device.type
    traced = torch.compiler.is_compiling()  # where torch 2.11 can't ask the next question
    known = q.shape[2] < k.shape[2] and (traced or torch.amp.is_autocast_available(device))
    if known and torch.is_autocast_enabled(device):  # as SDPA would
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    better = on_cpu(q) and (q.dtype.itemsize == 2 or q.shape[2] < k.shape[2])
    # Nor may one ask for transforms there.
    ours = better and torch.is_grad_enabled() and (traced or not is_transformed(q))
    if ours and _fits_flash(q, k, v):
        return _CausalAttention.apply(q, k, v, scale)
    return _sdpa(q, k, v, scale)
