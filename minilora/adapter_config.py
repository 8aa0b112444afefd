"""adapter_config.json as PEFT writes it: made from a model's adapters, read like user input.

Fields and their meaning: huggingface/peft, `src/peft/tuners/lora/config.py`.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from minilora.copies import asked_copies
from minilora.injection import check_alpha, check_dropout
from minilora.layers import is_conv1d
from minilora.lora_layer import LoRALayer
from minilora.quantization import QuantizedLinear
from minilora.selection import check_rank, compile_ending, find_head, plain_modules
from minilora.wrappers import unwrapped

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
    "rank_pattern", "target_modules", "use_dora", "use_rslora",
}  # fmt: skip
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


def _patterns(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Split per-layer values into the commonest one and exact-name patterns for the others."""
    common = Counter(values.values()).most_common(1)[0][0]
    # "^" keeps a name from also matching as the ending of a longer one under PEFT's rule.
    rest = {f"^{re.escape(name)}": value for name, value in values.items() if value != common}
    return common, rest


def _stores_transposed(base: nn.Module) -> bool:
    quantized = isinstance(base, QuantizedLinear) and not issubclass(base.plain, nn.Linear)
    return quantized or is_conv1d(base)


def config_of(model: nn.Module, layers: dict[str, LoRALayer], adapter: str) -> dict:
    """Describe an adapter by PEFT's fields, target_modules as short as is exact."""
    factors: dict[str, Any] = {fqn: layer.adapters[adapter] for fqn, layer in layers.items()}
    plain = {fqn: f.plain()[2:] for fqn, f in factors.items()}
    r, rank_pattern = _patterns({fqn: values[0] for fqn, values in plain.items()})
    alpha, alpha_pattern = _patterns({fqn: values[1] for fqn, values in plain.items()})
    bias, modules_to_save = asked_copies(model, adapter)
    first = next(iter(factors.values()))
    head = find_head(model)
    names = list(factors)
    return {
        "alpha_pattern": alpha_pattern,
        "auto_mapping": None,
        "base_model_name_or_path": getattr(unwrapped(model), "name_or_path", None) or None,
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


def read_config(file: Path) -> dict:
    """Read adapter_config.json with the mistrust that user input deserves."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object, found a {type(config).__name__}")

    def problem(key: str, must: str) -> ValueError:
        return ValueError(f"{file}: {key} must be {must}, found {config.get(key)!r}")

    if config.get("peft_type") != "LORA":
        raise problem("peft_type", "'LORA' (no other method can be loaded)")
    for key, value in config.items():
        if key not in _DESCRIPTIVE | _HANDLED and value not in _ASKS_NOTHING:
            raise ValueError(
                f"{file}: {key}={value!r} may change what is computed, and this version of "
                f"minilora does not support it"
            )
    if config.get("init_lora_weights") not in _PLAIN_INITS:
        raise ValueError(
            f"{file}: init_lora_weights={config['init_lora_weights']!r} changed the base's "
            f"weights, so the adapter fits only that base; convert it in PEFT "
            f"(save_pretrained(path_initial_model_for_weight_conversion=...)) and load the result"
        )
    entries = config.get("target_modules")
    is_list = isinstance(entries, list) and all(isinstance(e, str) and e for e in entries)
    if not (is_list or isinstance(entries, str)) or not entries:
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
        if not isinstance(patterns, dict):
            raise problem(key, "an object of regex: number")
        for pattern, value in patterns.items():
            try:
                compile_ending(pattern, "the key")
                check(value, f"{key}[{pattern!r}]")  # type: ignore[operator]
            except ValueError as error:
                raise ValueError(f"{file}: {key}: {error}") from None
        config[key] = patterns
    for key in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"):
        if config.get(key) not in (True, False, None):
            raise problem(key, "true or false")
    return config
