"""Which layers take an adapter: strict selection by name, and its dry run."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from minilora.files import one_line, short
from minilora.lora.base import view
from minilora.lora.config import AdapterConfig, one_word
from minilora.lora.layer import LoRALayer
from minilora.lora.patterns import after_dots, compiled_pattern, nearest
from minilora.lora.survey import Survey, parents, split_block
from minilora.quantization import packed_linear

_WORTH_A_LINE, WORTH_A_WARNING = 0.01, 0.1  # shares of a model's parameters
# Linears that PEFT 0.21, in a model with stacked experts, takes for the experts' own.
_LIKE_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj")


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


def _ends(name: str, entry: str) -> bool:
    return f".{name}".endswith(f".{entry}")


def string_list(value: object, what: str) -> list[str]:
    """Return the names in a list of them, else raise."""
    if isinstance(value, Iterable) and not isinstance(value, (str, Mapping)):
        entries = list(value)
        if all(isinstance(entry, str) and entry for entry in entries):
            return entries
    raise TypeError(
        f"{what} must be a list of module names or a regex string, found {short(value)}"
    )


class _Selection:
    """What `targets` or `exclude` (`what`) may choose from, and what it does choose."""

    def __init__(self, survey: Survey, what: str):
        self.survey, self.what = survey, what
        # Another library's packed linears are selected too, to be refused by name unless excluded.
        linears = {name for name, base in survey.bases.items() if base.family == "linear"}
        modules = survey.modules.items()
        self.linears = [name for name, m in modules if name in linears or packed_linear(m)]
        self.layers = {*survey.bases, *self.linears}

    def of(self, spec: object) -> list[str]:
        """Resolve "all-linear", a regex or a list of entries; every entry has to match a layer."""
        if spec == "all-linear":
            found = [name for name in self.linears if name != self.survey.head]
            if not found:
                raise ValueError(
                    f"targets='all-linear' must find a linear layer besides the head, found none "
                    f"in {type(self.survey.root).__name__}"
                )
            return found
        if isinstance(spec, str):
            return self.by_regex(spec)
        entries = string_list(spec, self.what)
        if not entries and self.what == "targets":
            raise ValueError("targets must name at least one layer, found an empty list")
        chosen = {name for entry in entries for name in self.by_entry(entry)}
        return [name for name in self.survey.modules if name in chosen]

    def by_regex(self, spec: str) -> list[str]:
        pattern = compiled_pattern(spec, self.what)
        found = [n for n in self.survey.modules if n in self.layers and pattern.fullmatch(n)]
        if found:
            return found
        meant = bare_match(pattern.fullmatch, self.survey)
        if meant is not None:
            raise ValueError(f"{self.what}={short(spec)} must match layers, but {meant}")
        hint = nearest(spec, self.linears)
        if spec.isidentifier():
            hint = f"for module names pass a list: {self.what}=[{short(spec)}]"
        raise ValueError(
            f"{self.what}={short(spec)} is a regex over whole dotted names and must match a "
            f"linear, embedding or convolution, found no match; {hint}"
        )

    def by_entry(self, entry: str) -> list[str]:
        found = [name for name in self.survey.modules if _ends(name, entry)]
        if self.what == "targets" and self.layers.isdisjoint(found):
            meant = bare_match(partial(_ends, entry=entry), self.survey)
            if meant is not None:
                raise ValueError(f"targets must name layers, but {entry!r} {meant}")
        if not found:
            raise ValueError(
                f"every entry of {self.what} must match a module, {short(entry)} matches none; "
                f"{nearest(entry, self.linears)}"
            )
        wrong = next((name for name in found if name not in self.layers), None)
        if wrong is not None and self.what == "targets":
            raise ValueError(
                f"targets must name linear layers, embeddings or 2-D convolutions, {short(entry)} "
                f"matches {wrong}, a {type(self.survey.modules[wrong]).__name__}; "
                f"{nearest(entry, self.linears)}"
            )
        return found


def select_targets(
    model: nn.Module | Survey,
    targets: object = "all-linear",
    exclude: object = (),
    layers: Iterable[int] | None = None,
    layers_pattern: Iterable[str] | str | None = None,
) -> list[str]:
    """Resolve `targets` minus `exclude`, in blocks `layers`, to dotted names in module order."""
    survey = Survey.of(model)
    if view(survey.root) is not None or isinstance(survey.root, LoRALayer):
        raise ValueError(
            "the model itself is a single layer and has no parent to hold the wrapped one; put it "
            "into an nn.Sequential"
        )
    targets = one_word(targets)
    chosen = _Selection(survey, "targets").of(targets)
    if layers is not None:
        chosen = _in_layers(chosen, layers, layers_pattern, targets)
    exclude = one_word(exclude)
    if not isinstance(exclude, str) and exclude not in (None, ()):
        exclude = string_list(exclude, "exclude")
    if exclude:
        dropped = set(_Selection(survey, "exclude").of(exclude))
        chosen = [name for name in chosen if dropped.isdisjoint((name, *parents(name)))]
        if not chosen:
            raise ValueError(
                f"exclude={short(exclude)} leaves no layer of targets={short(targets)}"
            )
    modules = survey.modules
    attention = [m for m in modules.values() if isinstance(m, nn.MultiheadAttention)]
    read = {child for parent in attention for child in parent.children()}
    for name in chosen:
        if modules[name] in read:
            raise ValueError(
                f"{name} can't take LoRA: nn.MultiheadAttention reads {name}.weight itself and "
                f"never calls the module, so an adapter there would do nothing; leave it out with "
                f"exclude=[{name!r}]"
            )
        base = survey.bases.get(name)
        reason = packed_linear(modules[name]) if base is None else base.problem()
        if reason is not None:
            raise ValueError(f"{name} {reason}")
    return chosen


def _in_layers(
    chosen: list[str], layers: object, pattern: Iterable[str] | str | None, targets: object
) -> list[str]:
    """Keep what lies in the blocks with these numbers: a name's first, or where `pattern` says."""
    given = [layers] if isinstance(layers, int) else layers
    wanted: list[Any] = list(given) if isinstance(given, Iterable) else [None]
    if not all(type(i) is int for i in wanted):
        raise TypeError(
            f"layers must be block numbers, a list of whole numbers, found {short(layers)}"
        )
    patterns = [pattern] if isinstance(pattern, str) else list(pattern or ())
    numbers = {name: _block_number(name, patterns) for name in chosen}
    there = {number for number in numbers.values() if number is not None}
    missing = sorted(set(wanted) - there)
    if missing or not wanted:
        known = one_line(", ".join(map(str, sorted(there))), 200) or "no numbered blocks"
        raise ValueError(
            f"layers must name blocks that hold targets={short(targets)}, found "
            f"{short(missing) if missing else 'none'}; there are: {known}"
        )
    return [name for name in chosen if numbers[name] in wanted]


