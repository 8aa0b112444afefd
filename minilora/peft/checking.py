"""Which programs read an adapter folder as PEFT means it, as far as its two files show."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minilora.files import one_line, short, tensor_file
from minilora.lora import MARKS, AdapterConfig, LoRAAdapter, compiled_pattern, parents
from minilora.peft.config import (
    FLAGS,
    KEYS,
    PLAIN_INITS,
    PREFIX,
    nested_copies,
    options_of,
    read_config,
)
from minilora.peft.files import require_pair

_SHOWN = 20  # problems printed of each reader
_PARTS = {f".{end}": part for part, ends in KEYS.items() for end in ends}
_FROZEN = ".base_layer.weight"  # of the base: PEFT writes an adapted embedding's along
_CONV1D = ("c_attn", "c_proj", "c_fc")  # of GPT-2


@dataclasses.dataclass(frozen=True)
class Reader:
    """What one program makes of an adapter folder: `problems` stop it, `notes` do not."""

    name: str
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def takes(self) -> bool:
        """Whether it loads the adapter and computes what PEFT does."""
        return not self.problems


class ReaderList(list[Reader]):
    """A list of `Reader` that prints as a table."""

    def __str__(self) -> str:
        lines = []
        for reader in self:
            lines.append(f"{reader.name}: {'yes' if reader.takes else 'no'}")
            lines += [f"  - {one_line(text)}" for text in reader.problems[:_SHOWN]]
            if len(reader.problems) > _SHOWN:
                lines.append(f"  - and {len(reader.problems) - _SHOWN:,} more")
            lines += [f"  (note: {one_line(text)})" for text in reader.notes]
        return "\n".join(lines)


def check(folder: str | Path) -> ReaderList:
    """Say which programs read an adapter folder as PEFT means it, from its two files alone.

    `"PEFT"`, `"vLLM"` and `"llama.cpp"` (its convert_lora_to_gguf.py). Files that contradict each
    other are no program's. Whether the base has such layers, and whether a program can run that
    base at all, is not known here. `export` writes what all three take, as far as the base lets
    them.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        A list of `Reader`, in this order; prints as a table.

    Raises:
        ValueError: a missing or damaged file, or another method than LoRA.
    """
    files = _Files(Path(folder))
    problems = tuple(files.contradictions())
    readers = [Reader("PEFT", (*files.refused(), *problems), tuple(files.notes()))]
    for name in ("vLLM", "llama.cpp"):
        hits = [(text, where(files)) for names, text, where in _RULES if name in names]
        own = tuple(text.format(hit[0], len(hit)) for text, hit in hits if hit)
        readers.append(Reader(name, problems + own))
    return ReaderList(readers)


class _Files:
    """What an adapter's two files say: options, and the shapes of each layer's parts.

    `others` are the shapes of other keys; `stacked` are layers that only `target_parameters` can
    mean, parameters that are no layer's weight; `known` is what the writer knew of PEFT.
    """

    def __init__(self, folder: Path):
        config_file, weights_file = require_pair(folder)
        self.config = read_config(config_file, loadable=False)
        self.options = options_of(self.config)
        self.layers: dict[str, dict[str, list[int]]] = {}
        self.others: dict[str, list[int]] = {}
        with tensor_file(weights_file) as opened:
            metadata = opened.metadata() or {}
            shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
        self.known = [text for key, text in metadata.items() if key == "minilora_not_for_peft"]
        for key, shape in shapes.items():
            end = next((end for end in _PARTS if key.endswith(end)), None)
            if end is None or not key.startswith(PREFIX):
                self.others[key] = shape
            else:
                parts = self.layers.setdefault(key[len(PREFIX) : -len(end)], {})
                parts[_PARTS[end]] = shape
        stacks = bool(self.config["target_parameters"])
        self.stacked = [n for n in self.layers if stacks and not self._is_target(n)]
        for fqn in self.stacked:
            del self.layers[fqn]

    def _is_target(self, fqn: str) -> bool:
        targets, parameters = self.options.targets, self.config["target_parameters"] or ()
        if targets == "all-linear" or any(f".{fqn}.weight".endswith(f".{e}") for e in parameters):
            return True
        if isinstance(targets, str):
            return compiled_pattern(targets, "target_modules").fullmatch(fqn)
        return any(f".{fqn}".endswith(f".{entry}") for entry in targets)

    def _is_copy(self, key: str) -> bool:
        """Return whether the config asks for a trained copy of this parameter."""
        name, options = key.removeprefix(PREFIX), self.options
        asked = any(f".{entry}." in f".{name}" for entry in options.modules_to_save)
        biased = options.bias != "none" and "bias" in name.rpartition(".")[2]
        return key.startswith(PREFIX) and (asked or biased or _FROZEN in key)

    def _replaces(self, key: str) -> bool:
        """Return whether PEFT writes such a key: an embedding or head of a grown vocabulary."""
        matrix = key.endswith(".weight") and len(self.others[key]) == 2
        return key.startswith(PREFIX) and matrix and not self._is_copy(key)

    def _shares_a_target(self, fqn: str) -> bool:
        """Whether PEFT has tied a layer to one that is named: head and embedding, turned around."""
        ends = {name: parts for name, parts in self.layers.items() if self._is_target(name)}
        own = self.layers[fqn]
        return bool(self.config.get("ensure_weight_tying")) and any(
            own.get("lora_A", [])[1:] == parts.get("lora_B", [])[:1]
            and own.get("lora_B", [])[:1] == parts.get("lora_A", [])[1:]
            for parts in ends.values()
        )

    def contradictions(self) -> Iterator[str]:
        """Say where the files are not whole, contradict each other, or change nothing."""
        names = [*self.layers, *self.stacked]
        if not names:
            yield "the file holds no LoRA factors, so it changes nothing"
        marks = [mark for mark in MARKS if any(mark in fqn.split(".") for fqn in names)]
        if names and all(fqn.startswith("module.") for fqn in names):
            marks.append("module")
        for mark in marks[:1]:
            yield (
                f"names carry {mark!r} (first: {next(n for n in names if mark in n)}), a wrapper's "
                f"name that no plain model has, so the factors change nothing; minilora.load the "
                f"adapter and save it again"
            )
        for fqn, parts in self.layers.items():
            if not {"lora_A", "lora_B"} <= set(parts):
                yield f"{fqn} needs lora_A and lora_B, found only {', '.join(sorted(parts))}"
            r = self.options.factor_options(fqn)["r"]
            ranks = [*parts.get("lora_A", [])[:1], *parts.get("lora_B", [])[1:2]]
            if any(stored != r for stored in ranks):
                yield f"{fqn} has rank {ranks[0]}, the config says {r}"
            if not (self._is_target(fqn) or self._shares_a_target(fqn)):
                yield f"{fqn} is not in target_modules, so PEFT leaves its factors out"
            for part, key in FLAGS.items():
                if (part in parts) != bool(self.config[key]):
                    has = "has" if part in parts else "lacks"
                    yield f"{fqn} {has} a {part}, the config says {key}={self.config[key]}"
        for key in self.others:
            if not (self._is_copy(key) or self._replaces(key)):
                yield f"{key} is no key that PEFT looks for, so it is left out"

    def refused(self) -> Iterator[str]:
        """Say what PEFT does not take, though the files agree."""
        yield from self.known
        config, init = self.config, self.config["init_lora_weights"]
        if config["lora_bias"] and not isinstance(init, bool):
            yield f"lora_bias=True needs init_lora_weights true or false, found {short(init)}"
        blocks, pattern = config["layers_to_transform"], config["layers_pattern"]
        if isinstance(config["target_modules"], str) and (blocks, pattern) != (None, None):
            yield (
                "layers_to_transform and layers_pattern are refused where target_modules is a regex"
            )
        if pattern and blocks is None:
            yield "layers_pattern is refused without layers_to_transform"
        modules = {module for key in self.others for module in parents(key.removeprefix(PREFIX))}
        if nested := nested_copies(modules, self.options.modules_to_save):
            yield f"modules_to_save must not name {nested[0]}, which lies within {nested[1]}"

    def notes(self) -> Iterator[str]:
        """Say what only the base can tell."""
        for key, shape in self.others.items():
            if self._replaces(key):
                yield f"{key} replaces the base's own, which must have that name and shape {shape}"
        if self.stacked:
            yield (
                f"{self.stacked[0]} is for parameters of target_parameters ({len(self.stacked)} "
                f"such): whether they fit is known with the base only; minilora.load refuses them"
            )
        for init in self.changed():
            yield f"init_lora_weights={init!r} changes the base's weights on loading"

    def changed(self) -> list[str]:
        """Return the init that was trained beside changed base weights, if it was."""
        init = self.config["init_lora_weights"]
        return [] if init in PLAIN_INITS else [init]

    def misscaled(self, **ignored: Any) -> list[str]:
        """Say where these values of options that a reader ignores change the scaling."""
        read = dataclasses.replace(self.options, **ignored)
        if read == self.options:
            return []
        scalings = {fqn: (_scaling(read, fqn), _scaling(self.options, fqn)) for fqn in self.layers}
        return [
            f"{fqn} would be scaled by {there:g} instead of {here:g}"
            for fqn, (there, here) in scalings.items() if not math.isclose(there, here)
        ]  # fmt: skip


def _scaling(config: AdapterConfig, fqn: str) -> float:
    """Return a layer's scaling as PEFT computes it."""
    return LoRAAdapter(1, 1, device="meta", **config.factor_options(fqn)).scaling


