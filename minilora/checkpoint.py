"""PEFT's two files, written as a pair and read strictly: only here are PEFT's keys known.

Layout and keys: huggingface/peft, `src/peft/utils/save_and_load.py` and `peft/config.py`. What is
minilora's own (a hash that pairs the files, a fingerprint of the base) lies in the safetensors
metadata, which PEFT does not read.
"""

import base64
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from minilora.adapter_config import config_of, read_config
from minilora.adapters import adapter_names, require_layers
from minilora.injection import as_dtype, attach, check_adapter_name
from minilora.kernels import check_backend
from minilora.layers import LoRAAdapter, LoRALinear, lora_layers, weight_sample
from minilora.selection import pattern_value, plain_modules, select_targets

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# A base of the same storage format must agree exactly; another format only this closely.
_MIN_COSINE = 0.98


def _key(fqn: str, factor: str) -> str:
    return f"base_model.model.{fqn}.{factor}.weight"


def _storage_format(weight: Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")


def _fingerprint(layers: dict[str, LoRALinear]) -> str:
    rows = {}
    for fqn, layer in layers.items():
        weight = layer.base.weight
        sample = weight_sample(fqn, weight) if layer.base_sample is None else layer.base_sample
        rows[fqn] = {
            "shape": [layer.out_features, layer.in_features],
            "format": _storage_format(weight),
            "sample": base64.b64encode(sample.numpy().astype("<f4").tobytes()).decode(),
        }
    return json.dumps(rows)


def _write_pair(files: dict[Path, bytes]) -> None:
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


def _serialize(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
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


def save(model: nn.Module, folder: str | Path, adapter: str | None = None) -> Path:
    """Write an adapter as PEFT's two files, so that PEFT, vLLM and `load` read it.

    The adapter named `default` goes to `folder`, any other to `folder/<name>`. Both files are
    written aside first; the weights carry the config's SHA-256, and the config is renamed last, so
    a crash in between is detected by `load`. A merged model's adapter is written unmerged.

    Args:
        model: a model with adapters; not changed.
        folder: made if missing; the two files in it are replaced.
        adapter: which one; None when there is only one, or only one is active.

    Returns:
        The folder that holds the two files.

    Raises:
        ValueError: no adapter, an unknown one, several without a name, factors with NaN or Inf.
        OSError: the folder can't be written; what was there before stays.
    """
    layers = require_layers(model, "save")
    adapter = _only_adapter(model, layers) if adapter is None else adapter
    return save_adapter(
        model, Path(folder) if adapter == "default" else Path(folder) / adapter, adapter
    )


def save_adapter(model: nn.Module, out: Path, adapter: str) -> Path:
    """Write the two files into exactly this folder, whatever the adapter's name; see `save`."""
    layers = require_layers(model, "save")
    layers = {fqn: layer for fqn, layer in layers.items() if adapter in layer.adapters}
    if not layers:
        raise ValueError(
            f"there is no adapter {adapter!r}; this model has: {', '.join(adapter_names(model))}"
        )
    tensors: dict[str, Tensor] = {}
    for fqn, layer in layers.items():
        for factor in ("lora_A", "lora_B"):
            value = getattr(layer.adapters[adapter], factor).detach()
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"{fqn}: {factor} of adapter {adapter!r} must be finite, found NaN or Inf; "
                    f"nothing was written"
                )
            tensors[_key(fqn, factor)] = value.cpu().clone().contiguous()
    text = json.dumps(config_of(model, layers, adapter), indent=2, sort_keys=True) + "\n"
    config = text.encode()
    metadata = {
        "format": "pt",
        "minilora_config_sha256": hashlib.sha256(config).hexdigest(),
        "minilora_base": _fingerprint(layers),
    }
    out.mkdir(parents=True, exist_ok=True)
    _write_pair({out / WEIGHTS_FILE: _serialize(tensors, metadata), out / CONFIG_FILE: config})
    return out


def _only_adapter(model: nn.Module, layers: dict[str, LoRALinear]) -> str:
    names = adapter_names(model)
    in_use = {name for layer in layers.values() for name in (layer.merged or layer.active)}
    for choice in (names, sorted(in_use)):
        if len(choice) == 1:
            return choice[0]
    raise ValueError(f"several adapters are there ({', '.join(names)}); say which with adapter=...")


def _read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            return tensors, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} must be a whole safetensors file, but reading it failed ({error}); "
            f"it may be cut short – save or copy it again"
        ) from None


def _check_pair(folder: Path, config: bytes, metadata: dict[str, str]) -> None:
    expected = metadata.get("minilora_config_sha256")
    found = hashlib.sha256(config).hexdigest()
    if expected is not None and expected != found:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} and {folder / CONFIG_FILE} must be saved together, but the "
            f"weights belong to a config with SHA-256 {expected[:12]}… and this one has "
            f"{found[:12]}…; a save was interrupted or one file was edited. Save the adapter "
            f"again, or pass verify=False if the edit was meant"
        )


