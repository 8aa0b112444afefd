"""Which programs read an adapter folder as PEFT means it, and why one does not."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.files import one_line, read_json_object, short, tensor_file
from minilora.lora import (
    MARKS,
    check_alpha,
    check_rank,
    compile_ending,
    compiled_pattern,
    pattern_value,
)
from minilora.peft.config import check_pattern_count
from minilora.peft.files import CONFIG_FILE, WEIGHTS_FILE, find_pair


@dataclass(frozen=True)
class Reader:
    """What one program makes of an adapter folder: `problems` stop it, `notes` do not."""

    name: str
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def takes(self) -> bool:
        """Whether it loads the adapter and computes what PEFT does."""
        return not self.problems


_SHOWN = 20  # problems printed of each reader


class ReaderList(list[Reader]):
    """A list of `Reader` that prints as a table."""

    def __str__(self) -> str:
        lines = []
        for reader in self:
            lines.append(f"{reader.name}: {'yes' if reader.takes else 'no'}")
            shown = [one_line(text) for text in reader.problems[:_SHOWN]]
            if len(reader.problems) > _SHOWN:
                shown.append(f"and {len(reader.problems) - _SHOWN:,} more")
            lines += [f"  - {text}" for text in shown]
            lines += [f"  (note: {one_line(text)})" for text in reader.notes]
        return "\n".join(lines)


_PREFIX = "base_model.model."
_PARTS = {
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_embedding_A": "A",
    ".lora_embedding_B": "B", ".lora_B.bias": "bias", ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class _Folder:
    """An adapter folder as its config and the shapes by layer and part; `others` are other keys.

    `stacked` are layers of PEFT's `target_parameters`, whose shapes only the base could explain;
    `refused` is what the writer knew of PEFT and this base.
    """

    config: dict
    layers: dict[str, dict[str, list[int]]]
    others: list[str]
    shapes: dict[str, list[int]]
    stacked: list[str]
    refused: str | None

    def rank(self, fqn: str) -> int:
        """Return the rank that the config gives to a layer."""
        return int(pattern_value(fqn, self.config["rank_pattern"], self.config["r"]))

    def scaling(self, fqn: str) -> float:
        """Return the scaling that PEFT computes from the config."""
        alpha = pattern_value(fqn, self.config["alpha_pattern"], self.config["lora_alpha"])
        return self.divided(alpha, self.rank(fqn))

    def divided(self, alpha: float, r: int) -> float:
        """Return alpha / r, or alpha / √r with rsLoRA."""
        return alpha / math.sqrt(r) if self.config.get("use_rslora") else alpha / r

    def lacking(self) -> list[str]:
        """Return the keys of which every reader needs a partner that is missing."""
        return [
            f"{fqn} needs lora_A and lora_B, found only {', '.join(sorted(parts))}"
            for fqn, parts in self.layers.items()
            if not {"A", "B"} <= set(parts)
        ]

    def dead(self) -> list[str]:
        """Return why every reader finds no layer for the factors, so that they change nothing."""
        if not self.layers:
            return ["the file holds no LoRA factors, so it changes nothing"]
        mark = next((mark for mark in MARKS for fqn in self.layers if mark in fqn.split(".")), None)
        if mark is None and all(fqn.startswith("module.") for fqn in self.layers):
            mark = "module"
        if mark is None:
            return []
        return [
            f"names carry {mark!r} (first: {next(f for f in self.layers if mark in f)}), a "
            f"wrapper's name that no plain model has, so the factors change nothing; minilora.load "
            f"the adapter and save it again"
        ]

    def ranks(self) -> dict[str, int]:
        """Return the rank of each layer's A as it is stored."""
        first = {fqn: parts.get("A", [])[:1] for fqn, parts in self.layers.items()}
        return {fqn: r[0] for fqn, r in first.items() if r and r[0]}

    def with_part(self, part: str) -> str | None:
        """Return the first layer that has a part, or None."""
        return next((fqn for fqn, parts in self.layers.items() if part in parts), None)

    def convolution(self) -> str | None:
        """Return the first layer whose A is no matrix, or None."""
        return next((f for f, p in self.layers.items() if len(p.get("A", [0, 0])) != 2), None)


