"""New adapters out of existing ones: weighted sums, exact or cut to the best lower rank."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minilora.files import is_number
from minilora.lora.adapter import LoRAAdapter
from minilora.lora.config import as_dtype, check_rank
from minilora.lora.injection import check_room
from minilora.lora.layer import LoRALayer
from minilora.lora.survey import Survey

# PEFT's names, with PEFT's meaning (`add_weighted_adapter` in peft/tuners/lora/model.py).
PRUNING = ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
METHODS = ("cat", "svd", *PRUNING)


@dataclass(frozen=True)
class ApproximatedLayer:
    """How well one layer's stored factors keep what was wanted there.

    `norm` is ‖ΔW‖ of what was wanted, `lost` is ‖ΔW − B A‖ with the factors as stored (Frobenius).
    """

    name: str
    r: int
    norm: float
    lost: float

    @property
    def error(self) -> float:
        """The relative error lost / norm, 0 where nothing was wanted and nothing is stored."""
        return _ratio(self.lost, self.norm)


@dataclass(frozen=True)
class Approximation:
    """What `combine`, `to_lora` and `export` made; prints as a table of the layers with an error.

    `adapter` is the new adapter (the source's name for `export`), `method` says how it was made.
    """

    adapter: str
    method: str
    layers: tuple[ApproximatedLayer, ...]

    @property
    def error(self) -> float:
        """The relative error over all layers: √Σ lost² / √Σ norm²."""
        lost = math.hypot(*(layer.lost for layer in self.layers))
        return _ratio(lost, math.hypot(*(layer.norm for layer in self.layers)))

    @property
    def exactness(self) -> str:
        """The error in words."""
        return f"error {self.error:.3g}" if self.error else "exact"

    def __str__(self) -> str:
        changed = [layer for layer in self.layers if layer.error]
        width = max([len(layer.name) for layer in changed] + [6])
        lines = [f"{'module':<{width}}  {'r':>4}  relative error"] if changed else []
        lines += [f"{v.name:<{width}}  {v.r:>4}  {v.error:.3g}" for v in changed]
        lines.append(f"{self.adapter} ({self.method}): {len(self.layers)} layers, {self.exactness}")
        return "\n".join(lines)


def _ratio(lost: float, norm: float) -> float:
    if norm:
        return lost / norm
    return math.inf if lost else 0.0


def truncated(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return the best A' `[r, K]`, B' `[N, r]` for the product B A, which is never formed.

    With QR of Aᵀ = Q_A R_A and B = Q_B R_B the singular values of B A are those of the small
    R_B R_Aᵀ; keeping the first r of them is best (Eckart and Young 1936). Where fewer than r
    exist, the factors are that much smaller.
    """
    Q_A, R_A = torch.linalg.qr(A.T)
    Q_B, R_B = torch.linalg.qr(B)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return _balanced(Q_B @ U[:, :r], S[:r], Vh[:r] @ Q_A.T)


def truncated_dense(delta: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return the best A `[r, K]`, B `[N, r]` for a dense matrix `[N, K]`; see `truncated`."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return _balanced(U[:, :r], S[:r], Vh[:r])


def _balanced(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Split U S Vh so that both factors have rows and columns of the same lengths."""
    root = S.sqrt()
    return root[:, None] * Vh, U * root


def product_norm(A: Tensor, B: Tensor) -> float:
    """Return ‖B A‖ (Frobenius) of A `[R, K]`, B `[N, R]` without forming B A.

    What is no more than the rounding of its parts counts as 0.
    """
    norm = float((torch.linalg.qr(B)[1] @ torch.linalg.qr(A.T)[1].T).norm())
    floor = torch.finfo(A.dtype).eps * len(A) * float(A.norm() * B.norm())
    return norm if norm > floor else 0.0


def approximated(
    name: str, wanted: Tensor | tuple[Tensor, Tensor], r: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, ApproximatedLayer]:
    """Return factors of rank r at most, rounded to `dtype`, and how well they keep `wanted`.

    That is a dense `[N, K]`, or A `[R, K]` and B `[N, R]`, which stay as they are if r is None.
    """
    if isinstance(wanted, Tensor):
        A, B = truncated_dense(wanted, min(wanted.shape) if r is None else r)
    else:
        A, B = wanted if r is None else truncated(*wanted, r)
    wide, A, B = A.dtype, A.to(dtype), B.to(dtype)
    if not (A.isfinite().all() and B.isfinite().all()):
        raise ValueError(
            f"the new factors of {name} must be finite, found NaN or Inf in {dtype}; check the "
            f"adapters and weights, or pass a wider dtype"
        )
    a, b = A.to(wide), B.to(wide)
    if isinstance(wanted, Tensor):
        norm, lost = float(wanted.norm()), float((wanted - b @ a).norm())
    else:
        norm = product_norm(*wanted)
        lost = product_norm(torch.cat([wanted[0], a]), torch.cat([wanted[1], -b], 1))
    return A, B, ApproximatedLayer(name, len(A), norm, lost)


def plain_adapter(layer: LoRALayer, A: Tensor, B: Tensor) -> LoRAAdapter:
    """Make a frozen adapter of scaling 1 for a layer from the matrices A `[r, K]`, B `[N, r]`."""
    factors = layer.view.new_adapter(r=len(A), alpha=len(A), device="meta")
    for key, value in (("lora_A", A), ("lora_B", B)):
        shaped = value.reshape(getattr(factors, key).shape)
        own = shaped.clone(memory_format=torch.contiguous_format)  # not the source's own memory
        setattr(factors, key, nn.Parameter(own, requires_grad=False))
    return factors


def add_frozen(survey: Survey, adapter: str, new: Mapping[str, LoRAAdapter]) -> None:
    """Put ready adapters on layers that have others; nothing is activated or unfrozen."""
    check_room(survey, adapter, new)
    for fqn, factors in new.items():
        survey.layers[fqn].add(adapter, factors)


def finite_factors(survey: Survey, adapter: str, verb: str) -> dict[str, LoRAAdapter]:
    """Return an adapter's factors by layer; raise unless it is there and all finite."""
    factors = survey.factors(survey.known(adapter, verb)[0])
    for fqn, one in factors.items():
        if not all(p.detach().isfinite().all() for p in one.parameters()):
            raise ValueError(
                f"adapter {adapter!r} must be finite, found NaN or Inf on {fqn}; load or train it "
                f"again"
            )
    return factors


def check_source(survey: Survey, adapter: str, verb: str) -> dict[str, LoRAAdapter]:
    """Return an adapter's factors, or raise unless all that it does lies in delta weights."""
    factors = finite_factors(survey, adapter, verb)
    copies = survey.copies_of(adapter)
    if copies:
        raise ValueError(
            f"{verb}() makes a product B A, but adapter {adapter!r} also brings trained copies of "
            f"base parameters (first: {next(iter(copies))}); use an adapter without bias= and "
            f"modules_to_save=, or merge it into the model"
        )
    for fqn, one in factors.items():
        if one.lora_bias is not None and one.lora_bias.detach().any():
            raise ValueError(
                f"{verb}() makes a product B A, but adapter {adapter!r} also has a lora_bias on "
                f"{fqn} that is not 0; use an adapter without lora_bias=True, or merge it"
            )
    return factors


def stored_dtype(dtype: torch.dtype | str | None, sources: Sequence[LoRAAdapter]) -> torch.dtype:
    """Return the dtype asked for; None is float32, or float64 where a source has it."""
    if dtype is not None:
        return as_dtype(dtype)
    wide = any(source.lora_A.dtype == torch.float64 for source in sources)
    return torch.float64 if wide else torch.float32


def _check_options(method: object, r: object, density: object, seed: object) -> None:
    if method not in METHODS:
        hint = ""
        if f"{method}_svd" in METHODS:
            hint = f"; {method!r} in PEFT acts on A and B apart, {method}_svd on their product"
        elif method == "linear":
            hint = "; adding A's and B's apart is not the sum of the products, 'cat' is"
        raise ValueError(f"method must be one of {', '.join(METHODS)}, found {method!r}{hint}")
    if r is not None:
        check_rank(r)
        if method == "cat":
            raise ValueError(
                "r has no meaning with method='cat', whose rank is the sum of the ranks; leave it "
                "out, or use method='svd'"
            )
    if method not in PRUNING and density is not None:
        raise ValueError(f"density is for {', '.join(PRUNING)}; leave it out with {method!r}")
    if method in PRUNING and not (is_number(density) and 0 < density <= 1):  # type: ignore[operator]
        raise ValueError(
            f"method={method!r} needs a density in (0, 1], the share of each delta weight that is "
            f"kept, found {density!r}"
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be a whole number, found {seed!r}")


def _check_weights(weights: object) -> dict[str, float]:
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"combine() takes a mapping of adapters' names to weights, found {weights!r}"
        )
    if not weights:
        raise ValueError("combine() needs at least one adapter, found an empty mapping")
    for name, weight in weights.items():
        if not is_number(weight):
            raise ValueError(
                f"the weight of adapter {name!r} must be a finite number, found {weight!r}"
            )
    return dict(weights)


@torch.no_grad()
def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str,
    *,
    method: str = "cat",
    r: int | None = None,
    density: float | None = None,
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
) -> Approximation:
    """Add an adapter made of others: `ΔW = Σ wᵢ ΔWᵢ`, or what a pruning method makes of them.

    The new adapter has scaling 1 (alpha = r), is frozen and not active; the others, what is active
    and what is trainable stay as they are. Methods, in PEFT's words and with its meaning, all on
    the delta weights ΔWᵢ = scalingᵢ · Bᵢ Aᵢ (a layer that an adapter lacks counts as 0):

    - `"cat"`: the exact sum, by stacking the factors; the rank is the sum of the ranks.
    - `"svd"`: the best rank-r approximation of that sum, from QR of the stacked factors and an
      SVD of an R × R matrix.
    - `"magnitude_prune_svd"`: of each ΔWᵢ the share `density` of largest magnitude, summed.
    - `"ties_svd"`: pruned alike; per element the sign of the (unweighted) sum is elected, and the
      weighted values of that sign are averaged (Yadav et al. 2023, arXiv:2306.01708, section 3).
    - `"dare_linear_svd"`: each element of ΔWᵢ is kept with probability `density` and divided by
      it, then summed (Yu et al. 2023, arXiv:2311.03099); `"dare_ties_svd"`: kept so, then as ties.

    The last four form ΔW of one layer at a time and keep its best rank-r approximation. There is
    no `"linear"`: adding the A's and the B's apart gives (Σ Bᵢ)(Σ Aᵢ), whose cross terms Bᵢ Aⱼ
    belong to no adapter. PEFT's `"ties"`, `"dare_linear"` and so on prune A and B apart, so their
    result depends on how a product happens to be factored; only their `_svd` forms are here.

    Args:
        model: a model with adapters; changed in place.
        weights: adapters' names and their weights: finite, negative ones subtract.
        name: of the new adapter.
        method: see above.
        r: rank for all but `"cat"`; None takes on each layer the largest rank of its sources (a
            PiSSA or OLoRA adapter counts twice its r). A layer gets no more than it can use.
        density: in (0, 1], for the last four.
        seed: of DARE's masks, drawn on the CPU by a generator of their own.
        dtype: of the new factors; None is float32, or float64 where a source has it.

    Returns:
        The relative Frobenius error per layer and overall, of the factors as stored, against the
        method's own matrix (for `"cat"` and `"svd"`: against the exact sum).

    Raises:
        ValueError: an unknown adapter or method, a name in use, options that don't belong to the
            method, and what is no low-rank sum: DoRA (see `minilora.peft.to_lora`), a
            lora_bias, trained copies, NaN or Inf. The model is unchanged.
        TypeError: weights or seed of another type.
        RuntimeError: adapters are merged.
    """
    survey = Survey(model)
    layers = survey.require_layers("combine", unmerged=True)
    _check_options(method, r, density, seed)
    weights = _check_weights(weights)
    survey.require_new_name(name)
    used: dict[str, list[tuple[LoRAAdapter, float]]] = {fqn: [] for fqn in layers}
    for source, weight in weights.items():
        for fqn, factors in check_source(survey, source, "combine").items():
            used[fqn].append((factors, weight))
            if factors.magnitude is not None:
                raise ValueError(
                    f"combine() sums low-rank products, but adapter {source!r} is DoRA (first: "
                    f"{fqn}), which changes all of W; convert it with minilora.peft.to_lora"
                )
    generator = torch.Generator().manual_seed(seed)
    new, reports = {}, []
    for fqn, parts in used.items():
        if not parts:
            continue
        sources = [factors for factors, _ in parts]
        largest = max(factors.rank for factors in sources)
        rank = None if method == "cat" else r or largest
        wanted = _wanted(method, parts, density, generator)
        A, B, report = approximated(fqn, wanted, rank, stored_dtype(dtype, sources))
        new[fqn] = plain_adapter(layers[fqn], A, B)
        reports.append(report)
    add_frozen(survey, name, new)
    return Approximation(name, method, tuple(reports))


def _wanted(
    method: str,
    parts: list[tuple[LoRAAdapter, float]],
    density: float | None,
    generator: torch.Generator,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return one layer's sum as factors in f64, or a pruning method's dense matrix in f32 (f64)."""
    if density is None:
        pairs = [(factors.product(torch.float64), weight) for factors, weight in parts]
        A = torch.cat([A for (A, _), _ in pairs])
        return A, torch.cat([B * weight for (_, B), weight in pairs], 1)
    deltas = [factors.delta_weight() for factors, _ in parts]
    wide = max((d.dtype for d in deltas), key=lambda d: d.itemsize)
    if density < 1:
        dare = method.startswith("dare")
        deltas = [_dropped(d, density, generator) if dare else _largest(d, density) for d in deltas]
    deltas = [delta.to(wide) for delta in deltas]
    weights = [weight for _, weight in parts]
    total = torch.zeros_like(deltas[0])
    if "ties" not in method:
        for delta, weight in zip(deltas, weights, strict=True):
            total += delta * weight
        return total
    elected = sum(deltas, torch.zeros_like(total)) >= 0
    count = torch.zeros_like(total)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = torch.where(elected, delta > 0, delta < 0)
        total += delta * weight * agrees
        count += agrees
    return total / count.clamp(min=1)


def _largest(delta: Tensor, density: float) -> Tensor:
    """Keep the ⌊density · n⌋ elements of largest magnitude (at least one), 0 elsewhere."""
    flat = delta.flatten()
    kept = flat.abs().topk(max(1, int(density * flat.numel()))).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).reshape(delta.shape)


def _dropped(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep each element with probability `density`, divided by it, 0 elsewhere."""
    kept = torch.rand(delta.shape, generator=generator, dtype=torch.float32) < density
    return delta * kept.to(delta.device) / density
