"""Put an adapter on the selected layers: everything is checked first, then swapped in."""

import re
import sys
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from minilora.kernels import check_backend
from minilora.layers import INITS, LoRAAdapter, LoRALinear, lora_layers
from minilora.selection import (
    check_patterns,
    check_rank,
    pattern_value,
    plain_modules,
    select_targets,
)


def check_alpha(alpha: object, what: str = "alpha") -> float:
    """Return alpha if it is a finite number other than 0, else raise."""
    ok = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    # Compared, not converted: an int beyond any float is refused too, and NaN compares false.
    if not ok or not 0 < abs(alpha) <= sys.float_info.max:  # type: ignore[arg-type]
        raise ValueError(f"{what} must be a finite number other than 0, found {alpha!r}")
    return alpha  # type: ignore[return-value]


def check_dropout(p: object) -> float:
    """Return p if it lies in [0, 1), else raise."""
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p < 1:
        raise ValueError(f"dropout must lie in [0, 1), found {p!r}")
    return float(p)


def check_adapter_name(name: object) -> str:
    """Return the name if it can name a folder, a module and a key part, else raise."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_\-]+", name):
        raise ValueError(
            f"an adapter's name must consist of letters, digits, '_' and '-', found {name!r}"
        )
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"the adapter name {name!r} is taken by torch.nn.ModuleDict itself; choose another, "
            f"such as '{name}_1'"
        )
    return name


def as_dtype(dtype: object, what: str = "dtype") -> torch.dtype:
    """Return a floating torch dtype from itself or its name ("bfloat16"), else raise."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(
            f"{what} must be a floating-point torch dtype of 16 bits or more, or its name, found "
            f"{dtype!r}"
        )
    return found


