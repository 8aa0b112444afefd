"""What a layer does instead of adding its active adapters, as one value: `layer.route`."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minilora.kernels import dropout_mask, without_autocast
from minilora.lora.adapter import LoRAAdapter, Pair, rescaled, stacked

if TYPE_CHECKING:
    from minilora.lora.layer import LoRALayer


class Route:
    """Another way through a layer, entered and left again; what it does not say holds as before.

    Attributes:
        before: the layer's route until this one, which leaving it restores.
        merged: the adapters that the base's weight holds.
        rows: an adapter per row of the batch, or None for the base.
        room: the rank that a slot holds.
        sample, stored: a sample of the unmerged weight, and how that is stored.
        kept: what `unmerge` puts back, see `merging.Kept`.
        ends: whether a block ends it, so that a copy made meanwhile must not have it.
    """

    before: "Route | None" = None
    merged: tuple[str, ...] = ()
    rows: tuple[str | None, ...] = ()
    room: int | None = None
    sample: Tensor | None = None
    stored: str | None = None
    kept: Any = None
    ends = False

    def forward(self, layer: "LoRALayer", x: Tensor) -> Tensor:
        """Map the base's input to the layer's output."""
        raise NotImplementedError

    def refill(self, layer: "LoRALayer") -> None:
        """Follow a change of the active adapters or of their values."""

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a move or cast of the layer."""


class Merged(Route):
    """The base's weight holds the adapters: calling the base is all."""

    def __init__(
        self,
        names: tuple[str, ...],
        kept: Any = None,
        sample: Tensor | None = None,
        stored: str | None = None,
    ):
        self.merged, self.kept, self.sample, self.stored = names, kept, sample, stored

    def forward(self, layer: "LoRALayer", x: Tensor) -> Tensor:
        """Call the base."""
        _refuse_training(
            layer,
            f"a merged adapter can't be trained: {', '.join(self.merged)} is merged into the base "
            f"weight and would get no gradient; call minilora.unmerge(model)",
        )
        return layer.base(x)