def _check_base(
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
        elif saved_format == _storage_format(modules[fqn].weight):
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


def _list_some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _matching(entries: Any, modules: dict[str, Any]) -> Any:
    """Leave out what matches no module: list entries, or a whole regex.

    PEFT writes entries that never matched anything. Nothing is lost by it: `_match_keys` requires
    every key of the file to find its layer.
    """
    if isinstance(entries, str):
        return entries if any(re.fullmatch(entries, name) for name in modules) else []
    names = [f".{name}" for name in modules]
    return [e for e in entries if any(name.endswith(f".{e}") for name in names)]


def _match_keys(file: Path, tensors: dict[str, Tensor], names: list[str]) -> None:
    """Require exactly the keys that the targets call for."""
    expected = {_key(fqn, factor) for fqn in names for factor in ("lora_A", "lora_B")}
    missing, surplus = expected - set(tensors), set(tensors) - expected
    if missing or surplus:
        parts = []
        if missing:
            parts.append(f"missing: {_list_some(missing)}")
        if surplus:
            parts.append(f"not called for by target_modules or the model: {_list_some(surplus)}")
        raise ValueError(
            f"{file} must hold exactly the factors of the targeted layers; {'; '.join(parts)}"
        )


def _build(
    file: Path,
    config: dict,
    tensors: dict[str, Tensor],
    modules: dict[str, Any],
    names,
    dtype,
) -> dict[str, LoRAAdapter]:
    built = {}
    for fqn in names:
        base = modules[fqn]
        r = int(pattern_value(fqn, config["rank_pattern"], config["r"]))
        shapes = {"lora_A": [r, base.in_features], "lora_B": [base.out_features, r]}
        ready: dict[str, nn.Parameter] = {}
        for factor, shape in shapes.items():
            value = tensors[_key(fqn, factor)]
            if list(value.shape) != shape:
                raise ValueError(
                    f"{file}: {_key(fqn, factor)} must have shape {shape} (r={r}, the model's "
                    f"{fqn} is [{base.out_features}, {base.in_features}]), found "
                    f"{list(value.shape)}; is this the model the adapter was trained on?"
                )
            if value.is_floating_point():  # copied: the tensors of the file are mapped from it
                value = value.to(base.weight.device, dtype or torch.float32, copy=True)
            if not value.is_floating_point() or not torch.isfinite(value).all():
                raise ValueError(
                    f"{file}: {_key(fqn, factor)} must hold floats that are finite in "
                    f"{dtype or torch.float32}, found {tensors[_key(fqn, factor)].dtype}"
                )
            ready[factor] = nn.Parameter(value)
        factors = LoRAAdapter(
            base.in_features,
            base.out_features,
            r=r,
            alpha=pattern_value(fqn, config["alpha_pattern"], config["lora_alpha"]),
            dropout=float(config["lora_dropout"]),
            rslora=bool(config.get("use_rslora")),
            init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
            device="meta",
        )
        for factor, parameter in ready.items():
            setattr(factors, factor, parameter)
        built[fqn] = factors
    return built


def load(
    model: nn.Module,
    folder: str | Path,
    adapter: str = "default",
    *,
    trainable: bool = False,
    dtype: torch.dtype | str | None = None,
    compute_dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    verify: bool = True,
) -> nn.Module:
    """Put an adapter that `save` or PEFT wrote onto the model, and activate it alone.

    Everything is checked before the first change: an error leaves the model as it was.

    Args:
        model: a plain model, or one with adapters of other names; changed in place.
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        adapter: the name to give it here.
        trainable: whether its factors require gradients; other adapters keep theirs.
        dtype: of the factors here; None is float32.
        compute_dtype: as for `inject`.
        backend: as for `inject`.
        verify: False skips the pairing of the two files and the comparison of the base with the
            one the adapter was trained on (keys, shapes and values are always checked).

    Returns:
        The same model.

    Raises:
        ValueError: a missing or damaged file, an unsupported option, keys or shapes that do not
            fit the model, another base, a name in use.
        RuntimeError: adapters are merged, or the backend can't run.
    """
    folder = Path(folder)
    check_adapter_name(adapter)
    check_backend(backend)
    dtype = None if dtype is None else as_dtype(dtype)
    compute = None if compute_dtype is None else as_dtype(compute_dtype, "compute_dtype")
    present = lora_layers(model)
    if any(layer.merged for layer in present.values()):
        raise RuntimeError("load() needs unmerged weights; call minilora.unmerge(model) first")
    if adapter in adapter_names(model):
        raise ValueError(
            f"the model already has an adapter {adapter!r}; choose another adapter=..."
        )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} must hold {CONFIG_FILE} and {WEIGHTS_FILE}; {name} is missing"
                f"{_adapters_below(folder)}"
            )
    config = read_config(folder / CONFIG_FILE)
    tensors, metadata = _read_weights(folder / WEIGHTS_FILE)
    if verify:
        _check_pair(folder, (folder / CONFIG_FILE).read_bytes(), metadata)
    modules = plain_modules(model)
    linears = {name: m for name, m in modules.items() if isinstance(m, nn.Linear)}
    entries, excluded = config["target_modules"], config.get("exclude_modules") or ()
    try:
        names = select_targets(
            model, _matching(entries, modules) or entries, _matching(excluded, linears)
        )
    except (ValueError, TypeError, re.error) as error:
        raise ValueError(f"{folder / CONFIG_FILE} does not fit this model: {error}") from None
    _match_keys(folder / WEIGHTS_FILE, tensors, names)
    built = _build(folder / WEIGHTS_FILE, config, tensors, modules, names, dtype)
    if verify:
        samples = {fqn: weight_sample(fqn, modules[fqn].weight) for fqn in names}
        _check_base(folder, metadata, modules, samples)
    attach(model, built, adapter, compute_dtype=compute, backend=backend)
    for fqn, layer in lora_layers(model).items():
        layer.active = (adapter,) if fqn in built else ()
        if fqn in built:
            layer.adapters[adapter].requires_grad_(trainable)
    return model


def _adapters_below(folder: Path) -> str:
    if not folder.is_dir():
        return ""
    below = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG_FILE}"))
    return f"; did you mean {folder / below[0]}?" if below else ""


__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "load", "save"]