def _block_number(name: str, patterns: list[str]) -> int | None:
    """Return the number of a name's block: the first in it, or the first behind a pattern."""
    if not patterns:
        return split_block(name)[1]
    for pattern in patterns:
        rule = compiled_pattern(pattern, "layers_pattern")
        for outer in reversed(list(parents(name))):
            before, _, number = outer.rpartition(".")
            if number.isdecimal() and rule.fullmatch(before, after_dots(before)):
                return int(number)
    return None


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
        targets: as for `inject`, like the options that follow.
        exclude, layers, r, rank_pattern: see there.

    Returns:
        A list of `Target` (name, shape, r, parameters, head marked) that prints as a table.

    Raises:
        ValueError: what `inject` would refuse.
    """
    targets = one_word(targets)
    if not isinstance(targets, str):
        targets = string_list(targets, "targets")
    survey = Survey(model)
    chosen = select_targets(survey, targets, exclude, layers)
    config = AdapterConfig(r=r, rank_pattern=rank_pattern)
    config.check_patterns(chosen)
    ranks = {name: config.factor_options(name)["r"] for name in chosen}
    rows = (
        Target(name, *base.shape[::-1], ranks.get(name, r), name == survey.head, name in ranks)
        for name, base in survey.bases.items()
        if name in ranks or base.family == "linear"
    )
    entries = () if isinstance(targets, str) else targets
    counts = {entry: sum(_ends(name, entry) for name in chosen) for entry in entries}
    return TargetList(rows, counts, unreached(survey))


# ── parameters that are no layer's weight, such as stacked experts: no adapter goes on those ──


def bare_parameters(survey: Survey) -> dict[str, nn.Parameter]:
    """Return the parameters of 2 or more dimensions that no adapter can reach, by dotted name."""
    takes = {base.module for base in survey.bases.values() if base.problem() is None}
    reached = {p for module in takes for p in module._parameters.values()}
    every = {name: position.value for name, position in survey.parameters.items()}
    return {n: p for n, p in every.items() if not (p in reached or is_lazy(p) or p.ndim < 2)}


def weight_count(module: Any) -> int:
    """Return the number of a module's own weights, as many as a packed one stands for."""
    own = {n: p for n, p in module._parameters.items() if not (p is None or is_lazy(p))}
    base = view(module)
    if base is None or not (base.is_quantized or base.packed):
        return sum(p.numel() for p in own.values())
    bias = 0 if module.bias is None else module.bias.numel()
    return module.in_features * module.out_features + bias


