"""How an adapter's two files get to the disk and back: as a pair, whole, and for one base.

What is minilora's own (a hash that pairs the files, a fingerprint of the base) lies in the
safetensors metadata, which PEFT does not read.
"""

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from minilora.lora_layer import LoRALayer, storage_format, weight_sample
from minilora.packed import packed_format, weight_values

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
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


def write_pair(files: dict[Path, bytes]) -> None:
    """Write every file aside and flush it to the disk, then rename them in order."""
    asides = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        for path, content in files.items():
            with open(asides[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, aside in asides.items():
            os.replace(aside, path)
    finally:
        for aside in asides.values():
            if aside.is_file():
                aside.unlink()


def serialize_sorted(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return safetensors bytes with the metadata in sorted order: equal content, equal bytes.

    safetensors keeps metadata in a hash map and writes it in an order that changes from call to
    call; its header is JSON behind an 8-byte length, so it is put in order in place.
    """
    data = serialize(tensors, metadata)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > length:  # another writer's escapes: valid as it is
        return data
    return data[:8] + text.ljust(length) + data[8 + length :]


def read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            return tensors, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} must be a whole safetensors file, but reading it failed ({error}); "
            f"it may be cut short – save or copy it again"
        ) from None


def check_pair(folder: Path, config: bytes, metadata: dict[str, str]) -> None:
    """Refuse weights that were saved beside another config."""
    expected = metadata.get("minilora_config_sha256")
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
    """Compare the base with the one the adapter was trained on; False when nothing is known."""
    if "minilora_base" not in metadata:
        return False
    try:
        rows = {
            fqn: (row["format"], np.frombuffer(base64.b64decode(row["sample"]), dtype="<f4"))
            for fqn, row in json.loads(metadata["minilora_base"]).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / WEIGHTS_FILE}: minilora_base in the metadata must be readable, found "
            f"{type(error).__name__} ({error}); save the adapter again, or pass verify=False"
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
    return True
