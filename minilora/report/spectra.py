"""What an adapter changed, read from its factors and the base's weights alone.

    ΔW = scaling · B A,  B = Q_B R_B,  Aᵀ = Q_A R_A,  ΔW = Q_B (R_B R_Aᵀ) Q_Aᵀ

so the singular values of ΔW `[N, K]` are those of an R × R matrix, and B A is never formed.
Everything is computed in float64; the base is widened panel by panel.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minilora.lora import LoRALayer, product_norm

PANEL = 2**22  # elements of the base widened at a time
DIRECTIONS = 10  # of the changed weight that may be intruders
SIMILAR = 0.5  # |cosine| below which a direction is new


@dataclass(frozen=True)
class LayerReport:
    """One layer's change.

    `block` is the first number in the dotted name (None without one), `kind` names the module
    within its block. Norms are Frobenius norms. With DoRA `norm`, `overlap_*` and `intruders`
    tell of all that W is changed by, the spectrum of its low-rank part.
    """

    name: str
    block: int | None
    kind: str
    # [N, K] of W as a matrix; a kernel is flattened, an embedding transposed
    shape: tuple[int, int]
    r: int  # rank of the factors, a frozen offset (PiSSA, OLoRA) included
    dora: bool
    norm: float  # ‖ΔW‖
    weight_norm: float  # ‖W‖
    singular_values: tuple[float, ...]  # of ΔW, largest first, min(R, N, K) of them
    suggested_r: int  # the smallest rank that keeps the asked share of the energy
    truncation_error: float  # ‖ΔW − its best rank-suggested_r part‖ / ‖ΔW‖, predicted
    # The share of ‖ΔW‖² within the span of W's first R left (outputs) and right (inputs) singular
    # vectors; None for ΔW = 0 and layers that were too large.
    overlap_out: float | None
    overlap_in: float | None
    # For each of the first (left) singular vectors of W + ΔW, the largest |cosine| to any of W's.
    similarities: tuple[float, ...] | None

    @property
    def relative(self) -> float:
        """‖ΔW‖ / ‖W‖."""
        if self.weight_norm:
            return self.norm / self.weight_norm
        return math.inf if self.norm else 0.0

    @property
    def spectral_norm(self) -> float:
        """The largest singular value."""
        return self.singular_values[0]

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of σ / Σσ, in [1, R]; 0 for ΔW = 0.

        Roy and Vetterli 2007, "The effective rank", section 2.
        """
        total = sum(self.singular_values)
        if not total:
            return 0.0
        shares = [s / total for s in self.singular_values if s]
        return math.exp(-sum(p * math.log(p) for p in shares))

    @property
    def energy(self) -> tuple[float, ...]:
        """Share of ‖B A‖² that its best rank-1, rank-2, … part keeps; the last is 1."""
        return energy_kept(self.singular_values)

    @property
    def intruders(self) -> int | None:
        """How many of the first singular vectors of W + ΔW are like none of W's.

        Shuttleworth et al. 2024, arXiv:2410.21228, section 3: |cosine| below 0.5 to each of them.
        """
        if self.similarities is None:
            return None
        return sum(cosine < SIMILAR for cosine in self.similarities)


def energy_kept(values: tuple[float, ...]) -> tuple[float, ...]:
    """Return Σ_{i ≤ k} σᵢ² / Σ σᵢ² for k = 1 to R; all 1 where every σ is 0: nothing is lost."""
    squares = [s * s for s in values]
    total = math.fsum(squares)
    if not total:
        return (1.0,) * len(values)
    return tuple(1 - math.fsum(squares[k:]) / total for k in range(1, len(values) + 1))


def rank_for(values: tuple[float, ...], keep: float) -> int:
    """Return the smallest rank whose energy is at least `keep`."""
    return next(k for k, share in enumerate(energy_kept(values), 1) if share >= keep)


def truncation_error(values: tuple[float, ...], r: int) -> float:
    """Return the relative error of the best rank-r part: √(Σ_{i > r} σᵢ² / Σ σᵢ²)."""
    total = math.fsum(s * s for s in values)
    return math.sqrt(math.fsum(s * s for s in values[r:]) / total) if total else 0.0


