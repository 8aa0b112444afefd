"""The frequencies of rotary embeddings: the plain ones, and those of each `rope_type`.

    f_i = theta^(−2i/dim), or what a `Scaling` makes of it, for the pairs i < dim/2 of a head

Formulas, keys and defaults are those of transformers' `modeling_rope_utils.py`, in f32 as there.
"""

import math
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, NamedTuple, get_args

import torch
from torch import Tensor

from minilora.files import is_number, one_line, short
from minilora.models.not_built import NotBuiltError

LONGEST = 2**30  # of original_max_position_embeddings


class Rope(NamedTuple):
    """How queries and keys of a layer are rotated.

    Attributes:
        dim: numbers at the head's beginning that are rotated, even; the rest stays.
        theta: base of the frequencies.
        scaling: how frequencies differ from the plain ones, None where they do not.
        context: max_position_embeddings, which some scalings refer to.
    """

    dim: int
    theta: float
    scaling: "Scaling | None" = None
    context: int = 0


def frequencies(rope: Rope, lengths: Tensor) -> Tensor:
    """Return f `[dim/2]` in f32, or by the lengths of tokens' documents `[…, T, dim/2]`."""
    steps = torch.arange(0, rope.dim, 2, dtype=torch.float32, device=lengths.device)
    if rope.scaling is None:
        return 1.0 / (rope.theta ** (steps / rope.dim))
    return rope.scaling.frequencies(rope, steps / rope.dim, lengths)


@dataclass(frozen=True)
class Scaling:
    """Other frequencies than the plain ones; a subclass is a `rope_type`, its fields are the keys.

    Attributes:
        rope_type: the name in config.json.
        by_length: whether frequencies depend on the length of the document a token is in.
    """

    rope_type: ClassVar[str]
    by_length: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for each in fields(self):
            name, value = each.name, getattr(self, each.name)
            if value is None and type(None) in get_args(each.type):
                continue
            wanted, fits = _RULES.get(name, _POSITIVE)
            if not fits(value):
                raise ValueError(
                    f"{name} of the {self.rope_type} rotary embedding must be {wanted}, found "
                    f"{short(value)}; correct config.json"
                )

    def check(self, rope: Rope) -> None:
        """Raise where the scaling does not fit a rope."""

    def frequencies(self, rope: Rope, exponents: Tensor, lengths: Tensor) -> Tensor:
        """Return f `[dim/2]`, or `[…, T, dim/2]` by length; `exponents` are 2i/dim in f32."""
        raise NotImplementedError

    def amplitude(self, rope: Rope) -> float:
        """Return what cosines and sines are multiplied by."""
        return 1.0

    def entries(self) -> dict[str, Any]:
        """Return the keys and values for config.json."""
        pairs = ((each.name, getattr(self, each.name)) for each in fields(self))
        kept = {k: list(v) if isinstance(v, tuple) else v for k, v in pairs if v is not None}
        return {"rope_type": self.rope_type, **kept}


def _are_factors(value: Any) -> bool:
    return isinstance(value, tuple) and all(is_number(v) and v > 0 for v in value)


_POSITIVE = ("a number above 0", lambda value: is_number(value) and value > 0)
_FACTORS = ("a list of numbers above 0", _are_factors)
_RULES: dict[str, Any] = {
    "factor": ("a number of at least 1", lambda value: is_number(value) and value >= 1),
    "original_max_position_embeddings": (
        "an integer above 1",
        lambda value: type(value) is int and 1 < value <= LONGEST,
    ),
    "mscale": ("a number", is_number),
    "mscale_all_dim": ("a number", is_number),
    "truncate": ("true or false", lambda value: isinstance(value, bool)),
    "short_factor": _FACTORS,
    "long_factor": _FACTORS,
}


@dataclass(frozen=True)
class Linear(Scaling):
    """f / factor: positions lie closer together (Chen et al. 2023, arXiv:2306.15595)."""

    rope_type = "linear"
    factor: float

    def frequencies(self, rope: Rope, exponents: Tensor, lengths: Tensor) -> Tensor:
        """Return f `[dim/2]`."""
        return 1.0 / (rope.theta**exponents) / self.factor


