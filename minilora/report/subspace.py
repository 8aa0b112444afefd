"""Two adapters side by side by the subspaces they use, and one adapter cut to lower ranks."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minilora.files import is_number
from minilora.lora import (
    Approximation,
    Survey,
    add_frozen,
    approximated,
    check_rank,
    check_source,
    finite_factors,
    plain_adapter,
    stored_dtype,
)
from minilora.report.spectra import rank_for, small_svd


@dataclass(frozen=True)
class LayerComparison:
    """Two adapters' ΔW of one layer."""

    name: str
    cosine: float  # ⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖): 1 the same change, −1 its opposite
    # Principal angles between the spaces their outputs and inputs span, in degrees, smallest first;
    # as many as the smaller of the two ranks.
    angles_out: tuple[float, ...]
    angles_in: tuple[float, ...]

    @property
    def shared(self) -> float:
        """Mean of cos² over all angles: 1 the same subspaces, 0 orthogonal ones."""
        angles = self.angles_out + self.angles_in
        return sum(math.cos(math.radians(a)) ** 2 for a in angles) / len(angles)


@dataclass(frozen=True)
class Comparison:
    """Two adapters: the layers both change, and those only one of them does."""

    adapters: tuple[str, str]
    layers: tuple[LayerComparison, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


def principal_angles(first: Tensor, second: Tensor) -> tuple[float, ...]:
    """Return the angles between the spans of orthonormal columns in degrees, smallest first.

    Each from its cosine and its sine, so that small ones are exact too (Björck and Golub 1973).
    """
    small, large = sorted((first, second), key=lambda basis: basis.shape[1])
    inner = large.T @ small
    cosines = torch.linalg.svdvals(inner)
    sines = torch.linalg.svdvals(small - large @ inner).flip(0)
    return tuple(torch.rad2deg(torch.atan2(sines, cosines)).tolist())


@torch.no_grad()
def subspaces(model: nn.Module | Survey, first: str, second: str) -> Comparison:
    """Compare what two adapters of a model add, layer by layer.

    DoRA's scaling of W is left out: it is the low-rank parts that are compared.

    Args:
        model: holds both adapters; not changed.
        first, second: their names.

    Raises:
        ValueError: an unknown adapter, or the same one twice.
    """
    survey = Survey.of(model)
    survey.require_layers("subspaces")
    if first == second:
        raise ValueError(f"subspaces() needs two different adapters, found {first!r} twice")
    mine, other = (finite_factors(survey, name, "subspaces") for name in (first, second))
    layers, used = [], {}  # what each of the two uses, by layer
    for fqn in mine | other:
        one, two = used[fqn] = _space(mine.get(fqn)), _space(other.get(fqn))
        if one and two:
            (U1, S1, V1), (U2, S2, V2) = one, two
            inner = ((U1.T @ U2) * (V1.T @ V2) * (S1[:, None] * S2)).sum()
            cosine = float(inner / (S1.norm() * S2.norm()))
            layers.append(
                LayerComparison(fqn, cosine, principal_angles(U1, U2), principal_angles(V1, V2))
            )
    return Comparison(
        (first, second),
        tuple(layers),
        tuple(fqn for fqn, (a, b) in used.items() if a and not b),
        tuple(fqn for fqn, (a, b) in used.items() if b and not a),
    )


def _space(factors: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the SVD of what factors add without directions that are noise, None if that is 0."""
    if factors is None:
        return None
    U, S, V = small_svd(*factors.product(torch.float64))
    there = S / S[0] > torch.finfo(torch.float32).eps  # the factors are stored in f32
    return (U[:, there], S[there], V[:, there]) if S[0] else None


def rank_pattern(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """Return r and the rank_pattern that give `inject`, and PEFT, exactly these ranks by name.

    r is the commonest. Blocks that differ in their number alone share a pattern:
    `^model.layers.(0|3).mlp.up_proj`.
    """
    common = Counter(ranks.values()).most_common(1)[0][0]
    groups: dict[tuple[str, str, int], list[str]] = {}
    patterns = {}
    for name, r in ranks.items():
        found = re.fullmatch(r"((?:[^.\d][^.]*\.)*)(\d+)(\..+)", name)
        if r != common and found:
            groups.setdefault((found.group(1), found.group(3), r), []).append(found.group(2))
        elif r != common:
            patterns[f"^{re.escape(name)}"] = r
    for (start, end, r), numbers in groups.items():
        block = numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"
        # Bare dots where they can only mean themselves: they are easier to read and to paste.
        meant = {f"{start}{number}{end}" for number in numbers}
        bare = f"^{start}{block}{end}"
        exact = {name for name in ranks if re.fullmatch(bare, name)} == meant
        patterns[bare if exact else f"^{re.escape(start)}{block}{re.escape(end)}"] = r
    return common, patterns


@torch.no_grad()
def truncate(
    model: nn.Module | Survey,
    adapter: str,
    name: str,
    *,
    keep: float = 0.95,
    ranks: Mapping[str, int] | None = None,
) -> Approximation:
    """Add the best approximation of an adapter at lower ranks as a new adapter.

    The new one has scaling 1, is frozen and not active. On each layer it is the product's own
    truncated SVD (Eckart and Young 1936), so its error is what the spectrum predicts.

    Args:
        model: a model with the adapter; changed in place.
        adapter: the source; stays as it is.
        name: of the new adapter.
        keep: the share of each layer's ‖ΔW‖² to keep, in (0, 1].
        ranks: ranks by dotted name instead; layers left out keep theirs.

    Returns:
        The relative error per layer and overall.

    Raises:
        ValueError: an unknown adapter, a name in use, a keep or ranks that can't be, and what is
            no low-rank product: DoRA, a lora_bias, trained copies, NaN or Inf.
        RuntimeError: adapters are merged.
    """
    survey = Survey.of(model)
    layers = survey.require_layers("truncate")
    survey.require_unmerged("truncate")
    check_keep(keep)
    survey.require_new_name(name)
    sources = check_source(survey, adapter, "truncate")
    for fqn in ranks or {}:
        if fqn not in sources:
            raise ValueError(f"ranks must name layers of adapter {adapter!r}, {fqn!r} is none")
        check_rank((ranks or {})[fqn], f"the rank of {fqn}")
    new, reports = {}, []
    for fqn, factors in sources.items():
        if factors.magnitude is not None:
            raise ValueError(
                f"truncate() cuts a product B A, but adapter {adapter!r} is DoRA (first: {fqn}), "
                f"which changes all of W; convert it with minilora.peft.to_lora"
            )
        A, B = factors.product(torch.float64)
        values = tuple(small_svd(A, B)[1].tolist())
        r = rank_for(values, keep) if ranks is None else ranks.get(fqn, len(values))
        A, B, report = approximated(fqn, (A, B), r, stored_dtype(None, [factors]))
        new[fqn] = plain_adapter(layers[fqn], A, B)
        reports.append(report)
    add_frozen(survey, name, new)
    method = "truncated" if ranks is not None else f"truncated, keep={keep:g}"
    return Approximation(name, method, tuple(reports))


def is_product(survey: Survey, adapter: str) -> bool:
    """Return whether all that an adapter does is to add products B A: no DoRA, biases or copies."""
    factors = survey.factors(adapter).values()
    biases = [f.lora_bias.detach() for f in factors if f.lora_bias is not None]
    dora = any(f.magnitude is not None for f in factors)
    return not (dora or survey.copies_of(adapter) or any(bias.any() for bias in biases))


def check_keep(keep: Any) -> None:
    """Raise unless `keep` is a share that can be kept."""
    if not is_number(keep) or not 0 < keep <= 1:
        raise ValueError(f"keep must lie in (0, 1], the share of ‖ΔW‖² to keep, found {keep!r}")
