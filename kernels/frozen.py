"""Y = base(X) for a frozen base alone: no low-rank branch, no gradient but X's, X not kept."""

import torch
from torch import Tensor

from .autocast import without_autocast
from .low_rank import FrozenLinear
from .probe import product_dtype
from .workspace import fresh


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, linear_forward, linear_grad_x, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.linear_grad_x = linear_grad_x
        return fresh(linear_forward(x.to(product_dtype(x)), *tensors).to(x.dtype))

    @staticmethod
    def backward(ctx, grad_out):
        tensors = ctx.saved_tensors  # under checkpointing they can be asked for once
        with without_autocast(grad_out.device.type):
            wide = grad_out.to(product_dtype(grad_out))
            grad_x = ctx.linear_grad_x(wide, *tensors).to(grad_out.dtype)
        return grad_x, *[None] * (2 + len(tensors))


def frozen_product(x: Tensor, base: FrozenLinear) -> Tensor:
    """Compute `base(x)`; backward needs the base's own tensors and nothing else.

    Args:
        x: `[..., K]` floating point, not kept for backward.
        base: the frozen linear; gets no gradient.

    Returns:
        `[..., N]` in x's dtype.
    """
    flat = x.reshape(-1, x.shape[-1])
    device = x.device.type
    if not torch.is_grad_enabled() and (x.is_meta or not torch.is_autocast_enabled(device)):
        # A step of decoding is short enough to feel what autograd and autocast cost.
        y = base.linear_forward(flat.to(product_dtype(flat)), *base.tensors).to(x.dtype)
    else:
        with without_autocast("cpu" if x.is_meta else device):
            y = _Frozen.apply(flat, base.linear_forward, base.linear_grad_x, *base.tensors)
    return y.reshape(*x.shape[:-1], y.shape[-1])
