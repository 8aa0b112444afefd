"""Rotary position embeddings: which frequencies a layer's queries and keys are turned by.

In the half-rotation order of Hugging Face's checkpoints (Su et al. 2021, "RoFormer", section 3.4.2,
with the pairs (i, i + dim/2) of the first dim numbers of a head).
"""

from typing import NamedTuple

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor] | None  # None: nothing is rotated


class Rope(NamedTuple):
    """How queries and keys of a layer are rotated.

    Attributes:
        dim: numbers at the head's beginning that are rotated, even; the rest stays.
        theta: base of the frequencies.
    """

    dim: int
    theta: float


def rotation_at(rope: Rope | None, positions: Tensor, dtype: torch.dtype) -> Rotation:
    """Cosines and sines `[1 or B, 1, T, dim / 2]`, computed in f32 from int positions."""
    if rope is None:
        return None
    steps = torch.arange(0, rope.dim, 2, dtype=torch.float32, device=positions.device)
    frequency = 1.0 / (rope.theta ** (steps / rope.dim))
    angle = (positions[..., None].float() * frequency).view(-1, 1, positions.shape[-1], len(steps))
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair (x_i, x_{i + dim/2}) of `[B, heads, T, head_dim]` by its angle."""
    if rotation is None:
        return x
    cos, sin = rotation
    half = cos.shape[-1]
    if 2 * half < x.shape[-1]:
        return torch.cat((rotate(x[..., : 2 * half], rotation), x[..., 2 * half :]), dim=-1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
