"""Which layers take an adapter: strict selection by name, and its dry run."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from minilora.files import one_line, short
from minilora.lora.bare_parameters import bare_match, unreached
from minilora.lora.kinds import is_linear, layer_class, unsupported
from minilora.lora.layer import LoRALayer, lora_layers
from minilora.lora.patterns import Pattern, after_dots, compiled_pattern
from minilora.lora.wrappers import named_modules, unwrapped
from minilora.quantization import QuantizedLinear, packed_linear

MOST_RANK = 2**16
_HEAD_NAMES = ("lm_head", "embed_out", "score", "classifier")


@dataclass(frozen=True)
class Target:
    """One linear layer of a model, as `minilora.targets` lists it."""

    name: str
    in_features: int
    out_features: int
    r: int
    is_head: bool
    selected: bool

    @property
    def parameters(self) -> int:
        """How many parameters an adapter adds here: r · (in + out), or 0 when left out."""
        return self.r * (self.in_features + self.out_features) if self.selected else 0


class TargetList(list[Target]):
    """A list of `Target` that prints as a table.

    Attributes:
        counts: how many layers each entry of a list of targets chose.
        unreached: the share of the model's parameters that no adapter can reach: of matrices and
            larger ones that are no layer's weight, such as stacked experts.
    """

    def __init__(
        self,
        rows: Iterable[Target] = (),
        counts: Mapping[str, int] | None = None,
        unreached: tuple[float, str] = (0.0, ""),
    ):
        super().__init__(rows)
        self.counts = dict(counts or {})
        self.unreached, self._note = unreached

    def __str__(self) -> str:
        width = max([len(t.name) for t in self] + [6])
        lines = [f"{'module':<{width}}  {'[out, in]':>15}  {'r':>4}  {'parameters':>11}"]
        for t in self:
            shape = f"[{t.out_features}, {t.in_features}]"
            note = "  head" if t.is_head else ""
            r = str(t.r) if t.selected else "-"
            note += "" if t.selected else "  (left out)"
            lines.append(f"{t.name:<{width}}  {shape:>15}  {r:>4}  {t.parameters:>11,}{note}")
        chosen = [t for t in self if t.selected]
        total = sum(t.parameters for t in chosen)
        counts = ", ".join(f"{entry} {count}" for entry, count in self.counts.items())
        lines.append(
            f"{len(chosen)} of {len(self)} linear layers{f' ({counts})' if counts else ''}, "
            f"{total:,} adapter parameters"
        )
        lines += [self._note] if self._note else []
        return "\n".join(lines)


def plain_modules(model: nn.Module) -> dict[str, Any]:
    """Return every module by dotted name as if nothing were injected (what LoRA wraps is shown)."""
    inside = tuple(f"{name}." for name in lora_layers(model))
    return {
        name: module.base if isinstance(module, LoRALayer) else module
        for name, module in named_modules(model)
        if name and not (inside and name.startswith(inside))
    }


def parameter_places(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return which module holds each of the plain model's parameters, and as what, by name."""
    return {
        f"{name}.{key}" if name else key: (module, key)
        for name, module in {"": unwrapped(model), **plain_modules(model)}.items()
        for key, parameter in module._parameters.items()
        if parameter is not None
    }


