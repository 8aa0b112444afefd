"""Turning queries and keys by rotary embeddings.

In the half-rotation order of Hugging Face's checkpoints: the pairs are (i, i + dim/2) of the first
dim numbers of a head (Su et al. 2021, "RoFormer", section 3.4.2). The frequencies: `rope.py`.
"""

import torch
from torch import Tensor

from minilora.kernels import rotary
from minilora.models.rope import LongRope, Rope, frequencies

Rotation = tuple[Tensor, Tensor] | None  # None: nothing is rotated


def document_lengths(positions: Tensor) -> Tensor:
    """Return at each place of `[…, T]` the length of its document: where positions fall, one ends.

    The last position known so far, plus one: a cached pass sees no later ones.
    """
    last = torch.arange(positions.shape[-1], device=positions.device)
    goes_on = positions[..., 1:] > positions[..., :-1]
    # The place of each document's last token: the nearest place from here on where one ends.
    ends = torch.where(goes_on, positions.shape[-1] - 1, last[:-1])
    ends = torch.cat((ends, last[-1:].expand(*ends.shape[:-1], 1)), dim=-1)
    ends = ends.flip(-1).cummin(-1).values.flip(-1)
    return positions.gather(-1, ends) + 1


def outgrows(rope: Rope | None, positions: Tensor) -> bool:
    """Whether the documents at new positions become too long for how their cached keys are rotated.

    LongRoPE alone has two sets of frequencies. With the dynamic type keys keep the rotation of
    their time in transformers' cache, too.
    """
    if rope is None or not isinstance(rope.scaling, LongRope):
        return False
    most = rope.scaling.original_max_position_embeddings
    cached, new = positions[..., 0], positions.amax(-1) + 1
    return bool(((cached > 0) & (cached <= most) & (new > most)).any())


def rotation_at(rope: Rope | None, positions: Tensor, dtype: torch.dtype) -> Rotation:
    """Cosines and sines `[1 or B, 1, T, dim / 2]`, computed in f32 from int positions."""
    if rope is None:
        return None
    scaling = rope.scaling
    by_length = scaling is not None and scaling.by_length
    lengths = document_lengths(positions.long()) if by_length else positions
    angle = positions[..., None].float() * frequencies(rope, lengths)
    angle = angle.view(-1, 1, positions.shape[-1], rope.dim // 2)
    cos, sin = angle.cos(), angle.sin()
    if scaling is not None and (stretch := scaling.amplitude(rope)) != 1.0:
        cos, sin = cos * stretch, sin * stretch
    return cos.to(dtype), sin.to(dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair (x_i, x_{i + dim/2}) of `[B, heads, T, head_dim]` by its angle."""
    if rotation is None:
        return x
    return rotary(x, *rotation)
