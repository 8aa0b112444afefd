"""How an adapter's two files get to the disk and back: as a pair, whole, and for one base.

What is minilora's own (a hash that pairs the files, a fingerprint of the base) lies in the
safetensors metadata, which PEFT does not read.
"""

import base64
import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilora.files import (
    UnwritableError,
    beside,
    leftovers,
    name_beside,
    parse_json,
    sweep,
    tensor_content,
    tensor_file,
)
from minilora.lora import LoRALayer, difference, storage_format, weight_sample
from minilora.quantization import packed_format, weight_values

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PAIRED = "minilora_config_sha256"  # in the weights' metadata
# A base of the same storage format must agree exactly; another format only this closely, and one
# that another library packs (bitsandbytes rounds its scales anew for some CPUs).
_MIN_COSINE = 0.98


def fingerprint(layers: dict[str, LoRALayer], own: Mapping[str, Tensor] | None = None) -> str:
    """Describe the unmerged base of each layer as JSON: shape, format and sampled weights.

    `own` are the base's own parameters that a trained copy may stand for, by dotted name.
    """
    rows = {}
    for fqn, layer in layers.items():
        sample = layer.base_sample
        if sample is None:  # else the weight may be merged, or sharded and not at hand
            key = f"{fqn}.weight"
            weight = own[key] if own and key in own else weight_values(layer.base)
            sample = weight_sample(fqn, weight)
        rows[fqn] = {
            "shape": [layer.out_features, layer.in_features],
            "format": layer.base_format or storage_format(layer.base),
            "sample": base64.b64encode(sample.numpy().astype("<f4").tobytes()).decode(),
        }
    return json.dumps(rows)


def write_pair(
    folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str], config: bytes
) -> None:
    """Write an adapter's two files; killed at any moment, the old or the new one can be loaded.

    Both are written aside before the first is renamed. Meanwhile an old config that differs goes
    aside too, so that no program reads it with the new weights; `find_pair` finds what fits.

    Raises:
        RuntimeError: they can't be written; what was there before stays.
    """
    weights_file, config_file = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    metadata = {**metadata, _PAIRED: hashlib.sha256(config).hexdigest()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            beside(weights_file, tensor_content(tensors, metadata)) as new_weights,
            beside(config_file, config) as new_config,
        ):
            old = name_beside(config_file)
            if config_file.is_file() and config_file.read_bytes() != config:
                os.replace(config_file, old)
            try:
                os.replace(new_weights, weights_file)
                os.replace(new_config, config_file)
            except BaseException:
                if old.is_file():
                    os.replace(old, config_file)
                raise
    except OSError as error:
        raise UnwritableError(folder, error) from error
    for file in (weights_file, config_file):
        sweep(folder, file.name)


def find_pair(folder: Path) -> tuple[Path, Path]:
    """Return the paths of an adapter's config and weights; either may be missing.

    They have the final names, unless a save was killed while it renamed: then they are those,
    among the final names and what it left, whose hash fits.
    """
    final = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    configs, weights = ([file, *leftovers(folder, file.name)] for file in final)
    if len(configs) == len(weights) == 1:
        return final
    for one in weights:
        paired = _paired(one)
        if one == final[1] and one.is_file() and paired is None and final[0].is_file():
            return final  # another program's
        for config in configs if paired is not None else ():
            with contextlib.suppress(OSError):
                if hashlib.sha256(config.read_bytes()).hexdigest() == paired:
                    return config, one
    return final


def _paired(weights: Path) -> str | None:
    """Return the hash of the config that weights belong to, if they are whole and have one."""
    with contextlib.suppress(ValueError, RuntimeError), tensor_file(weights) as opened:
        return (opened.metadata() or {}).get(_PAIRED)
    return None


def settle_pair(folder: Path) -> None:
    """Finish the renames of a save that was killed, and remove what it left."""
    names = CONFIG_FILE, WEIGHTS_FILE
    for file, name in zip(find_pair(folder), names, strict=True):
        if file.name != name:
            os.replace(file, folder / name)
    for name in names:
        sweep(folder, name)


def check_pair(folder: Path, config: bytes, metadata: dict[str, str]) -> None:
    """Refuse weights that were saved beside another config."""
    expected = metadata.get(_PAIRED)
    found = hashlib.sha256(config).hexdigest()
    if expected is not None and expected != found:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} and {folder / CONFIG_FILE} must be saved together, but the "
            f"weights belong to a config with SHA-256 {expected[:12]}… and this one has "
            f"{found[:12]}…; a save was interrupted or one file was edited. Save the adapter "
            f"again, or pass verify=False if the edit was meant"
        )


def check_base(
    folder: Path,
    metadata: dict[str, str],
    modules: dict[str, Any],
    samples: dict[str, Tensor],
) -> bool:
    """Compare the base with the one the adapter was trained on; False unless all is known."""
    if "minilora_base" not in metadata:
        return False
    try:
        rows = {
            fqn: (row["format"], np.frombuffer(base64.b64decode(row["sample"]), dtype="<f4"))
            for fqn, row in parse_json(metadata["minilora_base"], "it").items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{folder / WEIGHTS_FILE}: minilora_base in the metadata must be readable, found "
            f"{type(error).__name__} ({error!s:.200}); save the adapter again, or pass verify=False"
        ) from None
    for fqn, (saved_format, raw) in rows.items():
        if fqn not in samples:
            continue  # the keys are checked elsewhere
        saved = torch.from_numpy(raw.astype(np.float64))
        here = samples[fqn].to(torch.float64)
        if saved.shape != here.shape:
            same, how = False, f"{len(here)} numbers"
        elif saved_format == storage_format(modules[fqn]) and not packed_format(modules[fqn]):
            same, how = torch.equal(saved, here), "equal"
        else:
            norm = float(saved.norm() * here.norm())
            cosine = float(saved @ here) / norm if norm else float(torch.equal(saved, here))
            same, how = cosine >= _MIN_COSINE, f"alike (cosine {cosine:.3f}, {_MIN_COSINE} needed)"
        if not same:
            raise ValueError(
                f"{folder} was trained on another base: sampled weights of {fqn} must be {how} "
                f"and are not; load the base it was trained on, or pass verify=False to load it "
                f"all the same"
            )
    return rows.keys() >= samples.keys()


def check_rest(folder: Path, metadata: dict[str, str], values: Mapping[str, Tensor]) -> None:
    """Compare what the adapter depends on and does not hold; older files say nothing of it."""
    try:
        found = difference(values, metadata.get("minilora_rest", "{}"))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{folder / WEIGHTS_FILE}: minilora_rest in the metadata must be readable, found "
            f"{type(error).__name__} ({error}); save the adapter again, or pass verify=False"
        ) from None
    if found is not None:
        raise ValueError(
            f"{folder} was trained on another base: {found}; load the base it was trained on, or "
            f"pass verify=False to load it all the same"
        )
