"""Write an adapter as PEFT does, also when an injected transformers model saves itself.

`save_pretrained`, which Trainer calls too, writes a folder that reads back as what was saved: the
base under its plain names beside the adapter's two files. Left alone, transformers would write the
names of wrapped layers, and read random linears.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.lora import (
    LoRAAdapter,
    Survey,
    check_whole,
    describe,
    drawn_modules,
    frozen_values,
    is_copy,
    say_untied,
    write_pretrained_by,
)
from minilora.peft.config import config_of, copy_key, keys_of, not_for_peft, stored_shape
from minilora.peft.files import write_pair
from minilora.peft.fingerprints import fingerprint
from minilora.quantization import quantized_layers


def save(
    model: nn.Module,
    folder: str | Path,
    adapter: str | None = None,
    *,
    base_name: str | None = None,
) -> Path:
    """Write an adapter as PEFT's two files, so that PEFT, vLLM and `load` read it.

    The adapter named `default` goes to `folder`, any other to `folder/<name>`. Both files are
    written aside first; killed at any moment, `load` finds the old or the new one. A merged
    model's adapter is written unmerged; one started by PiSSA or OLoRA as an ordinary adapter of
    twice the rank for the untouched base.

    Args:
        model: a model with adapters; not changed.
        folder: made if missing; the two files in it are replaced.
        adapter: which one; None when there is only one, or only one is active.
        base_name: what the config names as the base; None is where the model came from, of a
            model from the hub its name there. A relative path begins with `./` or `../`, so that it
            is not taken for a name on the hub elsewhere.

    Returns:
        The folder that holds the two files.

    Raises:
        ValueError: no adapter, an unknown one, several without a name, factors with NaN or Inf,
            a parameter outside the adapter that is being trained.
        RuntimeError: the folder can't be written; what was there before stays.
    """
    survey = Survey(model)
    survey.require_layers("save")
    adapter = survey.adapter(adapter, "save")
    out = Path(folder) if adapter == "default" else Path(folder) / adapter
    return save_adapter(survey, out, adapter, base_name)


def save_adapter(
    model: nn.Module | Survey,
    out: Path,
    adapter: str,
    base_name: str | None = None,
    factors: Mapping[str, LoRAAdapter] | None = None,
) -> Path:
    """Write the two files into exactly this folder, whatever the adapter's name; see `save`.

    `factors` by layer are written in place of an adapter of the model.
    """
    survey = Survey.of(model)
    survey.require_layers("save")
    check_whole(survey.model, "save")
    survey.require_values("save")
    if factors is None:
        factors = survey.factors(survey.adapter(adapter, "save"))
    copies = survey.copies_of(adapter)
    tensors = _tensors(survey, adapter, factors, copies)
    frozen = frozen_values(survey, factors, copies)
    _refuse_trained(frozen)
    problem = not_for_peft(survey, factors)
    for text in (*_unsaved(survey, adapter, factors, copies), *filter(None, [problem])):
        warnings.warn(f"minilora: {text}", stacklevel=3)
    layers = {fqn: survey.layers[fqn] for fqn in factors}
    metadata = {
        "format": "pt",
        "minilora_base": fingerprint(layers, survey.originals),
        "minilora_rest": describe(frozen),
    } | ({} if problem is None else {"minilora_not_for_peft": problem})
    config = config_of(survey, adapter, base_name, factors)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_pair(out, tensors, metadata, text.encode())
    return out


def _tensors(
    survey: Survey, adapter: str, factors: Mapping[str, LoRAAdapter], copies: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return what is written, by PEFT's keys."""
    tensors: dict[str, Tensor] = {}

    def put(key: str, value: Tensor, what: str) -> None:
        if not torch.isfinite(value).all():
            raise ValueError(
                f"{what} of adapter {adapter!r} must be finite, found NaN or Inf; nothing was "
                f"written"
            )
        tensors[key] = value.detach().cpu().clone().contiguous()

    for fqn, one in factors.items():
        values: dict[str, Tensor] = dict(one.named_parameters(recurse=False))
        values["lora_A"], values["lora_B"] = one.plain()[:2]
        if "magnitude" in values:
            values["magnitude"] = values["magnitude"].reshape(stored_shape("magnitude", one))
        for part, key in keys_of(fqn, one).items():
            put(key, values[part], f"{fqn}: {part}")
    for name, value in copies.items():
        if name not in survey.parameters:
            raise ValueError(
                f"the adapter has a trained copy of {name}, and this model has no such parameter; "
                f"call save with the module that inject was called with"
            )
        put(copy_key(name, factors), value, name)
    return tensors


