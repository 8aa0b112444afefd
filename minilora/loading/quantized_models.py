"""Language models whose linears are quantized while they are read; folders of quantized models."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.files import (
    is_new,
    one_line,
    read_json,
    reading,
    short,
    tensor_content,
    whole_folder,
    write,
    write_json,
)
from minilora.loading.folder import KINDS, Model, check_blocks, finite, resolve_dtype
from minilora.loading.model import check_tokenizer, load_model
from minilora.loading.quantized_files import (
    LAYERS,
    WEIGHTS,
    bitsandbytes_tensors,
    float_dtypes,
    read_specs,
    stored_tensors,
)
from minilora.lora import check_quantizable, is_conv1d, lora_layers, quantized, select_targets
from minilora.models import Prepare
from minilora.quantization import (
    Quantization,
    QuantizedLinear,
    is_finite,
)
from minilora.text import Tokenizer, as_tokenizer


class _Quantizing:
    """A transform for the model readers: the target's weight becomes a `QuantizedLinear`."""

    def __init__(self, spec: Quantization, targets: tuple[object, ...]):
        self.spec, self.targets = spec, targets
        self.wanted: dict[str, Any] = {}

    def start(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        for name in select_targets(model, *self.targets):  # type: ignore[arg-type]
            check_quantizable(name, modules[name], self.spec, values=False)
            self.wanted[f"{name}.weight"] = modules[name]

    def __call__(self, fqn: str, tensor: torch.Tensor) -> Any:
        module = self.wanted.get(fqn)
        if module is None:
            return tensor
        return QuantizedLinear.from_weight(
            tensor.T if is_conv1d(module) else tensor,
            self.spec,
            plain=type(module),
        )

    def finish(self, model: nn.Module) -> None:
        """Quantize a head that shared the embedding's weight: no tensor was read for it."""
        for name in [key.removesuffix(".weight") for key in self.wanted]:
            module = model.get_submodule(name)
            if not isinstance(module, QuantizedLinear):
                parent, _, child = name.rpartition(".")
                small = quantized(module, self.spec)
                setattr(model.get_submodule(parent), child, small)


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
    prepare: Prepare | None = None,
) -> tuple[Model, Tokenizer]:
    """Read a model and its tokenizer with its linears stored in 8 or 4 bits.

    With a `format`, each weight is quantized as it is read: beside what is loaded so far, one
    tensor is in memory in full precision, and the result is that of `minilora.quantize` after
    loading. Without one the path is a folder of `save_quantized`, or one that transformers saved
    with bitsandbytes' NF4.

    Args:
        path: as for `minilora.loading.load_model`, or a quantized folder.
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
        prepare: as for `load_model`: called with the model on the meta device, its linears
            quantized there; what it returns gets a `QuantizedLinear` under the name of each
            weight that one stands for, and plain tensors otherwise.

    Returns:
        The model in evaluation mode and the tokenizer.

    Raises:
        ValueError: what `load_model` or `minilora.quantize` refuse, or a damaged folder.
    """
    ways = {"compute": compute, "grad_compute": grad_compute, "outliers": outliers}
    Quantization(**ways)  # type: ignore[arg-type]
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
        if prepare is not None:
            model = _read_in_parts(folder, ways, resolve_dtype(dtype), prepare)
        else:
            model = _read(folder, ways, resolve_dtype(dtype), device)
        tokenizer = Tokenizer.from_pretrained(folder)
        check_tokenizer(model, tokenizer, folder)
        return model, tokenizer
    spec = Quantization(format, block_size, double_quant, compute, grad_compute, outliers)  # type: ignore[arg-type]
    transform = _Quantizing(spec, (targets, exclude, layers))
    if prepare is not None:
        return load_model(path, dtype=dtype, prepare=_in_parts(transform, prepare))
    model, tokenizer = load_model(path, dtype=dtype, device=device, transform=transform)
    transform.finish(model)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):  # its bias came as any other
            module.requires_grad_(False)
    return model, tokenizer


