"""`QuantizedLinear`: a frozen linear layer whose weight is stored in 8 or 4 bits."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from minilora.kernels import FrozenLinear, Products, Stored, frozen_product, integer_way
from minilora.quantization.options import Quantization, is_finite


class QuantizedLinear(nn.Module):
    """Apply `x Ŵᵀ + b` with Ŵ `[N, K]` stored in 8 or 4 bits; maps `[..., K]` to `[..., N]`.

    Made by `minilora.quantize`. Codes and scales are parameters without gradient; scales are kept
    as int32 bit patterns of f32, so `.half()`, `.to(torch.bfloat16)` and mixed-precision policies
    leave them alone (such calls change the bias and `dtype`, which `dequantize` returns).

    Args:
        parts: what `Quantization.encode` gave.
        in_features: K.
        out_features: N.
        spec: how it is stored and multiplied.
        bias: `[N]` or None.
        dtype: of `dequantize()`: what the layer's weight was before.
        plain: the class the layer had, `nn.Linear` or a Conv1D.

    Dettmers et al. 2022, "LLM.int8()", section 2; Dettmers et al. 2023, "QLoRA", section 3.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        parts: dict[str, Tensor],
        in_features: int,
        out_features: int,
        spec: Quantization,
        *,
        bias: Tensor | None,
        dtype: torch.dtype,
        plain: type[nn.Module] = nn.Linear,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.spec, self.plain = spec, plain
        for name in spec.layout(out_features, in_features):
            self.register_parameter(name, nn.Parameter(parts[name], requires_grad=False))
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
        spec: Quantization,
        *,
        bias: Tensor | None = None,
        plain: type[nn.Module] = nn.Linear,
    ) -> "QuantizedLinear":
        """Quantize a weight `[N, K]`; ValueError if it is not finite or does not fit the format."""
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ValueError(
                f"a weight to quantize must be a floating-point matrix, found {weight.dtype} of "
                f"shape {list(weight.shape)}"
            )
        N, K = weight.shape
        reason = spec.problem(N, K)
        if reason is not None:
            raise ValueError(f"the weight {reason}")
        if not is_finite(weight):
            raise ValueError("a weight to quantize must be finite, found NaN or Inf (in float32)")
        return cls(spec.encode(weight), K, N, spec, bias=bias, dtype=weight.dtype, plain=plain)

    @property
    def dtype(self) -> torch.dtype:
        """What `dequantize()` returns."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.parts[0].device

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Codes and scales, in the layout's order."""
        return tuple(self._parameters.values())[:-1]  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """The dequantized weight: a fresh tensor at every access; `dtype` and `device` are free."""
        return self.dequantize()

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales (the bias and the shared tables are not counted)."""
        return sum(part.nbytes for part in self.parts)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return Ŵ as a fresh tensor `[N, K]` in `dtype` (default: the dtype before)."""
        shape = torch.Size((self.out_features, self.in_features))
        return self.spec.storage.decode(self.parts, self.spec, shape, dtype or self.dtype)

    def frozen(self) -> FrozenLinear:
        """Return the pair of products, for the fused path, and what other backends need to know."""
        tensors: Any = tuple(self._parameters.values())
        host, few = tensors[0].device.type == "cpu", not (self.training or torch.is_grad_enabled())
        make = _made if torch.compiler.is_compiling() else _products
        N, K = self.out_features, self.in_features
        return FrozenLinear(tensors, *make(self.spec, N, K, self._integer, host, few))

    @property
    def ways(self) -> tuple[str, str]:
        """How many rows are multiplied here, forward and backward; see `kernels/int8.py`."""
        return _ways(self.spec, self._integer, self.device.type == "cpu")

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to floats; computes in x's dtype, or autocast's."""
        if not x.is_floating_point():
            raise TypeError(
                f"a quantized layer multiplies floating-point inputs, found {x.dtype}; cast it"
            )
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        frozen = self.frozen()
        if self.bias is None or not self.bias.requires_grad:
            return frozen_product(x, frozen)
        # The product gives its own tensors no gradient, so a bias that is trained is added to it.
        y = frozen_product(x, frozen._replace(tensors=(*self.parts, None)))
        return y + self.bias.to(y.dtype)

    def _apply(self, fn, recurse=True):
        # A cast reaches no parameter but the bias: what it does to the weight's dtype is asked
        # of an empty tensor.
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self.device)).dtype
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        parts = {name: state[prefix + name] for name in self._parameters if prefix + name in state}
        reason = self.spec.damage(parts, self.out_features, self.in_features)
        if reason is not None:
            errors.append(f"{prefix[:-1] or 'the layer'} {reason}")
            return
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        """Show shape, format and how it multiplies."""
        spec = self.spec
        shown = [name for name in spec.storage.reads if name != "outliers" or spec.outliers]
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        options = [f"{name}={getattr(spec, name)}" for name in ("format", *shown)]
        return ", ".join([sizes, f"bias={self.bias is not None}", *options])

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


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Return a model's quantized layers by dotted name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def _ways(spec: Quantization, integer: str | None, host: bool) -> tuple[str, str]:
    """Return how rows are multiplied on a CPU (`host`) or elsewhere, forward and backward."""
    if not spec.storage.integer:
        return "dequantize", "dequantize"

    def way(asked: str) -> str:
        if asked == "auto":
            asked = "int8" if host and integer else "dequantize"
        return integer or "int8" if asked == "int8" and host else asked

    return way(spec.compute), way(spec.grad_compute)


def _made(
    spec: Quantization, N: int, K: int, integer: str | None, host: bool, few: bool
) -> tuple[Any, Any, Stored]:
    few = few and host and spec.compute == "auto" and integer != "int8"
    products: Products = spec.storage.products(spec, N, K, *_ways(spec, integer, host), few)
    block = spec.block_size if spec.storage.block_sizes else 0
    return *products, Stored(spec.format, block, spec.compute, spec.grad_compute, spec.outliers)


_products = functools.cache(_made)  # not while a graph is traced: tracing does not see through it
