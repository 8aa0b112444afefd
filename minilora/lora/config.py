"""What an adapter is asked to be: one frozen dataclass, checked in one place.

An option that an adapter's factors follow from is an argument of `LoRAAdapter` of the same name.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import nn

from minilora.files import check_options, described, option, short
from minilora.lora.adapter import FROM_WEIGHT, INITS, LoRAAdapter
from minilora.lora.patterns import compile_ending, nearest, pattern_value

MOST_RANK = 2**16


def check_rank(r: object, what: str = "r") -> int:
    """Return r if it is a whole number from 1 to `MOST_RANK`, else raise."""
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"{what} must be a whole number of at least 1, found {short(r)}")
    if r > MOST_RANK:
        raise ValueError(f"{what} must be at most {MOST_RANK:,}, found {short(r)}")
    return r


def check_alpha(alpha: object, what: str = "alpha") -> float:
    """Return alpha if it is a finite number other than 0, else raise."""
    ok = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    # Compared, not converted: an int beyond any float is refused too, and NaN compares false.
    if not ok or not 0 < abs(alpha) <= sys.float_info.max:  # type: ignore[arg-type]
        raise ValueError(f"{what} must be a finite number other than 0, found {short(alpha)}")
    return alpha  # type: ignore[return-value]


def check_dropout(p: object, what: str = "dropout") -> float:
    """Return p if it lies in [0, 1), else raise."""
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p < 1:
        raise ValueError(f"{what} must lie in [0, 1), found {short(p)}")
    return float(p)


def check_adapter_name(name: object) -> str:
    """Return the name if it can name a folder, a module and a key part, else raise."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_\-]+", name):
        raise ValueError(
            f"an adapter's name must consist of letters, digits, '_' and '-', found {name!r}"
        )
    if name == "base":
        raise ValueError(
            "the adapter name 'base' means the model without an adapter; choose another, such as "
            "'base_1'"
        )
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"the adapter name {name!r} is taken by torch.nn.ModuleDict itself; choose another, "
            f"such as '{name}_1'"
        )
    return name


def as_dtype(dtype: object, what: str = "dtype") -> torch.dtype:
    """Return a floating torch dtype from itself or its name ("bfloat16"), else raise."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(
            f"{what} must be a floating-point torch dtype of 16 bits or more, or its name, found "
            f"{dtype!r}"
        )
    return found


def _alpha(value: object, what: str) -> float | None:
    return None if value is None else check_alpha(value, what)


def _flag(value: object, what: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{what} must be True or False, found {value!r}")
    return value


def _init(value: object, what: str) -> str:
    known = isinstance(value, str) and (value in INITS[:3] or FROM_WEIGHT.fullmatch(value))
    if not known:
        raise ValueError(f"{what} must be one of {', '.join(INITS)}, found {value!r}")
    return str(value)


def _modules(value: object, what: str) -> list[Any]:
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise TypeError(f"{what} must be a list of module names, found {value!r}")
    return list(value)


def _pattern(check: Callable[[object, str], float]) -> Callable[[object, str], dict[str, Any]]:
    def checked(value: object, what: str) -> dict[str, Any]:
        if not isinstance(value, (Mapping, type(None))):
            raise TypeError(f"{what} must be a mapping of regex: number, found {short(value)}")
        for pattern, number in (value or {}).items():
            compile_ending(pattern, what)
            check(number, what)
        return dict(value or {})

    return checked


def one_word(targets: Any) -> Any:
    """Return "all-linear" or a regex for a list of that alone, which a command line has.

    A list's words are names else; what can't be one, as `.*[02468].*`, is taken for a regex.
    """
    if isinstance(targets, (list, tuple)) and len(targets) == 1 and isinstance(targets[0], str):
        word = targets[0]
        return word if word == "all-linear" or re.search(r"[^\w.\-]", word) else targets
    return targets


@described
@dataclass(frozen=True)
class AdapterConfig:
    """Settings of `inject`; each is checked, and brought to one form, when it is made."""

    r: int = option(8, "Rank, at least 1.", check_rank, flags=("--r", "--rank"))
    alpha: float | None = option(
        None, "Numerator of the scaling, alpha / r. None is each layer's r.", _alpha
    )
    targets: tuple[str, ...] | str = option(
        "all-linear",
        'Names of modules, or one regex. "all-linear": all linears but the head.',
        lambda value, name: one_word(value),
    )
    exclude: tuple[str, ...] | str = option(
        (), "Names or a regex, taken away from targets.", lambda value, name: one_word(value)
    )
    layers: tuple[int, ...] | None = option(None, "Numbers of the blocks to adapt. None: all.")
    dropout: float = option(0.0, "Dropout of the branch's input while training.", check_dropout)
    rslora: bool = option(False, "The scaling is alpha / √r.", _flag)
    dora: bool = option(False, "Train each row's length apart from its direction (DoRA).", _flag)
    bias: Literal["none", "all", "lora_only"] = option("none", "Biases to train a copy of.")
    lora_bias: bool = option(False, "Train a bias on B.", _flag)
    modules_to_save: tuple[str, ...] | str = option(
        (), "Modules to train a whole copy of, such as a new head.", _modules
    )
    rank_pattern: Any = option(
        None, "r by regex over the end of a name.", _pattern(check_rank), flags=()
    )
    alpha_pattern: Any = option(
        None, "alpha by regex over the end of a name.", _pattern(check_alpha), flags=()
    )
    init: str = option(
        "kaiming",
        "What the factors start from: kaiming, gaussian, orthogonal, pissa, olora.",
        _init,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.lora_bias and (self.dora or self.init not in ("kaiming", "gaussian")):
            other = "dora=True" if self.dora else f"init={self.init!r}"
            raise ValueError(f"lora_bias=True has no meaning with {other}; leave one of them out")

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> "AdapterConfig":
        """Return the settings among a function's arguments by name."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls)})

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raise where a key of a pattern matches none of the names."""
        names = list(names)
        for what in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, what):
                if not any(map(compile_ending(pattern, what).ends, names)):
                    raise ValueError(
                        f"every key of {what} must match a target, {short(pattern)} matches none; "
                        f"{nearest(pattern, names)}"
                    )

    def factor_options(self, name: str) -> dict[str, Any]:
        """Return the options of one layer's `LoRAAdapter`, by the layer's dotted name."""
        r = pattern_value(name, self.rank_pattern, self.r)
        alpha = pattern_value(name, self.alpha_pattern, r if self.alpha is None else self.alpha)
        return {option: getattr(self, option) for option in _OF_FACTORS} | {"r": r, "alpha": alpha}


_OF_FACTORS = {field.name for field in fields(AdapterConfig)} & set(
    inspect.signature(LoRAAdapter).parameters
)