# Readers, what they don't take of what PEFT does, and where the files have it. vLLM:
# `vllm/lora/peft_helper.py`; llama.cpp: `convert_lora_to_gguf.py`, `src/llama-adapter.h`.
_RULES: tuple[tuple[str, str, Callable[[_Files], list]], ...] = (
    ("vLLM, llama.cpp", "{} is refused", lambda f: [
        f"{flag} (first: {fqn})" for part, flag in FLAGS.items()
        for fqn in [name for name, parts in f.layers.items() if part in parts][:1]
    ]),
    ("vLLM, llama.cpp", "convolutions take no LoRA (first: {})",
     lambda f: [n for n, parts in f.layers.items() if len(parts.get("lora_A", "AB")) != 2]),
    ("vLLM, llama.cpp", "factors of other parameters than layers' weights are not read as PEFT "
     "means them (first: {})", lambda f: f.stacked),
    ("vLLM, llama.cpp", "init_lora_weights={!r} fits only the changed base that PEFT makes",
     lambda f: f.changed()),
    ("vLLM, llama.cpp", "{} is refused as no LoRA weight ({} such keys)",
     lambda f: [key for key in f.others if _FROZEN not in key]),
    ("vLLM", "bias={!r} is refused", lambda f: [b for b in [f.options.bias] if b != "none"]),
    ("vLLM", "rank_pattern and alpha_pattern are not read: {} ({} such layers)",
     lambda f: f.misscaled(rank_pattern={}, alpha_pattern={})),
    ("llama.cpp", "use_rslora and alpha_pattern are not read: {} ({} such layers)",
     lambda f: f.misscaled(rslora=False, alpha_pattern={})),
    ("llama.cpp", "the factors of Conv1D are transposed by mistake (first: {})",
     lambda f: [n for n in f.layers if f.config["fan_in_fan_out"] and n.endswith(_CONV1D)]),
)  # fmt: skip
