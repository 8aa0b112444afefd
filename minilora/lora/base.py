"""How LoRA sees one frozen layer: a matrix W `[N, K]`, how it is stored, both ends of a branch.

Weights of Conv1D and Embedding count transposed, a kernel as `[out, in·kh·kw]`. Whether a layer is
quantized or packed is asked here and nowhere else in this room.
"""

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
    frozen_product,
    is_slow,
)
from minilora.lora.adapter import FROM_WEIGHT, LoRAAdapter, Pair
from minilora.lora.trial import acts_as_linear
from minilora.quantization import (
    QuantizedLinear,
    decoded,
    packed_format,
    unpacked_dtype,
    unreadable,
)


class Base:
    """A frozen layer as LoRA sees it: any linear, and a subclass for each that takes an adapter.

    Attributes:
        module: the layer itself, neither copied nor changed.
        type: its class when this view was made.
        family: `"linear"`, `"embedding"` or `"conv2d"`.
        is_quantized: whether `minilora.quantize` has stored it.
        transposed: whether it stores W as `[K, N]`.
    """

    family = "linear"
    is_quantized = False
    transposed = False
    _widths = ("in_features", "out_features")
    _trailing = 0  # dimensions of the output behind its channels
    _exact = False  # whether the module's class is one whose products are known

    def __init__(self, module: nn.Module):
        self.module: Any = module
        self.type = type(module)
        self._made: tuple[list[object], FrozenLinear] | None = None

    @property
    def in_features(self) -> int:
        """Inputs of a linear, rows of an embedding, channels of a convolution."""
        return getattr(self.module, self._widths[0])

    @property
    def out_features(self) -> int:
        """Outputs of a linear, width of an embedding, channels of a convolution."""
        return getattr(self.module, self._widths[1])

    @property
    def shape(self) -> tuple[int, int]:
        """`[N, K]` of the matrix that an adapter adds to."""
        return self.out_features, self.in_features

    @property
    def dtype(self) -> torch.dtype:
        """Return the weight's dtype; if it is packed, the one before packing, as far as known."""
        return unpacked_dtype(self.module) if self.packed else self._weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self._weight.device

    @property
    def packed(self) -> str | None:
        """How another library packs the weight, or None."""
        return packed_format(self.module)

    @property
    def stored(self) -> str:
        """The weight's dtype, or the name of a quantized or packed format."""
        return self.packed or str(self._weight.dtype).removeprefix("torch.")

    @property
    def _weight(self) -> Any:
        """What has the weight's dtype and device, without decoding it."""
        return self.module.weight

    def values(self) -> Tensor:
        """Return the weight in its own layout: a fresh tensor where it has to be decoded."""
        return decoded(self.module) if self.packed else self.module.weight

    def matrix(self) -> Tensor:
        """Return W `[N, K]`: a view, or a fresh tensor where it has to be decoded."""
        return self.as_matrix(self.values())

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Return a tensor in the weight's layout as `[N, K]`."""
        return weight.T if self.transposed else weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Return a matrix `[N, K]` in the weight's layout."""
        return matrix.T if self.transposed else matrix

    def problem(self) -> str | None:
        """Say why no adapter can go here, or None."""
        if nn.parameter.is_lazy(self.module._parameters.get("weight")):
            return "has no weight yet (it is lazy); run the model once before injecting"
        return unreadable(self.module)

    def is_plain(self) -> bool:
        """Return whether the module computes what its W and bias say, and nothing else."""
        return type(self) is not Base

    def new_adapter(self, **options: Any) -> LoRAAdapter:
        """Make factors of this layer's shapes; DoRA and inits that read the weight are set up."""
        embedding = self.family == "embedding"
        kernel = self.module.kernel_size if self.family == "conv2d" else ()
        adapter = LoRAAdapter(
            self.in_features, self.out_features, embedding=embedding, kernel_size=kernel, **options
        )
        if adapter.lora_A.is_meta:
            return adapter
        # The matrix only where it is read: of a quantized base it is a fresh, decoded tensor.
        if FROM_WEIGHT.fullmatch(adapter.init):
            adapter.start_from(self.matrix())
        if adapter.magnitude is not None:
            adapter.magnitude.data.copy_(adapter.row_lengths(self.matrix()))
        return adapter

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Apply A `[R, K]`: R channels where the output has N."""
        return F.linear(x, A)

    def up(self, s: Tensor, B: Tensor) -> Tensor:
        """Apply B `[N, R]`."""
        return F.linear(s, B)

    def branch(self, x: Tensor, pair: Pair, dtype: torch.dtype) -> Tensor:
        """Return `scaling · B A x`, the factors cast to this dtype."""
        return self.up(self.down(x, pair.A.to(dtype)), pair.B.to(dtype)) * pair.scaling

    def product(self, x: Tensor) -> Tensor:
        """Apply the weight alone, without the bias."""
        return F.linear(x, self.matrix().to(x.dtype))

    def channels(self, values: Tensor, ndim: int) -> Tensor:
        """Shape `[channels]` or `[rows, channels]` to broadcast over `ndim` dimensions."""
        *rows, width = values.shape
        between = ndim - len(rows) - 1 - self._trailing if rows else 0
        return values.reshape(*rows, *[1] * between, width, *[1] * self._trailing)

    def products(self) -> FrozenLinear | None:
        """Return how the fused path multiplies, or None when only calling the module is right.

        Exactly `nn.Linear`, Conv1D or `QuantizedLinear` with plain frozen parameters qualifies. A
        subclass, a hook, a replaced `forward`, a trainable or sharded weight may compute something
        else. Made once, and anew where a parameter was replaced or the mode has changed.
        """
        module = self.module
        replaced = module.__dict__.get("forward")
        if (
            not self._exact
            or (replaced is not None and getattr(replaced, "__func__", None) is not Base.widened)
            or module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or torch_module._global_forward_hooks
            or torch_module._global_forward_pre_hooks
            or torch_module._global_backward_hooks
            or torch_module._global_backward_pre_hooks
        ):
            return None
        tensors = [tensor for tensor in module._parameters.values() if tensor is not None]
        for tensor in tensors:
            if type(tensor) not in (nn.Parameter, Tensor, FakeTensor) or tensor.requires_grad:
                return None
        if torch.compiler.is_compiling():  # a graph must not depend on which tensors these are
            return self._make()
        # How a quantized layer multiplies depends on its spec and, by few rows, on the mode. What
        # was made holds the tensors, so no other has the id of one.
        key = [module.training or torch.is_grad_enabled(), module.__dict__.get("spec")]
        key += [part for tensor in tensors for part in (id(tensor), tensor.device)]
        if self._made is None or self._made[0] != key:
            self._made = key, self._make()
        return self._made[1]

    def widened(self, *args: Any, **named: Any) -> Tensor:
        """Apply a plain linear, in float32 where x's dtype is slow; see `widening.widened`."""
        if len(args) != 1 or named:
            return self.type.forward(self.module, *args, **named)
        x = args[0]
        autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        frozen = self.products()
        if frozen is None or not is_slow(dtype) or not (autocast or self.dtype == dtype):
            return self.type.forward(self.module, x)
        return frozen_product(x.to(dtype), frozen)

    def _make(self) -> FrozenLinear:
        raise NotImplementedError


