"""How an adapter's two files get to the disk and back: as a pair, and whole.

What is minilora's own (a hash that pairs the files, fingerprints of the base) lies in the
safetensors metadata, which PEFT does not read.
"""

import contextlib
import hashlib
import os
from pathlib import Path

from torch import Tensor

from minilora.files import (
    UnwritableError,
    absent,
    beside,
    download,
    folder_below,
    leftovers,
    name_beside,
    on_hub,
    sweep,
    tensor_content,
    tensor_file,
)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PAIRED = "minilora_config_sha256"  # in the weights' metadata


def write_pair(
    folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str], config: bytes
) -> None:
    """Write an adapter's two files; killed at any moment, the old or the new one can be loaded.

    Both are written aside before the first is renamed. Meanwhile an old config that differs goes
    aside too, so that no program reads it with the new weights; `find_pair` finds what fits.
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


def adapter_folder(folder: str | Path) -> Path:
    """Return a folder; of an adapter's name on the hub, the one it is downloaded into."""
    name = on_hub(folder)
    return Path(folder) if name is None else download(name, (), [CONFIG_FILE, WEIGHTS_FILE])


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


def require_pair(folder: Path) -> tuple[Path, Path]:
    """Return the paths of an adapter's config and weights, or raise for a missing one."""
    pair = find_pair(folder)
    for file, name in zip(pair, (CONFIG_FILE, WEIGHTS_FILE), strict=True):
        if not file.is_file():
            missing = f"{name} is missing" if folder.is_dir() else absent(folder)
            raise ValueError(
                f"{folder} must hold {CONFIG_FILE} and {WEIGHTS_FILE}; {missing}"
                f"{folder_below(folder, CONFIG_FILE)}"
            )
    return pair


def _paired(weights: Path) -> str | None:
    """Return the hash of the config that weights belong to, if they are readable and have one."""
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
            f"again; if the edit was meant, in Python: verify=False"
        )