class Slot(Route):
    """One pair of fixed rank that holds copies of the active adapters, zeros behind them.

    `torch.compile` sees no switch: values are copied into it in place.
    """

    def __init__(self, layer: "LoRALayer", max_r: int):
        N, K = layer.view.shape
        like = next(layer.adapters.parameters())
        self.room = max_r
        self.A = torch.zeros(max_r, K, device=like.device, dtype=like.dtype)
        self.B = torch.zeros(N, max_r, device=like.device, dtype=like.dtype)
        self.refill(layer)

    def forward(self, layer: "LoRALayer", x: Tensor) -> Tensor:
        """Add the one pair."""
        _refuse_training(
            layer,
            "a model prepared for switching can't be trained: its slots are copies of the "
            "factors, which would get no gradient; call end_switching(model)",
        )
        return layer.general(x, [Pair(self.A, self.B, 1.0, 0.0)])

    @torch.no_grad()
    def refill(self, layer: "LoRALayer") -> None:
        """Copy the active adapters into the slot, in the widest dtype of the layer's adapters."""
        dtypes = (factor.dtype for factor in layer.adapters.parameters())
        dtype = functools.reduce(torch.promote_types, dtypes, self.A.dtype)
        self.A, self.B = self.A.to(dtype), self.B.to(dtype)
        self.A.zero_()
        self.B.zero_()
        start = 0
        for name in layer.active:
            A, B = layer.adapters[name].product()
            self.A[start : start + len(A)] = A
            self.B[:, start : start + len(A)] = B
            start += len(A)

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or cast the slot."""
        self.A, self.B = fn(self.A), fn(self.B)


class PerRow(Route):
    """Each row of the batch has its own adapter: one product over all ranks, masked by row.

    With R the sum of the ranks, `s = x Aᵀ ∘ [the row's adapter owns the column]`, `y += s Bᵀ`.
    """

    ends = True

    def __init__(self, rows: tuple[str | None, ...]):
        self.rows = rows

    def forward(self, layer: "LoRALayer", x: Tensor) -> Tensor:
        """Give each row what its adapter adds."""
        if x.shape[0] != len(self.rows):
            raise ValueError(
                f"mixed() was given {len(self.rows)} adapters, one per row of the batch, but a "
                f"layer saw {x.shape[0]} rows; the batch must be the first dimension in every layer"
            )
        y = layer.base(x)
        names = [n for n in dict.fromkeys(self.rows) if n is not None and n in layer.adapters]
        if not names:
            return y
        layer.note("general", x)
        adapters = [layer.adapters[name] for name in names]
        # The index of a row's adapter, behind all of them for the base.
        owner = torch.tensor([names.index(n) if n in names else len(names) for n in self.rows])
        owner = owner.to(x.device)
        x, dtype = layer.branch_input(x)
        seen, drops = self._dropped(x, owner, [one.pairs(layer.training) for one in adapters])
        with without_autocast(x.device.type):
            branch = self._branch(layer, seen, owner, adapters, dtype)
            if any(one.magnitude is not None for one in adapters):
                W, N = layer.view.matrix(), layer.view.out_features
                one = torch.ones(N, dtype=torch.float32, device=x.device)
                ratios = [one if a.magnitude is None else a.length_ratio(W) for a in adapters]
                ratio = layer.view.channels(torch.stack([*ratios, one])[owner], y.ndim)
                plain = layer.view.product(seen) if drops else layer.without_bias(y, dtype)
                branch = rescaled(plain, branch, ratio)
            return (y.to(torch.promote_types(y.dtype, dtype)) + branch).to(y.dtype)

    @staticmethod
    def _dropped(x: Tensor, owner: Tensor, pairs: list[list[Pair]]) -> tuple[Tensor, bool]:
        """Drop inputs with each row's own probability; also return whether any can be dropped."""
        drop = [max(pair.dropout for pair in own) for own in pairs]
        if not any(drop):
            return x, False
        if any(len({pair.dropout for pair in own}) > 1 for own in pairs):
            raise ValueError(
                "mixed() in training can't drop inputs of adapters started by PiSSA or OLoRA, "
                "whose offset sees the whole input; set dropout to 0 or run their rows apart"
            )
        p = torch.tensor([*drop, 0.0], dtype=torch.float32).to(x.device)[owner]
        p = p.reshape(-1, *[1] * (x.ndim - 1))
        return x * dropout_mask(x, p) / (1 - p.to(x.dtype)), True

    @staticmethod
    def _branch(
        layer: "LoRALayer",
        x: Tensor,
        owner: Tensor,
        adapters: Sequence[LoRAAdapter],
        dtype: torch.dtype,
    ) -> Tensor:
        """Return `Σ scaling · B A x` of each row's adapter, lora_bias included."""
        view = layer.view
        A, B, scaling = stacked([pair for one in adapters for pair in one.pairs()])
        columns = [i for i, one in enumerate(adapters) for _ in range(one.rank)]
        mine = owner[:, None] == torch.tensor(columns, device=x.device)
        s = view.down(x, A.to(dtype))
        s = s * view.channels(mine.to(dtype), s.ndim)
        branch = view.up(s, B.to(dtype)) * scaling
        if any(one.lora_bias is not None for one in adapters):
            zero = torch.zeros(layer.view.out_features, dtype=torch.float32, device=x.device)
            biases = [zero if a.lora_bias is None else a.lora_bias * a.scaling for a in adapters]
            chosen = torch.stack([*biases, zero])[owner].to(dtype)
            branch = branch + view.channels(chosen, branch.ndim)
        return branch


def check_fits(name: str, fqn: str, adapter: LoRAAdapter, room: int | None) -> None:
    """Raise where an adapter can't go into a layer's slot of this rank; None is no slot."""
    reason = None
    if room is not None and (adapter.magnitude is not None or adapter.lora_bias is not None):
        what = "DoRA" if adapter.magnitude is not None else "a lora_bias"
        reason = f"has {what}, and a slot for switching holds plain LoRA only"
    elif room is not None and adapter.rank > room:
        reason = f"has rank {adapter.rank}, and the slot for switching holds max_r={room}"
    if reason is not None:
        raise ValueError(f"adapter {name!r} on {fqn} {reason}")


def _refuse_training(layer: "LoRALayer", why: str) -> None:
    if not (layer.training and torch.is_grad_enabled()):
        return  # first, so that a compiled inference model does not depend on the adapters
    if any(p.requires_grad for p in layer.adapters.parameters()):
        raise RuntimeError(f"{why} to train, or model.eval() / torch.no_grad() for inference")
