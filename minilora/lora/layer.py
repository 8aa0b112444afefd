"""The layer that carries adapters by name, and the two paths by which they add to its output."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minilora.kernels import (
    FrozenLinear,
    drop,
    dropout_mask,
    lora_add,
    lora_linear,
    triton_lora_linear,
    without_autocast,
)
from minilora.lora.adapter import LoRAAdapter, ModuleDict, Pair, rescaled, stacked
from minilora.lora.base import Base, base_of, view
from minilora.lora.modes import refuse_others
from minilora.lora.routes import Route
from minilora.lora.wrappers import named_modules


class LoRALayer(nn.Module):
    """A layer plus the sum of its active adapters: `y = base(x) + Σ scaling · B A D(x)`.

    `base` is the original module, neither copied nor changed; adapters live in `adapters` by name
    and are switched by `minilora.activate`. A DoRA adapter adds `(m/‖W + scaling·BA‖ − 1) W D(x)`
    and scales its branch by the same ratio. Which path it takes, `choose_path` says.

    Args:
        base: the module to wrap: nn.Linear, Conv1D, `QuantizedLinear`, nn.Embedding or nn.Conv2d.
        compute_dtype: dtype of the branch; None computes in the input's (under autocast, in
            autocast's; for an embedding, in its weight's).
        backend: `"auto"`, `"torch"` or `"triton"`; kept and shown, see `minilora.inject`.

    Attributes:
        active: the names of the adapters that add to the output.
        route: what the layer does instead, or None; see `routes.py`.
        last_path: the path last used.
        weight_read: whether other code has read `weight`, to use it by itself.
        thread: the only one that may use the layer, see `claimed`.
    """

    adapters: ModuleDict[LoRAAdapter]

    def __init__(
        self, base: nn.Module, *, compute_dtype: torch.dtype | None = None, backend: str = "auto"
    ):
        super().__init__()
        self.base: Any = base
        self.adapters = ModuleDict()
        self.active: tuple[str, ...] = ()
        self.route: Route | None = None
        self.compute_dtype = compute_dtype
        self.backend = backend
        self.last_path: str | None = None
        self.weight_read = False
        self.thread: int | None = None
        self._view: Base | None = base_of(base)
        self._sample: Tensor | None = None
        self.register_load_state_dict_post_hook(_refill)
        self.train(base.training)

    @property
    def view(self) -> Base:
        """How LoRA sees the base."""
        base: Any = self._modules["base"]
        seen = self._view
        if seen is None or seen.module is not base or seen.type is not type(base):
            seen = view(base) or Base(base)  # a stranger's linear that was put in its place
            if not torch.compiler.is_compiling():
                self._view = seen
        return seen

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that takes the layer for its base."""
        if not torch.compiler.is_compiling():
            self.weight_read = True
        return self.base.weight

    def __getattr__(self, name: str) -> Any:
        """Show what else the base has: `bias`, `in_features`, `kernel_size`, `nf` and the like."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None or name.startswith("_"):
                raise
            return getattr(base, name)

    # ── what the layer is asked to become ──

    def add(self, name: str, adapter: LoRAAdapter) -> None:
        """Take an adapter, in the layer's mode; it is not active yet."""
        self.adapters[name] = adapter.train(self.training)

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        if name in self.adapters:
            del self.adapters[name]
        self.activate([other for other in self.active if other != name])

    def activate(self, names: Sequence[str]) -> None:
        """Make exactly these adapters, as far as they are on this layer, the active ones."""
        self.active = tuple(name for name in names if name in self.adapters)
        self.refill()

    def refill(self) -> None:
        """Bring what is active into the slot, if there is one, after factors were written to."""
        for route in self.routes():
            route.refill(self)

    def enter(self, route: Route) -> None:
        """Go another way until `leave`."""
        route.before, self.route = self.route, route

    def leave(self, route: Route) -> None:
        """Take a route out, whatever was entered after it."""
        for above in self.routes():
            if above.before is route:
                above.before = route.before
        if self.route is route:
            self.route = route.before

    def routes(self) -> Iterator[Route]:
        """Yield what was entered and not left, the last one first."""
        route = self.route
        while route is not None:
            yield route
            route = route.before

    def begin_step(self) -> None:
        """Forget which path was used and whether the weight was read."""
        self.last_path, self.weight_read = None, False

    def keep_sample(self, sample: Tensor) -> None:
        """Keep a sample of the base's weight, which will not be at hand later."""
        self._sample = sample

    # ── what it says of itself ──

    @property
    def merged(self) -> tuple[str, ...]:
        """The adapters that are merged into the base's weight."""
        return next((route.merged for route in self.routes() if route.merged), ())

    @property
    def room(self) -> int | None:
        """The rank that the slot holds, None without one; see `prepare_switching`."""
        return next((route.room for route in self.routes() if route.room), None)

    @property
    def used(self) -> list[str]:
        """The adapters that add to the output."""
        rows = (name for route in self.routes() for name in route.rows if name)
        names = [*self.active, *rows]
        return [name for name in dict.fromkeys(names) if name in self.adapters]

    @property
    def sample(self) -> Tensor | None:
        """The sample of the unmerged weight, where that is not at hand."""
        return next((r.sample for r in self.routes() if r.sample is not None), self._sample)

    def kept(self) -> list[Tensor]:
        """Return the tensors that routes keep to restore the layer."""
        return [t for route in self.routes() if route.kept for t in route.kept.tensors()]

    @property
    def stored(self) -> str:
        """How the unmerged base is stored: a dtype, or a quantized or packed format."""
        return next((r.stored for r in self.routes() if r.stored), self.view.stored)

    def rank(self, names: Sequence[str]) -> int:
        """Return the sum of the ranks of these adapters, frozen offsets included."""
        return sum(self.adapters[name].rank for name in names if name in self.adapters)

    def delta_weight(self, name: str) -> Tensor:
        """Return what one adapter adds to W as `[N, K]` in f32 (f64), DoRA's scaling included."""
        adapter = self.adapters[name]
        delta = adapter.delta_weight()
        if adapter.magnitude is None:
            return delta
        W = self.view.matrix().detach().to(delta.dtype)
        ratio = adapter.length_ratio(W).detach().to(delta.dtype)
        return ratio[:, None] * (W + delta) - W

    def extra_repr(self) -> str:
        """Show what is active, what is merged and the backend asked for."""
        parts = [f"active={list(self.active)}", f"backend={self.backend}"]
        if self.merged:
            parts.append(f"merged={list(self.merged)}")
        if self.compute_dtype is not None:
            parts.append(f"compute_dtype={self.compute_dtype}")
        return ", ".join(parts)

    # ── forward ──

    def forward(self, x: Tensor) -> Tensor:
        """Map the base's input to its output, adapters added."""
        compiling = torch.compiler.is_compiling()
        before = None if compiling else self.thread
        route, active = self.route, self.active
        if not compiling and (before is not None or self.thread is not None):
            refuse_others(before, self.thread)  # asked twice: a block may end in between
        if route is not None:
            return route.forward(self, x)
        if not active:
            return self.base(x)
        held: Any = self._modules["adapters"]  # past two `__getattr__`
        adapters, training = [held._modules[name] for name in active], self.training
        pairs, scaled = [], []
        for adapter in adapters:
            if adapter.magnitude is None:
                pairs += adapter.pairs(training)
            else:
                scaled.append(adapter)
        y = self.through(x, pairs, scaled)
        for adapter in adapters:
            if adapter.lora_bias is not None:
                bias = self.view.channels(adapter.lora_bias * adapter.scaling, y.ndim)
                y = y + bias.to(y.dtype)
        return y

    def through(
        self, x: Tensor, pairs: Sequence[Pair], scaled: Sequence[LoRAAdapter] = ()
    ) -> Tensor:
        """Return `base(x) + Σ scaling · B A D(x)`, and what adapters of DoRA (`scaled`) add."""
        dtype, autocast = _product_dtype(x)
        frozen = None if scaled else self.view.products()
        path = choose_path(self.backend, frozen, pairs, dtype, autocast, self.compute_dtype)
        self.note(path, x)
        if frozen is None or path == "general":
            return self.general(x, pairs, scaled)
        A, B, scaling = stacked(pairs)
        p = pairs[0].dropout
        x = x.to(dtype)
        if path == "triton":
            return triton_lora_linear(x, frozen, A, B, scaling, p)
        return lora_linear(x, frozen, A, B, scaling, dropout_mask(x, p) if p else None, p)

    def general(
        self, x: Tensor, pairs: Sequence[Pair], scaled: Sequence[LoRAAdapter] = ()
    ) -> Tensor:
        """Return the same by calling the base and adding to what it returns."""
        y = self.base(x)
        x, dtype = self.branch_input(x)
        out = y.to(torch.promote_types(y.dtype, dtype))
        with without_autocast(x.device.type):
            for pair in pairs:
                mask = dropout_mask(x, pair.dropout) if pair.dropout else None
                if self.view.family == "linear":
                    out = lora_add(out, x, *pair[:3], mask, pair.dropout)
                else:
                    seen = _dropped(x, mask, pair.dropout)
                    out = out + self.view.branch(seen, pair, dtype)
            for adapter in scaled:
                out = out + self.dora(y, x, adapter, dtype)
        return out.to(y.dtype)

    def dora(self, y: Tensor, x: Tensor, adapter: LoRAAdapter, dtype: torch.dtype) -> Tensor:
        """Return what a DoRA adapter adds to the base's output y.

        With S = Σ scaling · B A over its pairs: `(ratio − 1) W D(x) + ratio · S D(x)`. What a pair
        without dropout adds to x and not to D(x) is added unscaled.
        """
        pairs = adapter.pairs(self.training)
        view, p = self.view, pairs[0].dropout
        seen = _dropped(x, dropout_mask(x, p) if p else None, p)
        branches = [view.branch(seen, pair, dtype) for pair in pairs]
        plain = view.product(seen) if p else self.without_bias(y, dtype)
        ratio = view.channels(adapter.length_ratio(view.matrix()), y.ndim)
        out = rescaled(plain, functools.reduce(torch.add, branches), ratio)
        for pair, branch in zip(pairs, branches, strict=True):
            if p and not pair.dropout:
                out = out + view.branch(x, pair, dtype) - branch
        return out

    def branch_input(self, x: Tensor) -> tuple[Tensor, torch.dtype]:
        """Return x, and the dtype that the branch computes in, to which x is cast."""
        if not x.is_floating_point():
            return x, self.compute_dtype or self.view.dtype
        dtype = self.compute_dtype or _product_dtype(x)[0]
        return x.to(dtype), dtype

    def without_bias(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Take the base's bias off its output."""
        y, bias = y.to(dtype), getattr(self.base, "bias", None)
        return y if bias is None else y - self.view.channels(bias.to(dtype), y.ndim)

    def note(self, path: str, x: Tensor) -> None:
        """Note the path taken, if there is something to compute."""
        if not torch.compiler.is_compiling() and self.last_path != path and x.numel():
            self.last_path = path

    # ── copies, moves and state dicts ──

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle made within `mixed` is outside of it, since nothing would end it."""
        route = next((route for route in self.routes() if not route.ends), None)
        return {**self.__dict__, "route": route, "thread": None, "_view": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for route in self.routes():
            route.move(fn)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """Note what is merged: the weights alone don't show it."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None and self.merged:
            metadata["merged"] = list(self.merged)

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, *rest: Any
    ) -> None:
        """Take the base's weights under the plain layer's names too."""
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