@dataclass(frozen=True)
class Dynamic(Scaling):
    """A theta that grows with the length L beyond the context C ("NTK-aware", YaRN's appendix B.1).

    theta · (factor · L / C − (factor − 1))^(dim / (dim − 2)) where L > C.
    """

    rope_type = "dynamic"
    by_length = True
    factor: float

    def check(self, rope: Rope) -> None:
        """Raise unless the power below is defined."""
        if rope.dim < 4:
            raise ValueError(
                f"head_dim must be at least 4 for the dynamic rotary embedding, found {rope.dim} "
                f"rotated numbers; correct config.json"
            )

    def frequencies(self, rope: Rope, exponents: Tensor, lengths: Tensor) -> Tensor:
        """Return f `[…, T, dim/2]`."""
        stretched = self.factor * lengths.clamp(min=rope.context) / rope.context
        power = rope.dim / (rope.dim - 2)
        theta = rope.theta * (stretched - (self.factor - 1)) ** power
        return 1.0 / (theta[..., None] ** exponents)


@dataclass(frozen=True)
class Llama3(Scaling):
    """f / factor for long waves, f for short ones, and a mean of both between.

    Waves are long that turn less than `low_freq_factor` times in the original context, and short
    from `high_freq_factor` times on (Grattafiori et al. 2024, "The Llama 3 Herd of Models").
    """

    rope_type = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"high_freq_factor of the llama3 rotary embedding must be above low_freq_factor, "
                f"found {self.high_freq_factor} and {self.low_freq_factor}; correct config.json"
            )

    def frequencies(self, rope: Rope, exponents: Tensor, lengths: Tensor) -> Tensor:
        """Return f `[dim/2]`."""
        plain = 1.0 / (rope.theta**exponents)
        turns = self.original_max_position_embeddings / (2 * math.pi / plain)
        low, high = self.low_freq_factor, self.high_freq_factor
        share = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - share) * plain / self.factor + share * plain


