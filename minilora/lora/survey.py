"""One scan of a model: its modules, parameters, adapters, trained copies, head and blocks."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

from torch import nn

from minilora.lora.adapter import LoRAAdapter
from minilora.lora.base import Base, view
from minilora.lora.config import check_adapter_name
from minilora.lora.copies import CHILD, KeptCopies, TrainedCopies
from minilora.lora.layer import LoRALayer
from minilora.lora.modes import claimed
from minilora.lora.wrappers import joined, named_parameters, unwrapped
from minilora.quantization import is_finite

_HEAD_NAMES = ("lm_head", "embed_out", "score", "classifier")


class Position(NamedTuple):
    """What holds a module or a parameter: one of the model's modules, and the name it has there."""

    owner: nn.Module
    key: str

    @property
    def value(self) -> nn.Parameter:
        """The parameter that is there now."""
        return self.owner._parameters[self.key]  # type: ignore[return-value]


class Survey:
    """One scan of a model. A verb makes it first, checks against it, then changes the model by it.

    Names are those of the plain model: without wrappers such as torch.compile's, and as if nothing
    were injected. A module that has several names is listed under the first; `parameters` has a
    tied parameter under each of its modules.

    Attributes:
        root: the model without wrappers.
        modules: all modules but the root; where a LoRA layer is, the module that it wraps.
        everything: the same with the root, as "".
        layers: the LoRA layers.
    """

    def __init__(self, model: nn.Module):
        self.model, self.root = model, unwrapped(model)
        self.everything: dict[str, Any] = {}
        self.layers: dict[str, LoRALayer] = {}
        self._holders: dict[nn.Module, list[Position]] = {}
        self._kept: dict[str, tuple[nn.Module, KeptCopies]] = {}  # and the owner of the originals
        self._scan(self.root, "", set())
        self.modules = {name: module for name, module in self.everything.items() if name}

    @classmethod
    def of(cls, model: "nn.Module | Survey") -> "Survey":
        """Return a survey of a model, or the one that was made already."""
        return model if isinstance(model, Survey) else cls(model)

    def _scan(self, module: nn.Module, name: str, seen: set[nn.Module]) -> None:
        if module in seen:
            return
        seen.add(module)
        kept = module._modules.get(CHILD)
        if isinstance(module, LoRALayer):
            self.layers[name] = module
            self._holders.setdefault(module.base, []).append(Position(module, "base"))
            module = unwrapped(module.base)
        self.everything[name] = module
        if isinstance(kept, KeptCopies):
            self._kept[name] = module, kept
        for key, held in module._modules.items():
            if held is not None and held is not kept:
                child = unwrapped(held)
                self._holders.setdefault(child, []).append(Position(module, key))
                self._scan(child, joined(name, key), seen)

    # ── what the model is made of ──

    def positions(self, module: nn.Module) -> list[Position]:
        """Return all that holds a module: one that two parents share is replaced in both.

        Where a wrapper holds it, the position is the wrapper's own: one around a single layer is
        replaced with the layer, since torch.compile's keeps calling the module it was given.
        """
        return self._holders.get(module, [])

    def replace(self, module: nn.Module, new: nn.Module) -> None:
        """Put another module in all positions of one, and let it keep what that has kept."""
        for owner, key in self.positions(module):
            owner._modules[key] = new
        if CHILD in module._modules:
            new._modules[CHILD] = module._modules.pop(CHILD)

    @cached_property
    def parameters(self) -> dict[str, Position]:
        """What holds each of the plain model's parameters."""
        return {
            joined(name, key): Position(module, key)
            for name, module in self.everything.items()
            for key, parameter in module._parameters.items()
            if parameter is not None
        }

    @cached_property
    def bases(self) -> dict[str, Base]:
        """The modules that take an adapter, as LoRA sees them."""
        found = {name: view(module) for name, module in self.modules.items()}
        return {name: base for name, base in found.items() if base is not None}

    @cached_property
    def head(self) -> str | None:
        """The output head, which "all-linear" leaves out.

        It is what `get_output_embeddings()` returns, else a Linear that shares its weight with an
        Embedding, else a root-level Linear named lm_head, embed_out, score or classifier.
        """
        getter = getattr(self.root, "get_output_embeddings", None)
        if callable(getter) and (head := getter()) is not None:
            head = head.base if isinstance(head, LoRALayer) else unwrapped(head)
            for name, module in self.modules.items():
                if module is head:
                    return name
        weights = {n: f"{n}.weight" for n in self.bases if f"{n}.weight" in self.parameters}
        own = {name: self.original(weight) for name, weight in weights.items()}
        tied = {own[name] for name in own if self.bases[name].family == "embedding"}
        linears = [name for name, base in self.bases.items() if base.family == "linear"]
        shared = (name for name in linears if name in own and own[name] in tied)
        return next(shared, next((name for name in _HEAD_NAMES if name in linears), None))

    @cached_property
    def blocks(self) -> dict[str, nn.Module]:
        """The repeated blocks: the entries of the outermost lists of modules; see `split_block`."""
        found: dict[str, Any] = {}
        for name, module in self.modules.items():
            around, _, key = name.rpartition(".")
            owner = self.everything[around]
            container = isinstance(module, (nn.ModuleList, nn.ModuleDict))
            inside = any(outer in found for outer in parents(name))
            if isinstance(owner, nn.ModuleList) and not container and not inside:
                found[name] = owner._modules[key]
        return found

    # ── adapters ──

    @property
    def adapters(self) -> list[str]:
        """The adapters' names in the order they were added."""
        return list(dict.fromkeys(name for one in self.layers.values() for name in one.adapters))

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that are active somewhere, or whose copies are in place."""
        names = {name for layer in self.layers.values() for name in layer.active}
        names.update(self.in_place)
        return tuple(name for name in self.adapters if name in names)

    @property
    def merged(self) -> tuple[str, ...]:
        """The adapters that are merged into the base."""
        return next((layer.merged for layer in self.layers.values() if layer.merged), ())

    def with_adapter(self, adapter: str) -> dict[str, LoRALayer]:
        """Return the LoRA layers that have this adapter."""
        return {name: layer for name, layer in self.layers.items() if adapter in layer.adapters}

    def factors(self, adapter: str) -> dict[str, LoRAAdapter]:
        """Return an adapter's factors by the name of the layer."""
        return {n: layer.adapters[adapter] for n, layer in self.with_adapter(adapter).items()}

    def rename(self, adapter: str, new: str) -> None:
        """Give an adapter another name; its place among the others stays."""
        for layer in self.layers.values():
            layer.active = tuple(new if name == adapter else name for name in layer.active)
        held: list[Any] = [layer.adapters for layer in self.layers.values()]
        held += [kept.by_adapter for _, kept in self._kept.values()]
        for one in held:
            renamed = {new if name == adapter else name: part for name, part in one.items()}
            one.clear()
            one.update(renamed)

    def activate(self, adapters: Sequence[str]) -> None:
        """Make exactly these adapters active and put their copies in place."""
        for layer in self.layers.values():
            layer.activate(adapters)
        self.install(adapters)

    def set_trainable(self, adapter: str, trainable: bool) -> None:
        """Set `requires_grad` of all that belongs to an adapter, and of nothing else."""
        parts: list[Any] = [*self.factors(adapter).values(), *self.copies_of(adapter).values()]
        for part in parts:
            part.requires_grad_(trainable)

    @contextmanager
    def switched(self) -> Iterator[None]:
        """After the block the adapters that were active are so again; it is for one thread."""
        with claimed(self.layers.values()):
            self.require_unmixed("a verb that switches adapters")
            before, names = {n: layer.active for n, layer in self.layers.items()}, self.active
            try:
                yield
            finally:
                for name, layer in self.layers.items():
                    layer.activate(before[name])
                self.install(names)

    # ── what a verb requires ──

    def require_layers(self, verb: str, unmerged: bool = False) -> dict[str, LoRALayer]:
        """Return the LoRA layers, or raise: a verb on a plain model would silently do nothing."""
        if not self.layers:
            raise ValueError(
                f"{verb}() needs a model with adapters, found none in {type(self.model).__name__}; "
                f"call minilora.inject or minilora.load first"
            )
        if unmerged:
            self.require_unmerged(verb)
        return self.layers

    def require_unmerged(self, verb: str) -> None:
        """Raise while adapters are merged: the verb would act beside them."""
        if self.merged:
            raise RuntimeError(
                f"{verb}() needs unmerged weights, but {', '.join(self.merged)} is merged into the "
                f"base; call minilora.unmerge(model) first"
            )

    def require_unmixed(self, verb: str) -> None:
        """Raise within `mixed`, where the rows decide and not what is active."""
        if any(route.rows for layer in self.layers.values() for route in layer.routes()):
            raise RuntimeError(
                f"{verb} must be called outside of mixed(), which gives each row of a batch its "
                f"own adapter, whatever is active and in whatever order rows come; end the block "
                f"first"
            )

    def require_values(self, verb: str) -> None:
        """Raise unless every parameter has values: none is on the meta device."""
        for name, parameter in named_parameters(self.model):
            if parameter.is_meta:
                raise ValueError(
                    f"{verb}() needs a model with weights, found {name} on the meta device; load "
                    f"the model first"
                )

    def require_finite(self) -> None:
        """Raise where an adapter in use holds NaN or Inf, which attention may swallow unseen."""
        for fqn, layer in self.layers.items():
            for adapter in layer.used:
                for part, value in layer.adapters[adapter].named_parameters():
                    if not hasattr(value, "full_tensor") and not is_finite(value):  # or a shard
                        raise ValueError(
                            f"adapter {adapter!r} must be finite, found NaN or Inf in {part} of "
                            f"{fqn}; load or train it anew"
                        )

    def require_compatible(self, adapters: Iterable[str]) -> None:
        """Raise where two adapters can't be active together: both bring a copy of a parameter."""
        owner: dict[str, str] = {}
        for adapter in adapters:
            for name in self.copies_of(adapter):
                if name in owner:
                    raise ValueError(
                        f"{owner[name]!r} and {adapter!r} each bring a trained copy of {name}; "
                        f"copies can't be summed, so activate one of them at a time"
                    )
                owner[name] = adapter

    def require_new_name(self, name: object) -> str:
        """Return a name that can be given to another adapter, else raise."""
        name = check_adapter_name(name)
        if name in self.adapters:
            raise ValueError(f"the model already has an adapter {name!r}; choose another name")
        return name

    def known(self, names: object, verb: str) -> tuple[str, ...]:
        """Return the adapters named, each one of the model's and named once, else raise."""
        wanted = (names,) if isinstance(names, str) else names
        if not isinstance(wanted, Sequence) or not all(isinstance(name, str) for name in wanted):
            raise TypeError(
                f"{verb}() takes an adapter's name, a list of names or None, found {names!r}"
            )
        present = self.adapters
        for name in wanted:
            if name not in present:
                raise ValueError(
                    f"there is no adapter {name!r}; this model has: {', '.join(present)}"
                )
        if len(set(wanted)) != len(wanted):
            raise ValueError(f"each adapter may be named once, found {list(wanted)}")
        return tuple(wanted)

    def adapter(self, name: object, verb: str) -> str:
        """Return the adapter meant: the one named, else the only one, else the only one in use."""
        if name is not None and not isinstance(name, str):
            raise TypeError(f"{verb}() takes one adapter's name, found {name!r}")
        if name is not None:
            return self.known(name, verb)[0]
        present = self.adapters
        for names in (present, self.merged or self.active):
            if len(names) == 1:
                return names[0]
        raise ValueError(
            f"several adapters are there ({', '.join(present)}); say which with adapter=..."
        )

    # ── trained copies ──

    @property
    def copies(self) -> dict[str, TrainedCopies]:
        """Every adapter's trained copies of base parameters."""
        found: dict[str, TrainedCopies] = {}
        for name, (_, kept) in self._kept.items():
            for adapter, one in kept.by_adapter.items():
                mine = found.setdefault(adapter, TrainedCopies({}, *one.asked))
                mine.by_name.update((joined(name, key), v) for key, v in one._parameters.items())
        return found

    def copies_of(self, adapter: str) -> dict[str, nn.Parameter]:
        """Return one adapter's copies by the name of the parameter."""
        return self.copies.get(adapter, TrainedCopies({})).by_name

    @property
    def originals(self) -> dict[str, nn.Parameter]:
        """The base's own parameters that have copies."""
        return {
            joined(name, key): own
            for name, (_, kept) in self._kept.items()
            for key, own in kept.originals._parameters.items()
        }

    def original(self, name: str) -> nn.Parameter:
        """Return the base's own parameter, whether or not a copy is in its place."""
        position, around = self.parameters[name], name.rpartition(".")[0]
        if around in self._kept:
            own = self._kept[around][1].originals._parameters
            return own.get(position.key, position.value)
        return position.value

    @property
    def in_place(self) -> list[str]:
        """The adapters whose copies are where the model computes with them."""
        return [
            adapter for adapter, copies in self.copies.items()
            if any(self.parameters[name].value is one for name, one in copies.by_name.items())
        ]  # fmt: skip

    def keep(self, adapter: str, copies: TrainedCopies) -> None:
        """Keep an adapter's copies beside the parameters they stand for."""
        for name, value in copies.by_name.items():
            owner, key = self.parameters[name]
            around = name.rpartition(".")[0]
            holder: Any = self.layers.get(around, owner)
            kept = holder._modules.setdefault(CHILD, KeptCopies())
            kept.add(owner, key, value, adapter, copies)
            self._kept[around] = owner, kept

    def forget(self, adapter: str) -> None:
        """Give up an adapter's copies."""
        for name, (owner, kept) in list(self._kept.items()):
            if adapter in kept.by_adapter:
                del kept.by_adapter[adapter]
            if not kept.by_adapter:
                del self.layers.get(name, owner)._modules[CHILD], self._kept[name]

    def install(self, adapters: Iterable[str]) -> None:
        """Put the copies of these adapters in their places, originals elsewhere."""
        for owner, kept in self._kept.values():
            kept.install(owner, adapters)

    @contextmanager
    def originals_in_place(self) -> Iterator[None]:
        """Within the block every parameter is the base's own, afterwards copies are back."""
        before = self.in_place
        with claimed(self.layers.values() if before else ()):
            self.install(())
            try:
                yield
            finally:
                self.install(before)


def parents(name: str) -> Iterator[str]:
    """Yield the names of the modules around a module, the innermost first; not the root."""
    while name := name.rpartition(".")[0]:
        yield name


def split_block(name: str) -> tuple[str, int | None, str]:
    """Split a dotted name at its first number: the stack of blocks, the block, what is in it."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts[:-1]) if part.isdecimal()), None)
    if at is None:
        return "", None, name
    return ".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :])
