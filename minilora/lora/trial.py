"""Whether a stranger's forward computes what its class's does, found by calling it."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.lora.modes import as_found
from minilora.quantization import packed_format


@torch.no_grad()
def acts_as_linear(module: Any) -> bool:
    """Return whether a linear's forward computes `x Wᵀ + b`: its class's, or its own on trial.

    It is tried on a few rows, large and small, in both modes, on a shallow copy.
    """
    if "forward" in module.__dict__ or packed_format(module):
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    trial = copy.copy(module)
    trial._buffers = dict(module._buffers)
    x = torch.linspace(-3, 3, 3 * module.in_features, dtype=torch.float64).reshape(3, -1).sin()
    x = (x * torch.tensor([[1e-3], [1.0], [100.0]])).to(module.weight)
    wanted = F.linear(x, module.weight, module.bias)
    near = 1e-2 * wanted.abs().amax(1, keepdim=True)  # a forward may round between its steps
    try:
        with as_found(module):
            return all(
                isinstance(y := trial.train(mode)(x), Tensor)
                and y.shape == wanted.shape
                and y.dtype == wanted.dtype
                and bool(((y - wanted).abs() <= near).all())
                for mode in (True, False)
            )
    except Exception:  # whatever a stranger's forward raises, it is no linear's
        return False
