"""LoRA around one untouched layer: the layer stays whole in `base`, the factors stand beside it."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from minilora.kernels import (
    FrozenLinear,
    conv1d_forward,
    conv1d_grad_x,
    dense_forward,
    dense_grad_x,
    dropout_mask,
    frozen_product,
    is_slow,
    lora_add,
    lora_linear,
    triton_lora_linear,
)
from minilora.lora.adapter import LoRAAdapter
from minilora.lora.layer import LoRALayer, scaled_factors
from minilora.lora.modes import as_found
from minilora.quantization import (
    QuantizedLinear,
    packed_format,
    packed_linear,
    unreadable,
    weight_values,
)


def is_conv1d(module: nn.Module) -> bool:
    """Tell GPT-2's linear with a transposed weight `[in, out]` (transformers', or our own)."""
    weight = module._parameters.get("weight")
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(
        weight, "ndim", 0
    ) == 2  # fmt: skip


def is_linear(module: nn.Module) -> bool:
    """Tell what "all-linear" means: nn.Linear, its subclasses, Conv1D, and either quantized."""
    return isinstance(module, (nn.Linear, QuantizedLinear)) or is_conv1d(module)


@torch.no_grad()
def acts_as_linear(base: Any) -> bool:
    """Return whether an nn.Linear, or a subclass by its own forward, computes `x Wᵀ + b`.

    A forward of its own is tried on a few rows, large and small, in both modes, on a shallow copy.
    """
    if not isinstance(base, nn.Linear) or "forward" in base.__dict__ or packed_format(base):
        return False
    if type(base).forward is nn.Linear.forward:
        return True
    trial = copy.copy(base)
    trial._buffers = dict(base._buffers)
    x = torch.linspace(-3, 3, 3 * base.in_features, dtype=torch.float64).reshape(3, -1).sin()
    x = (x * torch.tensor([[1e-3], [1.0], [100.0]])).to(base.weight)
    wanted = F.linear(x, base.weight, base.bias)
    near = 1e-2 * wanted.abs().amax(1, keepdim=True)  # a forward may round between its steps
    try:
        with as_found(base):
            return all(
                isinstance(y := trial.train(mode)(x), Tensor)
                and y.shape == wanted.shape
                and y.dtype == wanted.dtype
                and bool(((y - wanted).abs() <= near).all())
                for mode in (True, False)
            )
    except Exception:  # whatever a stranger's forward raises, it is no linear's
        return False


def frozen_linear(base: nn.Module) -> FrozenLinear | None:
    """Return how the fused path multiplies by `base`, or None when only calling `base` is right.

    Exactly `nn.Linear`, Conv1D or `QuantizedLinear` with plain frozen parameters qualifies. A
    subclass, a parametrization, a hook, a replaced `forward`, a trainable weight or a tensor
    subclass (a sharded weight) may change what `base(x)` computes, so those are called as they
    are.
    """
    quantized = type(base) is QuantizedLinear
    if not (type(base) is nn.Linear or quantized or is_conv1d(base)):
        return None
    replaced = base.__dict__.get("forward")
    if replaced is not None and getattr(replaced, "func", None) is not widened_forward:
        return None
    if base._forward_hooks or base._forward_pre_hooks:
        return None
    if base._backward_hooks or base._backward_pre_hooks or torch_module._has_any_global_hook():
        return None
    for tensor in base._parameters.values() if quantized else (base.weight, base.bias):
        if tensor is not None and (
            type(tensor) not in (nn.Parameter, Tensor, FakeTensor) or tensor.requires_grad
        ):
            return None
    if isinstance(base, QuantizedLinear):
        return base.frozen()
    if type(base) is nn.Linear:
        return FrozenLinear((base.weight, base.bias), dense_forward, dense_grad_x)
    return FrozenLinear((base.weight, base.bias), conv1d_forward, conv1d_grad_x)


def widened_forward(base: nn.Module, *args: Any, **named: Any) -> Tensor:
    """Apply a linear or Conv1D, in float32 where x's dtype is slow; see `widening.widened`."""
    if len(args) != 1 or named:
        return type(base).forward(base, *args, **named)
    x = args[0]
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    frozen = frozen_linear(base)
    if frozen is None or not is_slow(dtype) or not (autocast or base.weight.dtype == dtype):
        return type(base).forward(base, x)
    return frozen_product(x.to(dtype), frozen)


