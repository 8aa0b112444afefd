"""Storage of frozen weights in 8 and 4 bits: formats, exact bytes, and the layer over them."""

from minilora.quantization.formats import (
    FORMATS,
    Spec,
    check_spec,
    layout,
    problem,
    quantize_weight,
    stored_bytes,
)
from minilora.quantization.linear import (
    QuantizedLinear,
    bad_scales,
    check_compute,
    check_outliers,
    is_finite,
)
from minilora.quantization.packed import (
    packed_format,
    packed_linear,
    unpacked_dtype,
    unreadable,
    weight_values,
)

__all__ = [
    "FORMATS",
    "QuantizedLinear",
    "Spec",
    "bad_scales",
    "check_compute",
    "check_outliers",
    "check_spec",
    "is_finite",
    "layout",
    "packed_format",
    "packed_linear",
    "problem",
    "quantize_weight",
    "stored_bytes",
    "unpacked_dtype",
    "unreadable",
    "weight_values",
]
