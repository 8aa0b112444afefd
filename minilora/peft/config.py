"""PEFT's names: adapter_config.json as our options and back, and the keys of the tensors.

One table, `_FIELDS`; reading, writing, `check` and sharding follow from it. The fields:
huggingface/peft, `src/peft/tuners/lora/config.py`; the keys: `src/peft/utils/save_and_load.py`.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from minilora.files import Check, cached_name, must_be, one_line, plain_path, read_json, short
from minilora.lora import (
    AdapterConfig,
    LoRAAdapter,
    Survey,
    TrainedCopies,
    check_alpha,
    compiled_pattern,
    parents,
    taken_for_experts,
)

# --- fields of the config

MOST_PATTERNS = 4096  # of ranks or alphas: one for each layer of the largest models
# Initialisations that leave the base as it was; PiSSA, OLoRA, LoftQ and CorDA change its weights,
# so their factors mean something only beside the changed base.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_TARGETS = "a non-empty list of module names or a regex"
_OURS = {field.name: field.metadata["check"] for field in fields(AdapterConfig)}


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) and entry for entry in value)


_names = must_be("a list of names, a string or null", lambda v: isinstance(v, str) or _are_names(v))
_parameters = must_be("a list of parameter names or null", _are_names)
_targets = must_be(_TARGETS, lambda v: (
    compiled_pattern(v, "target_modules") if isinstance(v, str) else _are_names(v)
))  # fmt: skip
_blocks = must_be("a block number, a list of them or null", lambda v: (
    all(type(number) is int for number in (v if isinstance(v, list) else [v]))
))  # fmt: skip
_flag = must_be("true or false", lambda v: isinstance(v, bool))
_bias = must_be("'none', 'all' or 'lora_only'", lambda v: v in ("none", "all", "lora_only"))


@dataclass(frozen=True)
class _Field:
    """A key of PEFT's config, the option that it stands for, and PEFT's default.

    `check` raises for a value other than None that is refused; without it, it is the check of our
    option. `read` and `write` convert to our option and back. `parts` are the parameters of
    `LoRAAdapter` that follow from it: what ends each one's key, and its key in an embedding.
    `unstacked` names what PEFT does not take on a parameter of `target_parameters`.
    """

    key: str
    option: str | None
    default: Any = None
    check: Check | None = None
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[Any], Any] = lambda value: value
    parts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    unstacked: str | None = None


_FIELDS = (
    _Field("r", "r", 8, parts={"lora_A": ("lora_A.weight", "lora_embedding_A"),
                               "lora_B": ("lora_B.weight", "lora_embedding_B")}),
    _Field("lora_alpha", "alpha", 8, check=check_alpha),
    _Field("rank_pattern", "rank_pattern"),
    _Field("alpha_pattern", "alpha_pattern"),
    _Field("lora_dropout", "dropout", 0.0, unstacked="dropout"),
    _Field("use_rslora", "rslora", False),
    _Field("use_dora", "dora", False, unstacked="DoRA",
           parts={"magnitude": ("lora_magnitude_vector", "lora_magnitude_vector")}),
    _Field("lora_bias", "lora_bias", False, unstacked="a lora_bias",
           parts={"lora_bias": ("lora_B.bias", "lora_B.bias")}),
    _Field("init_lora_weights", "init", True, check=lambda *_: None,
           read=lambda value: "gaussian" if value == "gaussian" else "kaiming",
           write=lambda init: "gaussian" if init == "gaussian" else True),
    _Field("bias", "bias", "none", check=_bias),
    _Field("modules_to_save", "modules_to_save", check=_names, read=lambda v: v or (),
           write=lambda names: names or None),
    _Field("target_modules", "targets", check=_targets, read=lambda v: v or ()),
    _Field("exclude_modules", "exclude", check=_names, read=lambda v: v or (),
           write=lambda names: names or None),
    _Field("layers_to_transform", "layers", check=_blocks),
    # What only PEFT has, or the base says.
    _Field("target_parameters", None, check=_parameters),
    _Field("layers_pattern", None, check=_names),
    _Field("fan_in_fan_out", None, False, check=_flag),
)  # fmt: skip
# Keys that name or describe; any other key must ask for nothing, so that a file from a newer PEFT
# can't mean something that is not computed here.
_KNOWN = {field.key for field in _FIELDS} | {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type", "ensure_weight_tying",
    "megatron_core", "eva_config",
}  # fmt: skip
_ASKS_NOTHING: tuple[object, ...] = (None, False, "none", [], {}, "")


def read_config(file: Path, loadable: bool = True) -> dict[str, Any]:
    """Read adapter_config.json with the mistrust that user input deserves; defaults are filled in.

    `loadable` also refuses what PEFT can load and `load` can't.
    """
    config = read_json(file)
    try:
        if config.get("peft_type") != "LORA":
            found = short(config.get("peft_type"))
            raise ValueError(
                f"peft_type must be 'LORA' (no other method can be loaded), found {found}"
            )
        if loadable:
            _require_loadable(config)
        for field in _FIELDS:
            _check(field, config.setdefault(field.key, field.default))
        if not (config["target_modules"] or config["target_parameters"]):
            raise ValueError(
                f"target_modules must be {_TARGETS}, found {short(config['target_modules'])}"
            )
        options_of(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None
    return config


def _check(field: _Field, value: Any) -> None:
    if isinstance(value, dict) and len(value) > MOST_PATTERNS:
        raise ValueError(
            f"{field.key} must have at most {MOST_PATTERNS:,} keys, found {len(value):,}"
        )
    check = field.check or _OURS[field.option or ""]
    if value is not None or field.default is not None:
        check(value, field.key)


def _require_loadable(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if key not in _KNOWN and value not in _ASKS_NOTHING:
            raise ValueError(
                f"{one_line(key, 80)}={short(value)} may change what is computed, and this "
                f"version of minilora does not support it"
            )
    if (init := config.get("init_lora_weights")) not in PLAIN_INITS:
        raise ValueError(
            f"init_lora_weights={short(init)} changed the base's weights, so the adapter fits "
            f"only that base; convert it in PEFT "
            f"(save_pretrained(path_initial_model_for_weight_conversion=...)) and load the result"
        )


def options_of(config: Mapping[str, Any]) -> AdapterConfig:
    """Return what `read_config` read as our options."""
    return AdapterConfig(**{f.option: f.read(config[f.key]) for f in _FIELDS if f.option})


def config_of(
    model: nn.Module | Survey,
    adapter: str,
    base_name: str | None = None,
    factors: Mapping[str, LoRAAdapter] | None = None,
) -> dict[str, Any]:
    """Describe an adapter, or these factors by layer, in PEFT's fields.

    `target_modules` is as short as is exact.
    """
    survey = Survey.of(model)
    factors = survey.factors(adapter) if factors is None else factors
    first, by_weight = next(iter(factors.values())), by_parameter(survey, factors)[0]
    plain = {fqn: one.plain()[2:] for fqn, one in factors.items()}
    r, rank_pattern = _split({fqn: r for fqn, (r, _, _) in plain.items()}, by_weight)
    alpha, alpha_pattern = _split({fqn: alpha for fqn, (_, alpha, _) in plain.items()}, by_weight)
    copies = survey.copies.get(adapter, TrainedCopies({}))
    options = first.options() | {
        "r": r, "alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern,
        "rslora": next(iter(plain.values()))[2],
        "bias": copies.bias, "modules_to_save": copies.modules_to_save,
        "targets": _minimal_targets(survey, [fqn for fqn in factors if fqn not in by_weight]),
    }  # fmt: skip
    if options["lora_bias"]:
        options["init"] = "kaiming"  # PEFT takes no other beside it, though it no longer matters
    asked = AdapterConfig(**options)
    bases = [survey.layers[fqn].view for fqn in factors]
    name, revision = _base_name(survey.root)
    config = {f.key: f.write(getattr(asked, f.option)) if f.option else None for f in _FIELDS}
    del config["target_parameters"]  # which older versions of PEFT don't know
    if by_weight:
        config["target_parameters"] = sorted(f"{fqn}.weight" for fqn in by_weight)
    return config | {
        "auto_mapping": None,
        "base_model_name_or_path": base_name or name,
        "fan_in_fan_out": any(base.family == "linear" and base.transposed for base in bases),
        "inference_mode": True,
        "peft_type": "LORA",
        "peft_version": "0.21.2",  # the release whose layout this follows
        "revision": None if base_name else revision,
        "task_type": "CAUSAL_LM" if "lm_head" in (survey.head or "") else None,
    }


def _split(values: dict[str, Any], by_weight: list[str]) -> tuple[Any, dict[str, Any]]:
    """Split per-layer values into the most common one and exact-name patterns for the others."""
    common = Counter(values.values()).most_common(1)[0][0]
    # "^" keeps a name from also matching as the ending of a longer one under PEFT's rule; where
    # PEFT is given a parameter's name (`target_parameters`), it looks that up.
    rest = {
        f"^{re.escape(name)}" + (r"(\.weight)?" if name in by_weight else ""): value
        for name, value in values.items()
        if value != common
    }
    return common, rest


def _minimal_targets(survey: Survey, names: list[str]) -> list[str] | str:
    """Return the shortest list of endings that selects exactly `names`, or a regex if none does.

    A name that is itself the ending of another module's name can't be told apart by endings.
    """
    wanted = set(names)
    entries: set[str] = set()
    for name in names:
        parts = name.split(".")
        for start in range(len(parts) - 1, -1, -1):
            entry = ".".join(parts[start:])
            if {n for n in survey.modules if f".{n}".endswith(f".{entry}")} <= wanted:
                entries.add(entry)
                break
        else:
            return "|".join(re.escape(name) for name in names)
    return sorted(entries)


def _base_name(root: nn.Module) -> tuple[str | None, str | None]:
    """Return where the base came from; of a copy in the hub's cache, the name there and commit."""
    name = getattr(root, "name_or_path", None) or None
    cached = cached_name(str(name))
    if cached is None:
        return (None if name is None else plain_path(str(name))), None
    return str(cached._replace(revision=None)), cached.revision