def check(folder: str | Path) -> ReaderList:
    """Say which programs read an adapter folder as PEFT means it, from its config and keys alone.

    `"PEFT"`, `"vLLM"` and `"llama.cpp"` (its convert_lora_to_gguf.py and what it makes of the
    result). Whether the base has such layers, and whether a program can run that base at all, is
    not known here. `export` writes what all three take, as far as the base lets them.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        A list of `Reader`, in this order; prints as a table.

    Raises:
        ValueError: a missing or damaged file, or another method than LoRA.
    """
    content = _read(Path(folder))
    return ReaderList([_peft(content), _vllm(content), _llama_cpp(content)])


def _read(folder: Path) -> _Folder:
    config_file, weights_file = find_pair(folder)
    for file, name in ((config_file, CONFIG_FILE), (weights_file, WEIGHTS_FILE)):
        if not file.is_file():
            raise ValueError(
                f"{folder} must hold {CONFIG_FILE} and {WEIGHTS_FILE}; {name} is missing"
            )
    config = _config(config_file)
    with tensor_file(weights_file) as opened:
        shapes = {k: opened.get_slice(k).get_shape() for k in opened.keys()}  # noqa: SIM118
        refused = (opened.metadata() or {}).get("minilora_not_for_peft")
    layers: dict[str, dict[str, list[int]]] = {}
    others = []
    for key, shape in shapes.items():
        end = next((end for end in _PARTS if key.endswith(end)), None)
        if end is None or not key.startswith(_PREFIX):
            others.append(key)
        else:
            fqn = key[len(_PREFIX) : -len(end)]
            layers.setdefault(fqn, {})[_PARTS[end]] = list(shape)
    stacked = [fqn for fqn in layers if _stacked(fqn, config)]
    layers = {fqn: parts for fqn, parts in layers.items() if fqn not in stacked}
    return _Folder(config, layers, others, shapes, stacked, refused)


def _config(file: Path) -> dict:
    """Read the config of any LoRA adapter, also one that `read_config` refuses."""
    config = read_json_object(file)
    if config.get("peft_type") != "LORA":
        found = short(config.get("peft_type"))
        raise ValueError(f"{file} must describe a LoRA adapter (peft_type 'LORA'), found {found}")
    config = {"r": 8, "lora_alpha": 8} | config  # PEFT's defaults
    try:
        for key, check_value in (("rank", check_rank), ("alpha", check_alpha)):
            patterns = config[f"{key}_pattern"] = config.get(f"{key}_pattern") or {}
            check_pattern_count(patterns, f"{key}_pattern")
            for pattern, value in patterns.items():
                compile_ending(pattern, "a pattern")
                check_value(value, f"{key}_pattern")
        check_rank(config["r"])
        check_alpha(config["lora_alpha"], "lora_alpha")
        for key in ("target_modules", "modules_to_save"):
            _check_names(config.get(key), key)
        _targeted("", config.get("target_modules"))
        named = config.get("target_parameters") or []
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            raise ValueError(
                f"target_parameters must be a list of parameter names, found {short(named)}"
            )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return config


def _check_names(value: Any, key: str) -> None:
    """Raise unless this is a list of names, a string or None."""
    entries = value if isinstance(value, list) else [value or ""]
    if not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"{key} must be a list of names, a string or null, found {short(value)}")


def _targeted(fqn: str, entries: Any) -> bool:
    """Tell whether target_modules names a layer, by PEFT's rule; "all-linear" is taken as it is."""
    if isinstance(entries, str):
        return entries == "all-linear" or compiled_pattern(entries, "target_modules").fullmatch(fqn)
    return any(f".{fqn}".endswith(f".{entry}") for entry in entries or ())


def _by_weight(fqn: str, config: dict) -> bool:
    """Return whether target_parameters names a layer's weight."""
    return _targeted(f"{fqn}.weight", config.get("target_parameters"))


