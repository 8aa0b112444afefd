"""Language models whose linears are quantized while they are read; folders of quantized models.

A folder of ours holds `config.json`, `quantized.safetensors` (the state dict) and
`quantization.json`: `{"version": 1, "dtype": ..., "layers": {name: {"format": ..., ...}}}`. The
weights' file has another name than Hugging Face's, so that no other reader takes codes for weights.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from minilora.bases import check_quantizable
from minilora.kernels import DYNAMIC_CODE, NF4_TABLE
from minilora.layers import is_conv1d
from minilora.lora_layer import lora_layers
from minilora.models import Tokenizer, load_model
from minilora.models.folder import KINDS, Model, read_json, resolve_dtype, write_json
from minilora.quantization import (
    QuantizedLinear,
    Spec,
    check_compute,
    check_outliers,
    check_spec,
    is_finite,
    layout,
)
from minilora.selection import select_targets

_WEIGHTS, _LAYERS = "quantized.safetensors", "quantization.json"
_STATE = ".quant_state.bitsandbytes__"  # between a weight's name and its 4-bit type


class _Quantizing:
    """A transform for the model readers: the target's weight becomes a `QuantizedLinear`."""

    def __init__(self, spec: Spec, ways: dict[str, Any], targets: tuple[object, ...]):
        self.spec, self.ways, self.targets = spec, ways, targets
        self.wanted: dict[str, Any] = {}

    def start(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        for name in select_targets(model, *self.targets):  # type: ignore[arg-type]
            check_quantizable(name, modules[name], self.spec, values=False)
            self.wanted[f"{name}.weight"] = modules[name]

    def __call__(self, fqn: str, tensor: torch.Tensor) -> Any:
        if not is_finite(tensor):
            raise ValueError(f"{fqn} must be finite, found NaN or Inf; fetch the model again")
        module = self.wanted.get(fqn)
        if module is None:
            return tensor
        return QuantizedLinear.from_weight(
            tensor.T if is_conv1d(module) else tensor,
            self.spec,
            plain=type(module),
            **self.ways,
        )


def load_quantized(
    path: str | Path,
    format: str | None = None,
    *,
    targets: object = "all-linear",
    exclude: object = (),
    layers: Iterable[int] | None = None,
    block_size: int = 64,
    double_quant: bool = True,
    compute: str = "auto",
    grad_compute: str = "auto",
    outliers: int = 0,
    dtype: torch.dtype | str | None = "auto",
    device: torch.device | str = "cpu",
) -> tuple[Model, Tokenizer]:
    """Read a model and its tokenizer with its linears stored in 8 or 4 bits.

    With a `format`, each weight is quantized as it is read: beside what is loaded so far, one
    tensor is in memory in full precision, and the result is that of `minilora.quantize` after
    loading. Without one the path is a folder of `save_quantized`, or one that transformers saved
    with bitsandbytes' NF4.

    Args:
        path: as for `minilora.models.load_model`, or a quantized folder.
        format: as for `minilora.quantize`, or None for a quantized folder.
        targets: as for `minilora.quantize`.
        exclude: likewise.
        layers: likewise.
        block_size: likewise.
        double_quant: likewise.
        compute: likewise.
        grad_compute: likewise.
        outliers: likewise.
        dtype: of everything that is not quantized, and of what is computed; `"auto"` the fastest
            here, None as stored.
        device: where the model goes.

    Returns:
        The model in evaluation mode and the tokenizer.

    Raises:
        ValueError: what `load_model` or `minilora.quantize` refuse, or a damaged folder.
    """
    for choice in (compute, grad_compute):
        check_compute(choice)
    check_outliers(outliers)
    ways = {"compute": compute, "grad_compute": grad_compute, "outliers": outliers}
    folder = Path(path)
    stored = is_quantized_folder(folder)
    if format is None and not stored:
        raise ValueError(
            f"without a format, load_quantized needs a quantized folder, found {str(path)!r}; pass "
            f"'int8', 'nf4' or 'int4' to quantize it while reading"
        )
    if stored:
        if format is not None:
            raise ValueError(
                f"'{folder}' is quantized already; load it without a format, or quantize the "
                f"model it was made from"
            )
        model = _read(folder, ways, resolve_dtype(dtype), device)
        return model, Tokenizer.from_pretrained(folder)
    spec = check_spec(format, block_size, double_quant)
    transform = _Quantizing(spec, ways, (targets, exclude, layers))
    model, tokenizer = load_model(path, dtype=dtype, device=device, transform=transform)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):  # its bias came as any other
            module.requires_grad_(False)
    return model, tokenizer


def is_quantized_folder(folder: str | Path) -> bool:
    """Tell a folder of `save_quantized`, or one with bitsandbytes' codes, from others."""
    folder = Path(folder)
    if (folder / _LAYERS).is_file():
        return True
    file = folder / "config.json"
    return file.is_file() and "quantization_config" in read_json(file)


