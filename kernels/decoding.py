"""Stored weights decoded by one Triton launch, wherever Triton's kernels run (CUDA).

Plain torch takes several passes over a whole matrix: 7 to 10 times the bytes of reading the codes
and writing the weights once.
"""

import torch
from torch import Tensor

from .workspace import is_traced

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_usable: dict[torch.device, bool] = {}


def runs_on(device: torch.device) -> bool:
    """Return whether kernels run on a device, asked once each."""
    found = _usable.get(device)
    if found is None:
        from .triton import problem

        found = _usable[device] = device.type == "cuda" and problem(device) is None
    return found


runs_on._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in triton/__init__.py


def decodes(like: Tensor) -> bool:
    """Return whether `decoded` can write weights in like's dtype on like's device."""
    return like.dtype in _DTYPES and runs_on(like.device)


def decoded(
    like: Tensor, parts: tuple[Tensor, ...], format: str, N: int, K: int, block: int
) -> Tensor:
    """Return W as a new tensor `[N, K]` in like's dtype, by one launch.

    Weights are f32 products, rounded once; the last bit may differ from the formats' own decoding
    in torch, as sums and products are fused.

    Args:
        like: a tensor that `decodes` is true for.
        parts: what stores W, in the order of the format's layout; contiguous.
        format: "int8", "nf4" or "int4".
        N: outputs.
        K: inputs.
        block: weights that share a scale (int8 has none: 0).
    """
    if is_traced(like):
        return _weight_op(list(parts), format, N, K, block, like)
    return _launch(parts, format, N, K, block, like)


def _launch(parts, format, N, K, block, like) -> Tensor:
    from .triton import with_tables
    from .triton.stored import Weight, plan_decoded

    out = torch.empty(N, K, dtype=like.dtype, device=like.device)
    stored = with_tables(list(parts), format, like.device)
    plan_decoded(Weight(format, N, K, block, stored), out).run()
    return out


# Opaque to the compiler, and with `like`, for the same reasons as NF4's.
@torch.library.custom_op(
    "minilora::decoded_weight",
    mutates_args=(),
    schema="(Tensor[] parts, str format, SymInt N, SymInt K, SymInt block, Tensor like) -> Tensor",
)
def _weight_op(
    parts: list[Tensor], format: str, N: int, K: int, block: int, like: Tensor
) -> Tensor:
    return _launch(parts, format, N, K, block, like)


@_weight_op.register_fake
def _(parts, format, N, K, block, like):
    return like.new_empty((N, K))