def _in_parts(transform: _Quantizing, prepare: Prepare) -> Prepare:
    """Put quantized layers into the model of shapes, and hand on weights quantized."""

    def start(model: Any) -> Any:
        transform.start(model)
        if model.config.tie_word_embeddings and "lm_head.weight" in transform.wanted:
            raise ValueError(
                "a head that shares the embedding's weight can't be read in parts and quantized, "
                "as no tensor is stored for it; leave lm_head out of targets"
            )
        dtype = next(p.dtype for p in model.parameters())
        for fqn, module in transform.wanted.items():
            name, bias = fqn.removesuffix(".weight"), module.bias is not None
            _put_empty(model, name, transform.spec, bias, dtype)
        put = prepare(model)
        return lambda fqn, tensor: put(fqn, transform(fqn, tensor))

    return start


def is_quantized_folder(folder: str | Path) -> bool:
    """Tell a folder of `save_quantized`, or one with bitsandbytes' codes, from others."""
    folder = Path(folder)
    if (folder / LAYERS).is_file():
        return True
    file = folder / "config.json"
    return file.is_file() and "quantization_config" in read_json(file)


def save_quantized(model: nn.Module, folder: str | Path, tokenizer: Any = None) -> None:
    """Write a quantized `Llama` or `GPT2` for `load_quantized`, with a checksum of every tensor.

    Args:
        model: without adapters.
        folder: a new or empty one.
        tokenizer: a `Tokenizer`, or one of transformers', written beside it when given.

    Raises:
        ValueError: a model with adapters or without quantized layers, a folder that holds files.
        TypeError: another kind of model or tokenizer.
        RuntimeError: the folder can't be written; it appears whole or not at all.
    """
    folder = Path(folder)
    tokenizer = None if tokenizer is None else as_tokenizer(tokenizer)
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
    if not is_new(folder):
        raise ValueError(f"save_quantized writes a new or empty folder, found files in '{folder}'")
    state = {n: t.detach().contiguous() for n, t in model.state_dict().items()}
    config: Any = model.config
    floats = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    rows = {
        name: {**layer.spec.stored, "bias": layer.bias is not None} for name, layer in small.items()
    }
    with whole_folder(folder) as made:
        write(made / WEIGHTS, tensor_content(state, {"format": "pt"}))
        write_json(made / "config.json", config.to_dict(floats))
        write_json(made / LAYERS, {"version": 1, "layers": rows})
        if tokenizer is not None:
            tokenizer.save(made)


def _read(
    folder: Path, ways: dict[str, Any], dtype: torch.dtype | None, device: torch.device | str
) -> Any:
    known, config = _config(folder)
    foreign = not (folder / LAYERS).is_file()
    with reading(f"'{folder}'"):
        tensors = dict(
            bitsandbytes_tensors(folder, known.fqn) if foreign else stored_tensors(folder / WEIGHTS)
        )
    rows = with_ways(tensors.pop("specs") if foreign else read_specs(folder), ways)
    check_blocks(config, len(tensors), folder)
    model = known.model(config, device="meta")
    floats = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
    _put_layers(folder, model, rows, dtype or floats)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = finite(
                f"{name} in '{folder}'", tensor, tensor.to(dtype or tensor.dtype)
            )
    if model.config.tie_word_embeddings and "lm_head" not in rows:
        tensors.setdefault("lm_head.weight", tensors.get(known.embedding))
    _check_names(folder, model, tensors)
    try:
        model.load_state_dict(tensors, assign=True)
    except (RuntimeError, AttributeError) as error:
        raise ValueError(
            f"'{folder}' does not hold the model it describes: {one_line(error, 300)}"
        ) from None
    if "lm_head" not in rows:
        model.tie_weights()
    for name in rows:
        _check_decoded(name, model.get_submodule(name), folder)
    model.name_or_path = str(folder)
    return model.to(device).eval()


def _check_decoded(name: str, layer: QuantizedLinear, folder: Path) -> None:
    """Raise where finite scales give weights that float16, of all dtypes, can't hold."""
    if layer.dtype == torch.float16 and not is_finite(layer.weight):
        raise ValueError(
            f"{name} in '{folder}' must be finite in torch.float16, found weights which that can't "
            f"hold; name a dtype that can, such as dtype=torch.bfloat16 or torch.float32"
        )


