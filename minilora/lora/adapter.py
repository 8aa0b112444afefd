"""One adapter's parameters for one layer: the two factors, and what the variants add to them.

Every kind of layer is a matrix W `[N, K]` to its adapter: Conv1D and Embedding weights transposed,
a convolution's kernel flattened to `[out, in·kh·kw]`. `delta_weight` is a matrix of that shape.
"""

import math
import re
from collections.abc import ItemsView, Sequence, ValuesView
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from minilora.kernels import without_autocast

# Initialisations in which the factors start from the base's weight; see `LoRAAdapter.start_from`.
FROM_WEIGHT = re.compile(r"pissa|pissa_niter_[1-9]\d*|olora")
INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_<n>", "olora")

M = TypeVar("M", bound=nn.Module)


class ModuleDict(nn.ModuleDict, Generic[M]):
    """`nn.ModuleDict` of modules of one class, which a type checker then knows."""

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> M: ...
        def items(self) -> ItemsView[str, M]: ...  # noqa: D102
        def values(self) -> ValuesView[M]: ...  # noqa: D102
        def pop(self, key: str) -> M: ...  # noqa: D102


class Pair(NamedTuple):
    """One product that adds to W: `scaling · B A`, its input dropped with probability `dropout`."""

    A: Tensor  # [R, K]
    B: Tensor  # [N, R]
    scaling: float
    dropout: float


def stacked(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, float]:
    """Return A, B and scaling of one pair of the summed rank, differentiable.

    `Σ sᵢ Bᵢ Aᵢ = [s₁B₁ s₂B₂ …] [A₁; A₂; …]`
    """
    if len(pairs) == 1:
        return pairs[0].A, pairs[0].B, pairs[0].scaling  # Dynamo 2.8 slices no named tuple
    A = torch.cat([pair.A for pair in pairs])
    return A, torch.cat([pair.B * pair.scaling for pair in pairs], dim=1), 1.0


def rescaled(plain: Tensor, branch: Tensor, ratio: Tensor) -> Tensor:
    """Return DoRA's `(ratio − 1) W x + ratio · s B A x`, the small ratio − 1 rounded last."""
    return (ratio - 1).to(plain.dtype) * plain + ratio.to(branch.dtype) * branch


def _exact(like: Tensor) -> AbstractContextManager:
    """Multiply in the tensors' own dtype, whatever autocast the caller is in."""
    return nullcontext() if like.is_meta else without_autocast(like.device.type)


