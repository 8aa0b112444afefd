"""The options of a quantized weight, and the registry of formats: one line each."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from minilora.files import check_options, described, must_be, option, whole
from minilora.kernels import COMPUTE, int8_is_exact, integer_way, scales_from_bits
from minilora.quantization.format import Format, Layout
from minilora.quantization.int4 import INT4
from minilora.quantization.int8 import INT8
from minilora.quantization.nf4 import NF4

FORMATS: dict[str, Format] = {
    "int8": INT8(),
    "nf4": NF4(),
    "int4": INT4(),
}


def _format(value: Any, name: str) -> Any:
    return must_be(
        f"one of {', '.join(FORMATS)}", lambda one: isinstance(one, str) and one in FORMATS
    )(value, name)


def _compute(value: Any, name: str) -> Any:
    must_be(f"one of {', '.join(COMPUTE)}", lambda one: one in COMPUTE)(value, name)
    if value != "int8" or integer_way() or int8_is_exact() or torch.cuda.is_available():
        return value
    raise RuntimeError(
        f"{name}='int8' cannot run: torch's int8 product is not exact on this processor (without "
        "VNNI or AMX it may saturate), and minilora's own needs AVX2 and a C compiler; install a "
        f"compiler (or set CC) if there is AVX2, or use {name}='auto' or 'dequantize'"
    )


@described
@dataclass(frozen=True)
class Quantization:
    """How a linear layer's weight is stored and multiplied; checked when it is made."""

    format: str = option(
        "nf4",
        "how weights are stored: int8 (a scale per output), nf4 (QLoRA's, codes as bitsandbytes "
        "writes them) or int4 (groups with small integer steps, multiplied through INT8)",
        _format,
    )
    block_size: int = option(
        64,
        "weights that share a scale: 32 to 4096 in powers of two for nf4; 32, 64 or 128 for int4, "
        "dividing the layer's inputs; refused for int8, which has a scale per output",
        whole(),
    )
    double_quant: bool = option(True, "store nf4's scales in 8 bits")
    compute: str = option(
        "auto",
        "how int8 and int4 multiply in the forward. `int8`: rows of x are quantized at run time, "
        "whole rows to 8 bits on a CPU with instructions for it (VNNI or AMX) and on CUDA, blocks "
        "of 64 to 7 bits on one with AVX2 and a C compiler. `dequantize`: in floating point. "
        "`auto`: int8 on such CPUs, else dequantize; in evaluation mode without gradients and "
        "without VNNI or AMX up to 16 rows are multiplied from the codes in f32, unrounded, so "
        "that a row's last digits depend on whether there are more",
        _compute,
    )
    grad_compute: str = option("auto", "the same for the gradient of the input", _compute)
    outliers: int = option(
        0,
        "how many input channels, those with the largest values of the batch, int8 and int4 "
        "multiply in floating point in the forward (at most a 16th of them). It brings the loss "
        "closer to the plain model's, and makes a row depend on the others of its batch",
        whole(0),
    )

    def __post_init__(self) -> None:
        check_options(self)
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name not in ("format", *self.storage.reads) and value != field.default:
                readers = [repr(one) for one, storage in FORMATS.items() if name in storage.reads]
                raise ValueError(
                    f"{name} acts on format={' or '.join(readers)} alone, found {name}={value!r} "
                    f"with format={self.format!r}; leave it out, or choose another format"
                )
        if self.outliers and self.compute == "dequantize":
            raise ValueError(
                f"outliers are channels kept out of the product of integers, which "
                f"compute='dequantize' has none of, found outliers={self.outliers}; leave one of "
                f"them out"
            )
        sizes = self.storage.block_sizes or (self.block_size,)
        if self.block_size not in sizes:
            raise ValueError(
                f"block_size of {self.format} must be one of {', '.join(map(str, sizes))}, found "
                f"{self.block_size}"
            )

    @property
    def storage(self) -> Format:
        """The format's class."""
        return FORMATS[self.format]

    @property
    def stored(self) -> dict[str, Any]:
        """The options that say what the bytes mean, as a folder of a quantized model has them."""
        return {name: getattr(self, name) for name in ("format", "block_size", "double_quant")}

    @classmethod
    def of_stored(cls, values: Mapping[str, Any]) -> "Quantization":
        """Return it from what `stored` names, without what the format does not read."""
        spec = cls(values["format"])
        return replace(spec, **{n: values[n] for n in spec.stored if n in spec.storage.reads})

    def problem(self, N: int, K: int) -> str | None:
        """Return why a weight `[N, K]` can't be stored so, or None."""
        if N == 0 or K == 0:
            return f"has no weights: its shape is [{N}, {K}]"
        return self.storage.problem(self, N, K)

    def layout(self, N: int, K: int) -> Layout:
        """Return shape and dtype of what stores a weight `[N, K]`, by name."""
        return self.storage.layout(self, N, K)

    def nbytes(self, N: int, K: int) -> dict[str, int]:
        """Return the bytes of each part that stores a weight `[N, K]`."""
        return {name: part.nbytes for name, part in self.empty(N, K).items()}

    def empty(self, N: int, K: int) -> dict[str, Tensor]:
        """Return the parts of a weight `[N, K]` on the meta device."""
        return {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (shape, dtype) in self.layout(N, K).items()
        }

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Quantize `[N, K]` of any floating dtype and strides to the tensors of `layout`."""
        if weight.is_meta:
            return self.empty(*weight.shape)
        parts = self.storage.encode(weight.detach(), self)
        shapes = self.layout(*weight.shape)
        return {name: tensor.reshape(shapes[name][0]) for name, tensor in parts.items()}

    def damage(self, parts: dict[str, Tensor], N: int, K: int) -> str | None:
        """Return what is wrong with stored parts of a weight `[N, K]`, as far as given, or None."""
        for name, (shape, dtype) in self.layout(N, K).items():
            part = parts.get(name)
            if part is None:
                continue
            if part.dtype != dtype or tuple(part.shape) != shape:
                return (
                    f"must have {name} of {dtype} {list(shape)} as {self.format}, found "
                    f"{part.dtype} {list(part.shape)}"
                )
            if not part.is_meta:
                reason = bad_scales(name, part) or self.storage.damage(name, part)
                if reason is not None:
                    return reason
        return None


def bad_scales(name: str, bits: Tensor) -> str | None:
    """Return what is wrong with a part whose name says that it holds scales, or None."""
    if not name.endswith("_bits"):
        return None
    scales = scales_from_bits(bits.detach().contiguous())
    if not bool(scales.isfinite().all()):
        return f"must have finite scales, found NaN or Inf in {name}"
    if name == "scale_bits" and not bool((scales > 0).all()):
        return f"must have scales above 0, found {float(scales.min()):g} in {name}"
    if name != "offset_bits" and bool((scales < 0).any()):
        return f"must have scales of at least 0, found {float(scales.min()):g} in {name}"
    return None


def is_finite(tensor: Tensor) -> bool:
    """Return whether every value is finite in f32, without a temporary of the tensor's size."""
    if tensor.is_meta or not tensor.numel():
        return True
    ends = torch.stack(tuple(tensor.detach().aminmax()))
    return bool(ends.to(torch.float32).isfinite().all())
