"""Adapters for other programs: written in the one form that all of them read alike."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.lora import (
    ApproximatedLayer,
    Approximation,
    Survey,
    add_frozen,
    approximated,
    check_rank,
    check_source,
    plain_adapter,
    stored_dtype,
)
from minilora.peft.saving import save_adapter


def plain_factors(
    survey: Survey, adapter: str, r: int | None, dtype: torch.dtype | str | None, verb: str
) -> dict[str, tuple[Tensor, Tensor, ApproximatedLayer]]:
    """Return A `[r, K]`, B `[N, r]` with the scaling inside, and their error, by layer."""
    if r is not None:
        check_rank(r)
    made = {}
    for fqn, factors in check_source(survey, adapter, verb).items():
        if factors.magnitude is not None and r is None:
            raise ValueError(
                f"{verb}() needs r=... for a DoRA adapter, because DoRA changes all of W (first: "
                f"{fqn}) and only a rank-r part of that is kept; adapter {adapter!r} has "
                f"r={factors.r}, a larger one loses less"
            )
        wanted: Tensor | tuple[Tensor, Tensor] = factors.product(torch.float64)
        rank = r if r is not None and r < len(wanted[0]) else None
        if factors.magnitude is not None:
            with survey.originals_in_place():  # not another adapter's copy of W
                wanted, rank = survey.layers[fqn].delta_weight(adapter), r
        made[fqn] = approximated(fqn, wanted, rank, stored_dtype(dtype, [factors]))
    return made


@torch.no_grad()
def to_lora(
    model: nn.Module,
    adapter: str,
    name: str,
    r: int | None = None,
    *,
    dtype: torch.dtype | str | None = None,
) -> Approximation:
    """Add a plain LoRA adapter of scaling 1 that does what another adapter does.

    A DoRA adapter changes W by `m/‖W + s B A‖ · (W + s B A) − W`; its best rank-r approximation is
    kept (an SVD of one layer's dense change at a time). Any other adapter is kept exactly, or its
    best rank-r approximation where r is smaller than its rank. The new adapter is frozen and not
    active; all else stays as it is.

    Args:
        model: a model with adapters; changed in place.
        adapter: the one to convert; stays.
        name: of the new one.
        r: its rank; required for DoRA, None keeps the rank of any other.
        dtype: of its factors; None is float32, or float64 where the source has it.

    Returns:
        The relative Frobenius error per layer and overall.

    Raises:
        ValueError: an unknown adapter, a name in use, DoRA without r, a lora_bias other than 0,
            trained copies, NaN or Inf. The model is unchanged.
        RuntimeError: adapters are merged.
    """
    survey = Survey(model)
    layers = survey.require_layers("to_lora", unmerged=True)
    survey.require_new_name(name)
    made = plain_factors(survey, adapter, r, dtype, "to_lora")
    new = {fqn: plain_adapter(layers[fqn], A, B) for fqn, (A, B, _) in made.items()}
    add_frozen(survey, name, new)
    return Approximation(name, "to_lora", tuple(report for *_, report in made.values()))


@torch.no_grad()
def export(
    model: nn.Module,
    folder: str | Path,
    adapter: str | None = None,
    *,
    r: int | None = None,
    dtype: torch.dtype | str | None = None,
) -> Approximation:
    """Write an adapter as PEFT's two files in the form that every reader understands alike.

    The scaling is folded into B and every layer gets one rank (smaller ones are padded with
    zeros), so `lora_alpha = r` and there are no patterns, no rsLoRA, no DoRA: vLLM ignores
    `rank_pattern` and `alpha_pattern`, llama.cpp those and `use_rslora` too, each dividing the one
    `lora_alpha` by its own idea of the rank. DoRA becomes plain LoRA as by `to_lora`.

    Args:
        model: a model with adapters; not changed.
        folder: holds the two files afterwards, whatever the adapter's name.
        adapter: which one; None when there is only one, or only one is active.
        r: rank; required for DoRA, None keeps the (largest) rank of any other.
        dtype: of the factors written; None is float32, or float64 where the source has it.

    Returns:
        The relative Frobenius error per layer and overall, rounding to `dtype` included.

    Raises:
        ValueError: no adapter, an unknown one, several without a name, DoRA without r, a lora_bias
            other than 0, trained copies (merge them into the model), NaN or Inf.
        RuntimeError: adapters are merged.
        RuntimeError: the folder can't be written; what was there before stays.
    """
    survey = Survey(model)
    layers = survey.require_layers("export", unmerged=True)
    adapter = survey.adapter(adapter, "export")
    made = plain_factors(survey, adapter, r, dtype, "export")
    rank = max(len(A) for A, _, _ in made.values())
    reports, new = [], {}
    for fqn, (A, B, report) in made.items():
        spare = rank - len(A)
        padded = F.pad(A, (0, 0, 0, spare)), F.pad(B, (0, spare))
        new[fqn] = plain_adapter(layers[fqn], *padded)
        reports.append(ApproximatedLayer(fqn, rank, report.norm, report.lost))
    save_adapter(survey, Path(folder), adapter, factors=new)
    return Approximation(adapter, "export", tuple(reports))
