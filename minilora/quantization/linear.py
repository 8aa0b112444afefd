"""`QuantizedLinear`: a frozen linear layer whose weight is stored in INT8, NF4 or INT4."""

from typing import Any

import torch
from torch import Tensor, nn

from minilora.files import short
from minilora.kernels import (
    COMPUTE,
    FrozenLinear,
    Stored,
    frozen_product,
    int4_codes,
    int4_linear,
    int8_dequantize,
    int8_is_exact,
    int8_linear,
    integer_way,
    nf4_absmax,
    nf4_dequantize,
    nf4_linear,
    scales_from_bits,
)
from minilora.quantization.formats import Spec, layout, problem, quantize_weight


class QuantizedLinear(nn.Module):
    """Apply `x Ŵᵀ + b` with Ŵ `[N, K]` stored in 8 or 4 bits; maps `[..., K]` to `[..., N]`.

    Made by `minilora.quantize`. Codes and scales are parameters without gradient; scales are kept
    as int32 bit patterns of f32, so `.half()`, `.to(torch.bfloat16)` and mixed-precision policies
    leave them alone (such calls change the bias and `dtype`, which `dequantize` returns).

    Args:
        parts: what `minilora.quantization.quantize_weight` gave.
        in_features: K.
        out_features: N.
        spec: the format.
        bias: `[N]` or None.
        dtype: of `dequantize()`: what the layer's weight was before.
        compute: how INT8 and INT4 multiply in the forward: `"int8"` (rows of x are quantized at
            run time: whole rows to 8 bits on a CPU with instructions for it, VNNI or AMX, and on
            CUDA; blocks of 64 to 7 bits on one with AVX2 and a C compiler), `"dequantize"`, or
            `"auto"`: int8 on such CPUs, else dequantize; in evaluation mode without gradients and
            without VNNI or AMX up to 16 rows are multiplied from the codes in f32, unrounded, so
            that a row's last digits depend on whether there are more. NF4 always dequantizes.
        grad_compute: likewise for the input's gradient.
        outliers: input channels that `"int8"` keeps in floating point in the forward.
        plain: the class the layer had, `nn.Linear` or a Conv1D.

    Dettmers et al. 2022, "LLM.int8()", section 2; Dettmers et al. 2023, "QLoRA", section 3.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        parts: dict[str, Tensor],
        in_features: int,
        out_features: int,
        spec: Spec,
        *,
        bias: Tensor | None,
        dtype: torch.dtype,
        compute: str = "auto",
        grad_compute: str = "auto",
        outliers: int = 0,
        plain: type[nn.Module] = nn.Linear,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.spec, self.compute, self.grad_compute = spec, compute, grad_compute
        self.outliers, self.plain = outliers, plain
        for name, tensor in parts.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", bias)
        self._dtype = dtype
        self._integer = integer_way()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._integer = integer_way()  # it may be another machine

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        spec: Spec,
        *,
        bias: Tensor | None = None,
        compute: str = "auto",
        grad_compute: str = "auto",
        outliers: int = 0,
        plain: type[nn.Module] = nn.Linear,
    ) -> "QuantizedLinear":
        """Quantize a weight `[N, K]`.

        Raises:
            ValueError: a weight that is not finite, not 2-D or does not fit the format.
        """
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ValueError(
                f"a weight to quantize must be a floating-point matrix, found {weight.dtype} of "
                f"shape {list(weight.shape)}"
            )
        reason = problem(spec, *weight.shape)
        if reason is not None:
            raise ValueError(f"the weight {reason}")
        if not is_finite(weight):
            raise ValueError("a weight to quantize must be finite, found NaN or Inf (in float32)")
        for choice in (compute, grad_compute):
            check_compute(choice)
        check_outliers(outliers)
        return cls(
            quantize_weight(weight, spec),
            weight.shape[1],
            weight.shape[0],
            spec,
            bias=bias,
            dtype=weight.dtype,
            compute=compute,
            grad_compute=grad_compute,
            outliers=outliers,
            plain=plain,
        )

    @property
    def dtype(self) -> torch.dtype:
        """What `dequantize()` returns."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the codes lie."""
        return self._parameters["codes"].device  # type: ignore[union-attr]

    @property
    def weight(self) -> Tensor:
        """The dequantized weight: a fresh tensor at every access; `dtype` and `device` are free."""
        return self.dequantize()

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales (the bias and the shared tables are not counted)."""
        return sum(p.nbytes for name, p in self._parameters.items() if p is not None
                   and name != "bias")  # fmt: skip

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return Ŵ as a fresh tensor `[N, K]` in `dtype` (default: the dtype before)."""
        dtype = dtype or self.dtype
        shape = torch.Size((self.out_features, self.in_features))
        p: Any = self._parameters
        if self.spec.format == "int8":
            return int8_dequantize(p["codes"], p["scale_bits"], dtype)
        if self.spec.format == "int4":
            codes = int4_codes(p["codes"], p["steps"], self.spec.block_size)
            return int8_dequantize(codes, p["scale_bits"], dtype)
        out = torch.empty(shape, dtype=dtype, device=self.device)
        packed = p["codes"].reshape(-1)
        return nf4_dequantize(packed, self._absmax(), self.spec.block_size, shape, out)

    def _absmax(self) -> Tensor:
        p: Any = self._parameters
        if not self.spec.double_quant:
            return nf4_absmax(p["absmax_bits"], None, None)
        return nf4_absmax(p["absmax"], p["absmax2_bits"], p["offset_bits"])

    def frozen(self) -> FrozenLinear:
        """Return the pair of products, for the fused path, and what other backends need to know."""
        spec = self.spec
        block = 0 if spec.format == "int8" else spec.block_size
        stored = Stored(spec.format, block, self.compute, self.grad_compute, self.outliers)
        return self._products()._replace(stored=stored)

    def _products(self) -> FrozenLinear:
        p: Any = self._parameters
        if self.spec.format == "nf4":
            double = self.spec.double_quant
            scales = (p["absmax"], p["absmax2_bits"], p["offset_bits"]) if double else (
                p["absmax_bits"], None, None)  # fmt: skip
            shape = (self.out_features, self.in_features)
            return nf4_linear(p["codes"], *scales, self.bias, shape, self.spec.block_size)
        how = (*self.ways, self.outliers, self._few())
        if self.spec.format == "int8":
            return int8_linear(p["codes"], p["scale_bits"], self.bias, *how)
        return int4_linear(
            p["codes"],
            p["steps"],
            p["scale_bits"],
            self.bias,
            self.spec.block_size,
            *how,
        )

    @property
    def ways(self) -> tuple[str, str]:
        """How many rows are multiplied here, forward and backward; see `kernels/int8.py`."""
        if self.spec.format == "nf4":
            return "dequantize", "dequantize"
        return self._way(self.compute), self._way(self.grad_compute)

    def _way(self, asked: str) -> str:
        here = self.device.type == "cpu"
        if asked == "auto":
            asked = "int8" if here and self._integer else "dequantize"
        return self._integer or "int8" if asked == "int8" and here else asked

    def _few(self) -> bool:
        if self.training or torch.is_grad_enabled() or self.compute != "auto":
            return False
        return self.device.type == "cpu" and self._integer != "int8"

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer; computes in x's dtype, or autocast's.

        Raises:
            TypeError: x is not floating point.
        """
        if not x.is_floating_point():
            raise TypeError(
                f"a quantized layer multiplies floating-point inputs, found {x.dtype}; cast it"
            )
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        return frozen_product(x, self.frozen())

    def _apply(self, fn, recurse=True):
        # A cast reaches no parameter but the bias: what it does to the weight's dtype is asked
        # of an empty tensor.
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self.device)).dtype
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        for name, (shape, dtype) in layout(self.spec, self.out_features, self.in_features).items():
            found = state.get(prefix + name)
            if found is not None and (found.dtype != dtype or tuple(found.shape) != shape):
                errors.append(
                    f"{prefix}{name} must be {dtype} of shape {list(shape)} for this "
                    f"{self.spec.format} layer, found {found.dtype} of shape {list(found.shape)}"
                )
                return
        reason = bad_scales({n: state[prefix + n] for n in self._parameters if prefix + n in state})
        if reason is not None:
            errors.append(f"{prefix[:-1]} {reason}")
            return
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        """Show shape, format and how it multiplies."""
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.spec.format}"
        )
        if self.spec.format != "int8":
            text += f", block_size={self.spec.block_size}"
        if self.spec.format == "nf4":
            return f"{text}, double_quant={self.spec.double_quant}"
        text += f", compute={self.compute}, grad_compute={self.grad_compute}"
        return f"{text}, outliers={self.outliers}" if self.outliers else text

    def plain_module(self, weight: Tensor) -> nn.Module:
        """Return the layer as it was before quantization, with this weight `[N, K]`."""
        N, K = weight.shape
        if self.plain is nn.Linear:
            module: Any = nn.Linear(K, N, bias=self.bias is not None, device="meta")
        else:
            module, weight = self.plain(N, K), weight.T.contiguous()
        module.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            module.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return module.train(self.training)


def check_compute(choice: object) -> None:
    """Raise unless this names a way to multiply that can run here."""
    if choice not in COMPUTE:
        raise ValueError(f"compute must be one of {', '.join(COMPUTE)}, found {choice!r}")
    if choice != "int8" or integer_way() or int8_is_exact() or torch.cuda.is_available():
        return
    raise RuntimeError(
        "compute='int8' cannot run: torch's int8 product is not exact on this processor (without "
        "VNNI or AMX it may saturate), and minilora's own needs AVX2 and a C compiler; install a "
        "compiler (or set CC) if there is AVX2, or use compute='auto' or 'dequantize'"
    )


def check_outliers(count: object) -> None:
    """Raise unless this is a number of channels."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"outliers must be a whole number of at least 0, found {short(count)}")