class Linear(Base):
    """`nn.Linear` and its subclasses, packed by another library or not."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self._exact = self.type is nn.Linear

    def is_plain(self) -> bool:
        """Return whether the module computes `x Wᵀ + b`, by its class or on trial."""
        return self._exact or acts_as_linear(self.module)

    def _make(self) -> FrozenLinear:
        return FrozenLinear((self.module.weight, self.module.bias), dense_forward, dense_grad_x)


class Conv1D(Base):
    """GPT-2's linear, which stores `[K, N]`: transformers' class or that of `minilora.models`."""

    transposed = _exact = True

    @property
    def in_features(self) -> int:
        """K."""
        return self.module.weight.shape[0]

    @property
    def out_features(self) -> int:
        """N."""
        return self.module.weight.shape[1]

    def _make(self) -> FrozenLinear:
        return FrozenLinear((self.module.weight, self.module.bias), conv1d_forward, conv1d_grad_x)


class Quantized(Base):
    """A linear or Conv1D that `minilora.quantize` has stored in fewer bits."""

    is_quantized = True

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self._exact = self.type is QuantizedLinear
        self.transposed = not issubclass(self.module.plain, nn.Linear)

    @property
    def _weight(self) -> Any:
        return self.module

    @property
    def stored(self) -> str:
        """The format."""
        return self.module.spec.format

    def values(self) -> Tensor:
        """Return the decoded weight in the layout that the plain layer had."""
        return self.as_weight(self.module.weight)

    def _make(self) -> FrozenLinear:
        return self.module.frozen()


class Embedding(Base):
    """`nn.Embedding`: ids `[...]` to `[..., N]`, `E(x) + scaling · A.T[x] Bᵀ`."""

    family = "embedding"
    transposed = True
    _widths = ("num_embeddings", "embedding_dim")

    def problem(self) -> str | None:
        """Say why no adapter can go here, or None."""
        if self.module.max_norm is not None:
            return "rescales its weight in every forward (max_norm), so it can't stay frozen"
        return super().problem()

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Look ids up in Aᵀ."""
        return F.embedding(x, A.T, self.module.padding_idx)

    def up(self, s: Tensor, B: Tensor) -> Tensor:
        """Apply B `[N, R]`, scaled as the output is."""
        scale = getattr(self.module, "embed_scale", None)
        y = F.linear(s, B)
        return y if scale is None else y * torch.as_tensor(scale, dtype=y.dtype, device=y.device)