def places_of(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return every place that holds `module`: a module shared by two parents is wrapped in both."""
    return [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is module
    ]


def _warn_wide_ranks(model: nn.Module, names: list[str], ranks: dict[str, int]) -> None:
    modules = plain_modules(model)
    wide = [n for n in names if ranks[n] > min(modules[n].in_features, modules[n].out_features)]
    if wide:
        name = wide[0]
        warnings.warn(
            f"minilora: r={ranks[name]} is above min(in, out) of {len(wide)} layers (first: "
            f"{name}, [{modules[name].out_features}, {modules[name].in_features}]); B·A can't have "
            f"a higher rank than the layer, so the surplus only costs memory and time",
            UserWarning,
            stacklevel=3,
        )


def inject(
    model: nn.Module,
    r: int = 8,
    alpha: float | None = None,
    *,
    targets: object = "all-linear",
    exclude: object = (),
    dropout: float = 0.0,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    init: str = "kaiming",
    adapter: str = "default",
    dtype: torch.dtype | str = torch.float32,
    compute_dtype: torch.dtype | str | None = None,
    backend: str = "auto",
) -> nn.Module:
    """Freeze the model and put a trainable adapter on its linear layers, in place.

    `y = base(x) + scaling · lora_B lora_A x`, scaling = alpha / r. The new adapter becomes the
    only active one; adapters already there keep their `requires_grad`. Everything is checked
    before the first change: an error leaves the model as it was.

    Args:
        model: any module with linear layers; changed in place.
        r: rank, at least 1 (above min(in, out) of a layer: a warning).
        alpha: numerator of the scaling; None means r, so that scaling is 1 (PEFT's default).
        targets: `"all-linear"` (every Linear but the head), a list of dotted names or whole-segment
            endings (`["q_proj", "mlp.up_proj"]`), or one regex that must match whole dotted names.
            Every entry has to match.
        exclude: list or regex in the same form, taken away from `targets`.
        dropout: on the branch's input while training, in [0, 1).
        rslora: scaling = alpha / sqrt(r).
        rank_pattern: r by regex over the end of a dotted name, first match wins.
        alpha_pattern: alpha likewise.
        init: `"kaiming"` or `"gaussian"`, see `LoRAAdapter`.
        adapter: its name: letters, digits, `_`, `-`.
        dtype: of the factors.
        compute_dtype: of the branch; None computes in the input's dtype, `"float32"` is what PEFT
            does on a bf16 base.
        backend: `"auto"`, `"torch"` or `"triton"`; an explicit choice that can't run raises.

    Returns:
        The same model.

    Raises:
        ValueError: anything above violated, a target that is already adapted under this name, a
            child of nn.MultiheadAttention.
        TypeError: targets, exclude or model of another type.
        RuntimeError: adapters are merged, or the backend can't run.

    Hu et al. 2021, "LoRA", arXiv:2106.09685.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"inject() needs an nn.Module, found {type(model).__name__}")
    check_rank(r)
    alpha = check_alpha(r if alpha is None else alpha)
    dropout = check_dropout(dropout)
    check_adapter_name(adapter)
    dtype = as_dtype(dtype)
    if compute_dtype is not None:
        compute_dtype = as_dtype(compute_dtype, "compute_dtype")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, found {init!r}")
    check_backend(backend)
    present = lora_layers(model)
    if any(layer.merged for layer in present.values()):
        raise RuntimeError("inject() needs unmerged weights; call minilora.unmerge(model) first")
    names = select_targets(model, targets, exclude)
    taken = [name for name in names if name in present and adapter in present[name].adapters]
    if taken:
        raise ValueError(
            f"{taken[0]} already has an adapter named {adapter!r} ({len(taken)} layers in all); "
            f"choose another name with adapter=..., or minilora.eject(model) first"
        )
    check_patterns(rank_pattern, names, "rank_pattern")
    check_patterns(alpha_pattern, names, "alpha_pattern")
    ranks = {n: check_rank(pattern_value(n, rank_pattern, r), "rank_pattern") for n in names}
    alphas = {
        n: check_alpha(pattern_value(n, alpha_pattern, alpha), "alpha_pattern") for n in names
    }
    _warn_wide_ranks(model, names, ranks)

    modules = plain_modules(model)
    new = {
        name: LoRAAdapter(
            modules[name].in_features,
            modules[name].out_features,
            r=ranks[name],
            alpha=alphas[name],
            dropout=dropout,
            rslora=rslora,
            init=init,
            device=modules[name].weight.device,
            dtype=dtype,
        )
        for name in names
    }
    attach(model, new, adapter, compute_dtype=compute_dtype, backend=backend)
    for name, layer in lora_layers(model).items():
        layer.active = (adapter,) if name in new else ()
    return model


def _stay_called(*_: object) -> None:
    """Do nothing: nn.TransformerEncoderLayer reads `.weight` itself unless a child has a hook."""


def attach(
    model: nn.Module,
    new: Mapping[str, LoRAAdapter],
    adapter: str,
    *,
    compute_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> None:
    """Put ready adapters on layers by dotted name and freeze the rest; checks were done before."""
    present = lora_layers(model)
    if not hasattr(model, "_minilora_trainable"):
        factors_there = {id(p) for m in present.values() for p in m.adapters.parameters()}
        others = {n: p for n, p in model.named_parameters() if id(p) not in factors_there}
        trainable = tuple(name for name, p in others.items() if p.requires_grad)
        model._minilora_trainable = trainable  # type: ignore[assignment]
        for parameter in others.values():
            parameter.requires_grad_(False)
    modules = plain_modules(model)
    for name, factors in new.items():
        layer = present.get(name)
        if layer is None:
            base = modules[name]
            places = places_of(model, base)
            layer = LoRALinear(base, compute_dtype=compute_dtype, backend=backend)
            for parent, child in places:
                parent._modules[child] = layer
                if isinstance(parent, nn.TransformerEncoderLayer):
                    layer.register_forward_hook(_stay_called)
        factors.train(layer.training)
        layer.adapters[adapter] = factors