def find_head(model: nn.Module) -> str | None:
    """Return the dotted name of the output head, which "all-linear" leaves out.

    It is what `get_output_embeddings()` returns, else a Linear that shares its weight with an
    Embedding, else a root-level Linear named lm_head, embed_out, score or classifier.
    """
    modules = plain_modules(model)
    model = unwrapped(model)
    getter = getattr(model, "get_output_embeddings", None)
    if callable(getter):
        head = getter()
        head = head.base if isinstance(head, LoRALayer) else head
        for name, module in modules.items():
            if head is not None and module is head:
                return name
    tied = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    for name, module in modules.items():
        if is_linear(module) and id(module._parameters.get("weight")) in tied:
            return name
    return next((n for n in _HEAD_NAMES if is_linear(modules.get(n, model))), None)


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Return [N, K] of the matrix an adapter adds to; a kernel counts as `[out, in·kh·kw]`."""
    kind = layer_class(module)
    if kind is None:
        raise TypeError(f"no adapter goes on a {type(module).__name__}")
    if isinstance(module, (QuantizedLinear, nn.Linear)):
        return module.out_features, module.in_features
    N, K = kind(module).weight_matrix().shape
    return N, K


def _entry_matches(entry: str, name: str) -> bool:
    return name == entry or name.endswith("." + entry)


def _nearest(entry: str, names: Iterable[str]) -> str:
    """Name what the user may have meant: whole names and their endings, by spelling."""
    pool: set[str] = set()
    for name in names:
        parts = name.split(".")
        pool.update(".".join(parts[i:]) for i in range(len(parts)))
    found = difflib.get_close_matches(entry, sorted(pool), n=3, cutoff=0.5)
    last = sorted({name.rpartition(".")[2] for name in names})[:12]
    return (
        f"did you mean {', '.join(found)}?" if found else f"the linears end in: {', '.join(last)}"
    )


def _string_list(value: object, what: str) -> list[str]:
    if isinstance(value, Iterable) and not isinstance(value, (str, Mapping)):
        entries = list(value)
        if all(isinstance(entry, str) and entry for entry in entries):
            return entries
    raise TypeError(
        f"{what} must be a list of module names or a regex string, found {short(value)}"
    )


def _select(modules: dict[str, Any], spec: object, what: str, model: nn.Module) -> dict[str, Any]:
    """Resolve "all-linear", a regex or a list of entries; every entry has to match a layer."""
    # Another library's packed linears are selected too, to be refused by name unless excluded.
    packed = {name for name, m in modules.items() if packed_linear(m)}
    linears = {name: m for name, m in modules.items() if is_linear(m) or name in packed}
    if spec == "all-linear":
        head = find_head(model)
        found = {name: m for name, m in linears.items() if name != head}
        if not found:
            raise ValueError(
                f"targets='all-linear' must find a linear layer besides the head, found none in "
                f"{type(model).__name__}"
            )
        return found
    layers = {n: m for n, m in modules.items() if layer_class(m) is not None or n in packed}
    if isinstance(spec, str):
        pattern = compiled_pattern(spec, what)
        found = {name: m for name, m in layers.items() if pattern.fullmatch(name)}
        if not found:
            meant = bare_match(pattern.fullmatch, modules)
            if meant is not None:
                raise ValueError(f"{what}={short(spec)} must match layers, but {meant}")
            hint = _nearest(spec, linears)
            if spec.isidentifier():
                hint = f"for module names pass a list: {what}=[{short(spec)}]"
            raise ValueError(
                f"{what}={short(spec)} is a regex over whole dotted names and must match a linear, "
                f"embedding or convolution, found no match; {hint}"
            )
        return found
    entries = _string_list(spec, what)
    if not entries and what == "targets":
        raise ValueError("targets must name at least one layer, found an empty list")
    found = {}
    for entry in entries:
        hits = {name: m for name, m in modules.items() if _entry_matches(entry, name)}
        hit_layers = any(name in layers for name in hits)
        meant = None if hit_layers else bare_match(partial(_entry_matches, entry), modules)
        if meant is not None and what == "targets":
            raise ValueError(f"targets must name layers, but {entry!r} {meant}")
        if not hits:
            raise ValueError(
                f"every entry of {what} must match a module, {short(entry)} matches none; "
                f"{_nearest(entry, linears)}"
            )
        wrong = next((name for name in hits if name not in layers), None)
        if wrong is not None and what == "targets":
            kind = type(hits[wrong]).__name__
            raise ValueError(
                f"targets must name linear layers, embeddings or 2-D convolutions, {short(entry)} "
                f"matches {wrong}, a {kind}; {_nearest(entry, linears)}"
            )
        found.update(hits)
    return {name: m for name, m in modules.items() if name in found}


def _refuse_attention_children(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    parents = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    read = {id(child) for parent in parents for child in parent.children()}
    for name, module in chosen.items():
        if id(module) in read:
            raise ValueError(
                f"{name} can't take LoRA: nn.MultiheadAttention reads {name}.weight itself and "
                f"never calls the module, so an adapter there would do nothing; leave it out with "
                f"exclude=[{name!r}]"
            )


def select_targets(
    model: nn.Module,
    targets: object = "all-linear",
    exclude: object = (),
    layers: Iterable[int] | None = None,
    layers_pattern: Iterable[str] | str | None = None,
) -> list[str]:
    """Resolve `targets` minus `exclude`, in blocks `layers`, to dotted names in module order."""
    modules = plain_modules(model)
    model = unwrapped(model)
    if layer_class(model) is not None or isinstance(model, LoRALayer):
        raise ValueError(
            "the model itself is a single layer and has no parent to hold the wrapped one; put it "
            "into an nn.Sequential"
        )
    chosen = _select(modules, targets, "targets", model)
    if layers is not None:
        chosen = _in_layers(chosen, layers, layers_pattern, targets)
    if not isinstance(exclude, str) and exclude not in (None, ()):
        exclude = _string_list(exclude, "exclude")
    if exclude:
        dropped = _select(modules, exclude, "exclude", model)
        chosen = {
            name: m
            for name, m in chosen.items()
            if not any(name == d or name.startswith(d + ".") for d in dropped)
        }
        if not chosen:
            raise ValueError(
                f"exclude={short(exclude)} leaves no layer of targets={short(targets)}"
            )
    _refuse_attention_children(model, chosen)
    for name, module in chosen.items():
        reason = unsupported(module)
        if reason is not None:
            raise ValueError(f"{name} {reason}")
    return list(chosen)


def _in_layers(
    chosen: dict[str, Any], layers: object, pattern: Iterable[str] | str | None, targets: object
) -> dict[str, Any]:
    """Keep what lies in the blocks with these numbers: a name's first, or where `pattern` says."""
    given = [layers] if isinstance(layers, int) else layers
    wanted: list[Any] = list(given) if isinstance(given, Iterable) else [None]
    if not all(type(i) is int for i in wanted):
        raise TypeError(
            f"layers must be block numbers, a list of whole numbers, found {short(layers)}"
        )
    patterns = [pattern] if isinstance(pattern, str) else list(pattern or ())
    kept, there = {}, set()
    for name, module in chosen.items():
        number = _block_number(name, patterns)
        if number is not None:
            there.add(number)
            if number in wanted:
                kept[name] = module
    missing = sorted(set(wanted) - there)
    if missing or not wanted:
        numbers = one_line(", ".join(map(str, sorted(there))), 200) or "no numbered blocks"
        raise ValueError(
            f"layers must name blocks that hold targets={short(targets)}, found "
            f"{short(missing) if missing else 'none'}; there are: {numbers}"
        )
    return kept


