"""What GPT-2 and GPT-NeoX share: attention from one projection, an MLP of two maps, activations.

B sequences, T new tokens. A family gives the maps their names in Hugging Face's checkpoints.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.files import short
from minilora.models.blocks import Mask, Slot, attend, extend
from minilora.models.not_built import NotBuiltError
from minilora.models.rotary import Rotation, rotate

STD = 0.02  # of a fresh model's weights

_tanh_gelu = partial(F.gelu, approximate="tanh")
# `activation_function`: several names of one formula are transformers' (its activations.py).
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu_python_tanh": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_accurate": _tanh_gelu,
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


def check_activation(name: Any) -> None:
    """Raise unless a configuration's activation is built."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise NotBuiltError(
            f"activation_function={short(name)} is not built: it must be one of "
            f"{', '.join(ACTIVATIONS)}; use a model with one of them"
        )


class Conv1D(nn.Module):
    """Apply y = x W + b with W stored as `[in, out]`, as OpenAI's GPT-2 does.

    A fresh W is normal with standard deviation 0.02, b zero.

    Args:
        nf, nx: widths of output and input.
        dtype, device: of weight `[nx, nf]` and bias `[nf]`.
    """

    def __init__(self, nf: int, nx: int, *, dtype=None, device=None) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(nf, dtype=dtype, device=device))
        if not self.weight.is_meta:  # there is nothing to draw there, and it takes its time
            nn.init.normal_(self.weight, std=STD)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., nf]` for x `[..., nx]`."""
        y = torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight)
        return y.view(*x.shape[:-1], self.nf)

    def extra_repr(self) -> str:
        """Show the widths when printed."""
        return f"nf={self.nf}, nx={self.nx}"


def turned(K: int, N: int, **made: Any) -> Conv1D:
    """Make a Conv1D of its widths of input and output, as nn.Linear takes them."""
    return Conv1D(N, K, **made)


class JointAttention(nn.Module):
    """Attend with as many key and value heads as query heads, all from one projection.

    `names` are those of the projection and of the map back, which `linear` makes. `by_head`: the
    projection's rows stand head by head, else all queries come first.
    """

    def __init__(
        self,
        names: tuple[str, str],
        size: int,
        head_dim: int,
        scale: float,
        by_head: bool = False,
        linear: Callable[..., nn.Module] = nn.Linear,
        **made: Any,
    ) -> None:
        super().__init__()
        self.names, self.head_dim, self.scale, self.by_head = names, head_dim, scale, by_head
        self.add_module(names[0], linear(size, 3 * size, **made))
        self.add_module(names[1], linear(size, size, **made))

    def heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Return unrotated queries, keys and values `[B, heads, T, head_dim]`."""
        split = (*qkv.shape[:2], -1, 3 * self.head_dim if self.by_head else self.head_dim)
        if self.by_head:
            return qkv.view(split).transpose(1, 2).chunk(3, dim=-1)
        return tuple(part.view(split).transpose(1, 2) for part in qkv.chunk(3, dim=-1))

    def forward(self, x: Tensor, rotation: Rotation, mask: Mask, slot: Slot | None) -> Tensor:
        """Return `[B, T, size]`; without a mask position t sees positions 0 to t."""
        q, k, v = self.heads(getattr(self, self.names[0])(x))
        q, k = rotate(q, rotation), rotate(k, rotation)
        if slot is not None:
            k, v = extend(slot, k, v)
        out = attend(q, k, v, mask, self.scale).transpose(1, 2).reshape(x.shape)
        return getattr(self, self.names[1])(out)


class PlainMLP(nn.Module):
    """Apply a linear map, the activation and a linear map back; `linear` makes the maps."""

    def __init__(
        self,
        names: tuple[str, str],
        size: int,
        inner: int,
        activation: str,
        linear: Callable[..., nn.Module] = nn.Linear,
        **made: Any,
    ) -> None:
        super().__init__()
        self.names, self.act = names, ACTIVATIONS[activation]
        self.add_module(names[0], linear(size, inner, **made))
        self.add_module(names[1], linear(inner, size, **made))

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, T, size]`."""
        return getattr(self, self.names[1])(self.act(getattr(self, self.names[0])(x)))
