"""LoRA around one untouched layer: the layer stays whole in `base`, the factors stand beside it."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from minilora.factors import LoRAAdapter
from minilora.kernels import (
    FrozenLinear,
    conv1d_forward,
    conv1d_grad_x,
    dense_forward,
    dense_grad_x,
    dropout_mask,
    lora_add,
    lora_linear,
)


def is_conv1d(module: nn.Module) -> bool:
    """Tell GPT-2's linear with a transposed weight `[in, out]` (transformers', or our own)."""
    weight = module._parameters.get("weight")
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(
        weight, "ndim", 0
    ) == 2  # fmt: skip


def is_linear(module: nn.Module) -> bool:
    """Tell what "all-linear" means: nn.Linear, its subclasses, and Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def frozen_linear(base: nn.Module) -> FrozenLinear | None:
    """Return how the fused path multiplies by `base`, or None when only calling `base` is right.

    Exactly `nn.Linear` or Conv1D with a plain frozen weight qualifies. A subclass, a
    parametrization, a hook, a replaced `forward`, a trainable weight or a tensor subclass (a
    sharded or quantized weight) may change what `base(x)` computes, so those are called as they
    are.
    """
    if not (type(base) is nn.Linear or is_conv1d(base)) or "forward" in base.__dict__:
        return None
    if base._forward_hooks or base._forward_pre_hooks:
        return None
    if base._backward_hooks or base._backward_pre_hooks or torch_module._has_any_global_hook():
        return None
    for tensor in (base.weight, base.bias):
        if tensor is not None and (
            type(tensor) not in (nn.Parameter, Tensor) or tensor.requires_grad
        ):
            return None
    if type(base) is nn.Linear:
        return FrozenLinear((base.weight, base.bias), dense_forward, dense_grad_x)
    return FrozenLinear((base.weight, base.bias), conv1d_forward, conv1d_grad_x)