class LoRALinear(LoRALayer):
    """LoRA on nn.Linear or Conv1D: maps `[..., K]` to `[..., N]`.

    Two paths give the same numbers: fused (one autograd step that owns both products) where
    `frozen_linear(base)` allows it, else general (`base` is called, then the branch is added).
    With `backend="triton"` the fused step runs on Triton's kernels; the general one never does.
    """

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """K of the base."""
        return self.base.weight.shape[0] if is_conv1d(self.base) else self.base.in_features

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """N of the base."""
        return self.base.weight.shape[1] if is_conv1d(self.base) else self.base.out_features

    def weight_matrix(self) -> Tensor:
        """Return W `[N, K]`: a view, or a fresh tensor where the base is quantized."""
        if isinstance(self.base, QuantizedLinear):
            return self.base.weight
        return self.base.weight.T if is_conv1d(self.base) else weight_values(self.base)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Return a view in the base's layout."""
        return matrix.T if is_conv1d(self.base) else matrix

    def _takes(self, dtype: torch.dtype) -> bool:
        if isinstance(self.base, QuantizedLinear):
            return dtype.is_floating_point
        return dtype == self.base.weight.dtype

    def _forward(self, x: Tensor, adapters: list[LoRAAdapter], drops: list[float]) -> Tensor:
        if any(a.magnitude is not None for a in adapters):
            return super()._forward(x, adapters, drops)
        dtype = x.dtype
        autocast = torch.is_autocast_enabled(x.device.type) and dtype != torch.float64
        if autocast:
            dtype = torch.get_autocast_dtype(x.device.type)
        frozen = frozen_linear(self.base)
        fused = (
            frozen is not None
            and self.compute_dtype in (None, dtype)
            # Stored codes are decoded to whatever x has.
            and (autocast or self._takes(dtype))
            # One mask for the whole branch: a second adapter, or the offset, must not share it.
            and (not any(drops) or (len(adapters) == 1 and adapters[0].offset_A is None))
        )
        if fused and frozen is not None and self.backend == "triton":
            self._used("triton", x)
            y = triton_lora_linear(x.to(dtype), frozen, *_concatenated(adapters), drops[0])
            return _with_bias(y, adapters)
        self._used("fused" if fused else "general", x)
        if fused and frozen is not None:
            x = x.to(dtype)
            mask = dropout_mask(x, drops[0]) if drops[0] else None
            y = lora_linear(x, frozen, *_concatenated(adapters), mask, drops[0])
            return _with_bias(y, adapters)
        y = self.base(x)
        x = x.to(self.compute_dtype or dtype)
        for factors, p in zip(adapters, drops, strict=True):
            mask = dropout_mask(x, p) if p else None
            y = lora_add(y, x, *factors.matrices(), factors.scaling, mask, p)
            if factors.offset_A is not None and factors.offset_B is not None:
                y = lora_add(y, x, factors.offset_A, factors.offset_B, -1.0)
        return _with_bias(y, adapters)


class LoRAEmbedding(LoRALayer):
    """LoRA on nn.Embedding: `E(x) + scaling · A.T[x] Bᵀ`, ids `[...]` to `[..., N]`.

    An embedding that scales its output (`embed_scale`) scales the branch alike. Adapter dropout
    does not apply: there is no floating input to drop.
    """

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """K: the number of ids."""
        return self.base.num_embeddings

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """N: the width of a row."""
        return self.base.embedding_dim

    def _shape(self) -> dict[str, Any]:
        return {"embedding": True}

    def weight_matrix(self) -> Tensor:
        """Return W `[N, K]`, a view."""
        return self.base.weight.T

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Return a view in the base's layout `[K, N]`."""
        return matrix.T

    def _forward(self, x: Tensor, adapters: list[LoRAAdapter], drops: list[float]) -> Tensor:
        return super()._forward(x, adapters, [0.0] * len(drops))

    def _down(self, x: Tensor, A: Tensor) -> Tensor:
        return F.embedding(x, A.T, self.base.padding_idx)

    def _up(self, s: Tensor, B: Tensor) -> Tensor:
        scale = getattr(self.base, "embed_scale", None)
        y = F.linear(s, B)
        return y if scale is None else y * torch.as_tensor(scale, dtype=y.dtype, device=y.device)


