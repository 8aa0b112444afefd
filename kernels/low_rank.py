"""A frozen linear and its low-rank branch as one differentiable step, in traceable torch.

    Y = base(X) + s · D(X) Aᵀ Bᵀ                           D: dropout, X ∘ mask / (1 − p)
    grad_S = s · G B   grad_A = grad_Sᵀ D(X)   grad_B = s · Gᵀ S   grad_X = base'(G) + D'(grad_S A)

M tokens, K in, N out, R rank. Kept for backward: X, S = D(X) Aᵀ, the factors, the mask, and the
base's own tensors – no second copy of X, nothing `[M, N]`. G·B is formed once. Of base and branch
one is accumulated onto the other by `addmm_` (`_adds_first`), so Y and grad_X are read once more.
FLOPs over the base: 2·M·R·(K + N) forward, 4·M·R·(K + N) backward. Products run in X's dtype, or in
f32 where that one is slow (`probe.product_dtype`); factors are cast per call; the gradients of the
factors come back in the factors' dtype.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .autocast import without_autocast
from .dropout import drop
from .probe import product_dtype
from .workspace import fresh, workspace


class Stored(NamedTuple):
    """How a quantized weight is stored and was asked to be multiplied, for backends of their own.

    `compute` and `grad_compute` are as in `int8.COMPUTE`; block is 0 where a format has none.
    """

    format: str
    block: int
    compute: str
    grad_compute: str
    outliers: int = 0


Products = tuple[Callable[..., Tensor], Callable[..., Tensor]]  # FrozenLinear's two functions


class FrozenLinear(NamedTuple):
    """How to multiply by a frozen weight: two functions of plain tensors, and those tensors.

    `linear_forward(x [M, K], *tensors) -> [M, N]` is a fresh tensor (the branch is added in place)
    and `linear_grad_x(grad_out [M, N], *tensors) -> [M, K]` too. A storage format is supported
    by the fused path once it has such a pair. The last tensor is the bias or None; `_sums` marks
    a pair that can add its products to a tensor, which is then returned.
    """

    tensors: tuple[Tensor | None, ...]
    linear_forward: Callable[..., Tensor]
    linear_grad_x: Callable[..., Tensor]
    stored: Stored | None = None


def _like(weight: Tensor, x: Tensor) -> Tensor:
    """Return a weight in x's dtype; a cast one lies in the `workspace`."""
    if weight.dtype == x.dtype:
        return weight
    return workspace(weight.shape, x.dtype, weight.device).copy_(weight)


def _sums(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Mark one of `Products` that takes `onto=`, a tensor to add its result to."""
    product.sums = True  # type: ignore[attr-defined]
    return product


@_sums
def dense_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, onto: Tensor | None = None
) -> Tensor:
    """Return `x Wᵀ + b` for a weight `[N, K]`, which is cast to x's dtype (a no-op when equal)."""
    if onto is not None:
        return _add_product(onto, x, _like(weight, x).t())
    return F.linear(x, _like(weight, x), None if bias is None else bias.to(x.dtype))


@_sums
def dense_grad_x(
    grad_out: Tensor, weight: Tensor, bias: Tensor | None, onto: Tensor | None = None
) -> Tensor:
    """Return `G W`."""
    return _multiplied(grad_out, _like(weight, grad_out), onto)


def _multiplied(left: Tensor, right: Tensor, onto: Tensor | None) -> Tensor:
    return torch.mm(left, right) if onto is None else _add_product(onto, left, right)


def decoded_products(decode: Callable[..., Tensor]) -> Products:
    """Return the products of a stored weight that is decoded first, then multiplied as any.

    Args:
        decode: `decode(like, *parts) -> W [N, K]` in like's dtype; valid until it is called again.
    """
    # A compiled layer makes them while it is traced: torch 2.6 can't mark an inner function then.
    return functools.partial(_decoded_forward, decode), functools.partial(_decoded_grad_x, decode)


@_sums
def _decoded_forward(
    decode: Callable[..., Tensor], x: Tensor, *stored: Tensor, onto: Tensor | None = None
) -> Tensor:
    *parts, bias = stored
    return dense_forward(x, decode(x, *parts), bias, onto)


@_sums
def _decoded_grad_x(
    decode: Callable[..., Tensor], grad_out: Tensor, *stored: Tensor, onto: Tensor | None = None
) -> Tensor:
    return _multiplied(grad_out, decode(grad_out, *stored[:-1]), onto)


@_sums
def conv1d_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, onto: Tensor | None = None
) -> Tensor:
    """Return `x W + b` for a weight `[K, N]` as GPT-2's Conv1D stores it, cast to x's dtype."""
    if bias is None or onto is not None:
        return _multiplied(x, _like(weight, x), onto)
    return torch.addmm(bias.to(x.dtype), x, _like(weight, x))


