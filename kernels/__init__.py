"""Matmuls, loss, attention and norms on plain tensors; `reference` says what the matmuls mean."""

# transformers asks whether Hugging Face's `kernels` is there, and in the repository's root finds
# this folder. Under that name it is empty: operators registered twice crash the process.
if __name__ != "kernels":
    from .attention import causal_attention
    from .autocast import without_autocast
    from .cache import cache_folder, make_folder, private_folder
    from .capped import capped_attention
    from .cross_entropy import bounds, linear_cross_entropy
    from .devices import DEVICES, as_on_gpu, on_cpu, out_of_memory, resolve_device
    from .dropout import drop, dropout_mask, row_masks
    from .frozen import frozen_product
    from .int4 import INT4_CODES, int4_codes
    from .int8 import (
        COMPUTE,
        INT8_CODES,
        int8_decode,
        integer_products,
        quantize_rows,
        quotient,
        scales_from_bits,
    )
    from .low_rank import (
        FrozenLinear,
        Products,
        Stored,
        conv1d_forward,
        conv1d_grad_x,
        decoded_products,
        dense_forward,
        dense_grad_x,
        lora_add,
        lora_linear,
    )
    from .nf4 import DYNAMIC_CODE, NF4_TABLE, nf4_decode, nf4_products
    from .probe import (
        fastest_dtype,
        hardware,
        instruction_set,
        int8_is_exact,
        integer_way,
        is_slow,
    )
    from .rowwise import geglu, rms_norm, rotary, swiglu
    from .triton import lora_linear as triton_lora_linear
    from .triton import problem as triton_problem
    from .workspace import hand_back_freed_memory, hand_back_large_blocks, keep_freed_memory

    BACKENDS = ("auto", "torch", "triton")


def check_backend(backend: str) -> None:
    """Raise unless `backend` can run here.

    Raises:
        ValueError: a name that is not one of `BACKENDS`.
        RuntimeError: a backend that exists by name and cannot run, with the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, found {backend!r}")
    reason = triton_problem() if backend == "triton" else None
    if reason is not None:
        raise RuntimeError(f"backend='triton' cannot run: {reason}; use backend='auto' or 'torch'")


__all__ = [
    "COMPUTE",
    "DEVICES",
    "DYNAMIC_CODE",
    "INT4_CODES",
    "INT8_CODES",
    "NF4_TABLE",
    "FrozenLinear",
    "Products",
    "Stored",
    "as_on_gpu",
    "bounds",
    "cache_folder",
    "capped_attention",
    "causal_attention",
    "check_backend",
    "conv1d_forward",
    "conv1d_grad_x",
    "decoded_products",
    "dense_forward",
    "dense_grad_x",
    "drop",
    "dropout_mask",
    "fastest_dtype",
    "frozen_product",
    "geglu",
    "hand_back_freed_memory",
    "hand_back_large_blocks",
    "hardware",
    "instruction_set",
    "int4_codes",
    "int8_decode",
    "int8_is_exact",
    "integer_products",
    "integer_way",
    "is_slow",
    "keep_freed_memory",
    "linear_cross_entropy",
    "lora_add",
    "lora_linear",
    "make_folder",
    "nf4_decode",
    "nf4_products",
    "on_cpu",
    "out_of_memory",
    "private_folder",
    "quantize_rows",
    "quotient",
    "resolve_device",
    "rms_norm",
    "rotary",
    "row_masks",
    "scales_from_bits",
    "swiglu",
    "triton_lora_linear",
    "without_autocast",
]