class Conv2d(Base):
    """`nn.Conv2d`: A is a convolution of its geometry to r channels, B a 1×1 one (as in PEFT)."""

    family = "conv2d"
    _widths = ("in_channels", "out_channels")
    _trailing = 2

    @property
    def shape(self) -> tuple[int, int]:
        """`[out, in·kh·kw]`."""
        return self.out_features, self.module.weight[0].numel()

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Return a kernel as `[N, in·kh·kw]`."""
        return weight.flatten(1)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Return a matrix as a kernel `[N, in, kh, kw]`, a view."""
        return matrix.reshape(self.module.weight.shape)

    def problem(self) -> str | None:
        """Say why no adapter can go here, or None."""
        groups, padding = self.module.groups, self.module.padding_mode
        if groups != 1:
            return f"is a grouped convolution (groups={groups}); only groups=1 is supported"
        if padding != "zeros":
            return f"pads by padding_mode={padding!r}; only 'zeros' is supported"
        return super().problem()

    def is_plain(self) -> bool:
        """Return whether it is exactly torch's class."""
        return self.type is nn.Conv2d

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Convolve to R channels."""
        return self._convolved(x, A.reshape(-1, *self.module.weight.shape[1:]))

    def up(self, s: Tensor, B: Tensor) -> Tensor:
        """Apply B `[N, R]` at every position."""
        return F.conv2d(s, B[:, :, None, None])

    def product(self, x: Tensor) -> Tensor:
        """Apply the weight alone, without the bias."""
        return self._convolved(x, self.module.weight.to(x.dtype))

    def _convolved(self, x: Tensor, kernel: Tensor) -> Tensor:
        module = self.module
        return F.conv2d(x, kernel, None, module.stride, module.padding, module.dilation)


def _is_conv1d(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    named = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return named and getattr(weight, "ndim", 0) == 2


def view(module: nn.Module) -> Base | None:
    """Return a frozen layer as LoRA sees it, None for a module that takes no adapter."""
    if isinstance(module, QuantizedLinear):
        return Quantized(module)
    if isinstance(module, nn.Linear):
        return Linear(module)
    if _is_conv1d(module):
        return Conv1D(module)
    if isinstance(module, nn.Embedding):
        return Embedding(module)
    return Conv2d(module) if isinstance(module, nn.Conv2d) else None


def base_of(module: nn.Module) -> Base:
    """Return a frozen layer as LoRA sees it, or raise TypeError."""
    if (found := view(module)) is None:
        raise TypeError(f"no adapter goes on a {type(module).__name__}")
    return found


def is_linear(module: nn.Module) -> bool:
    """Return whether "all-linear" means it: nn.Linear, its subclasses, Conv1D, either quantized."""
    return getattr(view(module), "family", None) == "linear"


def is_quantized(module: nn.Module) -> bool:
    """Return whether `minilora.quantize` has stored this layer."""
    return isinstance(module, QuantizedLinear)
