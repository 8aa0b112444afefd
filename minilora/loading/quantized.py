"""Folders of quantized models: ours, and those transformers wrote with bitsandbytes' NF4.

A folder of ours holds `config.json`, `quantized.safetensors` (the state dict) and
`quantization.json`: `{"version": 1, "layers": {name: {"format": ..., ...}}}`. The weights' file
has another name than Hugging Face's, so that no other reader takes codes for weights.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.files import one_line, parse_json, read_json, reading, short
from minilora.kernels import DYNAMIC_CODE, NF4_TABLE
from minilora.loading.folder import CONFIG, FLOAT_NAMES, find_tensors, stored_tensors
from minilora.loading.source import Layers, Source, family_of
from minilora.models import CausalLM
from minilora.quantization import Quantization, QuantizedLinear

QUANTIZED, LAYERS = "quantized.safetensors", "quantization.json"
_STATE = ".quant_state.bitsandbytes__"  # between a weight's name and its 4-bit type


def is_quantized(folder: Path) -> bool:
    """Return whether a folder holds a quantized model, ours or bitsandbytes'."""
    if (folder / LAYERS).is_file():
        return True
    file = folder / CONFIG
    return file.is_file() and "quantization_config" in read_json(file)


def open_quantized(folder: Path) -> Source:
    """Read what a folder of a quantized model says of its layers and tensors."""
    entries = read_json(folder / CONFIG)
    family = family_of(entries, folder / CONFIG)
    config = family.config_class.from_dict({**entries, "quantization_config": None})
    if not (folder / LAYERS).is_file():
        with reading(f"'{folder}'"):
            layers, held = _bitsandbytes(folder, family)
        shapes = {fqn: tuple(tensor.shape) for fqn, tensor in held.items()}
        floats = (tensor.dtype for tensor in held.values() if tensor.is_floating_point())
        dtype = next(floats, torch.float32)
        return Source(folder, family, config, shapes, held.items(), dtype, layers)
    places = find_tensors([folder / QUANTIZED], lambda name: name)
    places = dict(sorted(places.items()))  # a layer's tensors follow one another
    shapes = {fqn: place.shape for fqn, place in places.items()}
    floats = (FLOAT_NAMES[p.dtype] for p in places.values() if p.dtype in FLOAT_NAMES)
    dtype = next(floats, torch.float32)
    tensors = stored_tensors(places)
    return Source(folder, family, config, shapes, tensors, dtype, described_layers(folder) or {})


def described_layers(folder: Path) -> Layers | None:
    """Return how the layers of a folder of ours are stored, None of another folder."""
    if not (folder / LAYERS).is_file():
        return None
    entries = read_json(folder / LAYERS)
    try:
        if entries["version"] != 1:
            raise ValueError(f"version 1 is read, found {short(entries['version'])}")
        return {
            name: (Quantization.of_stored(row), bool(row["bias"]))
            for name, row in entries["layers"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"'{folder / LAYERS}' must describe the layers: {one_line(repr(error), 200)}"
        ) from None


def layer_rows(small: dict[str, QuantizedLinear]) -> dict[str, Any]:
    """Return what `described_layers` reads, of quantized layers by name."""
    rows = {
        name: {**layer.spec.stored, "bias": layer.bias is not None} for name, layer in small.items()
    }
    return {"version": 1, "layers": rows}


def _bitsandbytes(folder: Path, family: type[CausalLM]) -> tuple[Layers, dict[str, Tensor]]:
    """Return the layers and tensors under our names; only NF4 is read.

    Of a weight W there are W (packed codes), W.absmax, W.quant_map, and with double quantization
    W.nested_absmax and W.nested_quant_map; a JSON text in W.quant_state.bitsandbytes__nf4 has
    the sizes (bitsandbytes, `QuantState.as_dict`).
    """
    files = sorted(folder.glob("*.safetensors"))
    stored = dict(stored_tensors(find_tensors(files, lambda name: name)))
    states = {name.partition(_STATE)[0]: name for name in stored if _STATE in name}
    if not states:
        raise ValueError(
            f"'{folder}' has a quantization_config, found no 4-bit layers of bitsandbytes in it; "
            f"load the unquantized model"
        )
    layers: Layers = {}
    tensors: dict[str, Tensor] = {}
    for weight, key in states.items():
        name = str(family.stored_fqn(weight)).removesuffix(".weight")
        form = key.partition(_STATE)[2]
        if form != "nf4":
            raise ValueError(
                f"{name} in '{folder}' must be NF4, found {short(form)}; can't read it"
            )
        state = parse_json(bytes(stored.pop(key).tolist()), key)
        double = f"{weight}.nested_absmax" in stored
        tables = {"quant_map": torch.tensor(NF4_TABLE, dtype=torch.float32)}
        parts = {"codes": stored.pop(weight).view(torch.uint8)}
        absmax = stored.pop(f"{weight}.absmax")
        if double:
            tables["nested_quant_map"] = DYNAMIC_CODE
            parts["absmax"] = absmax
            parts["absmax2_bits"] = stored.pop(f"{weight}.nested_absmax").view(torch.int32)
            offset = torch.tensor([state["nested_offset"]], dtype=torch.float32)
            parts["offset_bits"] = offset.view(torch.int32)
        else:
            parts["absmax_bits"] = absmax.view(torch.int32)
        for table, ours in tables.items():
            if not torch.equal(stored.pop(f"{weight}.{table}").float(), ours):
                raise ValueError(f"{name} in '{folder}' has a {table} of its own; can't read it")
        spec = Quantization("nf4", state["blocksize"], double)
        shapes = spec.layout(*state["shape"])
        for part, tensor in parts.items():
            count = torch.Size(shapes[part][0]).numel()
            if tensor.numel() != count:
                raise ValueError(
                    f"{name} in '{folder}' must have {count} {part}, found {tensor.numel()}; the "
                    f"file is damaged"
                )
            tensors[f"{name}.{part}"] = tensor.reshape(shapes[part][0])
        layers[name] = spec, f"{weight.removesuffix('.weight')}.bias" in stored
    for name, tensor in stored.items():
        fqn = family.stored_fqn(name)
        if fqn is not None:
            tensors[fqn] = tensor
    return layers, tensors