class LoRAConv2d(LoRALayer):
    """LoRA on nn.Conv2d: maps `[B, K, H, W]` to `[B, N, H', W']`.

    As PEFT stores it: A is a convolution of the base's geometry to r channels, B a 1×1 one.
    """

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """K: input channels."""
        return self.base.in_channels

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """N: output channels."""
        return self.base.out_channels

    def _shape(self) -> dict[str, Any]:
        return {"kernel_size": self.base.kernel_size}

    def weight_matrix(self) -> Tensor:
        """Return W `[N, in·kh·kw]`, a view."""
        return self.base.weight.flatten(1)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Return a view in the base's layout `[N, in, kh, kw]`."""
        return matrix.reshape(self.base.weight.shape)

    def _down(self, x: Tensor, A: Tensor) -> Tensor:
        return self._conv(x, A.reshape(-1, *self.base.weight.shape[1:]))

    def _up(self, s: Tensor, B: Tensor) -> Tensor:
        return F.conv2d(s, B[:, :, None, None])

    def _base_product(self, x: Tensor) -> Tensor:
        return self._conv(x, self.base.weight.to(x.dtype))

    def _per_row(self, values: Tensor, like: Tensor) -> Tensor:
        return values[:, :, None, None]

    def _conv(self, x: Tensor, kernel: Tensor) -> Tensor:
        base = self.base
        return F.conv2d(x, kernel, None, base.stride, base.padding, base.dilation)

    def _rows(self, vector: Tensor) -> Tensor:
        return vector[:, None, None]


def unsupported(base: nn.Module) -> str | None:
    """Say why no adapter can go on a module of a known kind, or another library's, or None."""
    if nn.parameter.is_lazy(base._parameters.get("weight")):  # type: ignore[arg-type]
        return "has no weight yet (it is lazy); run the model once before injecting"
    if isinstance(base, nn.Embedding) and base.max_norm is not None:
        return "rescales its weight in every forward (max_norm), so it can't stay frozen"
    if isinstance(base, nn.Conv2d):
        if base.groups != 1:
            return f"is a grouped convolution (groups={base.groups}); only groups=1 is supported"
        if base.padding_mode != "zeros":
            return f"pads by padding_mode={base.padding_mode!r}; only 'zeros' is supported"
    return unreadable(base) or packed_linear(base)


def layer_class(base: nn.Module) -> type[LoRALayer] | None:
    """Return the class that wraps such a module, or None."""
    if is_linear(base):
        return LoRALinear
    if isinstance(base, nn.Embedding):
        return LoRAEmbedding
    return LoRAConv2d if isinstance(base, nn.Conv2d) else None


def _concatenated(adapters: Sequence[LoRAAdapter]) -> tuple[Tensor, Tensor, float]:
    """Several adapters as one of the summed rank: `Σ sᵢ Bᵢ Aᵢ = [s₁B₁ s₂B₂ …] [A₁; A₂; …]`."""
    first = adapters[0]
    if len(adapters) == 1 and first.offset_A is None:
        return *first.matrices(), first.scaling
    parts = [scaled_factors(factors) for factors in adapters]
    return torch.cat([A for A, _ in parts]), torch.cat([B for _, B in parts], dim=1), 1.0


def _with_bias(y: Tensor, adapters: Sequence[LoRAAdapter]) -> Tensor:
    for factors in adapters:
        if factors.lora_bias is not None:
            y = y + (factors.lora_bias * factors.scaling).to(y.dtype)
    return y
