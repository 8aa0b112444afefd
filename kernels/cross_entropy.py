"""Output head and cross-entropy in one pass over chunks of rows.

    loss = Σ_m [ log Σ_v exp(z_mv) − z_m,label ]     z = h Wᵀ, over rows with label_m ≠ ignore_index
    e_mv = exp(z_mv − max z_m)    s_m = Σ_v e_mv     p = e / s
    grad_h_m = (e_m − s_m·onehot(label_m)) W / s_m   grad_W = Σ_m (e_m − s_m·onehot)ᵀ h_m / s_m
    with a cap c:  z = c·t,  t = tanh(h Wᵀ / c),  and (e_m − s_m·onehot) ∘ (1 − t²) in both

N rows, D hidden, V vocabulary. Only `[chunk, V]` logits exist at a time, in a reused buffer that
turns into e and then into the gradient; not that is divided by s but the narrow `[chunk, D]`
product (in float16, whose range e·W may leave, e itself). Where this CPU multiplies bf16 slowly
the products and the chunk are in f32, and W is widened panel by panel.
The label's entry is formed in f32, so that p − 1 does not cancel. Rows whose label is ignored are
never multiplied. The gradient is formed in the forward pass; backward only scales it, by row under
reduction="none". FLOPs:
2·N·D·V forward, as much again for grad_h (and for grad_W if asked). Exponents and sums are in f32
(f64 for f64 input). The idea of fusing the head with the loss: Hsu et al. 2024, "Liger Kernel",
section 3.2. On CUDA one Triton kernel makes the passes over the logits, where Triton runs.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .autocast import without_autocast
from .decoding import runs_on
from .probe import product_dtype
from .triton import DTYPES
from .workspace import fresh, is_traced, workspace

# Elements of one chunk of logits: enough rows to keep the products compute-bound (256 at a
# vocabulary of 49152), and 24 MB in bf16.
_CHUNK_ELEMENTS = 3 * 2**22
_GPU_CHUNK_ELEMENTS = 2**26  # each chunk reads the head twice: 512 rows at a vocabulary of 131072
_CACHED_ELEMENTS = 2**19  # of the rows widened at a time on a CPU: 2 MB in f32
_PANEL_ELEMENTS = 2**22  # of the head widened at a time, 16 MB in f32


def _exponents(logits: Tensor, labels: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """Turn logits `[rows, V]` in place into `e − s·onehot`; return s and the losses, `[rows, 1]`.

    One pass of few tensor operations, for a compiler to fuse.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    column = labels[:, None]
    z = logits if cap is None else (logits.to(wide) / cap).tanh() * cap
    largest = z.amax(1, keepdim=True).to(wide)
    picked = z.gather(1, column).to(wide) - largest
    e = (z.to(wide) - largest).exp()
    sums = e.sum(1, keepdim=True)
    own, losses = picked.exp() - sums, sums.log() - picked
    if cap is not None:
        slope = 1 - (z / cap) ** 2
        e, own = e * slope, own * slope.gather(1, column)
    if logits.dtype == torch.float16:
        e, own, sums = e / sums, own / sums, torch.ones_like(sums)
    logits.copy_(e)
    logits.scatter_(1, column, own.to(logits.dtype))
    return sums, losses


