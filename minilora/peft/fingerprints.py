"""A base by samples of its values, so that no adapter is loaded onto another one unnoticed."""

import base64
import contextlib
import json
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilora.files import parse_json, tensor_file
from minilora.lora import (
    LoRALayer,
    Survey,
    are_floats,
    base_of,
    difference,
    equal_but_for_rounding,
    frozen_values,
    weight_sample,
)
from minilora.peft.files import WEIGHTS_FILE, find_pair

# A base of the same storage format must agree exactly, of another floating dtype but for rounding.
# Codes agree with other formats only this closely, and those that another library packs with
# themselves (bitsandbytes rounds its scales anew for some CPUs).
_MIN_COSINE = 0.98


def fingerprint(layers: dict[str, LoRALayer], own: Mapping[str, Tensor] | None = None) -> str:
    """Describe the unmerged base of each layer as JSON: shape, format and sampled weights.

    `own` are the base's own parameters that a trained copy may stand for, by dotted name.
    """
    rows = {}
    for fqn, layer in layers.items():
        sample = layer.sample
        if sample is None:  # else the weight may be merged, or sharded and not at hand
            key = f"{fqn}.weight"
            weight = own[key] if own and key in own else layer.view.values()
            sample = weight_sample(fqn, weight)
        rows[fqn] = {
            "shape": [*layer.view.shape],
            "format": layer.stored,
            "sample": base64.b64encode(sample.numpy().astype("<f4").tobytes()).decode(),
        }
    return json.dumps(rows)


def base_formats(folder: Path) -> dict[str, str]:
    """Return how each base layer was stored when an adapter was saved; of PEFT's files nothing."""
    with tensor_file(find_pair(folder)[1]) as opened:
        metadata = opened.metadata() or {}
    with _readable(folder, "minilora_base"):
        rows = parse_json(metadata.get("minilora_base", "{}"), "it")
        return {fqn: row["format"] for fqn, row in rows.items()}


def check_base(
    survey: Survey,
    folder: Path,
    metadata: dict[str, str],
    names: Collection[str],
    copied: Collection[str],
) -> None:
    """Refuse another base than the one an adapter was trained on, as far as its files tell.

    It adapts the layers `names` and brings trained copies of the parameters `copied`. The base's
    own parameters have to be in place.
    """
    with _readable(folder, "minilora_base"):
        rows = {
            fqn: (row["format"], np.frombuffer(base64.b64decode(row["sample"]), dtype="<f4"))
            for fqn, row in parse_json(metadata.get("minilora_base", "{}"), "it").items()
        }
    unlike = (_unlike(fqn, survey.modules[fqn], *rows[fqn]) for fqn in names if fqn in rows)
    found = next(filter(None, unlike), None)
    with _readable(folder, "minilora_rest"):
        rest = frozen_values(survey, names, copied)
        found = found or difference(rest, metadata.get("minilora_rest", "{}"))
    if found is not None:
        raise ValueError(
            f"{folder} was trained on another base: {found}; load the base it was trained on "
            f"(in Python, verify=False loads it all the same)"
        )
    if "minilora_base" in metadata and not rows.keys() >= set(names):  # PEFT writes none
        warnings.warn(
            f"minilora: {folder} says nothing of the base it was trained on, so a wrong base goes "
            f"unnoticed; compare outputs",
            stacklevel=4,
        )


def _unlike(fqn: str, module: Any, saved_format: str, sample: Any) -> str | None:
    """Say how a layer's weights differ from the saved sample, None if they do not."""
    saved = torch.from_numpy(sample.astype(np.float64))
    base = base_of(module)
    here = weight_sample(fqn, base.values()).to(torch.float64)
    if saved.shape != here.shape:
        same, how = False, f"{len(here)} numbers"
    elif saved_format == base.stored and not base.packed:
        same, how = torch.equal(saved, here), "equal"
        if not same and base.is_quantized and _rounded(saved) != _rounded(here):
            same = equal_but_for_rounding(saved, here)  # computed in another dtype
    elif are_floats(saved_format, base.stored):
        same, how = equal_but_for_rounding(saved, here), "equal but for rounding"
    else:
        norm = float(saved.norm() * here.norm())
        cosine = float(saved @ here) / norm if norm else float(torch.equal(saved, here))
        same, how = cosine >= _MIN_COSINE, f"alike (cosine {cosine:.3f}, {_MIN_COSINE} needed)"
    return None if same else f"sampled weights of {fqn} must be {how} and are not"


def _rounded(values: Tensor) -> bool:
    """Whether values are such that bfloat16 holds."""
    return torch.equal(values.bfloat16().to(values.dtype), values)


@contextlib.contextmanager
def _readable(folder: Path, key: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{folder / WEIGHTS_FILE}: {key} in the metadata must be readable, found "
            f"{type(error).__name__} ({error!s:.200}); save the adapter again "
            f"(in Python, verify=False loads it all the same)"
        ) from None