def unreached(survey: Survey) -> tuple[float, str]:
    """Return which share of the weights no adapter can reach, and a sentence ("" below 1 %)."""
    bare = bare_parameters(survey)
    count = sum(p.numel() for p in set(bare.values()))
    owners = {owner._parameters[key]: owner for owner, key in survey.parameters.values()}
    total = sum(map(weight_count, set(owners.values())))
    share = count / max(1, total)
    if share < _WORTH_A_LINE:
        return share, ""
    name, largest = max(bare.items(), key=lambda item: item[1].numel())
    return share, (
        f"no adapter reaches {share:.0%} of the parameters: {len(bare)} are the weight of no "
        f"linear, embedding or 2-D convolution (largest: {name}, {list(largest.shape)})"
    )


def bare_match(matches: Callable[[str], object], survey: Survey) -> str | None:
    """Say so where a pattern means such parameters, or a module that holds them; else None.

    A layer of torch's that takes no adapter (Conv1d and the like) is no such module.
    """
    bare, hits = bare_parameters(survey), []
    for name in bare:
        owner = survey.parameters[name].owner
        of_torch = type(owner).__module__.startswith("torch.nn.")
        if matches(name) or (matches(name.rpartition(".")[0]) and not of_torch):
            hits.append((name, type(owner).__name__))
    if not hits:
        return None
    name, owner_type = hits[0]
    return (
        f"means {len(hits)} parameters that are no layer's weight (first: {name}, "
        f"{list(bare[name].shape)}, of a {owner_type}), and adapters go on layers only; leave it "
        f"out, or train a whole copy of the module with modules_to_save"
    )


def taken_for_experts(survey: Survey, names: list[str]) -> list[str]:
    """Return which of these layers PEFT 0.21 would look for among the model's stacked experts.

    When it loads an adapter for a model of transformers whose experts became one parameter,
    `target_modules` of these names are taken for the experts (huggingface/peft,
    `utils/transformers_weight_conversion.py`), and what lies elsewhere under such a name (shared
    experts, dense blocks) is dropped.
    """
    stacked = any(n.endswith(".experts.gate_up_proj") for n in bare_parameters(survey))
    if not stacked or not hasattr(getattr(survey.root, "config", None), "model_type"):
        return []
    return [name for name in names if name.rpartition(".")[2] in _LIKE_EXPERTS]