# --- tensors

PREFIX = "base_model.model."
KEYS = {part: keys for row in _FIELDS for part, keys in row.parts.items()}
FLAGS = {part: row.key for row in _FIELDS for part in row.parts if row.default is False}


def keys_of(fqn: str, factors: LoRAAdapter) -> dict[str, str]:
    """Return the key of each parameter of a layer's adapter."""
    parts = dict(factors.named_parameters(recurse=False))
    return {part: f"{PREFIX}{fqn}.{KEYS[part][factors.embedding]}" for part in parts}


def stored_shape(part: str, factors: LoRAAdapter) -> list[int]:
    """Return the shape a parameter has in the file: a convolution's magnitude is 4-D there."""
    shape = list(getattr(factors, part).shape)
    return [1, *shape, 1, 1] if part == "magnitude" and factors.lora_A.dim() == 4 else shape


def nested_copies(modules: Iterable[str], entries: Collection[str]) -> tuple[str, str] | None:
    """Return a module to save that lies in another one, and that; None if none does.

    PEFT keeps a copy within a copy there, writes one of the two, and can't load the file.
    """
    hits = {n for n in modules if any(f".{n}".endswith(f".{entry}") for entry in entries)}
    return next(((n, outer) for n in sorted(hits) for outer in parents(n) if outer in hits), None)


