"""Frozen linears whose dtype this CPU multiplies slowly compute in float32, for a while."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from minilora.kernels import is_slow
from minilora.lora.kinds import is_conv1d, widened_forward


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Let the model's plain linears and Conv1Ds, its head too, widen slow products to float32.

    LoRA and quantized layers do so by themselves. What is replaced is `forward` alone, and only on
    a CPU on which bfloat16 is slow (`kernels.is_slow`); a layer that trains computes as before.
    """
    found = [module for module in model.modules() if _narrow(module)]
    if found and not is_slow(torch.bfloat16):
        found = []
    try:
        for module in found:
            module.forward = functools.partial(widened_forward, module)
        yield
    finally:
        for module in found:
            module.__dict__.pop("forward", None)


def _narrow(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return (
        (type(module) is nn.Linear or is_conv1d(module))
        and weight is not None
        and weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and "forward" not in module.__dict__
    )
