"""Storage of frozen weights in 8 and 4 bits: formats, exact bytes, and the layer over them."""

from .formats import FORMATS, Spec, check_spec, layout, problem, quantize_weight, stored_bytes
from .linear import QuantizedLinear, bad_scales, check_compute, check_outliers, is_finite

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
    "problem",
    "quantize_weight",
    "stored_bytes",
]