def _stacked(fqn: str, config: dict) -> bool:
    """Return whether a layer's factors are for other parameters that target_parameters names."""
    holder = "." + re.sub(r"\.base_layer(?=\.|$)", "", fqn)  # several on one module are nested
    named = _targeted(fqn, config.get("target_modules")) or _by_weight(fqn, config)
    parents = [e.rpartition(".")[0] for e in config.get("target_parameters") or ()]
    return not named and any(not p or holder.endswith(f".{p}") for p in parents)


def _peft(content: _Folder) -> Reader:
    """PEFT: what does not fit is an error, a warning, or left out without a word.

    huggingface/peft, `utils/save_and_load.py` (set_peft_model_state_dict) and
    `tuners/tuners_utils.py` (check_target_module_exists).
    """
    config, problems = content.config, [*content.dead(), *content.lacking()]
    notes = []
    if content.refused:
        problems.append(content.refused)
    if content.stacked:
        notes.append(
            f"{content.stacked[0]} is for parameters of target_parameters ({len(content.stacked)} "
            f"such): whether they fit is known with the base only; minilora.load refuses them"
        )
    for fqn, parts in content.layers.items():
        ranks = [*parts.get("A", [])[:1], *parts.get("B", [])[1:2]]
        if any(r != content.rank(fqn) for r in ranks):
            problems.append(f"{fqn} has rank {ranks[0]}, the config says {content.rank(fqn)}")
        if not (_targeted(fqn, config.get("target_modules")) or _by_weight(fqn, config)):
            problems.append(f"{fqn} is not in target_modules, so PEFT leaves its factors out")
        for part, flag in (("magnitude", "use_dora"), ("bias", "lora_bias")):
            if (part in parts) != bool(config.get(flag)):
                found = "has" if part in parts else "lacks"
                problems.append(
                    f"{fqn} {found} a {part}, the config says {flag}={config.get(flag)}"
                )
    saved = config.get("modules_to_save") or []
    saved = [saved] if isinstance(saved, str) else saved
    for key in content.others:
        inside = key.startswith(_PREFIX) and (
            any(f".{entry}." in f".{key[len(_PREFIX) :]}" for entry in saved)
            or ".base_layer." in key
            or (config.get("bias") in ("all", "lora_only") and "bias" in key.rpartition(".")[2])
        )
        shape = content.shapes[key]
        if not inside and key.startswith(_PREFIX) and key.endswith(".weight") and len(shape) == 2:
            notes.append(  # embedding and head, which PEFT writes where their vocabulary has grown
                f"{key} replaces the base's own, which must have that name and shape {shape}"
            )
        elif not inside:
            problems.append(f"{key} is no key that PEFT looks for, so it is left out")
    init = _changes_base(config)
    if init:
        notes.append(f"init_lora_weights={init!r} changes the base's weights on loading")
    return Reader("PEFT", tuple(problems), tuple(notes))


def _changes_base(config: dict) -> str | None:
    """Return an init that was trained beside changed base weights, or None."""
    init = config.get("init_lora_weights")
    plain = ("gaussian", "eva", "orthogonal")
    return init if isinstance(init, str) and init not in plain else None


def _shared(content: _Folder) -> list[str]:
    """Return what neither vLLM nor llama.cpp takes."""
    problems = [*content.dead(), *content.lacking()]
    if content.stacked:
        problems.append(
            f"factors of other parameters than layers' weights are not read as PEFT means them "
            f"(first: {content.stacked[0]})"
        )
    init = _changes_base(content.config)
    if init:
        problems.append(f"init_lora_weights={init!r} fits only the changed base that PEFT makes")
    if content.with_part("magnitude"):
        problems.append(f"DoRA is refused (first: {content.with_part('magnitude')})")
    if content.with_part("bias"):
        problems.append(f"a lora_bias is refused (first: {content.with_part('bias')})")
    if content.convolution():
        problems.append(f"convolutions take no LoRA (first: {content.convolution()})")
    return problems


def _refused(keys: list[str]) -> list[str]:
    return [f"{keys[0]} is refused as no LoRA weight ({len(keys)} such keys)"] if keys else []


