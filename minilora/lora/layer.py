"""What every kind of LoRA layer shares: adapters by name, and how they add to the base's output.

A kind (`layers.py`) says how its weight is a matrix W `[N, K]` and how A and B are applied.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.kernels import dropout_mask
from minilora.lora.adapter import FROM_WEIGHT, LoRAAdapter
from minilora.lora.threads import refuse_others
from minilora.lora.wrappers import named_modules
from minilora.quantization import QuantizedLinear, packed_format, unpacked_dtype


class LoRALayer(nn.Module):
    """A layer plus the sum of its active adapters: `y = base(x) + Σ scaling · B A D(x)`.

    `base` is the original module, neither copied nor changed; adapters live in `adapters` by name
    and are switched by `minilora.activate`. A DoRA adapter adds `(m/‖W + scaling·BA‖ − 1) W D(x)`
    and scales its branch by the same ratio. `last_path` names the path last used.

    Args:
        base: the module to wrap; has a `weight`.
        compute_dtype: dtype of the branch; None computes in the input's (under autocast, in
            autocast's; for an embedding, in its weight's).
        backend: `"auto"`, `"torch"` or `"triton"`; kept and shown, see `minilora.inject`.
    """

    in_features: int
    out_features: int
    thread: int | None = None  # the only one to use the layer, see `claimed`
    slot_A: Tensor | None
    slot_B: Tensor | None

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
        self.weight_read = False  # whether other code has read `weight`, to use it by itself
        self.merged: tuple[str, ...] = ()
        self.original: object = None  # what `merge(keep=...)` kept
        self.base_sample: Tensor | None = None  # of the unmerged weight, while merged
        self.base_format: str | None = None  # and how that is stored
        self.rows: tuple[str | None, ...] | None = None  # an adapter per row, see `mixed`
        self.register_buffer("slot_A", None, persistent=False)  # see `prepare_switching`
        self.register_buffer("slot_B", None, persistent=False)
        self.register_load_state_dict_post_hook(_refill)
        self.train(base.training)

    # Other code reads these of a layer it believes to be the base.
    @property
    def weight(self) -> Tensor:
        """The base's weight."""
        if not torch.compiler.is_compiling():
            self.weight_read = True
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

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle made within `mixed` is outside of it, since nothing would end it."""
        return {**super().__getstate__(), "rows": None, "thread": None}

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """Note what is merged: the weights alone don't show it."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None and self.merged:
            metadata["merged"] = list(self.merged)

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, *rest: Any
    ) -> None:
        """Take the base's weights under the plain layer's names too.

        Raises:
            RuntimeError: weights with adapters merged where none are, or the other way round.
        """
        merged = tuple(local_metadata.get("merged", ()))
        if merged != self.merged and any(key.startswith(prefix) for key in state_dict):
            there, here = (", ".join(names) or "none" for names in (merged, self.merged))
            raise RuntimeError(
                f"a state dict must have the same adapters merged as the model, found {there} "
                f"there and {here} in {prefix[:-1]}: they would count twice or not at all; call "
                f"minilora.unmerge before state_dict() and before load_state_dict()"
            )
        for key in self.base.state_dict():
            if f"{prefix}{key}" in state_dict:
                state_dict[f"{prefix}base.{key}"] = state_dict.pop(f"{prefix}{key}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def new_adapter(self, **options: Any) -> LoRAAdapter:
        """Make factors of this layer's shapes; DoRA and inits that read the weight are set up.

        Args:
            options: as for `LoRAAdapter`, and `dora`.
        """
        dora = options.pop("dora", False)
        factors = LoRAAdapter(self.in_features, self.out_features, **self._shape(), **options)
        # Only when it is read: of a quantized base this is a fresh, decoded tensor.
        if FROM_WEIGHT.fullmatch(factors.init) and not factors.lora_A.is_meta:
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
        ratio = factors.length_ratio(W).detach().to(delta.dtype)
        return ratio[:, None] * (W + delta) - W

    def forward(self, x: Tensor) -> Tensor:
        """Map the base's input to its output, adapters added.

        Raises:
            RuntimeError: a training step while an adapter is merged into the base (its factors
                would get no gradient), or another thread within `disabled` or `mixed`.
        """
        before = None if torch.compiler.is_compiling() else self.thread
        rows, active = self.rows, self.active
        if not torch.compiler.is_compiling():
            refuse_others(before, self.thread)  # asked twice: a block may end in between
        if self.merged:
            self._refuse_training(
                f"a merged adapter can't be trained: {', '.join(self.merged)} is merged into the "
                f"base weight and would get no gradient; call minilora.unmerge(model)"
            )
            return self.base(x)
        if rows is not None:
            return self._mixed(x, rows)
        if self.slot_A is not None and self.slot_B is not None:
            self._refuse_training(
                "a model prepared for switching can't be trained: its slots are copies of the "
                "factors, which would get no gradient; call end_switching(model)"
            )
            return self._slotted(x, self.slot_A, self.slot_B)
        adapters: list[Any] = [self.adapters[name] for name in active]
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
        whole = x
        if p:
            x = x * dropout_mask(x, p) * (1 / (1 - p))
        A, B = factors.matrices()
        branch = self._branch(x, A.to(dtype), B.to(dtype)) * factors.scaling
        if factors.lora_bias is not None:
            branch = branch + self._rows(factors.lora_bias.to(dtype) * factors.scaling)
        offset = self._offset(whole, factors, dtype)  # a part of the base: it sees the whole input
        if factors.magnitude is None:
            return branch - offset
        ratio = self._rows(factors.length_ratio(self.weight_matrix()))
        plain = self._base_product(x) if p else self._without_bias(y, dtype)
        plain = plain - (self._offset(x, factors, dtype) if p else offset)
        return _rescaled(plain, branch, ratio) - offset

    def _offset(self, x: Tensor, factors: LoRAAdapter, dtype: torch.dtype) -> Tensor | float:
        """Apply what PiSSA or OLoRA took off the base, 0 for other adapters."""
        if factors.offset_A is None or factors.offset_B is None:
            return 0.0
        return self._branch(x, factors.offset_A.to(dtype), factors.offset_B.to(dtype))

    def _branch_dtype(self, x: Tensor) -> torch.dtype:
        if self.compute_dtype is not None:
            return self.compute_dtype
        if not x.is_floating_point():
            return weight_dtype(self.base)
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            return torch.get_autocast_dtype(x.device.type)
        return x.dtype

    def _branch(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Apply B A, both as matrices, to x."""
        return self._up(self._down(x, A), B)

    def _down(self, x: Tensor, A: Tensor) -> Tensor:
        """Apply A `[R, K]`: R channels where the output has N."""
        return F.linear(x, A)

    def _up(self, s: Tensor, B: Tensor) -> Tensor:
        """Apply B `[N, R]`."""
        return F.linear(s, B)

    def _base_product(self, x: Tensor) -> Tensor:
        """Apply the base's weight alone, without its bias."""
        return F.linear(x, self.weight_matrix().to(x.dtype))

    def _rows(self, vector: Tensor) -> Tensor:
        """Shape `[N]` so that it broadcasts along the output's channels."""
        return vector

    def _used(self, path: str, x: Tensor) -> None:
        if not torch.compiler.is_compiling() and x.numel():
            self.last_path = path

    def _refuse_training(self, why: str) -> None:
        if not (self.training and torch.is_grad_enabled()):
            return  # first, so that a compiled inference model does not depend on the adapters
        if any(p.requires_grad for p in self.adapters.parameters()):
            raise RuntimeError(f"{why} to train, or model.eval() / torch.no_grad() for inference")

    def activate(self, names: Sequence[str]) -> None:
        """Make exactly these adapters, as far as they are on this layer, the active ones."""
        self.active = tuple(name for name in names if name in self.adapters)
        self.fill_slot()

    def slot_room(self) -> int | None:
        """Return the rank the slot holds, or None where there is no slot."""
        return None if self.slot_A is None else len(self.slot_A)

    def ranks(self, names: Sequence[str]) -> int:
        """Return the sum of the ranks of these adapters, frozen offsets included."""
        return sum(rank_of(self.adapters[name]) for name in names if name in self.adapters)

    def misfit(self, factors: Any, room: int | None) -> str | None:
        """Say why an adapter can't go into a slot of this rank, or None; None is any adapter."""
        if room is None:
            return None
        if factors.magnitude is not None or factors.lora_bias is not None:
            kind = "DoRA" if factors.magnitude is not None else "a lora_bias"
            return f"has {kind}, and a slot for switching holds plain LoRA only"
        r = rank_of(factors)
        return f"has rank {r}, and the slot for switching holds max_r={room}" if r > room else None

    @torch.no_grad()
    def fill_slot(self) -> None:
        """Copy the active adapters into the slot, where there is one; the rest of it is 0."""
        if self.slot_A is None or self.slot_B is None:
            return
        self.slot_A.zero_()
        self.slot_B.zero_()
        start = 0
        for name in self.active:
            factors: Any = self.adapters[name]
            A, B = factors.product()
            self.slot_A[start : start + len(A)] = A
            self.slot_B[:, start : start + len(A)] = B
            start += len(A)

    def _slotted(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        y = self.base(x)
        dtype = self._branch_dtype(x)
        x = x.to(dtype) if x.is_floating_point() else x
        with torch.autocast(x.device.type, enabled=False):
            return (y.to(dtype) + self._branch(x, A.to(dtype), B.to(dtype))).to(y.dtype)

    def _mixed(self, x: Tensor, rows: tuple[str | None, ...]) -> Tensor:
        """Give each row of the batch its own adapter: one product over all ranks, masked by row.

        With R the sum of the ranks, `s = x Aᵀ ∘ [row's adapter owns the column]`, `y += s Bᵀ`.
        """
        if x.shape[0] != len(rows):
            raise ValueError(
                f"mixed() was given {len(rows)} adapters, one per row of the batch, but a layer "
                f"saw {x.shape[0]} rows; the batch must be the first dimension in every layer"
            )
        y = self.base(x)
        names = [n for n in dict.fromkeys(rows) if n is not None and n in self.adapters]
        if not names:
            return y
        adapters: list[Any] = [self.adapters[name] for name in names]
        self._used("general", x)
        dtype = self._branch_dtype(x)
        owner = torch.tensor([names.index(n) if n in names else -1 for n in rows]).to(x.device)
        shape = (len(rows), *[1] * (y.ndim - 1))
        drop = torch.tensor([a.dropout if self.training else 0.0 for a in adapters] + [0.0])
        p = drop.to(x.device)[owner].reshape(shape)  # -1 picks the last entry
        dropped = bool(drop.any()) and x.is_floating_point()
        if dropped and any(a.offset_A is not None for a in adapters):
            raise ValueError(
                "mixed() in training can't drop inputs of adapters started by PiSSA or OLoRA, "
                "whose offset sees the whole input; set dropout to 0 or run their rows apart"
            )
        if x.is_floating_point():
            x = x.to(dtype)
        if dropped:
            x = x * dropout_mask(x, p) / (1 - p.to(dtype))
        with torch.autocast(x.device.type, enabled=False):
            parts = [scaled_factors(a) for a in adapters]
            A, B = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], 1)
            columns = [i for i, (a, _) in enumerate(parts) for _ in range(len(a))]
            mine = owner[:, None] == torch.tensor(columns, device=x.device)
            s = self._down(x, A.to(dtype))
            s = s * self._per_row(mine.to(dtype), s)
            branch = self._up(s, B.to(dtype))
            zeros = torch.zeros(self.out_features, device=x.device)
            if any(a.lora_bias is not None for a in adapters):
                biases = [
                    zeros if a.lora_bias is None else a.lora_bias * a.scaling for a in adapters
                ]
                chosen = torch.stack([*biases, zeros])[owner].to(dtype)
                branch = branch + self._per_row(chosen, branch)
            if any(a.magnitude is not None for a in adapters):
                W = self.weight_matrix()
                ratios = [zeros + 1 if a.magnitude is None else a.length_ratio(W) for a in adapters]
                ratio = self._per_row(torch.stack([*ratios, zeros + 1])[owner], branch)
                plain = self._base_product(x) if dropped else self._without_bias(y, dtype)
                branch = _rescaled(plain, branch, ratio)
            return (y.to(torch.promote_types(y.dtype, dtype)) + branch).to(y.dtype)

    def _per_row(self, values: Tensor, like: Tensor) -> Tensor:
        """Shape `[rows, channels]` so that it broadcasts over like's other dimensions."""
        return values.reshape(len(values), *[1] * (like.ndim - 2), values.shape[1])

    def _without_bias(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        y = y.to(dtype)
        return y if self.bias is None else y - self._rows(self.bias.to(dtype))

    def extra_repr(self) -> str:
        """Show what is active, what is merged and the backend asked for."""
        parts = [f"active={list(self.active)}", f"backend={self.backend}"]
        if self.merged:
            parts.append(f"merged={list(self.merged)}")
        if self.compute_dtype is not None:
            parts.append(f"compute_dtype={self.compute_dtype}")
        return ", ".join(parts)


def _refill(layer: LoRALayer, _: object) -> None:
    """Bring new factors into the slot."""
    layer.fill_slot()


def _rescaled(plain: Tensor, branch: Tensor, ratio: Tensor) -> Tensor:
    """DoRA's `(ratio − 1) W x + ratio · s B A x`, with the small ratio − 1 rounded last."""
    return (ratio - 1).to(plain.dtype) * plain + ratio.to(branch.dtype) * branch


def rank_of(factors: Any) -> int:
    """Return r, and the rank of a frozen offset on top."""
    return factors.r + (0 if factors.offset_A is None else len(factors.offset_A))


def scaled_factors(factors: LoRAAdapter) -> tuple[Tensor, Tensor]:
    """Return A and B, differentiable, with the scaling in B and a frozen offset appended."""
    A, B = factors.matrices()
    B = B * factors.scaling
    if factors.offset_A is not None and factors.offset_B is not None:
        A, B = torch.cat([A, factors.offset_A]), torch.cat([B, -factors.offset_B], dim=1)
    return A, B


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Return the model's LoRA layers by dotted name, a shared one under its first name."""
    return {name: m for name, m in named_modules(model) if isinstance(m, LoRALayer)}


def weight_dtype(base: Any) -> torch.dtype:
    """Return the dtype of a module's weight, a quantized one's without decoding it."""
    if isinstance(base, QuantizedLinear):
        return base.dtype
    return base.weight.dtype if packed_format(base) is None else unpacked_dtype(base)


def weight_device(base: Any) -> torch.device:
    """Return where a module's weight lies."""
    return base.device if isinstance(base, QuantizedLinear) else base.weight.device


def storage_format(base: Any) -> str:
    """Name how a module stores its weight: a dtype, or a quantized format."""
    if isinstance(base, QuantizedLinear):
        return base.spec.format
    return packed_format(base) or str(base.weight.dtype).removeprefix("torch.")


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
