"""The verb that stores a model's frozen linears in fewer bits."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from minilora.lora.base import base_of, view
from minilora.lora.selection import select_targets
from minilora.lora.survey import Survey
from minilora.quantization import Quantization, QuantizedLinear, is_finite


def quantize(
    model: nn.Module,
    format: str | Quantization = "nf4",
    *,
    targets: object = "all-linear",
    exclude: object = (),
    layers: Iterable[int] | None = None,
    block_size: int = 64,
    double_quant: bool = True,
    compute: str = "auto",
    grad_compute: str = "auto",
    outliers: int = 0,
) -> nn.Module:
    """Store linear layers in 8 or 4 bits, in place: they become frozen `QuantizedLinear` modules.

    Everything is checked before the first change. Call it before or after `inject`; adapters that
    are there stay on. Bytes a weight: int8 1 + 4/K, nf4 0.516 (0.563 without double quantization),
    int4 0.516 + 4/K at blocks of 64.

    Args:
        model: any module with linear layers; changed in place.
        format: `"int8"`, `"nf4"`, `"int4"`, or a `Quantization`, which has all of the options from
            block_size on.
        targets: as for `inject`: every Linear and Conv1D but the head, unless named. A head named
            here is unshared from its embedding, which stays as it is.
        exclude, layers: as for `inject`.
        block_size, double_quant, compute, grad_compute, outliers: see `Quantization`; one that the
            format does not read is refused.

    Returns:
        The same model.

    Raises:
        ValueError: an unknown format, an option it does not read, a block size that does not fit,
            NaN or Inf, a layer that is quantized already or no plain Linear or Conv1D; the model
            is unchanged.
        TypeError: model or targets of another type.
        RuntimeError: adapters are merged, or `compute="int8"` where integers can't be multiplied.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize() needs an nn.Module, found {type(model).__name__}")
    spec = Quantization(
        format.format if isinstance(format, Quantization) else format,
        block_size, double_quant, compute, grad_compute, outliers,
    )  # fmt: skip
    if isinstance(format, Quantization):
        if spec != Quantization(format.format):
            raise ValueError(
                f"quantize() takes options one by one or in a Quantization, found {format} and "
                f"others beside it; put them into it"
            )
        spec = format
    survey = Survey(model)
    if survey.merged:
        raise RuntimeError("quantize() needs unmerged weights; call minilora.unmerge(model) first")
    chosen, copied = select_targets(survey, targets, exclude, layers), survey.originals
    for name in chosen:
        check_quantizable(name, survey.modules[name], spec)
        if f"{name}.weight" in copied:
            raise ValueError(
                f"quantize() replaces weights, but an adapter trains a copy of {name}.weight "
                f"(modules_to_save); leave it out with exclude=[{name!r}]"
            )
    before = survey.in_place
    survey.install(())
    try:
        for name in chosen:
            with torch.no_grad():
                survey.replace(survey.modules[name], quantized(survey.modules[name], spec))
    finally:
        Survey(model).install(before)
    return model


def check_quantizable(name: str, module: Any, spec: Quantization, values: bool = True) -> None:
    """Raise unless this module can be stored in the format; `values` looks for NaN too."""
    base = view(module)
    stored = base and (base.stored if base.is_quantized else base.packed)
    if stored:
        raise ValueError(
            f"{name} is quantized already ({stored}); quantize a model loaded in full precision, "
            f"or leave that layer out with exclude=[{name!r}]"
        )
    if base is None or base.family != "linear" or not base.is_plain():
        raise ValueError(
            f"quantize() stores nn.Linear, subclasses that compute the same, and Conv1D, but "
            f"{name} is a {type(module).__name__}; leave it out with exclude=[{name!r}]"
        )
    weight = module._parameters.get("weight")
    hooked = module._forward_hooks or module._forward_pre_hooks
    if type(weight) is not nn.Parameter or hooked or parametrize.is_parametrized(module):
        raise ValueError(
            f"quantize() needs a weight that is a plain parameter, but {name} computes its own or "
            f"has hooks; leave it out with exclude=[{name!r}]"
        )
    if not weight.is_floating_point():
        raise ValueError(f"the weight of {name} must be floating point, found {weight.dtype}")
    reason = spec.problem(*base.shape)
    if reason is not None:
        raise ValueError(f"{name} {reason}")
    if values and not is_finite(weight):
        raise ValueError(
            f"the weight of {name} must be finite, found NaN or Inf in it (in float32)"
        )


def quantized(module: Any, spec: Quantization) -> QuantizedLinear:
    """Return the layer stored in this format; the given one is not changed."""
    small = QuantizedLinear.from_weight(
        base_of(module).as_matrix(module.weight.detach()),
        spec,
        bias=module.bias,
        plain=nn.Linear if isinstance(module, nn.Linear) else type(module),
    )
    return small.train(module.training)
