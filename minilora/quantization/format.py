"""What a storage format has to say: one subclass a format, one line in `options.FORMATS`.

Scales are stored as the int32 bit patterns of f32 (names ending in `_bits`), so that no cast of a
module's floating-point parameters touches them. `out` is dimension 0 wherever the layout has one,
and nothing is 0-dim. The part with the weights is called `codes` and has an integer dtype, which no
cast changes. A format needs no kernel, since `Format.products` decodes; one in `kernels/` makes it
faster.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minilora.kernels import Products, decoded_products

if TYPE_CHECKING:
    from minilora.quantization.options import Quantization

_PANEL = 2**18  # weights quantized at a time

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype by name


class Format:
    """How a weight `[N, K]` is stored; methods take the options that it was asked for with.

    Attributes:
        block_sizes: those the format has; empty where weights share no scale in blocks.
        reads: the options that mean something to it; others are refused.
    """

    block_sizes: tuple[int, ...] = ()
    reads: tuple[str, ...] = ()

    @property
    def integer(self) -> bool:
        """Whether the codes can be multiplied as integers."""
        return "compute" in self.reads

    def problem(self, spec: "Quantization", N: int, K: int) -> str | None:
        """Return why a weight `[N, K]` can't be stored so, or None."""
        return None

    def layout(self, spec: "Quantization", N: int, K: int) -> Layout:
        """Return shape and dtype of the parts that store a weight, in the order they are kept."""
        raise NotImplementedError

    def encode(self, weight: Tensor, spec: "Quantization") -> dict[str, Tensor]:
        """Quantize `[N, K]` of any floating dtype and strides; the parts may have any shape."""
        raise NotImplementedError

    def decode(
        self, parts: tuple[Tensor, ...], spec: "Quantization", shape: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        """Return the weight `[N, K]` as a fresh tensor."""
        raise NotImplementedError

    def products(
        self, spec: "Quantization", N: int, K: int, forward: str, backward: str, few: bool
    ) -> Products:
        """Return how to multiply by it: functions of x or grad_out, the parts and the bias.

        By default the weight is decoded first. `forward`, `backward` and `few` as for
        `kernels.integer_products`; they mean nothing to a format that is not `integer`.
        """
        shape = torch.Size((N, K))
        return decoded_products(lambda like, *parts: self.decode(parts, spec, shape, like.dtype))

    def damage(self, name: str, part: Tensor) -> str | None:
        """Return why a part's values can't be what `encode` wrote, or None; scales are checked."""
        return None

    def workspace_bytes(self, spec: "Quantization", weights: int) -> int:
        """Return the bytes needed to decode a matrix, beside the decoded values themselves."""
        return 0


def bits_of(scales: Tensor) -> Tensor:
    """Return scales as the int32 bit patterns of f32."""
    return scales.to(torch.float32).contiguous().view(torch.int32)


def panels(weight: Tensor, rows: int = 1) -> tuple[Tensor, ...]:
    """Split by multiples of `rows`, about 2¹⁸ weights each, so that f32 copies stay small."""
    step = max(1, _PANEL // max(1, weight.shape[1]) // rows) * rows
    return weight.split(step)
