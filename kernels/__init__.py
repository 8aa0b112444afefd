"""Low-rank matmuls and the fused loss on plain tensors; every op's meaning is in `reference`."""

from .cross_entropy import linear_cross_entropy
from .low_rank import (
    FrozenLinear,
    conv1d_forward,
    conv1d_grad_x,
    dense_forward,
    dense_grad_x,
    dropout_mask,
    lora_add,
    lora_linear,
    row_masks,
)
from .probe import Hardware, hardware

BACKENDS = ("auto", "torch", "triton")


def check_backend(backend: str) -> None:
    """Raise unless `backend` can run here.

    Raises:
        ValueError: a name that is not one of `BACKENDS`.
        RuntimeError: a backend that exists by name and cannot run, with the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, found {backend!r}")
    if backend == "triton":
        raise RuntimeError(
            "backend='triton' cannot run: this version of minilora has no Triton kernels; "
            "use backend='auto' or 'torch'"
        )


__all__ = [
    "BACKENDS",
    "FrozenLinear",
    "Hardware",
    "check_backend",
    "conv1d_forward",
    "conv1d_grad_x",
    "dense_forward",
    "dense_grad_x",
    "dropout_mask",
    "hardware",
    "linear_cross_entropy",
    "lora_add",
    "lora_linear",
    "row_masks",
]