def _block_number(name: str, patterns: list[str]) -> int | None:
    """Return the number of a name's block: the first in it, or the last that `patterns` precede."""
    parts = name.split(".")
    numbered = [i for i, part in enumerate(parts[:-1]) if part.isdecimal()]
    if not patterns:
        return int(parts[numbered[0]]) if numbered else None
    for pattern in patterns:
        rule = compiled_pattern(pattern, "layers_pattern")
        for i in reversed(numbered):
            before = ".".join(parts[:i])
            if rule.fullmatch(before, after_dots(before)):
                return int(parts[i])
    return None


def compile_ending(pattern: str, what: str) -> Pattern:
    """Compile a pattern whose `ends` is PEFT's rule for the keys of rank_pattern."""
    if not isinstance(pattern, str):
        raise TypeError(f"{what} must have regex strings as keys, found {short(pattern)}")
    return compiled_pattern(pattern, what)


def pattern_value(name: str, patterns: Mapping[str, float] | None, default: float) -> float:
    """Return the value of the first pattern that ends `name`; see `compile_ending`."""
    for pattern, value in (patterns or {}).items():
        if compile_ending(pattern, "a pattern").ends(name):
            return value
    return default


def check_patterns(patterns: Mapping[str, float] | None, names: list[str], what: str) -> None:
    """Raise unless every pattern is a regex that matches one of the names."""
    if not isinstance(patterns, (Mapping, type(None))):
        raise TypeError(f"{what} must be a mapping of regex: number, found {short(patterns)}")
    for pattern in patterns or {}:
        compiled = compile_ending(pattern, what)
        if not any(compiled.ends(name) for name in names):
            raise ValueError(
                f"every key of {what} must match a target, {short(pattern)} matches none; "
                f"{_nearest(pattern, names)}"
            )


def check_rank(r: object, what: str = "r") -> int:
    """Return r if it is a whole number from 1 to `MOST_RANK`, else raise."""
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"{what} must be a whole number of at least 1, found {short(r)}")
    if r > MOST_RANK:
        raise ValueError(f"{what} must be at most {MOST_RANK:,}, found {short(r)}")
    return r


def targets(
    model: nn.Module,
    targets: object = "all-linear",
    *,
    exclude: object = (),
    layers: Iterable[int] | None = None,
    r: int = 8,
    rank_pattern: Mapping[str, int] | None = None,
) -> TargetList:
    """List every linear layer, other targets too, and what `inject` would do to each.

    Args:
        model: any module; not changed.
        targets: as for `inject`.
        exclude: as for `inject`.
        layers: as for `inject`.
        r: as for `inject`.
        rank_pattern: as for `inject`.

    Returns:
        A list of `Target` (name, shape, r, parameters, head marked) that prints as a table.

    Raises:
        ValueError: what `inject` would refuse.
    """
    if not isinstance(targets, str):
        targets = _string_list(targets, "targets")
    chosen = set(select_targets(model, targets, exclude, layers))
    check_rank(r)
    check_patterns(rank_pattern, list(chosen), "rank_pattern")
    head = find_head(model)
    rows = (
        Target(
            name,
            *matrix_shape(module)[::-1],
            check_rank(pattern_value(name, rank_pattern, r), "rank_pattern"),
            name == head,
            name in chosen,
        )
        for name, module in plain_modules(model).items()
        if is_linear(module) or name in chosen
    )
    counts = {
        entry: sum(_entry_matches(entry, name) for name in chosen)
        for entry in (() if isinstance(targets, str) else targets)
    }
    return TargetList(rows, counts, unreached({"": model, **plain_modules(model)}))
