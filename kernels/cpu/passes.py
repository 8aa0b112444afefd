"""The passes between a decoder's products in bf16, in C: see `passes.c`, and `rowwise.py`.

Torch makes each of them of some five operations, which write and read f32 rows in between.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn import Parameter

from ..devices import on_cpu
from ..workspace import is_transformed
from . import check, operator
from .library import native

BF16 = torch.bfloat16


def takes(*tensors: Tensor) -> bool:
    """Return whether these run here: plain bf16 on a CPU, and a library.

    A traced graph fuses passes of its own, and `torch.func` knows torch's operations.
    """
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        plain = type(tensor) in (Tensor, Parameter, FakeTensor) and not is_transformed(tensor)
        if not plain or tensor.dtype != BF16 or not on_cpu(tensor):
            return False
    library = native()
    return library is not None and bool(library.minilora_has_passes())


def _run(name: str, tensors: tuple[Tensor, ...], *numbers: float) -> None:
    library: Any = native()
    getattr(library, f"minilora_{name}_pass")(*(t.data_ptr() for t in tensors), *numbers)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _by_heads(x: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """Return `[B, H, T, D]` with each head's numbers side by side, and what is written.

    Back as it came: the product before reads it as rows, the one behind head by head.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, torch.empty_like(x) if back else _like(x)


@operator(lambda x, *_: _like(x))
def norm_pass(x: Tensor, weight: Tensor, eps: float, offset: int | None) -> Tensor:
    """Return what `rms_norm` does of `[..., D]`, where `takes`; not differentiable."""
    check("norm_pass", x=(x, BF16, x.shape), weight=(weight, BF16, x.shape[-1:]))
    x, y, (D,) = x.contiguous(), _like(x), weight.shape
    sizes = (x.numel() // max(1, D), D, offset is not None)
    _run("norm", (x, weight.contiguous(), y), *sizes, eps, offset or 0)
    return y


@operator(lambda grad_out, x, *_: _like(x))
def norm_back_pass(grad_out: Tensor, x: Tensor, weight: Tensor, eps: float, offset: int) -> Tensor:
    """Return the gradient of x, where `takes`."""
    like = (BF16, x.shape)
    weights = (weight, BF16, x.shape[-1:])
    check("norm_back_pass", x=(x, *like), grad_out=(grad_out, *like), weight=weights)
    x, y, (D,) = x.contiguous(), _like(x), weight.shape
    tensors = (grad_out.contiguous(), x, weight.contiguous(), y)
    _run("norm_back", tensors, x.numel() // max(1, D), D, eps, offset)
    return y


@operator(lambda gate, *_: _like(gate))
def gated_pass(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """Return `silu(gate) · up`, or with gelu's tanh form, where `takes`; not differentiable."""
    check("gated_pass", gate=(gate, BF16, gate.shape), up=(up, BF16, gate.shape))
    y = _like(gate)
    _run("gated", (gate.contiguous(), up.contiguous(), y), y.numel(), gelu)
    return y


@operator(lambda grad_out, gate, *_: (_like(gate), _like(gate)))
def gated_back_pass(
    grad_out: Tensor, gate: Tensor, up: Tensor, gelu: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up, where `takes`."""
    like = (BF16, gate.shape)
    check("gated_back_pass", gate=(gate, *like), up=(up, *like), grad_out=(grad_out, *like))
    grads = _like(gate), _like(gate)
    operands = (grad_out.contiguous(), gate.contiguous(), up.contiguous())
    _run("gated_back", (*operands, *grads), gate.numel(), gelu)
    return grads


@operator(lambda x, cos, sin, back: _by_heads(x, back)[1])
def rotary_pass(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Return `[B, H, T, D]` turned by cos and sin `[1 or B, 1, T, half]`, or turned back.

    The pairs are (i, i + half); what lies behind 2 · half stays. Where `takes`.
    """
    (B, _, T, D), half = x.shape, cos.shape[-1]
    wanted = (BF16, (B if len(cos) == B else 1, 1, T, min(half, D // 2)))
    check("rotary_pass", x=(x, BF16, x.shape), cos=(cos, *wanted), sin=(sin, *wanted))
    x, y = _by_heads(x, back)
    step = 0 if len(cos) == 1 else T * half
    sizes = (*x.shape, half, back, step, *x.stride()[:3], *y.stride()[:3])
    _run("rotary", (x, cos.contiguous(), sin.contiguous(), y), *sizes)
    return y
