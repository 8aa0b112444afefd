"""What folders of quantized models hold: ours, and transformers' with bitsandbytes' NF4.

A folder of ours holds `config.json`, `quantized.safetensors` (the state dict) and
`quantization.json`: `{"version": 1, "layers": {name: {"format": ..., ...}}}`. The weights' file
has another name than Hugging Face's, so that no other reader takes codes for weights.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from minilora.files import Checksums, one_line, parse_json, read_json, short, tensor_file
from minilora.kernels import DYNAMIC_CODE, NF4_TABLE
from minilora.quantization import Quantization

WEIGHTS, LAYERS = "quantized.safetensors", "quantization.json"
_STATE = ".quant_state.bitsandbytes__"  # between a weight's name and its 4-bit type
_AT_ONCE = 64  # tensors read before a file is mapped anew, so that read pages don't pile up
_FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
}  # fmt: skip


def stored_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a file's tensors one by one in the order of their names, each a copy of its own.

    Raises:
        ValueError: the file is damaged, or values are not those that its checksums are of.
        RuntimeError: it can't be read.
    """
    names = sorted(float_dtypes(file))  # a layer's tensors follow one another
    for start in range(0, len(names), _AT_ONCE):
        with tensor_file(file) as opened:
            sums = Checksums(file, opened.metadata() or {})
            for name in names[start : start + _AT_ONCE]:
                tensor = opened.get_tensor(name).clone()  # the file is mapped
                sums.check(name, tensor)
                yield name, tensor


def float_dtypes(file: Path) -> dict[str, torch.dtype | None]:
    """Return the names of a file's tensors, and the dtypes of those that are floating point."""
    with tensor_file(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {name: _FLOATS.get(one.get_dtype()) for name, one in slices.items()}


def read_specs(folder: Path) -> dict[str, tuple[Quantization, bool]]:
    """Return format and whether there is a bias of each quantized layer of a folder of ours.

    Raises:
        ValueError: the description is damaged, or of another version.
    """
    entries = read_json(folder / LAYERS)
    try:
        if entries["version"] != 1:
            raise ValueError(f"version 1 is read, found {short(entries['version'])}")
        return {
            name: (
                Quantization(row["format"], row["block_size"], row["double_quant"]),
                bool(row["bias"]),
            )
            for name, row in entries["layers"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"'{folder / LAYERS}' must describe the layers: {one_line(repr(error), 200)}"
        ) from None


def bitsandbytes_tensors(folder: Path, fqn_of: Any) -> Iterator[tuple[str, Any]]:
    """Yield tensors under our names, and last `specs`; only NF4 is read.

    Of a weight W there are W (packed codes), W.absmax, W.quant_map, and with double quantization
    W.nested_absmax and W.nested_quant_map; a JSON text in W.quant_state.bitsandbytes__nf4 has
    the sizes (bitsandbytes, `QuantState.as_dict`).
    """
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= dict(stored_tensors(file))
    states = {name.partition(_STATE)[0]: name for name in found if _STATE in name}
    if not states:
        raise ValueError(
            f"'{folder}' has a quantization_config, found no 4-bit layers of bitsandbytes in it; "
            f"load the unquantized model"
        )
    specs: dict[str, tuple[Quantization, bool]] = {}
    for weight, key in states.items():
        name = str(fqn_of(weight)).removesuffix(".weight")
        kind = key.partition(_STATE)[2]
        if kind != "nf4":
            raise ValueError(
                f"{name} in '{folder}' must be NF4, found {short(kind)}; can't read it"
            )
        state = parse_json(bytes(found.pop(key).tolist()), key)
        double = f"{weight}.nested_absmax" in found
        spec = Quantization("nf4", state["blocksize"], double)
        tables = {"quant_map": torch.tensor(NF4_TABLE)}
        if double:
            tables["nested_quant_map"] = DYNAMIC_CODE
        for table, ours in tables.items():
            if not torch.equal(found.pop(f"{weight}.{table}").float(), ours):
                raise ValueError(f"{name} in '{folder}' has a {table} of its own; can't read it")
        N, K = state["shape"]
        shapes = spec.layout(N, K)
        absmax = found.pop(f"{weight}.absmax")
        parts = {"codes": found.pop(weight).view(torch.uint8)}
        if double:
            parts["absmax"] = absmax
            parts["absmax2_bits"] = found.pop(f"{weight}.nested_absmax").view(torch.int32)
            parts["offset_bits"] = torch.tensor([state["nested_offset"]]).view(torch.int32)
        else:
            parts["absmax_bits"] = absmax.view(torch.int32)
        for part, tensor in parts.items():
            shape = shapes[part][0]
            if tensor.numel() != torch.Size(shape).numel():
                raise ValueError(
                    f"{name} in '{folder}' must have {torch.Size(shape).numel()} {part}, found "
                    f"{tensor.numel()}; the file is damaged"
                )
            yield f"{name}.{part}", tensor.reshape(shape)
        specs[name] = (spec, f"{weight.removesuffix('.weight')}.bias" in found)
    for name, tensor in found.items():
        fqn = fqn_of(name)
        if fqn is not None:
            yield fqn, tensor
    yield "specs", specs
