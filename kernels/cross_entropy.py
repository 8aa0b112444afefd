"""Output head and cross-entropy in one pass over chunks of rows.

    loss = Σ_m [ logsumexp(h_m Wᵀ) − (h_m Wᵀ)[label_m] ]      over rows with label_m ≠ ignore_index
    grad_h_m = (softmax(h_m Wᵀ) − onehot(label_m)) W          grad_W = Σ_m (softmax − onehot)ᵀ h_m

N rows, D hidden, V vocabulary. Only `[chunk, V]` logits exist at a time, and rows whose label is
ignored are never multiplied. The gradient is formed in the forward pass, while a chunk's logits
are at hand; backward only scales it. FLOPs: 2·N·D·V forward, as much again for grad_h (and for
grad_W if asked). Softmax and sums are in f32 (f64 for f64 input). The idea of fusing the head with
the loss: Hsu et al. 2024, "Liger Kernel", section 3.2.
"""

import torch

# Elements of one chunk of logits: 64 MB in f32, which stays near the cache and keeps rows ≥ 256
# for vocabularies up to 64k, so the products stay compute-bound.
_CHUNK_ELEMENTS = 2**24


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        need_h, need_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_h = torch.empty_like(hidden) if need_h else None
        grad_w = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_w else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        rows = max(32, _CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            h, label = hidden[start : start + rows], labels[start : start + rows]
            logits = torch.mm(h, weight.t()).to(wide)
            lse = torch.logsumexp(logits, dim=1, keepdim=True)
            total += (lse - logits.gather(1, label[:, None])).sum()
            if grad_h is None and grad_w is None:
                continue
            grad = logits.sub_(lse).exp_()
            grad.scatter_add_(1, label[:, None], grad.new_full((len(label), 1), -1.0))
            narrow = grad.to(hidden.dtype)
            if grad_h is not None:
                torch.mm(narrow, weight, out=grad_h[start : start + rows])
            if grad_w is not None:
                grad_w += torch.mm(narrow.t(), h)
        ctx.save_for_backward(grad_h, grad_w)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        grad_h, grad_w = ctx.saved_tensors
        if grad_h is not None:
            grad_h = grad_h * grad_out  # not cast first: 1/N and loss scales leave fp16's range
        if grad_w is not None:
            grad_w = (grad_w * grad_out).to(ctx.weight_dtype)
        return grad_h, grad_w, None


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Compute the cross-entropy of `hidden · weightᵀ` without holding the logits whole.

    Args:
        hidden: `[N, D]` floating point; its gradient is kept for backward in place of the logits.
        weight: `[V, D]`, the output head, same dtype as `hidden`.
        labels: `[N]` int64 in `[0, V)`, or `ignore_index` for rows that do not count.
        ignore_index: the label that marks a row to leave out.
        reduction: `"mean"` over the rows that count, or `"sum"`.

    Returns:
        A 0-dim tensor in f32 (f64 for f64 input).

    Raises:
        ValueError: shapes, dtypes or labels that do not fit, an unknown reduction, or no row that
            counts under `"mean"` (its value would be 0/0).
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', found {reduction!r}")
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
    counted = labels != ignore_index
    rows = counted.nonzero().squeeze(1)
    if len(rows) == 0 and reduction == "mean":
        raise ValueError(
            f"at least one label must count, found {len(labels)} rows all equal to ignore_index "
            f"({ignore_index}); leave such a batch out"
        )
    if len(rows) < len(labels):
        hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
    if len(rows) and (int(labels.min()) < 0 or int(labels.max()) >= weight.shape[0]):
        raise ValueError(
            f"labels must lie in [0, {weight.shape[0]}) or be {ignore_index}, found values from "
            f"{int(labels.min())} to {int(labels.max())}"
        )
    total = _LinearCrossEntropy.apply(hidden, weight, labels)
    return total / len(rows) if reduction == "mean" else total
