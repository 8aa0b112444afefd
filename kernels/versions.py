"""What differs between the versions of torch that minilora runs on: 2.6 and newer."""

import re

import torch

TORCH = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])

# Torch's flash attention for CPUs reads fewer key than query heads as they are: 2.8 reads past
# their end instead, 2.11 is the oldest that was seen to be right.
FLASH_GROUPS_HEADS = TORCH >= (2, 11)


def cuda_takes_tf32() -> bool:
    """Return whether f32 matmuls on CUDA may round to TF32.

    From 2.9 on one switch knows it; the older getter raises once that was set directly.
    """
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32