def _refill(layer: LoRALayer, _: object) -> None:
    """Bring factors read from a state dict into the slot."""
    layer.refill()


def choose_path(
    backend: str,
    frozen: FrozenLinear | None,
    pairs: Sequence[Pair],
    dtype: torch.dtype,
    autocast: bool,
    compute_dtype: torch.dtype | None,
) -> str:
    """Return `"fused"` or `"triton"` where one step can own both products, else `"general"`.

    That step computes base and branch in one dtype (`dtype`: the input's, or autocast's) and with
    one mask; the general path calls the base, whatever it is, and adds to its output.
    """
    if frozen is None or compute_dtype not in (None, dtype):
        return "general"
    weight = frozen.tensors[0]
    stored = frozen.stored is not None and dtype.is_floating_point  # decoded to any floating dtype
    if not (autocast or stored or (weight is not None and weight.dtype == dtype)):
        return "general"
    if len(pairs) > 1 and any(pair.dropout for pair in pairs):
        return "general"
    return "triton" if backend == "triton" else "fused"


def _product_dtype(x: Tensor) -> tuple[torch.dtype, bool]:
    """Return the dtype that x is multiplied in, and whether autocast says so."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type), True
    return x.dtype, False


def _dropped(x: Tensor, mask: Tensor | None, p: float) -> Tensor:
    return x if mask is None else drop(x, mask, p) * (1 / (1 - p))


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Return the model's LoRA layers by dotted name, a shared one under its first name."""
    return {name: m for name, m in named_modules(model) if isinstance(m, LoRALayer)}
