"""INT8: a code of −127 to 127 for each weight, a scale for each output."""

import torch

from minilora.kernels import INT8_CODES, int8_decode, integer_products, quantize_rows
from minilora.quantization.format import Format, bits_of, panels


class INT8(Format):
    """1 + 4/K bytes a weight; see `kernels/int8.py`."""

    reads = ("compute", "grad_compute", "outliers")

    def layout(self, spec, N, K):
        """Codes `[N, K]` and a scale for each row."""
        return {"codes": ((N, K), torch.int8), "scale_bits": ((N,), torch.int32)}

    def encode(self, weight, spec):
        """Quantize each row by its largest magnitude."""
        parts = [quantize_rows(panel.to(torch.float32)) for panel in panels(weight)]
        codes, scales = (torch.cat(column) for column in zip(*parts, strict=True))
        return {"codes": codes, "scale_bits": bits_of(scales)}

    def decode(self, parts, spec, shape, dtype):
        """Multiply codes by scales."""
        return int8_decode(*parts, dtype)

    def products(self, spec, N, K, forward, backward, few):
        """Multiply integers, or the codes cast to floats."""
        return integer_products(INT8_CODES, forward, backward, spec.outliers, few)

    def damage(self, name, part):
        """Find the code that is never written."""
        if name == "codes" and bool((part == -128).any()):
            return "must have codes of -127 to 127, found -128"
        return None
