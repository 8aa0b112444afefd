"""The passes between a decoder's products in bf16, in C: see `passes.c`, and `rowwise.py`.

Torch makes each of them of some five operations, which write and read f32 rows in between.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn import Parameter

from ..workspace import is_transformed
from . import check, operator
from .library import native


def takes(*tensors: Tensor) -> bool:
    """Return whether these run here: plain bf16 on a CPU, and a library.

    A traced graph fuses passes of its own, and `torch.func` knows torch's operations.
    """
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        plain = type(tensor) in (Tensor, Parameter, FakeTensor) and not is_transformed(tensor)
        if not plain or tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu":
            return False
    library = native()
    return library is not None and bool(library.minilora_has_passes())


def _run(name: str, tensors: tuple[Tensor, ...], *numbers: float) -> None:
    library: Any = native()
    getattr(library, f"minilora_{name}_pass")(*(t.data_ptr() for t in tensors), *numbers)


def _like(*tensors: Any) -> Tensor:
    return torch.empty_like(tensors[0], memory_format=torch.contiguous_format)


@operator(lambda x, *_: _like(x))
def norm_pass(x: Tensor, weight: Tensor, eps: float, offset: int | None) -> Tensor:
    """Return what `rms_norm` does of `[..., D]`, where `takes`; not differentiable."""
    check("norm_pass", weight=(weight, x.dtype, x.shape[-1:]))
    x, y, (D,) = x.contiguous(), _like(x), weight.shape
    sizes = (x.numel() // max(1, D), D, offset is not None)
    _run("norm", (x, weight.contiguous(), y), *sizes, eps, offset or 0)
    return y


@operator(lambda grad_out, x, *_: _like(x))
def norm_back_pass(grad_out: Tensor, x: Tensor, weight: Tensor, eps: float, offset: int) -> Tensor:
    """Return the gradient of x, where `takes`."""
    same = {"grad_out": (grad_out, x.dtype, x.shape)}
    check("norm_back_pass", weight=(weight, x.dtype, x.shape[-1:]), **same)
    x, y, (D,) = x.contiguous(), _like(x), weight.shape
    tensors = (grad_out.contiguous(), x, weight.contiguous(), y)
    _run("norm_back", tensors, x.numel() // max(1, D), D, eps, offset)
    return y


@operator(lambda gate, *_: _like(gate))
def gated_pass(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """Return `silu(gate) · up`, or with gelu's tanh form, where `takes`; not differentiable."""
    check("gated_pass", up=(up, gate.dtype, gate.shape))
    y = _like(gate)
    _run("gated", (gate.contiguous(), up.contiguous(), y), y.numel(), gelu)
    return y


@operator(lambda grad_out, gate, *_: (_like(gate), _like(gate)))
def gated_back_pass(
    grad_out: Tensor, gate: Tensor, up: Tensor, gelu: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up, where `takes`."""
    like = (gate.dtype, gate.shape)
    check("gated_back_pass", up=(up, *like), grad_out=(grad_out, *like))
    grads = _like(gate), _like(gate)
    operands = (grad_out.contiguous(), gate.contiguous(), up.contiguous())
    _run("gated_back", (*operands, *grads), gate.numel(), gelu)
    return grads


@operator(lambda x, cos, sin, back: torch.empty_like(x) if back else _like(x))
def rotary_pass(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Return `[B, H, T, D]` turned by cos and sin `[1 or B, 1, T, half]`, or turned back.

    The pairs are (i, i + half); what lies behind 2 · half stays. Where `takes`.
    """
    (B, _, T, D), half = x.shape, cos.shape[-1]
    wanted = (x.dtype, (B if len(cos) == B else 1, 1, T, min(half, D // 2)))
    check("rotary_pass", cos=(cos, *wanted), sin=(sin, *wanted))
    x = x if x.stride(-1) == 1 else x.contiguous()
    # Back as it came: the product before reads it as rows, the one behind head by head.
    y = torch.empty_like(x) if back else _like(x)
    step = 0 if len(cos) == 1 else T * half
    sizes = (*x.shape, half, back, step, *x.stride()[:3], *y.stride()[:3])
    _run("rotary", (x, cos.contiguous(), sin.contiguous(), y), *sizes)
    return y
