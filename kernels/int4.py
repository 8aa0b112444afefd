"""INT4 storage: symmetric, with two-level scales, so that it widens to INT8's codes.

    w_nk = q_nk · s_{n, k // group} · channel_n     q in −7..7, s in 1..18: q·s is an int8 code

Column j and column j + K/2 share a byte (low and high nibble, each q + 8): unpacking writes two
runs. N out, K in. Bytes read: 0.5 + 1/group a weight. The products are INT8's (`int8.py`).
"""

import torch
from torch import Tensor

from .cpu import can_decode, int4_blocks, int4_rows, int4_weights
from .decoding import decoded
from .int8 import Codes
from .workspace import is_traced, panel, workspace

_PANEL = 2**19  # weights widened at a time: what lies between the steps stays in cache


def int4_codes(packed: Tensor, steps: Tensor) -> Tensor:
    """Widen INT4 storage to INT8 codes: `q · s`, int8 `[N, K]`.

    Args:
        packed: uint8 `[N, K/2]`.
        steps: uint8 `[N, K/group]`.
    """
    N, half = packed.shape
    K = 2 * half
    out = workspace(torch.Size((N, K)), torch.int8, packed.device)
    rows = N if is_traced(packed) else max(1, panel(_PANEL, packed.device) // max(1, K))
    for start in range(0, N, rows):
        codes = packed[start : start + rows]
        q = out[start : start + rows]
        q[:, :half] = (codes & 15).view(torch.int8)
        q[:, half:] = (codes >> 4).view(torch.int8)
        q -= 8
        s = steps[start : start + rows].view(torch.int8)
        q.view(len(q), steps.shape[1], -1).mul_(s[:, :, None])
    return out


def _decoded(packed: Tensor, steps: Tensor, out: Tensor) -> Tensor:
    if not can_decode(out):
        return out.copy_(int4_codes(packed, steps))
    int4_weights(packed, steps, _group(packed, steps), out)
    return out


def _group(packed: Tensor, steps: Tensor) -> int:
    return 2 * packed.shape[1] // steps.shape[1]


# Opaque to the compiler, and with `like`, for the same reasons as NF4's.
@torch.library.custom_op("minilora::int4_weight", mutates_args=())
def _weight_op(packed: Tensor, steps: Tensor, like: Tensor) -> Tensor:
    out = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=like.dtype, device=packed.device)
    return _decoded(packed, steps, out)


@_weight_op.register_fake
def _(packed, steps, like):
    return packed.new_empty((packed.shape[0], 2 * packed.shape[1]), dtype=like.dtype)


def _widen(like: Tensor, packed: Tensor, steps: Tensor, floats: bool) -> Tensor:
    """Return `q · s` as int8, or in f32 for a product of floats on a CPU."""
    if not (floats and like.dtype == torch.float32 and like.device.type == "cpu"):
        return int4_codes(packed, steps)
    if is_traced(like):
        return _weight_op(packed, steps, like)
    shape = torch.Size((packed.shape[0], 2 * packed.shape[1]))
    return _decoded(packed, steps, workspace(shape, like.dtype, packed.device))


def _rows(x: Tensor, packed: Tensor, steps: Tensor, scales: Tensor) -> Tensor:
    return int4_rows(x, packed, steps, scales, _group(packed, steps))


def _blocks(x: Tensor, packed: Tensor, steps: Tensor, scales: Tensor, across: bool) -> Tensor:
    return int4_blocks(x, packed, steps, scales, _group(packed, steps), across)


def _weight(like: Tensor, packed: Tensor, steps: Tensor, bits: Tensor) -> Tensor:
    N, half = packed.shape
    return decoded(like, (packed, steps, bits), "int4", N, 2 * half, _group(packed, steps))


INT4_CODES = Codes(_widen, _rows, _blocks, _weight)  # parts: packed, steps
