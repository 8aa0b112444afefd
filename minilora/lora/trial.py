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

    It is tried on a few rows, large and small, in both modes, on a shallow copy; one on the meta
    device with values of no meaning.
    """
    if "forward" in module.__dict__ or packed_format(module):
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    trial = copy.copy(module)
    trial._buffers = dict(module._buffers)
    weight, bias = module.weight, module.bias
    if weight.is_meta:
        N, K = weight.shape
        wide: Any = {"dtype": torch.float32, "device": "cpu"}
        values = torch.outer(torch.linspace(1, 2, N, **wide), torch.linspace(-1, 1, K, **wide))
        values = values.to(weight.dtype)
        weight = nn.Parameter(values, requires_grad=False)
        bias = None if bias is None else nn.Parameter(values[:, -1].clone(), requires_grad=False)
        trial._parameters = {"weight": weight, "bias": bias}
    x = torch.linspace(-3, 3, 3 * module.in_features, dtype=torch.float64).reshape(3, -1).sin()
    x = (x * torch.tensor([[1e-3], [1.0], [100.0]], dtype=torch.float64)).to(weight)
    wanted = F.linear(x, weight, bias)
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