class LoRALayer(nn.Module):
    """A layer plus the sum of its active adapters: `y = base(x) + Σ scaling · B A D(x)`.

    `base` is the original module, neither copied nor changed; adapters live in `adapters` by name
    and are switched by `minilora.activate`. A DoRA adapter adds `(m/‖W + scaling·BA‖ − 1) W D(x)`
    and scales its branch by the same ratio. `last_path` names the path last used.

    Args:
        base: the module to wrap; has a `weight`.
        compute_dtype: dtype of the branch; None computes in the input's (under autocast, in
            autocast's; for an embedding, in its weight's).
        backend: `"auto"` or `"torch"`; the request is kept and shown, see `minilora.inject`.
    """

    in_features: int
    out_features: int

    def __init__(
        self, base: nn.Module, *, compute_dtype: torch.dtype | None = None, backend: str = "auto"
    ):
        super().__init__()
        self.base: Any = base
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.compute_dtype = compute_dtype
        self.backend = backend
        self.last_path: str | None = None
        self.merged: tuple[str, ...] = ()
        self.original: object = None  # what `merge(keep=...)` kept
        self.base_sample: Tensor | None = None  # of the unmerged weight, while merged
        self.train(base.training)

    # Other code reads these of a layer it believes to be the base.
    @property
    def weight(self) -> Tensor:
        """The base's weight."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return getattr(self.base, "bias", None)

    def __getattr__(self, name: str) -> Any:
        """Show what else the base has: `num_embeddings`, `kernel_size`, `nf` and the like."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None or name.startswith("_"):
                raise
            return getattr(base, name)

    def new_adapter(self, **options: Any) -> LoRAAdapter:
        """Make factors of this layer's shapes; DoRA and inits that read the weight are set up.

        Args:
            options: as for `LoRAAdapter`, and `dora`.
        """
        dora = options.pop("dora", False)
        factors = LoRAAdapter(self.in_features, self.out_features, **self._shape(), **options)
        if not factors.lora_A.is_meta:
            factors.start_from(self.weight_matrix())
        if dora:
            lengths = torch.empty(self.out_features, device="meta")
            if not factors.lora_A.is_meta:
                lengths = factors.row_lengths(self.weight_matrix())
            factors.magnitude = nn.Parameter(lengths.to(factors.lora_A.dtype))
        return factors

    def _shape(self) -> dict[str, Any]:
        return {}

    def weight_matrix(self) -> Tensor:
        """Return the base's weight as the matrix W `[N, K]` that `delta_weight` adds to."""
        return self.base.weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Bring a matrix `[N, K]` into the layout of the base's weight."""
        return matrix

    def delta_weight(self, name: str) -> Tensor:
        """Return what one adapter adds to W as `[N, K]` in f32 (f64), DoRA's scaling included."""
        factors: Any = self.adapters[name]
        delta = factors.delta_weight()
        if factors.magnitude is None:
            return delta
        W = self.weight_matrix().detach().to(delta.dtype)
        ratio = factors.magnitude.detach().to(delta.dtype) / factors.row_lengths(W)
        return ratio[:, None] * (W + delta) - W

    def forward(self, x: Tensor) -> Tensor:
        """Map the base's input to its output, adapters added.

        Raises:
            RuntimeError: a training step while an adapter is merged into the base (its factors
                would get no gradient).
        """
        if self.merged:
            self._refuse_training()
            return self.base(x)
        adapters: list[Any] = [self.adapters[name] for name in self.active]
        if not adapters:
            return self.base(x)
        drops = [adapter.dropout if self.training else 0.0 for adapter in adapters]
        return self._forward(x, adapters, drops)

    def _forward(self, x: Tensor, adapters: list[LoRAAdapter], drops: list[float]) -> Tensor:
        self._used("general", x)
        y = self.base(x)
        dtype = self._branch_dtype(x)
        x = x.to(dtype) if x.is_floating_point() else x
        out = y.to(torch.promote_types(y.dtype, dtype))
        with torch.autocast(x.device.type, enabled=False):
            for factors, p in zip(adapters, drops, strict=True):
                out = out + self._added(y, x, factors, p, dtype)
        return out.to(y.dtype)

    def _added(
        self, y: Tensor, x: Tensor, factors: LoRAAdapter, p: float, dtype: torch.dtype
    ) -> Tensor:
        """Return what one adapter adds to the base's output y."""
        if p:
            x = x * dropout_mask(x, p) * (1 / (1 - p))
        A, B = factors.matrices()
        branch = self._branch(x, A.to(dtype), B.to(dtype)) * factors.scaling
        if factors.offset_A is not None and factors.offset_B is not None:
            branch = branch - self._branch(
                x, factors.offset_A.to(dtype), factors.offset_B.to(dtype)
            )
        if factors.lora_bias is not None:
            branch = branch + self._rows(factors.lora_bias.to(dtype) * factors.scaling)
        if factors.magnitude is None:
            return branch
        ratio = factors.magnitude / factors.row_lengths(self.weight_matrix())
        ratio = self._rows(ratio.to(dtype))
        if p:
            plain = self._base_product(x)
        else:
            plain = y.to(dtype)
            if self.bias is not None:
                plain = plain - self._rows(self.bias.to(dtype))
        return (ratio - 1) * plain + ratio * branch

    def _branch_dtype(self, x: Tensor) -> torch.dtype:
        if self.compute_dtype is not None:
            return self.compute_dtype
        if not x.is_floating_point():
            return self.weight.dtype
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            return torch.get_autocast_dtype(x.device.type)
        return x.dtype

    def _branch(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Apply B A, both as matrices, to x."""
        return F.linear(F.linear(x, A), B)

    def _base_product(self, x: Tensor) -> Tensor:
        """Apply the base's weight alone, without its bias."""
        return F.linear(x, self.weight_matrix().to(x.dtype))

    def _rows(self, vector: Tensor) -> Tensor:
        """Shape `[N]` so that it broadcasts along the output's channels."""
        return vector

    def _used(self, path: str, x: Tensor) -> None:
        if not torch.compiler.is_compiling() and x.numel():
            self.last_path = path

    def _refuse_training(self) -> None:
        trainable = any(p.requires_grad for p in self.adapters.parameters())
        if self.training and trainable and torch.is_grad_enabled():
            raise RuntimeError(
                f"a merged adapter can't be trained: {', '.join(self.merged)} is merged into the "
                f"base weight and would get no gradient; call minilora.unmerge(model) to train, or "
                f"model.eval() / torch.no_grad() for inference"
            )

    def extra_repr(self) -> str:
        """Show what is active, what is merged and the backend asked for."""
        parts = [f"active={list(self.active)}", f"backend={self.backend}"]
        if self.merged:
            parts.append(f"merged={list(self.merged)}")
        if self.compute_dtype is not None:
            parts.append(f"compute_dtype={self.compute_dtype}")
        return ", ".join(parts)


class LoRALinear(LoRALayer):
    """LoRA on nn.Linear or Conv1D: maps `[..., K]` to `[..., N]`.

    Two paths give the same numbers: fused (one autograd step that owns both products) where
    `frozen_linear(base)` allows it, else general (`base` is called, then the branch is added).
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
        """Return W `[N, K]`, a view."""
        return self.base.weight.T if is_conv1d(self.base) else self.base.weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Return a view in the base's layout."""
        return matrix.T if is_conv1d(self.base) else matrix

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
            and (autocast or dtype == self.base.weight.dtype)
            # One mask for the whole branch: a second adapter, or the offset, must not share it.
            and (not any(drops) or (len(adapters) == 1 and adapters[0].offset_A is None))
        )
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

    def _branch(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        rows = F.embedding(x, A.T, self.base.padding_idx)
        scale = getattr(self.base, "embed_scale", None)
        y = F.linear(rows, B)
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

    def _branch(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        s = self._conv(x, A.reshape(-1, *self.base.weight.shape[1:]))
        return F.conv2d(s, B[:, :, None, None])

    def _base_product(self, x: Tensor) -> Tensor:
        return self._conv(x, self.base.weight.to(x.dtype))

    def _conv(self, x: Tensor, kernel: Tensor) -> Tensor:
        base = self.base
        return F.conv2d(x, kernel, None, base.stride, base.padding, base.dilation)

    def _rows(self, vector: Tensor) -> Tensor:
        return vector[:, None, None]


def unsupported(base: nn.Module) -> str | None:
    """Say why no adapter can go on a module of a known kind, or None."""
    if nn.parameter.is_lazy(base.weight):  # type: ignore[arg-type]
        return "has no weight yet (it is lazy); run the model once before injecting"
    if isinstance(base, nn.Embedding) and base.max_norm is not None:
        return "rescales its weight in every forward (max_norm), so it can't stay frozen"
    if isinstance(base, nn.Conv2d):
        if base.groups != 1:
            return f"is a grouped convolution (groups={base.groups}); only groups=1 is supported"
        if base.padding_mode != "zeros":
            return f"pads by padding_mode={base.padding_mode!r}; only 'zeros' is supported"
    return None


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
    As: list[Tensor] = []
    Bs: list[Tensor] = []
    for adapter in adapters:
        A, B = adapter.matrices()
        As.append(A)
        Bs.append(B * adapter.scaling)
        if adapter.offset_A is not None and adapter.offset_B is not None:
            As.append(adapter.offset_A)
            Bs.append(-adapter.offset_B)
    return torch.cat(As), torch.cat(Bs, dim=1), 1.0


def _with_bias(y: Tensor, adapters: Sequence[LoRAAdapter]) -> Tensor:
    for factors in adapters:
        if factors.lora_bias is not None:
            y = y + (factors.lora_bias * factors.scaling).to(y.dtype)
    return y


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Return the model's LoRA layers by dotted name, a shared one under its first name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALayer)}


def weight_sample(fqn: str, weight: Tensor, count: int = 64) -> Tensor:
    """Return `count` f32 weights at positions drawn from the dotted name: a base's fingerprint.

    The positions depend on the name and the number of elements alone, so two bases of one shape
    are compared at the same places.
    """
    seed = int.from_bytes(hashlib.sha256(fqn.encode()).digest()[:8], "little") >> 1
    generator = torch.Generator().manual_seed(seed)
    where = torch.randint(weight.numel(), (count,), generator=generator)
    flat = weight.detach().reshape(-1)
    return flat[where.to(weight.device)].to(torch.float32).cpu()
