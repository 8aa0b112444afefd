"""The base's values outside the adapted weights: what an adapter depends on and does not hold.

Heads, embeddings, norms, biases, layers without an adapter, running statistics. A sample of each
is saved beside the adapter, so that it is not loaded over another head without a word.
"""

import base64
import hashlib
import json
from collections.abc import Container, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minilora.lora.base import is_quantized
from minilora.lora.survey import Survey
from minilora.lora.wrappers import joined

# transformers puts this on every parameter that it has read from a checkpoint.
_READ = "_is_hf_initialized"

_FLOATS = ("float16", "bfloat16", "float32", "float64")


def are_floats(*formats: str) -> bool:
    """Whether values of these formats differ by rounding alone."""
    return all(each in _FLOATS for each in formats)


def equal_but_for_rounding(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may hold the same values, each rounded to a dtype of 16 bits or more."""
    return torch.allclose(a, b, rtol=2**-7, atol=1e-6)


def marked_as(read: bool, parameter: nn.Parameter) -> nn.Parameter:
    """Return a parameter that counts as read from a checkpoint, or not, in place of another."""
    if read:
        setattr(parameter, _READ, True)
    return parameter


def is_read(parameter: Any) -> bool:
    """Whether transformers has read a parameter from a checkpoint."""
    return getattr(parameter, _READ, False)


def weight_sample(fqn: str, weight: Tensor, count: int = 64) -> Tensor:
    """Return `count` f32 weights at positions drawn from the dotted name: a base's fingerprint.

    The positions depend on the name and the number of elements alone, so two bases of one shape
    are compared at the same places.
    """
    seed = int.from_bytes(hashlib.sha256(fqn.encode()).digest()[:8], "little") >> 1
    generator = torch.Generator().manual_seed(seed)
    where = torch.randint(weight.numel(), (count,), generator=generator)
    flat = weight.detach().reshape(-1)
    return flat[where.to(weight.device)].to(torch.float32).cpu()


def frozen_values(
    model: nn.Module | Survey, adapted: Container[str], copied: Container[str]
) -> dict[str, Tensor]:
    """Return the base's own values that an adapter does not bring along, by dotted name.

    Left out are the weights of layers that are `adapted` and parameters that are `copied`, what
    quantized layers store in place of a weight, what a merge has changed, and what is on no device
    or only in part at hand.
    """
    survey = Survey.of(model)
    merged = {fqn: layer for fqn, layer in survey.layers.items() if layer.merged}
    changed = {f"{fqn}.weight" for fqn in merged} | {
        f"{fqn}.bias" for fqn, layer in merged.items()
        if any(name not in layer.adapters or layer.adapters[name].lora_bias is not None
               for name in layer.merged)
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, (module, key) in survey.parameters.items():
        layer = name.rpartition(".")[0]
        held = name in copied or name in changed or (key == "weight" and layer in adapted)
        if not held and (key == "bias" or not is_quantized(module)):
            found[name] = survey.original(name)
    for name, module in survey.everything.items():
        if name not in merged and not is_quantized(module):
            for key, buffer in module._buffers.items():
                if key not in module._non_persistent_buffers_set:
                    found[joined(name, key)] = buffer
    return {name: value for name, value in found.items() if _at_hand(value)}


def _at_hand(value: Tensor | None) -> bool:
    if value is None or not value.is_floating_point() or not value.numel():
        return False
    return not value.is_meta and not hasattr(value, "full_tensor")


def _sample(name: str, value: Tensor) -> Tensor:
    """Return values from anywhere and from the last row, where a vocabulary grows."""
    value = value.reshape(1) if value.dim() == 0 else value
    return torch.cat([weight_sample(name, value, 24), weight_sample(name, value[-1:], 8)])


def _format(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def describe(values: Mapping[str, Tensor]) -> str:
    """Describe values as JSON: shape, dtype and a sample; a tied one once, then by its name."""
    rows: dict[str, dict] = {}
    first: dict[int, str] = {}
    for name, value in values.items():
        if first.setdefault(id(value), name) != name:
            rows[name] = {"as": first[id(value)]}
            continue
        sample = _sample(name, value).numpy().astype("<f4")
        rows[name] = {
            "shape": list(value.shape),
            "format": _format(value),
            "sample": base64.b64encode(sample.tobytes()).decode(),
        }
    return json.dumps(rows)


def difference(values: Mapping[str, Tensor], description: str) -> str | None:
    """Say how a base differs from the one described, None if it does not; absent names pass.

    Values of one dtype must be equal, of two floating dtypes equal but for rounding. A damaged
    description raises ValueError, KeyError, TypeError or AttributeError.
    """
    rows = dict(json.loads(description))
    for name, value in values.items():
        if name not in rows:
            continue
        first = rows[name].get("as", name)  # what was tied had the values of the first name
        row = rows[first]
        shape, dtype = list(row["shape"]), row["format"]
        saved = torch.from_numpy(np.frombuffer(base64.b64decode(row["sample"]), "<f4").copy())
        if shape != list(value.shape):
            grown = value.dim() == 2 and shape[1:] == list(value.shape[1:])
            do = f" (a vocabulary that grew: model.resize_token_embeddings({shape[0]}) first)"
            found = f"{name} had shape {shape} there, and has {list(value.shape)} here"
            return found + do * grown
        here = _sample(first, value)
        if dtype == _format(value):
            same = torch.equal(saved, here)
        else:  # codes of another storage format can't be compared
            same = not are_floats(dtype, _format(value)) or equal_but_for_rounding(saved, here)
        if not same:
            module = name.rpartition(".")[0] or name
            return (
                f"the values of {name} are others; if loading draws them at random (a new head, "
                f"new rows), train and save them with modules_to_save={[module]}"
            )
    return None


def drawn_modules(model: nn.Module | Survey, copied: Container[str] = ()) -> list[str]:
    """Return the modules with values drawn at random, not `copied`, beside those of a checkpoint.

    Known for models of transformers' `from_pretrained` alone: what it did not read is a new head,
    a layer put in afterwards, or a vocabulary that has grown. Constant values count as known.
    """
    survey = Survey.of(model)
    values = {name: survey.original(name) for name in survey.parameters}
    codes = {n.rpartition(".")[0] for n, value in values.items() if not value.is_floating_point()}
    values = {
        n: value for n, value in values.items()
        if type(value) is nn.Parameter and _at_hand(value) and n.rpartition(".")[0] not in codes
    }  # fmt: skip
    unread = {n: value for n, value in values.items() if not is_read(value)}
    if 2 * len(unread) > len(values):  # made from a config, or the marks are lost
        return []
    drawn = {v for v in unread.values() if bool(v.detach().min() != v.detach().max())}
    drawn |= _grown(survey.root)
    found = [n for n, value in values.items() if value in drawn and n not in copied]
    return list(dict.fromkeys(name.rpartition(".")[0] for name in found))


def _grown(root: Any) -> set[nn.Parameter]:
    """Return the weights of embedding and head, if the stored config has another vocabulary."""
    config, name = getattr(root, "config", None), getattr(root, "name_or_path", None)
    read = getattr(type(config), "from_pretrained", None)
    if read is None or not name:
        return set()
    try:
        stored = read(name, local_files_only=True).get_text_config().vocab_size
        here = config.get_text_config().vocab_size  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError):
        return set()
    ends = (root.get_input_embeddings(), root.get_output_embeddings())
    return {end.weight for end in ends if end is not None and stored != here}