def _refuse_trained(frozen: Mapping[str, Tensor]) -> None:
    """Raise where something is trained that the files do not hold."""
    for name, value in frozen.items():
        if value.requires_grad:
            raise ValueError(
                f"{name} requires gradients, and the adapter's files do not hold it: what is "
                f"trained there would be lost; inject with "
                f"modules_to_save=[{name.rpartition('.')[0]!r}], or set requires_grad_(False) on "
                f"it to save the adapter without it"
            )


def _unsaved(
    survey: Survey, adapter: str, factors: Mapping[str, Any], copies: Mapping[str, Tensor]
) -> list[str]:
    """Warn of values that no file holds, and of layers that training has left at 0."""
    texts = []
    if drawn := drawn_modules(survey, copies):
        texts.append(
            f"{', '.join(drawn[:4])} of the base holds values drawn at random since it was loaded "
            f"(new rows of a vocabulary, a new head), which the adapter's files do not hold: save "
            f"the base too, with adapters ejected, or the adapter will not load"
        )
    still = [
        fqn for fqn, one in factors.items()
        if one.zero_factor and not getattr(one, one.zero_factor).detach().any()
    ]  # fmt: skip
    if 0 < len(still) < len(factors):
        texts.append(
            f"adapter {adapter!r} adds nothing in {len(still)} of {len(factors)} layers (first: "
            f"{still[0]}): no gradient has reached them; does the model call these modules, or "
            f"others that it kept before inject?"
        )
    return texts


def plain_state(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with what LoRA wraps under the plain model's names.

    Merged layers are plain ones. Of others the adapters keep their own names, by which Trainer
    resumes; trained copies are in their places already.
    """
    survey = Survey(model)
    layers, merged, found = survey.layers, bool(survey.merged), {}
    for name, value in state.items():
        dots = [i for i, character in enumerate(name) if character == "."]
        fqn = next((name[:i] for i in dots if name[:i] in layers), None)
        part = "" if fqn is None else name[len(fqn) + 1 :]
        if part.startswith("base."):
            found[f"{fqn}.{part.removeprefix('base.')}"] = value
        elif not is_copy(name) and not (merged and part.startswith("adapters.")):
            found[name] = value
    return found


def save_pretrained(model: Any, save_directory: str | Path, *args: Any, **options: Any) -> None:
    """Write the base under plain names and, unless it is merged, the active adapter beside it."""
    survey = Survey(model)
    names, merged = survey.active, bool(survey.merged)
    how = "minilora.save(model, folder) writes the adapter alone"
    if quantized_layers(model):
        raise ValueError(
            f"save_pretrained() needs a base in floating point, found layers that "
            f"minilora.quantize stores; {how}"
        )
    if len(names) > 1 and not merged:
        raise ValueError(
            f"save_pretrained() writes one active adapter, found {', '.join(names)}; activate one "
            f"of them, or minilora.save(model, folder, adapter=...)"
        )
    factors = [one for name in survey.adapters for one in survey.factors(name).values()]
    if not merged and any(one.magnitude is not None for one in factors):
        warnings.warn(
            "minilora: transformers' from_pretrained leaves out what DoRA learned of row lengths; "
            "read this folder's adapter with minilora.load or PEFT, on the base",
            stacklevel=2,
        )
    state = options.pop("state_dict", None)
    options["state_dict"] = plain_state(model, model.state_dict() if state is None else state)
    if names and not merged and options.get("is_main_process", True):
        save_adapter(survey, Path(save_directory), names[0])
    untied = say_untied(model) if merged else []
    try:
        type(model).save_pretrained(model, save_directory, *args, **options)
    finally:
        for config in untied:  # `unmerge` ties them again
            config.tie_word_embeddings = True


write_pretrained_by(save_pretrained)