def is_finite(tensor: Tensor) -> bool:
    """Tell whether every value is finite in f32, without a temporary of the tensor's size."""
    if tensor.is_meta or not tensor.numel():
        return True
    ends = torch.stack(tuple(tensor.detach().aminmax()))
    return bool(ends.to(torch.float32).isfinite().all())


def bad_scales(parts: dict[str, Tensor]) -> str | None:
    """Say what is wrong with stored codes and scales, or None."""
    for name, tensor in parts.items():
        if tensor.is_meta:
            continue
        if name.endswith("_bits") and tensor.dtype == torch.int32:
            scales = scales_from_bits(tensor.detach().contiguous())
            if not bool(scales.isfinite().all()):
                return f"must have finite scales, found NaN or Inf in {name}"
            if name == "scale_bits" and not bool((scales > 0).all()):
                return f"must have scales above 0, found {float(scales.min()):g} in {name}"
            if name != "offset_bits" and bool((scales < 0).any()):
                return f"must have scales of at least 0, found {float(scales.min()):g} in {name}"
        if name == "steps" and not bool(((tensor >= 1) & (tensor <= 18)).all()):
            return f"must have steps of 1 to 18, found {int(tensor.min())} to {int(tensor.max())}"
        if name == "codes" and tensor.dtype == torch.int8 and bool((tensor == -128).any()):
            return "must have codes of -127 to 127, found -128"
    return None
