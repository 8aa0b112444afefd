"""`save_pretrained` of an injected transformers model, which Trainer calls too.

Such a folder reads back as what was saved: the base under its plain names beside the adapter's two
files. Left alone, transformers would write the names of wrapped layers, and read random linears.
"""

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minilora.lora import Survey, is_copy, say_untied, write_pretrained_by
from minilora.peft.saving import save_adapter
from minilora.quantization import quantized_layers


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
    """Write the base under plain names and, unless it is merged, the active adapter beside it.

    Args:
        model: of transformers, with adapters.
        save_directory, args, options: as for transformers' `save_pretrained`.

    Raises:
        ValueError: several adapters are active, or layers are stored by `minilora.quantize`.
    """
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
            UserWarning,
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