def _misscaled(content: _Folder, applied: dict[str, float], unread: str) -> list[str]:
    """Say where a reader's scaling is not PEFT's."""
    wrong = [fqn for fqn, s in applied.items() if not math.isclose(s, content.scaling(fqn))]
    if not wrong:
        return []
    return [
        f"{unread} are not read: {wrong[0]} would be scaled by {applied[wrong[0]]:g} instead of "
        f"{content.scaling(wrong[0]):g} ({len(wrong)} such layers)"
    ]


def _vllm(content: _Folder) -> Reader:
    """vLLM: `vllm/lora/peft_helper.py` (validate_legal), `lora_model.py`, `utils.py`.

    One scaling for all layers, from r and lora_alpha of the config (rsLoRA included); patterns are
    not read. Keys other than lora_A, lora_B and embeddings are refused, all but the frozen weights
    of embed_tokens and lm_head. `max_lora_rank`: `vllm/config/lora.py`, 16 unless set.
    """
    config, problems = content.config, _shared(content)
    if config.get("use_dora") and not content.with_part("magnitude"):
        problems.append("use_dora=true is refused")
    if config.get("modules_to_save"):
        problems.append(f"modules_to_save={config['modules_to_save']} is refused")
    if config.get("bias", "none") != "none":
        problems.append(f"bias={config['bias']!r} is refused")
    frozen = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
    problems += _refused([key for key in content.others if not key.endswith(frozen)])
    one = content.divided(config["lora_alpha"], config["r"])
    applied = dict.fromkeys(content.layers, one)
    problems += _misscaled(content, applied, "rank_pattern and alpha_pattern")
    ends = sorted({fqn.rpartition(".")[2] for fqn in content.layers})
    notes = [f"the served model must have LoRA on: {', '.join(ends)}"]
    r = max([config["r"], *content.ranks().values()])
    if r > _VLLM_RANKS[-1]:
        problems.append(f"rank {r} is above {_VLLM_RANKS[-1]}, the largest max_lora_rank")
    elif r > 16:
        allowed = next(size for size in _VLLM_RANKS if size >= r)
        notes.append(f"rank {r} needs --max-lora-rank {allowed} (16 unless set)")
    if config.get("fan_in_fan_out"):
        notes.append("fan_in_fan_out means Conv1D, and vLLM's GPT-2 takes no LoRA")
    return Reader("vLLM", tuple(problems), tuple(notes))


def _llama_cpp(content: _Folder) -> Reader:
    """llama.cpp: `convert_lora_to_gguf.py`, and `get_scale` in `src/llama-adapter.h`.

    The converter takes lora_A, lora_B and lora_embedding_A, _B, passes over base_layer.weight and
    stops at any other key but a norm's. Only lora_alpha is kept of the config; the scaling is
    lora_alpha / the rank of the tensor at hand. GPT2Model.modify_tensors (convert_hf_to_gguf.py)
    transposes Conv1D weights, and so by mistake their factors, which PEFT never transposes.
    """
    config, problems = content.config, _shared(content)
    others = [key for key in content.others if ".base_layer.weight" not in key]
    norms = [key for key in others if "_layernorm" in key or ".norm" in key]
    if norms:
        problems.append(f"{norms[0]} is converted, but not applied")
    problems += _refused([key for key in others if key not in norms])
    applied = {fqn: config["lora_alpha"] / r for fqn, r in content.ranks().items()}
    problems += _misscaled(content, applied, "use_rslora, rank_pattern and alpha_pattern")
    turned = [f for f in content.layers if f.rpartition(".")[2] in ("c_attn", "c_proj", "c_fc")]
    if config.get("fan_in_fan_out") and turned:
        problems.append(f"the factors of Conv1D are transposed by mistake (first: {turned[0]})")
    notes = []
    if not config.get("base_model_name_or_path"):
        notes.append("the converter needs --base FOLDER: the config names no base model")
    head = next((f for f in content.layers if f.rpartition(".")[2] == "lm_head"), None)
    if head:
        notes.append(f"{head} is refused where the base ties it to its embedding")
    return Reader("llama.cpp", tuple(problems), tuple(notes))