def _exponents_by_rows(logits: Tensor, labels: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """Do the same over as many rows as stay in the cache, in a buffer of their own."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    step = len(logits)
    if logits.device.type == "cpu":
        step = max(1, _CACHED_ELEMENTS // logits.shape[1])
    found = []
    for start in range(0, len(logits), step):
        narrow, column = logits[start : start + step], labels[start : start + step, None]
        e = narrow
        if narrow.dtype != wide:
            e = workspace(narrow.shape, wide, narrow.device).copy_(narrow)
        slope = None
        if cap is not None:
            slope = e.div_(cap).tanh_().square().neg_().add_(1)
            e.mul_(cap)
        largest = e.amax(1, keepdim=True)
        picked = e.gather(1, column) - largest
        sums = e.sub_(largest).exp_().sum(1, keepdim=True)
        e.scatter_(1, column, picked.exp() - sums)
        if slope is not None:
            e.mul_(slope)
        losses = sums.log() - picked
        if narrow.dtype == torch.float16:
            e, sums = e.div_(sums), torch.ones_like(sums)
        if e is not narrow:
            narrow.copy_(e)
        found.append((sums, losses))
    return torch.cat([s for s, _ in found]), torch.cat([loss for _, loss in found])


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_exponents, dynamic=True)


def _way(x: Tensor, fused: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return which of these turns logits of x's dtype, on its device, into exponents."""
    if fused:
        return _compiled()
    # A graph that is traced takes tensor operations, which its compiler fuses.
    if is_traced(x) or x.dtype not in DTYPES or not runs_on(x.device):
        return _exponents_by_rows
    from .triton.cross_entropy import exponents_by_rows

    return exponents_by_rows


def _panels(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the weight in `dtype`: whole where it has it, else panel by panel in one buffer."""
    if weight.dtype == dtype:
        yield slice(None), weight
        return
    step = max(1, _PANEL_ELEMENTS // max(1, weight.shape[1]))
    buffer = weight.new_empty((min(step, len(weight)), weight.shape[1]), dtype=dtype)
    for start in range(0, len(weight), step):
        panel = weight[start : start + step]
        yield slice(start, start + step), buffer[: len(panel)].copy_(panel)


def _times(e: Tensor, weight: Tensor) -> Tensor:
    """Return `e · weight` in e's dtype."""
    panels = _panels(weight, e.dtype)
    panel, matrix = next(panels)
    product = torch.mm(e[:, panel], matrix)
    for panel, matrix in panels:
        product.addmm_(e[:, panel], matrix)
    return product


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        fused: bool,
        cap: float | None,
        by_row: bool,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        need_h, need_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_h = torch.empty_like(hidden) if need_h else None
        grad_w = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_w else None
        total = torch.zeros((len(hidden),) if by_row else (), dtype=wide, device=hidden.device)
        exponents = _way(hidden, fused)
        compute = product_dtype(hidden)
        # Each chunk widens the head anew, twice, which 256 rows make a twentieth of its products.
        least = 32 if weight.dtype == compute else 256
        elements = _CHUNK_ELEMENTS if hidden.device.type == "cpu" else _GPU_CHUNK_ELEMENTS
        rows = max(least, elements // weight.shape[0])
        for start in range(0, len(hidden), rows):
            h, label = hidden[start : start + rows].to(compute), labels[start : start + rows]
            logits = workspace(torch.Size((len(h), len(weight))), h.dtype, h.device)
            for panel, matrix in _panels(weight, compute):
                torch.mm(h, matrix.t(), out=logits[:, panel])
            sums, losses = exponents(logits, label, cap)
            if by_row:
                total[start : start + rows] = losses.squeeze(1)
            else:
                total += losses.sum()
            if grad_h is not None:
                grad = _times(logits, weight)
                torch.div(grad, sums, out=grad_h[start : start + rows])
            if grad_w is not None:
                grad_w += torch.mm(logits.t(), (h / sums).to(h.dtype))
        ctx.save_for_backward(grad_h, grad_w)
        ctx.weight_dtype = weight.dtype
        return fresh(total)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_w = ctx.saved_tensors
        if grad_h is not None:  # not cast first: 1/N and loss scales leave fp16's range
            by_row = grad_out.dim() == 1
            grad_h = (grad_h * (grad_out[:, None] if by_row else grad_out)).to(grad_h.dtype)
        if grad_w is not None:
            grad_w = (grad_w * grad_out).to(ctx.weight_dtype)
        return grad_h, grad_w, None, None, None, None


def bounds(ids: Tensor) -> tuple[int, int]:
    """Return the least and the largest of some integers; on a GPU that waits once, not twice."""
    low, high = torch.stack(ids.aminmax()).tolist()
    return low, high


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    fused: bool = False,
    cap: float | None = None,
) -> torch.Tensor:
    """Compute the cross-entropy of `hidden · weightᵀ` without holding the logits whole.

    Args:
        hidden: `[N, D]` floating point; its gradient is kept for backward in place of the logits.
        weight: `[V, D]`, the output head, same dtype as `hidden`.
        labels: `[N]` int64 in `[0, V)`, or `ignore_index` for rows that do not count.
        ignore_index: the label that marks a row to leave out.
        reduction: `"mean"` over the rows that count, `"sum"`, or `"none"`: each row's loss, 0 where
            it does not count, for a head that is frozen.
        fused: run the passes over the logits through `torch.compile`, which must work here.
        cap: above 0: each logit y is `cap · tanh(y / cap)`; None: as it is.

    Returns:
        A 0-dim tensor, or `[N]` under `"none"`, in f32 (f64 for f64 input).

    Raises:
        ValueError: shapes, dtypes or labels that do not fit, an unknown reduction, or no row that
            counts under `"mean"` (its value would be 0/0); under `"none"` a weight that is trained,
            whose gradient would need each row's factor before the backward pass.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', found {reduction!r}")
    if reduction == "none" and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "reduction='none' needs a frozen weight, found one that requires gradients; compute "
            "the logits chunk by chunk under torch.utils.checkpoint"
        )
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [N, D] and weight [V, D] with the same D, found "
            f"{list(hidden.shape)} and {list(weight.shape)}"
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 of shape [{hidden.shape[0]}], found {labels.dtype} of shape "
            f"{list(labels.shape)}"
        )
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden and weight must share a dtype, found {hidden.dtype} and {weight.dtype}; "
            f"cast one of them or use torch.autocast"
        )
    rows = (labels != ignore_index).nonzero().squeeze(1)
    if len(rows) == 0 and reduction == "mean":
        raise ValueError(
            f"at least one label must count, found {len(labels)} rows all equal to ignore_index "
            f"({ignore_index}); leave such a batch out"
        )
    count = len(labels)
    if len(rows) < count:
        hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
    low, high = bounds(labels) if len(rows) else (0, 0)
    if low < 0 or high >= weight.shape[0]:
        raise ValueError(
            f"labels must lie in [0, {weight.shape[0]}) or be {ignore_index}, found values from "
            f"{low} to {high}"
        )
    with without_autocast(hidden.device.type):
        by_row = reduction == "none"
        total = _LinearCrossEntropy.apply(hidden, weight, labels, fused, cap, by_row)
    if by_row:
        return total.new_zeros(count).index_copy(0, rows, total)
    return total / len(rows) if reduction == "mean" else total
