"""Full-precision weights of single layers, read by name from a Hugging Face folder."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_SHARDS = "model.safetensors.index.json"
_MIN_COSINE = 0.9  # between a weight and the same weight in 4 bits; other weights have about 0


class StoredWeights:
    """The tensors of a folder's safetensors files; nothing is read before it is asked for.

    Args:
        folder: holds `model.safetensors`, or an index and the shards it names.

    Raises:
        ValueError: neither is there, or a file is damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = self.folder / _SHARDS
        names = {"model.safetensors"}
        if index.is_file():
            try:
                names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"'{index}' must map tensor names to files: {error}") from None
        self._files: dict[str, Path] = {}
        for name in sorted(names):
            file = self.folder / name
            if not file.is_file():
                raise ValueError(
                    f"into= must name a folder with model.safetensors or {_SHARDS} and its "
                    f"shards, found no {name} in '{self.folder}'"
                )
            try:
                with safe_open(str(file), framework="pt") as opened:
                    self._files |= dict.fromkeys(opened.keys(), file)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"'{file}' is damaged or cut short ({error})") from error

    def find(self, fqn: str) -> str:
        """Return the stored name of a layer's weight; a leading `transformer.` may differ."""
        wanted = f"{fqn}.weight"
        for name in (wanted, wanted.removeprefix("transformer."), f"transformer.{wanted}"):
            if name in self._files:
                return name
        raise ValueError(
            f"'{self.folder}' must hold {wanted} of the unquantized model, found no such tensor; "
            f"name the folder this model was quantized from"
        )

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        with safe_open(str(self._files[name]), framework="pt") as opened:
            return opened.get_tensor(name)

    def reader(self, layers: Mapping[str, Any]) -> Callable[[str], Tensor]:
        """Check that these quantized layers came from here; return how to read one, f32 `[N, K]`.

        Raises:
            ValueError: a layer's weight is missing, of another shape or type, or another weight.
        """
        names = {fqn: self.find(fqn) for fqn in layers}

        def matrix(fqn: str) -> Tensor:
            base, weight = layers[fqn].base, self.read(names[fqn])
            weight = weight if base.plain is torch.nn.Linear else weight.T
            if (
                tuple(weight.shape) != (base.out_features, base.in_features)
                or not weight.is_floating_point()
            ):
                raise ValueError(
                    f"{names[fqn]} in '{self.folder}' must be a floating-point weight for "
                    f"[{base.out_features}, {base.in_features}], found {weight.dtype} of shape "
                    f"{list(weight.shape)}; name the folder this model was quantized from"
                )
            return weight.to(base.device, torch.float32)

        for fqn, layer in layers.items():
            full, here = matrix(fqn).flatten(), layer.base.dequantize(torch.float32).flatten()
            norm = float(full.norm() * here.norm())
            if norm and float(full @ here) < _MIN_COSINE * norm:
                raise ValueError(
                    f"{names[fqn]} in '{self.folder}' is not the weight {fqn} was quantized from "
                    f"(cosine {float(full @ here) / norm:.3f}, {_MIN_COSINE} needed); name the "
                    f"folder this model was quantized from"
                )
        return matrix
