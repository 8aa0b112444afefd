"""adapter_config.json as PEFT writes it: made from a model's adapters, read like user input.

Fields and their meaning: huggingface/peft, `src/peft/tuners/lora/config.py`.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from minilora.files import one_line, read_json_object, short
from minilora.lora import (
    LoRALayer,
    asked_copies,
    check_alpha,
    check_dropout,
    check_rank,
    compile_ending,
    find_head,
    is_conv1d,
    parameter_places,
    plain_modules,
    taken_for_experts,
    unwrapped,
)
from minilora.quantization import QuantizedLinear

# Config keys that name or describe; every other key must be one handled below or at a value that
# asks for nothing, so that a file from a newer PEFT can't mean something we don't compute.
_DESCRIPTIVE = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
    "ensure_weight_tying", "megatron_core", "eva_config",
}  # fmt: skip
_HANDLED = {
    "alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "modules_to_save", "r",
    "rank_pattern", "target_modules", "target_parameters", "use_dora", "use_rslora",
}  # fmt: skip
_MAMBAS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
MOST_PATTERNS = 4096  # of ranks or alphas: one for each layer of the largest models
_ASKS_NOTHING: tuple[object, ...] = (None, False, "none", [], {}, "")
# Initialisations that leave the base as it was; PiSSA, OLoRA, LoftQ and CorDA change its weights,
# so their factors mean something only beside the changed base.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def _minimal_targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """The shortest list of endings that selects exactly `names`, or a regex where none does.

    A name that is itself the ending of another module's name can't be told apart by endings.
    """
    every = list(plain_modules(model))
    wanted = set(names)
    entries: set[str] = set()
    for name in names:
        parts = name.split(".")
        for start in range(len(parts) - 1, -1, -1):
            entry = ".".join(parts[start:])
            hits = {n for n in every if n == entry or n.endswith("." + entry)}
            if hits <= wanted:
                entries.add(entry)
                break
        else:
            return "|".join(re.escape(name) for name in names)
    return sorted(entries)


def _patterns(values: dict[str, Any], by_weight: list[str]) -> tuple[Any, dict[str, Any]]:
    """Split per-layer values into the commonest one and exact-name patterns for the others."""
    common = Counter(values.values()).most_common(1)[0][0]
    # "^" keeps a name from also matching as the ending of a longer one under PEFT's rule; where
    # PEFT is given a parameter's name (`target_parameters`), it looks that up.
    rest = {
        f"^{re.escape(name)}" + (r"(\.weight)?" if name in by_weight else ""): value
        for name, value in values.items()
        if value != common
    }
    return common, rest


def _stores_transposed(base: nn.Module) -> bool:
    quantized = isinstance(base, QuantizedLinear) and not issubclass(base.plain, nn.Linear)
    return quantized or is_conv1d(base)


def by_parameter(
    model: nn.Module, layers: dict[str, LoRALayer], adapter: str
) -> tuple[list[str], str | None]:
    """Return the layers to be named by their weight, and why those can't be that should be.

    PEFT would look for them among stacked experts (`taken_for_experts`); named by their weight, in
    `target_parameters`, it finds them. It takes neither dropout nor DoRA nor a lora_bias there.
    """
    names = taken_for_experts(unwrapped(model), {"": model, **plain_modules(model)}, list(layers))
    first: Any = next(iter(layers.values())).adapters[adapter]
    what = "dropout" if first.dropout else "DoRA" if first.magnitude is not None else None
    what = "a lora_bias" if first.lora_bias is not None else what
    if not names or what is None:
        return names, None
    return [], (
        f"PEFT takes {names[0]} and {len(names) - 1} more for the model's stacked experts, and "
        f"reads them rightly only without dropout, DoRA and lora_bias; this adapter has {what}"
    )


def not_for_peft(model: nn.Module, layers: dict[str, LoRALayer], adapter: str) -> str | None:
    """Say why PEFT refuses this adapter on its own base, or reads it otherwise; else None."""
    kind = getattr(getattr(unwrapped(model), "config", None), "model_type", None)
    wrong = [n for n in layers if n.rpartition(".")[2] in ("out_proj", "conv1d")]
    if kind in _MAMBAS and wrong:
        return f"PEFT refuses {wrong[0]} ({len(wrong)} such layers) in a model of type {kind}"
    return by_parameter(model, layers, adapter)[1]


def weights_named(model: nn.Module, config: dict, file: Path) -> list[str]:
    """Return the linears whose weight `target_parameters` names; refuse what is no such weight."""
    places, found = parameter_places(model), []
    entries = config.get("target_parameters") or []
    for name in places:
        if not any(f".{name}".endswith(f".{entry}") for entry in entries):
            continue
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or not isinstance(places[name][0], nn.Linear):
            raise ValueError(
                f"{file}: target_parameters must name weights of linear layers, found {name} "
                f"{list(getattr(*places[name]).shape)}, which is none; adapters on such parameters "
                f"(stacked experts) can't be loaded here, only in PEFT"
            )
        found.append(module)
    return found


def _base_name(model: nn.Module) -> str | None:
    """Return where the base came from; of a copy in Hugging Face's cache, the model's name."""
    name = getattr(unwrapped(model), "name_or_path", None) or None
    cached = re.search(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]", str(name))
    return f"{cached[1]}/{cached[2]}" if cached else name


def config_of(
    model: nn.Module, layers: dict[str, LoRALayer], adapter: str, base_name: str | None = None
) -> dict:
    """Describe an adapter by PEFT's fields, target_modules as short as is exact."""
    factors: dict[str, Any] = {fqn: layer.adapters[adapter] for fqn, layer in layers.items()}
    plain = {fqn: f.plain()[2:] for fqn, f in factors.items()}
    by_weight, _ = by_parameter(model, layers, adapter)
    r, rank_pattern = _patterns({fqn: values[0] for fqn, values in plain.items()}, by_weight)
    alpha, alpha_pattern = _patterns({fqn: values[1] for fqn, values in plain.items()}, by_weight)
    bias, modules_to_save = asked_copies(model, adapter)
    first = next(iter(factors.values()))
    head = find_head(model)
    names = [fqn for fqn in factors if fqn not in by_weight]
    config = {
        "alpha_pattern": alpha_pattern,
        "auto_mapping": None,
        "base_model_name_or_path": base_name or _base_name(model),
        "bias": bias,
        "exclude_modules": None,
        "fan_in_fan_out": any(_stores_transposed(layer.base) for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": "gaussian" if first.init == "gaussian" else True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_bias": first.lora_bias is not None,
        "lora_dropout": first.dropout,
        "modules_to_save": modules_to_save or None,
        "peft_type": "LORA",
        "peft_version": "0.21.2",  # the release whose layout this follows
        "r": r,
        "rank_pattern": rank_pattern,
        "revision": None,
        "target_modules": _minimal_targets(model, names),
        "task_type": "CAUSAL_LM" if head is not None and "lm_head" in head else None,
        "use_dora": first.magnitude is not None,
        "use_rslora": next(iter(plain.values()))[2],
    }
    if by_weight:
        config["target_parameters"] = sorted(f"{fqn}.weight" for fqn in by_weight)
    return config


def check_pattern_count(patterns: object, key: str) -> None:
    """Raise unless this is an object of regex: number that can be matched in bounded time."""
    if not isinstance(patterns, dict):
        raise ValueError(f"{key} must be an object of regex: number, found {short(patterns)}")
    if len(patterns) > MOST_PATTERNS:
        raise ValueError(f"{key} must have at most {MOST_PATTERNS:,} keys, found {len(patterns):,}")


def read_config(file: Path) -> dict:
    """Read adapter_config.json with the mistrust that user input deserves."""
    config = read_json_object(file)

    def problem(key: str, must: str) -> ValueError:
        return ValueError(f"{file}: {key} must be {must}, found {short(config.get(key))}")

    if config.get("peft_type") != "LORA":
        raise problem("peft_type", "'LORA' (no other method can be loaded)")
    for key, value in config.items():
        if key not in _DESCRIPTIVE | _HANDLED and value not in _ASKS_NOTHING:
            raise ValueError(
                f"{file}: {one_line(key, 80)}={short(value)} may change what is computed, and this "
                f"version of minilora does not support it"
            )
    if config.get("init_lora_weights") not in _PLAIN_INITS:
        raise ValueError(
            f"{file}: init_lora_weights={short(config['init_lora_weights'])} changed the base's "
            f"weights, so the adapter fits only that base; convert it in PEFT "
            f"(save_pretrained(path_initial_model_for_weight_conversion=...)) and load the result"
        )
    entries = config.get("target_modules")
    is_list = isinstance(entries, list) and all(isinstance(e, str) and e for e in entries)
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(e, str) and e for e in parameters):
        raise problem("target_parameters", "a list of parameter names or null")
    if not (is_list or isinstance(entries, str)) or not (entries or parameters):
        raise problem("target_modules", "a non-empty list of module names or a regex")
    for key in ("exclude_modules", "layers_pattern", "modules_to_save"):
        value = config.get(key)
        if not isinstance(value, (str, type(None))) and not (
            isinstance(value, list) and all(isinstance(e, str) and e for e in value)
        ):
            raise problem(key, "a list of names, a string or null")
    blocks = config.get("layers_to_transform")
    if blocks is not None and not all(
        type(i) is int for i in (blocks if isinstance(blocks, list) else [blocks])
    ):
        raise problem("layers_to_transform", "a block number, a list of them or null")
    if config.setdefault("bias", "none") not in ("none", "all", "lora_only"):
        raise problem("bias", "'none', 'all' or 'lora_only'")
    try:
        check_rank(config.setdefault("r", 8), "r")
        check_alpha(config.setdefault("lora_alpha", 8), "lora_alpha")
        check_dropout(config.setdefault("lora_dropout", 0.0))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    for key, check in (("rank_pattern", check_rank), ("alpha_pattern", check_alpha)):
        patterns = config.get(key) or {}
        try:
            check_pattern_count(patterns, key)
            for pattern, value in patterns.items():
                compile_ending(pattern, f"the key of {key}")
                check(value, f"{key}[{short(pattern)}]")  # type: ignore[operator]
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        config[key] = patterns
    for key in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"):
        if config.get(key) not in (True, False, None):
            raise problem(key, "true or false")
    return config
