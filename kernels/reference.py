"""What each kernel means, in the plainest torch: every backend is tested against these.

    Y = X Wᵀ + b + s · D(X) Aᵀ Bᵀ          D: dropout, X ∘ mask / (1 − p)
    grad_S = s · G B            grad_A = grad_Sᵀ D(X)            grad_B = s · Gᵀ (D(X) Aᵀ)
    grad_X = G W + (grad_S A) ∘ mask / (1 − p)

M tokens, K in, N out, R rank; X `[M, K]`, W `[N, K]`, b `[N]`, A `[R, K]`, B `[N, R]`, G `[M, N]`,
mask `[M, K]` bool. Source: Hu et al. 2021, "LoRA", section 4.1.
"""

import torch
from torch import Tensor


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """Return Y `[M, N]`."""
    dropped = x if mask is None else x * mask / (1 - p)
    y = x @ weight.T + scaling * (dropped @ A.T) @ B.T
    return y if bias is None else y + bias


def lora_linear_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `grad_x [M, K]`, `grad_A [R, K]`, `grad_B [N, R]`."""
    keep = torch.ones_like(x) if mask is None else mask / (1 - p)
    grad_s = scaling * (grad_out @ B)
    grad_x = grad_out @ weight + (grad_s @ A) * keep
    grad_A = grad_s.T @ (x * keep)
    grad_B = scaling * grad_out.T @ ((x * keep) @ A.T)
    return grad_x, grad_A, grad_B


def int8_rows(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Return `x · diag(scales) codesᵀ` for x `[M, K]`, codes `[N, K]`, scales `[N]`."""
    return x @ (codes.to(x.dtype) * scales[:, None]).T


def int4_rows(x: Tensor, packed: Tensor, steps: Tensor, scales: Tensor, group: int) -> Tensor:
    """Likewise for codes `(q − 8) · steps`, two q in a byte: column j low, j + K/2 high."""
    q = torch.cat([packed % 16, packed // 16], dim=1).to(x.dtype) - 8
    return int8_rows(x, q * steps.repeat_interleave(group, dim=1), scales)


def int8_blocks(x: Tensor, codes: Tensor, scales: Tensor, across: bool) -> Tensor:
    """Return the product along, or across as for grad_X: what rounding in blocks comes near."""
    return x @ (codes * scales[:, None]) if across else int8_rows(x, codes, scales)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `weight · x / sqrt(mean(x²) + eps)`, the mean over each row of x `[..., D]`."""
    return weight * (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt())


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return `gate · sigmoid(gate) · up`, both `[..., I]`."""
    return gate * gate.sigmoid() * up
