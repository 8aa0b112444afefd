"""LoRA around one untouched layer: the layer stays whole in `base`, the factors stand beside it."""

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from minilora.kernels import (
    FrozenLinear,
    dense_forward,
    dense_grad_x,
    dropout_mask,
    lora_add,
    lora_linear,
)

INITS = ("kaiming", "gaussian")


class LoRAAdapter(nn.Module):
    """One adapter's factors for one linear: `delta_weight = scaling · lora_B lora_A`.

    Args:
        in_features: K.
        out_features: N.
        r: rank, at least 1.
        alpha: scaling is alpha / r, or alpha / sqrt(r) with `rslora`.
        dropout: probability of zeroing an input of the branch while training.
        rslora: rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732).
        init: `"kaiming"` draws A from kaiming_uniform(a=√5), `"gaussian"` from a normal
            distribution of standard deviation 1/r; B is 0 in both, so a fresh adapter changes
            nothing.
        device: where the factors live.
        dtype: of the factors.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        init: str = "kaiming",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.r, self.alpha, self.dropout, self.rslora = r, alpha, dropout, rslora
        self.init = init
        self.lora_A = nn.Parameter(torch.empty(r, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, device=device, dtype=dtype))
        if init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA; recomputed, never stored."""
        return self.alpha / math.sqrt(self.r) if self.rslora else self.alpha / self.r

    def delta_weight(self) -> Tensor:
        """Return `scaling · B A` as `[out, in]` in f32 (f64 for f64 factors)."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self.scaling * (self.lora_B.detach().to(wide) @ self.lora_A.detach().to(wide))

    def extra_repr(self) -> str:
        """Show the numbers that make the scaling."""
        parts = [f"r={self.r}", f"alpha={self.alpha:g}", f"scaling={self.scaling:g}"]
        if self.dropout:
            parts.append(f"dropout={self.dropout:g}")
        return ", ".join(parts)


def frozen_linear(base: nn.Module) -> FrozenLinear | None:
    """Return how the fused path multiplies by `base`, or None when only calling `base` is right.

    Exactly `nn.Linear` with a plain frozen weight qualifies. A subclass, a parametrization, a hook,
    a replaced `forward`, a trainable weight or a tensor subclass (a sharded or quantized weight)
    may change what `base(x)` computes, so those are called as they are.
    """
    if type(base) is not nn.Linear or "forward" in base.__dict__:
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
    return FrozenLinear((base.weight, base.bias), dense_forward, dense_grad_x)


class LoRALinear(nn.Module):
    """A linear layer plus the sum of its active adapters: `y = base(x) + Σ scaling · D(x) Aᵀ Bᵀ`.

    `base` is the original module, neither copied nor changed; adapters live in `adapters` by name
    and are switched by `minilora.activate`. Two paths give the same numbers: fused (one autograd
    step that owns both products) where `frozen_linear(base)` allows it, else general (`base` is
    called, then the branch is added). `last_path` names the one last used.

    Args:
        base: a module that maps `[..., in_features]` to `[..., out_features]` with a `weight`.
        compute_dtype: dtype of the branch; None computes in the input's (under autocast, in
            autocast's).
        backend: `"auto"` or `"torch"`; the request is kept and shown, see `minilora.inject`.
    """

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
        return self.base.bias

    @property
    def in_features(self) -> int:
        """K of the base."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """N of the base."""
        return self.base.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., K]` to `[..., N]`.

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
        dtype = x.dtype
        autocast = torch.is_autocast_enabled(x.device.type) and dtype != torch.float64
        if autocast:
            dtype = torch.get_autocast_dtype(x.device.type)
        drops = [adapter.dropout if self.training else 0.0 for adapter in adapters]
        frozen = frozen_linear(self.base)
        fused = (
            frozen is not None
            and self.compute_dtype in (None, dtype)
            and (autocast or dtype == self.base.weight.dtype)
            and (len(adapters) == 1 or not any(drops))
        )
        if not torch.compiler.is_compiling() and x.numel():
            self.last_path = "fused" if fused else "general"
        if fused and frozen is not None:
            x = x.to(dtype)
            mask = dropout_mask(x, drops[0]) if drops[0] else None
            A, B, scaling = _concatenated(adapters)
            return lora_linear(x, frozen, A, B, scaling, mask, drops[0])
        y = self.base(x)
        x = x.to(self.compute_dtype or dtype)
        for adapter, p in zip(adapters, drops, strict=True):
            mask = dropout_mask(x, p) if p else None
            y = lora_add(y, x, adapter.lora_A, adapter.lora_B, adapter.scaling, mask, p)
        return y

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


def _concatenated(adapters: list[LoRAAdapter]) -> tuple[Tensor, Tensor, float]:
    """Several adapters as one of the summed rank: `Σ sᵢ Bᵢ Aᵢ = [s₁B₁ s₂B₂ …] [A₁; A₂; …]`."""
    first = adapters[0]
    if len(adapters) == 1:
        return first.lora_A, first.lora_B, first.scaling
    A = torch.cat([adapter.lora_A for adapter in adapters])
    B = torch.cat([adapter.lora_B * adapter.scaling for adapter in adapters], dim=1)
    return A, B, 1.0


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the model's LoRA layers by dotted name, a shared one under its first name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


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