def save_quantized(
    model: nn.Module, folder: str | Path, tokenizer: Tokenizer | None = None
) -> None:
    """Write a quantized `Llama` or `GPT2` for `load_quantized`.

    Args:
        model: without adapters.
        folder: a new or empty one.
        tokenizer: written beside it when given.

    Raises:
        ValueError: a model with adapters or without quantized layers, a folder that holds files.
        TypeError: another kind of model.
    """
    folder = Path(folder)
    if not any(isinstance(model, kind.model) for kind in KINDS.values()):
        raise TypeError(
            f"save_quantized writes a Llama or GPT2 of minilora.models, found "
            f"{type(model).__name__}; save other models by their state_dict()"
        )
    if lora_layers(model):
        raise ValueError(
            "save_quantized writes a base without adapters; save those with minilora.save and "
            "call minilora.eject(model) first"
        )
    small = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if not small:
        raise ValueError("save_quantized needs quantized layers, found none; use save_pretrained")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"save_quantized writes a new or empty folder, found files in '{folder}'")
    folder.mkdir(parents=True, exist_ok=True)
    state = {n: t.detach().contiguous() for n, t in model.state_dict().items()}
    config: Any = model.config
    floats = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    rows = {
        name: {**layer.spec._asdict(), "bias": layer.bias is not None}
        for name, layer in small.items()
    }
    save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})
    write_json(folder / "config.json", config.to_dict(floats))
    write_json(folder / _LAYERS, {"version": 1, "layers": rows})
    if tokenizer is not None:
        tokenizer.save(folder)


def _read(
    folder: Path, ways: dict[str, Any], dtype: torch.dtype | None, device: torch.device | str
) -> Any:
    config = read_json(folder / "config.json")
    known = KINDS.get(str(config.get("model_type")))
    if known is None:
        raise ValueError(
            f"'{folder}' must hold a model of type {', '.join(KINDS)}, found "
            f"{config.get('model_type')!r}"
        )
    foreign = not (folder / _LAYERS).is_file()
    config.pop("quantization_config", None)
    model: Any = known.model(known.config.from_dict(config), device="meta")  # type: ignore[arg-type]
    tensors = dict(_bitsandbytes(folder, known.fqn) if foreign else _tensors(folder / _WEIGHTS))
    rows = tensors.pop("specs") if foreign else _specs(folder)
    floats = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
    for name, (spec, bias) in rows.items():
        parent, _, child = name.rpartition(".")
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"'{folder}' names a quantized layer {name}, which the model of its "
                             f"config.json does not have") from None  # fmt: skip
        check_quantizable(name, old, spec)
        N, K = old.weight.shape[::-1] if is_conv1d(old) else old.weight.shape
        parts = {
            part: torch.empty(shape, dtype=kind, device="meta")
            for part, (shape, kind) in layout(spec, N, K).items()
        }
        small = QuantizedLinear(
            parts, K, N, spec, dtype=dtype or floats,
            bias=torch.empty(N, device="meta") if bias else None, plain=type(old), **ways,
        )  # fmt: skip
        setattr(model.get_submodule(parent), child, small)
    for name, tensor in tensors.items():
        if dtype is not None and tensor.is_floating_point():
            tensors[name] = tensor.to(dtype)
    if model.config.tie_word_embeddings and "lm_head" not in rows:
        tensors.setdefault("lm_head.weight", tensors.get(known.embedding))
    try:
        model.load_state_dict(tensors, assign=True)
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"'{folder}' does not hold the model it describes: {error}") from None
    if "lm_head" not in rows:
        model.tie_weights()
    model.name_or_path = str(folder)
    return model.to(device).eval()


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield name, opened.get_tensor(name).clone()  # the file is mapped
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"'{file}' must be a whole safetensors file, found it damaged, cut short or missing "
            f"({error})"
        ) from None


def _specs(folder: Path) -> dict[str, tuple[Spec, bool]]:
    entries = read_json(folder / _LAYERS)
    try:
        if entries["version"] != 1:
            raise ValueError(f"version 1 is read, found {entries['version']!r}")
        return {
            name: (
                check_spec(row["format"], row["block_size"], row["double_quant"]),
                bool(row["bias"]),
            )
            for name, row in entries["layers"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"'{folder / _LAYERS}' must describe the layers: {error!r}") from None


def _bitsandbytes(folder: Path, fqn_of: Any) -> Iterator[tuple[str, Any]]:
    """Yield tensors under our names, and last `specs`; only NF4 is read.

    Of a weight W there are W (packed codes), W.absmax, W.quant_map, and with double quantization
    W.nested_absmax and W.nested_quant_map; a JSON text in W.quant_state.bitsandbytes__nf4 has
    the sizes (bitsandbytes, `QuantState.as_dict`).
    """
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= dict(_tensors(file))
    states = {name.partition(_STATE)[0]: name for name in found if _STATE in name}
    if not states:
        raise ValueError(
            f"'{folder}' has a quantization_config, found no 4-bit layers of bitsandbytes in it; "
            f"load the unquantized model"
        )
    specs: dict[str, tuple[Spec, bool]] = {}
    for weight, key in states.items():
        name = fqn_of(weight).removesuffix(".weight")
        kind = key.partition(_STATE)[2]
        if kind != "nf4":
            raise ValueError(f"{name} in '{folder}' must be NF4, found {kind}; it can't be read")
        state = json.loads(bytes(found.pop(key).tolist()).decode())
        double = f"{weight}.nested_absmax" in found
        spec = check_spec("nf4", state["blocksize"], double)
        tables = {"quant_map": torch.tensor(NF4_TABLE)}
        if double:
            tables["nested_quant_map"] = DYNAMIC_CODE
        for table, ours in tables.items():
            if not torch.equal(found.pop(f"{weight}.{table}").float(), ours):
                raise ValueError(f"{name} in '{folder}' has a {table} of its own; can't read it")
        N, K = state["shape"]
        shapes = layout(spec, N, K)
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