@_sums
def conv1d_grad_x(
    grad_out: Tensor, weight: Tensor, bias: Tensor | None, onto: Tensor | None = None
) -> Tensor:
    """Return `G Wᵀ`."""
    return _multiplied(grad_out, _like(weight, grad_out).t(), onto)


def _folds(mask: Tensor) -> bool:
    """Return whether `scaling` has the factor 1 / (1 − p), and D(X) is X ∘ mask alone.

    That saves a pass over a matrix as large as X in each product. A CPU's results keep their bits.
    """
    return mask.device.type == "cuda" or mask.dtype != torch.bool


def _dropped(x: Tensor, mask: Tensor | None, p: float) -> Tensor:
    if mask is None:
        return x
    return drop(x, mask, p) if _folds(mask) else drop(x, mask, p) * (1 / (1 - p))


@torch.library.custom_op("minilora::add_product_", mutates_args=("y",))
def _add_in_place(y: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    y.addmm_(left, right, alpha=scale)


def _add_product(y: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """Add `scale · left right` to y in place, in a compiled graph too.

    There Inductor would write `addmm_`'s sum into another matrix, after a copy of y.
    """
    if y.device.type == "cuda" and torch.compiler.is_compiling():  # torch 2.6 traces no `is_cuda`
        _add_in_place(y, left, right, scale)
        return y
    return y.addmm_(left, right, alpha=scale)


def _product(x, A, B, mask, scaling, p, linear_forward, tensors) -> tuple[Tensor, Tensor]:
    """Return Y and S in the dtype of the products."""
    wide = x.to(product_dtype(x))
    s = torch.mm(_dropped(wide, mask, p), A.to(wide.dtype).t())
    right = B.to(wide.dtype).t()
    # Rounded with the branch, a large bias would cost more than is won.
    if tensors[-1] is not None or not _adds_first(linear_forward, wide):
        return _add_product(linear_forward(wide, *tensors), s, right, scaling), s
    y = wide.new_empty(len(s), len(B)).addmm_(s, right, beta=0, alpha=scaling)
    return linear_forward(wide, *tensors, onto=y), s


def _adds_first(product: Callable[..., Tensor], x: Tensor) -> bool:
    """Return whether the branch comes first, and the base's product is added to it.

    In 16 bits a sum of two rounded matrices loses whatever of the smaller one is less than half a
    unit in the last place of the larger: most of a young adapter, a few percent of a trained one
    (benchmarks/NOTES.md). A product adds to its target before it rounds.
    """
    function = product.func if isinstance(product, functools.partial) else product
    return x.dtype in (torch.bfloat16, torch.float16) and getattr(function, "sums", False)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, B, mask, scaling, p, linear_forward, linear_grad_x, *tensors):
        y, s = _product(x, A, B, mask, scaling, p, linear_forward, tensors)
        ctx.save_for_backward(x, A, B, s.to(x.dtype), mask, *tensors)
        ctx.scaling, ctx.p, ctx.linear_grad_x = scaling, p, linear_grad_x
        return fresh(y.to(x.dtype))

    @staticmethod
    def backward(ctx, grad_out):
        x, A, B, s, mask, *tensors = ctx.saved_tensors
        grad_x = grad_A = grad_B = None
        narrow, wide = x.dtype, product_dtype(x)
        x, grad_out, s = x.to(wide), grad_out.to(wide), s.to(wide)
        with without_autocast(grad_out.device.type):
            if torch.is_grad_enabled():  # a second derivative needs S as a function of x and A
                s = torch.mm(_dropped(x, mask, ctx.p), A.to(x.dtype).t())
            grad_s = torch.mm(grad_out, B.to(grad_out.dtype)) * ctx.scaling
            if ctx.needs_input_grad[2]:
                grad_B = torch.mm(grad_out.t(), s * ctx.scaling).to(B.dtype)
            if ctx.needs_input_grad[1]:
                grad_A = torch.mm(grad_s.t(), _dropped(x, mask, ctx.p)).to(A.dtype)
            if ctx.needs_input_grad[0]:
                right = A.to(grad_s.dtype)
                if _adds_first(ctx.linear_grad_x, grad_out):
                    branch = _dropped(torch.mm(grad_s, right), mask, ctx.p)
                    grad_x = ctx.linear_grad_x(grad_out, *tensors, onto=branch)
                else:
                    grad_x = ctx.linear_grad_x(grad_out, *tensors)
                    if mask is None:
                        grad_x = _add_product(grad_x, grad_s, right)
                    else:
                        grad_x += _dropped(torch.mm(grad_s, right), mask, ctx.p)
            grad_x = None if grad_x is None else grad_x.to(narrow)
        return grad_x, grad_A, grad_B, *[None] * (5 + len(tensors))


def lora_linear(
    x: Tensor,
    base: FrozenLinear,
    A: Tensor,
    B: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """Compute `base(x) + scaling · D(x) Aᵀ Bᵀ` in one autograd step (the fused path).

    Args:
        x: `[..., K]` floating point, kept for backward.
        base: the frozen linear; gets no gradient.
        A: `[R, K]`, kept for backward; any floating dtype, cast to x's for the products.
        B: `[N, R]`, as A.
        scaling: alpha / r, or alpha / sqrt(r) under rsLoRA.
        mask: bool, x's shape, True = keep, or seeds `[S]` (see `dropout_mask`), or None.
        p: the probability the mask was drawn with.

    Returns:
        `[..., N]` in x's dtype.

    Hu et al. 2021, "LoRA", section 4.1.
    """
    if mask is not None and _folds(mask):
        scaling /= 1 - p
    flat = x.reshape(-1, x.shape[-1])
    flat_mask = mask
    if mask is not None and mask.dtype == torch.bool:
        flat_mask = mask.reshape(flat.shape)
    if not (torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)):
        # A step of decoding is short enough to feel what autograd and autocast cost.
        y, _ = _product(flat, A, B, flat_mask, scaling, p, base.linear_forward, base.tensors)
        return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])
    # The caller has settled the dtype; autocast must not cast single products inside the step.
    with without_autocast(x.device.type):
        y = _LoRALinear.apply(
            flat,
            A,
            B,
            flat_mask,
            scaling,
            p,
            base.linear_forward,
            base.linear_grad_x,
            *base.tensors,
        )
    return y.reshape(*x.shape[:-1], y.shape[-1])


def lora_add(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """Compute `y + scaling · D(x) Aᵀ Bᵀ` by ordinary autograd ops (the general path).

    Args:
        y: `[..., N]`, what any base gave for x; not changed.
        x: `[..., K]` in the dtype the branch computes in. When y is narrower, the sum is formed
            in x's dtype and rounded once to y's.
        A: `[R, K]`.
        B: `[N, R]`.
        scaling: alpha / r, or alpha / sqrt(r) under rsLoRA.
        mask: as for `lora_linear`.
        p: the probability the mask was drawn with.

    Returns:
        `[..., N]` in y's dtype.
    """
    if mask is not None and _folds(mask):
        scaling /= 1 - p
    flat = _dropped(x, mask, p).reshape(-1, x.shape[-1])
    flat = flat.to(product_dtype(flat))
    with without_autocast(x.device.type):
        s = torch.mm(flat, A.to(flat.dtype).t())
        out = torch.addmm(
            y.reshape(-1, y.shape[-1]).to(flat.dtype), s, B.to(flat.dtype).t(), alpha=scaling
        )
    return out.to(y.dtype).reshape(y.shape)
