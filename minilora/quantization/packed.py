"""Weights that other libraries pack: what they stand for, and which can't be read here."""

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from minilora.quantization.linear import QuantizedLinear

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Libraries whose tensors look like the weight they stand for and decode themselves.
_DECODING = ("torchao", "optimum")


def packed_format(base: Any) -> str | None:
    """Name how another library packs a layer's weight, where it can be decoded; else None."""
    weight = base._parameters.get("weight")
    kind = type(weight).__name__
    if kind == "Params4bit" and _state(base) is not None:
        return f"bitsandbytes-{_state(base).quant_type}"
    if kind == "Int8Params" and weight.dtype == torch.int8:
        return "bitsandbytes-int8"
    library = type(weight).__module__.partition(".")[0]
    return library if library in _DECODING else None


def decoded(base: Any) -> Tensor:
    """Return a packed layer's weight as a fresh tensor `[N, K]`."""
    form, weight = packed_format(base), base.weight
    if form in _DECODING:
        return weight.detach().dequantize()
    library: Any = sys.modules["bitsandbytes"]  # its layer is here, so it was imported
    if form == "bitsandbytes-int8":
        scales = base.state.SCB if weight.SCB is None else weight.SCB
        return library.functional.int8_vectorwise_dequant(weight.data, scales.to(weight.device))
    codes, state = weight.data, _state(base)
    if getattr(state, "packing_format_for_cpu", False):  # another order, scales decoded to bf16
        scales, state = state.absmax, copy.copy(state)
        codes, state = library.functional._convert_weight_packed_for_cpu_inverse(codes, state)
        state.absmax, state.nested = scales.T.reshape(-1).float().contiguous(), False
    return library.functional.dequantize_4bit(codes, state).detach()


def unpacked_dtype(base: Any) -> torch.dtype:
    """Return the dtype that a packed weight had, as far as it is known, else float32."""
    state = _state(base)
    if state is not None:
        return getattr(state, "original_dtype", state.dtype)
    known = getattr(base, "bias", None) if base.weight.dtype == torch.int8 else base.weight
    return torch.float32 if known is None else known.dtype


def unreadable(base: nn.Module) -> str | None:
    """Say why the values of a linear's or embedding's weight can't be read, or None."""
    if isinstance(base, nn.Embedding):
        shape = (base.num_embeddings, base.embedding_dim)
    elif isinstance(base, nn.Linear):
        shape = (base.out_features, base.in_features)
    else:
        return None
    weight = getattr(base, "weight", None)
    if packed_format(base) is not None and isinstance(base, nn.Linear):
        return None
    if isinstance(weight, Tensor) and weight.dtype in _FLOATS and tuple(weight.shape) == shape:
        return None
    found = f"{weight.dtype} {list(weight.shape)}" if isinstance(weight, Tensor) else "nothing"
    return _refusal(base, f"holds {found} where a weight of floats {list(shape)} must be")


def packed_linear(module: nn.Module) -> str | None:
    """Say why a module that is no nn.Linear, but another library's packed one, is refused."""
    sizes: list[Any] = [getattr(module, n, None) for n in ("in_features", "out_features")]
    ours = isinstance(module, (nn.Linear, QuantizedLinear))
    if ours or not all(type(n) is int for n in sizes):
        return None
    own = {**module._parameters, **module._buffers}
    tensors = [t for t in own.values() if t is not None]
    whole = any(t.dtype in _FLOATS and t.numel() == sizes[0] * sizes[1] for t in tensors)
    packed = any(not t.is_floating_point() for t in tensors) or {"qweight", "W_q"} & set(own)
    if not (packed or callable(getattr(module, "weight", None))) or whole:
        return None
    return _refusal(module, f"packs its weight {sizes[::-1]}")


def _refusal(module: nn.Module, what: str) -> str:
    library = type(module).__module__.partition(".")[0]
    return (
        f"is a {type(module).__name__} of {library}, which {what}, in a way that can't be read "
        f"here; load the model in full precision and store it with minilora.quantize, or leave the "
        f"layer out with exclude="
    )


def _state(base: Any) -> Any:
    """Return bitsandbytes' description of a 4-bit weight, None before it is quantized."""
    found = getattr(base._parameters.get("weight"), "quant_state", None)
    return getattr(base, "quant_state", None) if found is None else found