def copy_key(name: str, targets: Collection[str]) -> str:
    """Return the key of a trained copy: PEFT wraps targets, so theirs lie in `base_layer`."""
    module, _, leaf = name.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{leaf}" if module in targets else f"{PREFIX}{name}"


# --- what PEFT reads otherwise

_MAMBAS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def by_parameter(
    survey: Survey, factors: Mapping[str, LoRAAdapter]
) -> tuple[list[str], str | None]:
    """Return the layers to be named by their weight, and why those can't be that should be.

    PEFT would look for them among stacked experts (`taken_for_experts`); named by their weight, in
    `target_parameters`, it finds them. It takes neither dropout nor DoRA nor a lora_bias there.
    """
    names = taken_for_experts(survey, list(factors))
    options = next(iter(factors.values())).options()
    what = next((f.unstacked for f in _FIELDS if f.unstacked and options[f.option or ""]), None)
    if not names or what is None:
        return names, None
    return [], (
        f"PEFT takes {names[0]} and {len(names) - 1} more for the model's stacked experts, and "
        f"reads them rightly only without dropout, DoRA and lora_bias; this adapter has {what}"
    )


def not_for_peft(survey: Survey, factors: Mapping[str, LoRAAdapter]) -> str | None:
    """Say why PEFT refuses this adapter on its own base, or reads it otherwise; else None."""
    family = getattr(getattr(survey.root, "config", None), "model_type", None)
    wrong = [n for n in factors if n.rpartition(".")[2] in ("out_proj", "conv1d")]
    if family in _MAMBAS and wrong:
        return f"PEFT refuses {wrong[0]} ({len(wrong)} such layers) in a model of type {family}"
    return by_parameter(survey, factors)[1]
