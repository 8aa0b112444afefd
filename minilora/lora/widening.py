"""Frozen linears whose dtype this CPU multiplies slowly compute in float32, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from minilora.kernels import is_slow
from minilora.lora.base import Conv1D, base_of, view


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Let the model's plain linears and Conv1Ds, its head too, widen slow products to float32.

    LoRA and quantized layers do so by themselves. What is replaced is `forward` alone, and only on
    a CPU on which bfloat16 is slow (`kernels.is_slow`); a layer that trains computes as before.
    """
    narrow = [module for module in model.modules() if _is_narrow(module)]
    if narrow and not is_slow(torch.bfloat16):
        narrow = []
    try:
        for module in narrow:
            module.forward = base_of(module).widened
        yield
    finally:
        for module in narrow:
            module.__dict__.pop("forward", None)


def _is_narrow(module: Any) -> bool:
    weight = module._parameters.get("weight")
    return (
        (type(module) is nn.Linear or isinstance(view(module), Conv1D))
        and weight is not None
        and weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and "forward" not in module.__dict__
    )
