"""Storage of frozen weights in 8 and 4 bits: formats, exact bytes, and the layer over them."""

from minilora.quantization.linear import QuantizedLinear, quantized_layers
from minilora.quantization.options import FORMATS, Quantization, is_finite
from minilora.quantization.packed import (
    decoded,
    packed_format,
    packed_linear,
    unpacked_dtype,
    unreadable,
)

__all__ = [
    "FORMATS",
    "Quantization",
    "QuantizedLinear",
    "decoded",
    "is_finite",
    "packed_format",
    "packed_linear",
    "quantized_layers",
    "unpacked_dtype",
    "unreadable",
]