class LoRAAdapter(nn.Module):
    """One adapter's factors for one layer: `delta_weight = scaling · lora_B lora_A`.

    Args:
        in_features: K: inputs of a linear, rows of an embedding, channels of a convolution.
        out_features: N.
        r: rank, at least 1.
        alpha: scaling is alpha / r, or alpha / sqrt(r) with `rslora`.
        dropout: probability of zeroing an input of the branch while training.
        rslora: rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732).
        init: `"kaiming"` draws A from kaiming_uniform(a=√5), `"gaussian"` from a normal
            distribution of standard deviation 1/r; B is 0 in both, so a fresh adapter changes
            nothing. `"orthogonal"` draws both, from orthogonal halves of one basis, so that B A
            is 0 (r even; as PEFT's option of that name). `"pissa"`, `"pissa_niter_<n>"` and
            `"olora"` start from the base's weight, see `start_from`.
        lora_bias: a bias `[N]` on B, scaled like the branch.
        dora: row lengths `[N]`, which `Base.new_adapter` sets from the weight.
        kernel_size: of a convolution; A is then `[r, K, kh, kw]` and B `[N, r, 1, 1]`.
        embedding: the reversed start: A is 0 and B ~ N(0, 1), as in PEFT.
        device: where the factors live.
        dtype: of the factors.

    Attributes:
        magnitude: DoRA's `[N]` row lengths, or None.
        offset_A, offset_B: `[R0, K]`, `[N, R0]`, scaling included: what PiSSA and OLoRA take off
            the base, or None. The base itself stays as it is.
    """

    magnitude: nn.Parameter | None
    lora_bias: nn.Parameter | None
    offset_A: Tensor | None
    offset_B: Tensor | None

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
        lora_bias: bool = False,
        dora: bool = False,
        kernel_size: Sequence[int] = (),
        embedding: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.r, self.alpha, self.dropout, self.rslora = r, alpha, dropout, rslora
        self.init, self.embedding = init, embedding
        where: Any = {"device": device, "dtype": dtype}
        ones = (1,) * len(kernel_size)
        self.lora_A = nn.Parameter(torch.zeros(r, in_features, *kernel_size, **where))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, *ones, **where))
        for name, wanted in (("lora_bias", lora_bias), ("magnitude", dora)):
            extra = nn.Parameter(torch.zeros(out_features, **where)) if wanted else None
            self.register_parameter(name, extra)
        for name in ("offset_A", "offset_B"):
            self.register_buffer(name, None)
        self._draw()

    def _draw(self) -> None:
        if self.embedding:
            nn.init.normal_(self.lora_B)
        elif self.init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        elif self.init == "orthogonal":
            rows = torch.linalg.qr(torch.randn(self.r, self.r, dtype=torch.float32))[0]
            for factor, half in ((self.lora_A, rows[0::2]), (self.lora_B.T, rows[1::2])):
                width = factor[0].numel()
                start = half.T @ torch.randn(self.r // 2, width, dtype=torch.float32) / 10
                factor.data.copy_(start.reshape(factor.shape))
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def options(self) -> dict[str, Any]:
        """Return the options of `AdapterConfig` that this adapter was made with."""
        return {
            "r": self.r, "alpha": self.alpha, "dropout": self.dropout, "rslora": self.rslora,
            "dora": self.magnitude is not None, "lora_bias": self.lora_bias is not None,
            "init": self.init,
        }  # fmt: skip

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA; recomputed, never stored."""
        return self.alpha / math.sqrt(self.r) if self.rslora else self.alpha / self.r

    @property
    def zero_factor(self) -> str | None:
        """The factor that starts at 0, or None where both start from something."""
        if self.embedding:
            return "lora_A"
        return "lora_B" if self.init in ("kaiming", "gaussian") else None

    @property
    def rank(self) -> int:
        """The rank of `delta_weight`: r, and that of a frozen offset on top."""
        return sum(len(pair.A) for pair in self.pairs())

    def pairs(self, training: bool = False) -> list[Pair]:
        """Return what adds to W: the trained pair, and of PiSSA and OLoRA the frozen offset."""
        own: Any = self._parameters
        frozen: Any = self._buffers
        A, B = own["lora_A"], own["lora_B"]
        dropout = self.dropout if training and not self.embedding else 0.0
        pairs = [Pair(A.flatten(1), B.flatten(1), self.scaling, dropout)]
        if frozen["offset_A"] is not None:
            pairs.append(Pair(frozen["offset_A"], frozen["offset_B"], -1.0, 0.0))
        return pairs

    def product(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return detached copies A `[R, K]` and B `[N, R]` whose product is `delta_weight`."""
        dtype = torch.promote_types(dtype, self.lora_A.dtype)
        pairs = self.pairs()
        A = torch.cat([pair.A.detach().to(dtype) for pair in pairs])
        return A, torch.cat([pair.B.detach().to(dtype) * pair.scaling for pair in pairs], 1)

    def plain(self) -> tuple[Tensor, Tensor, int, float, bool]:
        """Return A, B, r, alpha and rslora of the ordinary adapter that does the same.

        A frozen offset becomes part of an adapter of the summed rank, its scaling 1.
        """
        if self.offset_A is None:
            return self.lora_A.detach(), self.lora_B.detach(), self.r, self.alpha, self.rslora
        A, B = self.product()
        return A.to(self.lora_A.dtype), B.to(self.lora_B.dtype), len(A), len(A), False

    def delta_weight(self) -> Tensor:
        """Return `scaling · B A` (minus the offset) as `[N, K]` in f32 (f64 for f64 factors)."""
        A, B = self.product()
        with _exact(A):
            return B @ A

    def row_lengths(self, weight: Tensor) -> Tensor:
        """Return `‖W + scaling · B A‖` per row of W as `[N]`, without forming B A; no gradient.

        `‖W‖² + 2 Σ (W Aᵀ) ∘ B + Σ (B (A Aᵀ)) ∘ B`, each sum along a row, in f32 (f64).
        Liu et al. 2024, "DoRA", arXiv:2402.09353, section 4.3 (the length counts as a constant).
        """
        A, B = self.product()
        with torch.no_grad(), _exact(A):
            W = weight.detach().to(A.dtype)
            squares = W.square().sum(1) + 2 * ((W @ A.T) * B).sum(1) + ((B @ (A @ A.T)) * B).sum(1)
            return squares.clamp(min=0).sqrt()

    def length_ratio(self, weight: Tensor) -> Tensor:
        """Return DoRA's `m / ‖W + scaling · B A‖` as `[N]`; 1 for a row of zeros."""
        assert self.magnitude is not None
        lengths = self.row_lengths(weight)
        return torch.where(lengths == 0, 1.0, self.magnitude / lengths.clamp(min=1e-30))

    @torch.no_grad()
    def start_from(self, weight: Tensor) -> None:
        """Set the factors from the base's weight `[N, K]`, where `init` says so.

        PiSSA: `B A` is the best rank-r part of W (Meng et al. 2024, arXiv:2404.02948), exactly or
        by a randomised SVD of n iterations; OLoRA: the first r columns of QR (Büyükakyüz 2024,
        arXiv:2406.01775). What the branch adds at the start is kept as the frozen offset and taken
        off again, so that the base's own weights never change.
        """
        if not FROM_WEIGHT.fullmatch(self.init):
            return
        W = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        if self.init == "olora":
            Q, R = torch.linalg.qr(W)
            A, B = R[: self.r], Q[:, : self.r]
        else:
            if self.init == "pissa":
                U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            else:
                U, S, V = torch.svd_lowrank(W, self.r, niter=int(self.init.rpartition("_")[2]))
                Vh = V.T
            root = (S[: self.r] / abs(self.scaling)).sqrt()
            A, B = root[:, None] * Vh[: self.r], U[:, : self.r] * root
            B = B if self.scaling > 0 else -B
        self.lora_A.copy_(A.reshape(self.lora_A.shape))
        self.lora_B.copy_(B.reshape(self.lora_B.shape))
        A, B = self.product()  # as rounded to the factors' dtype
        self.offset_A, self.offset_B = A.to(self.lora_A.dtype), B.to(self.lora_B.dtype)

    def extra_repr(self) -> str:
        """Show the numbers that make the scaling."""
        parts = [f"r={self.r}", f"alpha={self.alpha:g}", f"scaling={self.scaling:g}"]
        if self.dropout:
            parts.append(f"dropout={self.dropout:g}")
        if self.magnitude is not None:
            parts.append("dora")
        if self.offset_A is not None:
            parts.append(f"init={self.init}")
        return ", ".join(parts)