def _read_in_parts(
    folder: Path, ways: dict[str, Any], dtype: torch.dtype | None, prepare: Prepare
) -> Any:
    """Read a folder of ours a layer at a time, into what `prepare` returns."""
    if not (folder / LAYERS).is_file():
        raise ValueError(
            f"'{folder}' is in bitsandbytes' format, which is read as a whole; write it anew with "
            f"save_quantized, and read that in parts"
        )
    known, config = _config(folder)
    rows = with_ways(read_specs(folder), ways)
    stored = float_dtypes(folder / WEIGHTS)
    check_blocks(config, len(stored), folder)
    model = known.model(config, device="meta")
    floats = next((d for d in stored.values() if d is not None), torch.float32)
    _put_layers(folder, model, rows, dtype or floats)
    head = ["lm_head.weight"] if model.config.tie_word_embeddings and "lm_head" not in rows else []
    _check_names(folder, model, [*stored, *head])
    put: Any = prepare(model.to(dtype or floats).eval())
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in stored_tensors(folder / WEIGHTS):
        owner, _, leaf = name.rpartition(".")
        if owner not in rows or leaf == "bias":
            put(name, finite(f"{name} in '{folder}'", tensor, tensor.to(dtype or floats)))
            continue
        mine = parts.setdefault(owner, {})
        mine[leaf] = tensor
        spec, _ = rows[owner]
        layer = model.get_submodule(owner)
        layer = getattr(layer, "base", layer)  # adapters may be on it by now
        if len(mine) == len(spec.layout(layer.out_features, layer.in_features)):
            reason = spec.damage(mine, layer.out_features, layer.in_features)
            if reason is not None:
                raise ValueError(f"{owner} in '{folder}' {reason}; the file is damaged")
            sizes = (layer.in_features, layer.out_features)
            small = QuantizedLinear(
                parts.pop(owner), *sizes, spec, bias=None, dtype=dtype or floats
            )
            _check_decoded(owner, small, folder)
            put(f"{owner}.weight", small)
    model.name_or_path = str(folder)
    return model


def with_ways(
    rows: dict[str, tuple[Quantization, bool]], ways: dict[str, Any]
) -> dict[str, tuple[Quantization, bool]]:
    """Return what a folder stores, to be multiplied as asked for."""
    return {name: (replace(spec, **ways), bias) for name, (spec, bias) in rows.items()}


def _check_names(folder: Path, model: Any, found: Iterable[str]) -> None:
    """Raise unless a folder holds the tensors of its model, before any is put in."""
    odd = sorted(set(model.state_dict()) ^ set(found))
    if odd:
        names = one_line(", ".join(odd[:3]), 200)
        raise ValueError(
            f"'{folder}' does not hold the model it describes: {names}"
            f"{f' and {len(odd) - 3:,} more' if len(odd) > 3 else ''} in one of them only"
        )


def _config(folder: Path) -> tuple[Any, Any]:
    """Return the kind of model that a folder describes, and its configuration."""
    config = read_json(folder / "config.json")
    known = KINDS.get(str(config.get("model_type")))
    if known is None:
        raise ValueError(
            f"'{folder}' must hold a model of type {', '.join(KINDS)}, found "
            f"{short(config.get('model_type'))}"
        )
    config.pop("quantization_config", None)
    return known, known.config.from_dict(config)


def _put_layers(
    folder: Path,
    model: Any,
    rows: dict[str, tuple[Quantization, bool]],
    dtype: torch.dtype,
) -> None:
    """Put empty quantized layers where a folder says."""
    for name, (spec, bias) in rows.items():
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"'{folder}' names a quantized layer {name}, which the model of its "
                             f"config.json does not have") from None  # fmt: skip
        check_quantizable(name, old, spec)
        _put_empty(model, name, spec, bias, dtype)


def _put_empty(model: Any, name: str, spec: Quantization, bias: bool, dtype: torch.dtype) -> None:
    """Put a quantized layer on the meta device where a plain one is."""
    parent, _, child = name.rpartition(".")
    old = model.get_submodule(name)
    N, K = old.weight.shape[::-1] if is_conv1d(old) else old.weight.shape
    empty = torch.empty(N, dtype=dtype, device="meta") if bias else None
    small = QuantizedLinear(spec.empty(N, K), K, N, spec, dtype=dtype, bias=empty, plain=type(old))
    setattr(model.get_submodule(parent), child, small)