@dataclass(frozen=True)
class Yarn(Scaling):
    """f / factor for pairs that turn little in the original context, f for those that turn often.

    Between `beta_slow` and `beta_fast` turns the share of f grows with the pair's number, and
    cosines and sines are stretched (Peng et al. 2023, "YaRN", arXiv:2309.00071, sections 3.2-3.4).
    """

    rope_type = "yarn"
    original_max_position_embeddings: int
    factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def check(self, rope: Rope) -> None:
        """Raise unless the logarithm of theta can be divided by."""
        if rope.theta <= 1:
            raise ValueError(
                f"rope_theta must be above 1 for the yarn rotary embedding, found {rope.theta}; "
                f"correct config.json"
            )

    def stretch(self, rope: Rope) -> float:
        """Return `factor`, or what it is by default."""
        return self.factor or rope.context / self.original_max_position_embeddings

    def frequencies(self, rope: Rope, exponents: Tensor, lengths: Tensor) -> Tensor:
        """Return f `[dim/2]`."""

        def pair(turns: float) -> float:
            """The number of a pair that turns that often, times two."""
            wave = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return rope.dim * math.log(wave) / (2 * math.log(rope.theta))

        low, high = pair(self.beta_fast or 32), pair(self.beta_slow or 1)
        if self.truncate is not False:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rope.dim - 1)
        if low == high:
            high += 0.001
        numbers = torch.arange(rope.dim // 2, dtype=torch.float32, device=exponents.device)
        share = ((numbers - low) / (high - low)).clamp(0, 1)
        powers = rope.theta**exponents
        return 1.0 / (self.stretch(rope) * powers) * share + 1.0 / powers * (1 - share)

    def amplitude(self, rope: Rope) -> float:
        """Return `attention_factor`, or what the paper derives from `factor`."""
        if self.attention_factor is not None:
            return self.attention_factor
        log = math.log(max(1.0, self.stretch(rope)))
        if self.mscale and self.mscale_all_dim:
            return (0.1 * self.mscale * log + 1) / (0.1 * self.mscale_all_dim * log + 1)
        return 0.1 * log + 1


@dataclass(frozen=True)
class LongRope(Scaling):
    """f_i / short_factor_i, or f_i / long_factor_i in documents beyond the original context.

    Cosines and sines are stretched (Ding et al. 2024, "LongRoPE", arXiv:2402.13753).
    """

    rope_type = "longrope"
    by_length = True
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    factor: float | None = None
    attention_factor: float | None = None

    def check(self, rope: Rope) -> None:
        """Raise unless there is a factor for each pair."""
        sizes = {len(self.short_factor), len(self.long_factor)}
        if sizes != {rope.dim // 2}:
            raise ValueError(
                f"short_factor and long_factor must have {rope.dim // 2} numbers, one for each "
                f"rotated pair, found {len(self.short_factor)} and {len(self.long_factor)}; "
                f"correct config.json"
            )

    def frequencies(self, rope: Rope, exponents: Tensor, lengths: Tensor) -> Tensor:
        """Return f `[…, T, dim/2]`."""
        powers, device = rope.theta**exponents, exponents.device
        short_ones, long_ones = (
            1.0 / (torch.tensor(factors, dtype=torch.float32, device=device) * powers)
            for factors in (self.short_factor, self.long_factor)
        )
        is_long = lengths > self.original_max_position_embeddings
        return torch.where(is_long[..., None], long_ones, short_ones)

    def amplitude(self, rope: Rope) -> float:
        """Return `attention_factor`, or sqrt(1 + ln factor / ln original)."""
        if self.attention_factor is not None:
            return self.attention_factor
        original = self.original_max_position_embeddings
        factor = self.factor or rope.context / original
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


SCALINGS: dict[str, type[Scaling]] = {
    each.rope_type: each for each in (Linear, Dynamic, Llama3, Yarn, LongRope)
}
# Keys beside a scaling's own: the original context may stand beside a type that needs none.
_OTHER_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"} | {
    "original_max_position_embeddings"
}


def read_rope(
    entries: dict[str, Any], context: int, types: dict[str, type[Scaling]]
) -> dict[str, Any]:
    """Return `rope_scaling`, and where given `rope_theta` and `partial_rotary_factor`.

    In a config.json of transformers 5 `rope_parameters` hold all; that of transformers 4 has the
    three beside each other. `context` is max_position_embeddings, `types` are the family's.
    """
    found = dict.fromkeys(("rope_theta", "partial_rotary_factor"))
    scalings = []
    for where in ("rope_parameters", "rope_scaling"):
        rope = entries.get(where)
        if rope is None or rope == {}:
            continue
        if not isinstance(rope, dict):
            raise ValueError(f"{where} must be an object or null, found {short(rope)}")
        rope = {"original_max_position_embeddings": context} | rope
        original = entries.get("original_max_position_embeddings")
        if original is not None:  # which comes first in transformers
            rope["original_max_position_embeddings"] = original
        scalings.append(_read_scaling(rope, where, types))
        found = {key: rope.get(key) if found[key] is None else found[key] for key in found}
    if len(set(scalings)) > 1:
        raise ValueError(
            "rope_parameters and rope_scaling must describe one rotary embedding, found two; "
            "remove one of them from config.json"
        )
    found = {key: entries.get(key) if value is None else value for key, value in found.items()}
    given = {key: value for key, value in found.items() if value is not None}
    return {"rope_scaling": scalings[0] if scalings else None, **given}


def _read_scaling(
    rope: dict[str, Any], where: str, types: dict[str, type[Scaling]]
) -> Scaling | None:
    given = {key: value for key, value in rope.items() if value is not None}
    names = [given.get(key) for key in ("rope_type", "type") if key in given] or ["default"]
    name = names[0]
    if name != names[-1] or not isinstance(name, str):
        raise ValueError(f"{where} must name one rope_type, found {short(names)}")
    if name != "default" and name not in types:
        raise NotBuiltError(
            f"{where}: rope_type={short(name)} is not built, only default, {', '.join(types)}; "
            f"use a model with one of them"
        )
    own = () if name == "default" else fields(types[name])
    known = {each.name for each in own} | _OTHER_KEYS
    for key, value in given.items():
        if key not in known:
            raise NotBuiltError(
                f"{where}: {one_line(key, 80)}={short(value)} is not built for the rope_type "
                f"{name!r}; use a model without it"
            )
    if name == "default":
        return None
    values = {each.name: given[each.name] for each in own if each.name in given}
    if missing := [f.name for f in own if f.default is MISSING and f.name not in values]:
        raise ValueError(
            f"{where} must give {', '.join(missing)} for the rope_type {name!r}, found none; "
            f"correct config.json"
        )
    return types[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