def small_svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U `[N, n]`, S `[n]`, V `[K, n]` of B A, n ≤ R, without forming B A."""
    Q_A, R_A = torch.linalg.qr(A.T)
    Q_B, R_B = torch.linalg.qr(B)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    if not product_norm(A, B):  # rounding of what cancels is no direction
        S = torch.zeros_like(S)
    return Q_B @ U, S, Q_A @ Vh.T


def layer_report(
    name: str,
    block: int | None,
    kind: str,
    layer: LoRALayer,
    adapter: str,
    keep: float,
    largest: int,
) -> LayerReport:
    """Analyse one layer; the base's own directions only where min(N, K) ≤ `largest`."""
    factors = layer.adapters[adapter]
    A, B = factors.product(torch.float64)
    U, S, V = small_svd(A, B)
    values = tuple(S.tolist())
    W = layer.view.matrix().detach()
    N, K = W.shape
    change = _Change(W, A, B, None)
    if factors.magnitude is not None:
        change.ratio = factors.length_ratio(W).detach().double()
    norm, weight_norm = change.norms()
    if change.ratio is None:
        norm = math.sqrt(math.fsum(s * s for s in values))
    overlap: tuple[float | None, float | None] = (None, None)
    similarities = None
    if min(N, K) <= largest and norm and weight_norm:
        overlap, similarities = change.directions(U * S, V * S, norm)
    r = rank_for(values, keep)
    return LayerReport(
        name, block, kind, (N, K), len(A), change.ratio is not None, norm, weight_norm, values, r,
        truncation_error(values, r), *overlap, similarities,
    )  # fmt: skip


@dataclass
class _Change:
    """W and what is added to it: `ratio ∘ (W + B A) − W`, ratio per row, None for 1."""

    W: Tensor
    A: Tensor
    B: Tensor
    ratio: Tensor | None

    def panels(self, dim: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield W and the changed W in float64, rows (0) or columns (1) at a time."""
        step = max(1, PANEL // max(1, self.W.shape[1 - dim]))
        for start in range(0, self.W.shape[dim], step):
            part = slice(start, min(start + step, self.W.shape[dim]))
            rows, columns = (part, slice(None)) if dim == 0 else (slice(None), part)
            old = self.W[rows, columns].double()
            new = old + self.B[rows] @ self.A[:, columns]
            yield part, old, new if self.ratio is None else new * self.ratio[rows, None]

    def norms(self) -> tuple[float, float]:
        """Return the norms of the change and of W."""
        change = weight = 0.0
        for _, old, new in self.panels(0):
            weight += float(old.square().sum())
            if self.ratio is not None:
                change += float((new - old).square().sum())
        return math.sqrt(change), math.sqrt(weight)

    def directions(
        self, left: Tensor, right: Tensor, norm: float
    ) -> tuple[tuple[float, float], tuple[float, ...]]:
        """Return overlap_out and overlap_in, and the similarities, from Gram matrices of panels.

        `left` `[N, n]` and `right` `[K, n]` are B A's singular vectors times its singular values.
        """
        N, K = self.W.shape
        tall = K <= N
        size = min(N, K)
        gram, changed = (torch.zeros(size, size, dtype=torch.float64, device=self.W.device)
                         for _ in range(2))  # fmt: skip
        for _, old, new in self.panels(0 if tall else 1):
            gram += old.T @ old if tall else old @ old.T
            changed += new.T @ new if tall else new @ new.T
        squares, short = torch.linalg.eigh(gram)
        short = short.flip(1)  # W's singular vectors on the shorter side, [size, size]
        S = squares.flip(0).clamp(min=0).sqrt()
        floor = S[0] * math.sqrt(torch.finfo(torch.float64).eps)
        inverse = torch.where(S.gt(floor), 1 / S.clamp(min=1e-300), 0.0)
        new_squares, new_short = torch.linalg.eigh(changed)
        count = min(DIRECTIONS, size)
        new_short = new_short.flip(1)[:, :count]
        new_S = new_squares.flip(0)[:count].clamp(min=1e-300).sqrt()
        n = min(left.shape[1], size)
        # The other side of both: W v / σ, a panel at a time.
        other = torch.zeros(max(N, K), n, dtype=torch.float64, device=self.W.device)
        product = torch.zeros(size, count, dtype=torch.float64, device=self.W.device)
        for part, old, new in self.panels(0 if tall else 1):
            if tall:
                other[part] = old @ (short[:, :n] * inverse[:n])
                product += old.T @ (new @ (new_short / new_S))
            else:
                other[part] = old.T @ (short[:, :n] * inverse[:n])
        outs, ins = (other, short[:, :n]) if tall else (short[:, :n], other)
        cosines = inverse[:, None] * (short.T @ product) if tall else short.T @ new_short
        if self.ratio is None:
            shares = (outs.T @ left).norm(), (ins.T @ right).norm()
        else:
            shares = self._projected(outs, ins)
        similar = tuple(cosines.abs().amax(0).clamp(max=1).tolist())
        out, into = (min(1.0, (float(s) / norm) ** 2) for s in shares)
        return (out, into), similar

    def _projected(self, outs: Tensor, ins: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norms of the change projected on output and input directions."""
        left = torch.zeros(outs.shape[1], self.W.shape[1], dtype=torch.float64, device=outs.device)
        right = torch.zeros((), dtype=torch.float64, device=outs.device)
        for part, old, new in self.panels(0):
            left += outs[part].T @ (new - old)
            right += ((new - old) @ ins).square().sum()
        return left.norm(), right.sqrt()
