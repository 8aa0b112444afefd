"""Write adapters and models as GGUF files, for llama.cpp and what is built on it.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; an adapter's keys and names:
`llama-adapter.cpp` of llama.cpp, which multiplies B A by `adapter.lora.alpha` / rank.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.files import beside, import_extra
from minilora.loading.gguf_file import read_metadata
from minilora.lora import Approximation, Survey
from minilora.models import (
    CausalLM,
    GGUFNames,
    rotates_alike,
    unread_scaling,
    written_scaling,
)
from minilora.peft import plain_factors
from minilora.quantization import is_finite
from minilora.text import as_tokenizer, gguf_metadata

FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # general.file_type: llama.h's llama_ftype
# Keys whose values llama.cpp wants in floating point.
_FLOATS = re.compile(r"freq_base|factor|epsilon|softcapping|(^|[._])scale$")
_ROPE = re.compile(r"(no_)?rope_|rotary_|original_max|partial_rotary")  # of config.json
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # which the tokenizer's keys tell


def export_gguf(
    model: nn.Module,
    file: str | Path,
    adapter: str | None = None,
    *,
    r: int | None = None,
    dtype: torch.dtype | str | None = None,
) -> Approximation:
    """Write an adapter as a GGUF file, which llama.cpp and Ollama add to a base of the same model.

    It is plain LoRA with the scaling folded into B, as `minilora.export` writes it for PEFT.

    Args:
        model: of a family of `minilora.models` with names in GGUF files; not changed.
        file: written whole, or not at all.
        adapter: which one; None when there is only one, or only one is active.
        r: rank; required for DoRA, None keeps the (largest) rank of any other.
        dtype: of the factors: float32 (None), float16 or bfloat16.

    Returns:
        The relative Frobenius error per layer and overall, rounding to `dtype` included.

    Raises:
        ValueError: what `minilora.export` refuses, a model that llama.cpp has no names for, or an
            adapter on a layer that it adds none to.
        RuntimeError: the package `gguf` is missing, or the file can't be written.
    """
    own, names = _names(model)
    pad = nn.functional.pad
    survey = Survey(model)
    survey.require_layers("export")
    survey.require_unmerged("export")
    adapter = survey.adapter(adapter, "export")
    factors = plain_factors(survey, adapter, r, dtype, "export")
    rank = max(len(A) for A, _, _ in factors.values())
    tensors: dict[str, Tensor] = {}
    for fqn, (A, B, _) in factors.items():
        name = _stored_name(f"{fqn}.weight", own, names)
        tied = fqn == "lm_head" and own.config.tie_word_embeddings  # no tensor of its own there
        if name is None or fqn == own.embedding_name or tied:
            raise ValueError(
                f"a GGUF adapter holds linear layers that llama.cpp has a name for, found {fqn}; "
                "merge the adapter into the model instead (minilora merge)"
            )
        stored = names.stored(f"{fqn}.weight", B, own.config)
        tensors[f"{name}.lora_a"] = pad(A, (0, 0, 0, rank - len(A)))
        tensors[f"{name}.lora_b"] = pad(stored, (0, rank - len(A)))
    metadata: dict[str, Any] = {"general.type": "adapter", "adapter.type": "lora"}
    metadata["adapter.lora.alpha"] = float(rank)  # divided by the rank: 1
    _write(Path(file), names.architecture, metadata, tensors)
    reports = tuple(report for *_, report in factors.values())
    return Approximation(adapter, "export", reports)


def save_gguf(model: CausalLM, file: str | Path, tokenizer: Any, *, type: str = "f16") -> None:
    """Write a model and its tokenizer as one GGUF file, which llama.cpp and Ollama run.

    Args:
        model: of a family of `minilora.models` with names in GGUF files, without adapters, in
            floating point; not changed.
        file: written whole, or not at all.
        tokenizer: of the model: a byte-level BPE; its chat template goes with it.
        type: of matrices: `"f32"`, `"f16"`, `"bf16"` or `"q8_0"` (8 bits, a scale for each 32
            weights). Vectors are f32.

    Raises:
        ValueError: another model, tokenizer or type, an option that the keys of GGUF files don't
            tell, or a number beyond f16.
        RuntimeError: the package `gguf` is missing, or the file can't be written.
    """
    _, names = _names(model)
    if type not in FILE_TYPES:
        raise ValueError(f"type must be one of {', '.join(FILE_TYPES)}, found {type!r:.40}")
    config: Any = model.config
    plain = model.__class__(config, device="meta").state_dict()
    state = model.state_dict()
    if state.keys() != plain.keys() or any(not v.is_floating_point() for v in state.values()):
        raise ValueError(
            "a GGUF file is written of a plain model in floating point, found adapters or "
            "quantized layers; merge and eject them first (minilora merge)"
        )
    tied = config.tie_word_embeddings and not names.own_head
    if tied:
        state.pop("lm_head.weight")
    tensors: dict[str, Tensor] = {}
    for fqn, value in state.items():
        name = _stored_name(fqn, model, names)
        if name is None:
            raise ValueError(f"a GGUF file has no name for {fqn}; write a folder instead")
        made = names.stored(fqn, value, config)
        tensors[name] = made.mT if names.turns(name) else made
    scaling, rope = written_scaling(config.rope) if names.ropes else ({}, {})
    tensors |= rope
    metadata = {"general.type": "model", "general.file_type": FILE_TYPES[type]}
    metadata |= _model_metadata(model, names)
    metadata |= {f"{names.architecture}.{key}": value for key, value in scaling.items()}
    metadata |= gguf_metadata(as_tokenizer(tokenizer, model), config.vocab_size)
    told = read_metadata(Path(file), model.__class__, metadata, tensors)
    _check_told(config.replace(tie_word_embeddings=tied), told)
    _warn_of_unread(config, names)
    _write(Path(file), names.architecture, metadata, tensors, type)


def _check_told(config: Any, told: Any) -> None:
    """Raise unless a file tells of a configuration all that changes the maths."""
    entries = [
        {k: v for k, v in each.to_dict().items() if not (k in _IDS or _ROPE.match(k))}
        for each in (config, told)
    ]
    ropes = [getattr(each, "ropes", ()) for each in (config, told)]
    if entries[0] != entries[1] or not all(map(rotates_alike, *ropes)):
        raise ValueError(
            f"a GGUF file must tell all of the model's configuration, found {config}, of which it "
            f"tells {told}; write a folder instead"
        )


def _warn_of_unread(config: Any, names: GGUFNames) -> None:
    """Warn of keys of a file that llama.cpp does not read."""
    if names.ropes and (flags := unread_scaling(config.rope)):
        warnings.warn(
            f"minilora: llama.cpp takes these from its command line alone: {flags}", stacklevel=3
        )
    if names.windowless and (config.sliding_window or math.inf) < config.max_position_embeddings:
        warnings.warn(
            f"minilora: llama.cpp knows no window for {names.architecture}, and this model has "
            f"one of {config.sliding_window} tokens: it goes on differently after longer texts",
            stacklevel=3,
        )


def _model_metadata(model: CausalLM, names: GGUFNames) -> dict[str, Any]:
    """Return the keys of a model's configuration."""
    keys = names.required | names.optional | names.equal
    values: dict[str, Any] = {k: getattr(model.config, field) for k, field in keys.items()}
    for key, value in values.items():
        if _FLOATS.search(key) and type(value) is int:  # as config.json may have it
            values[key] = float(value)
    return {f"{names.architecture}.{k}": v for k, v in values.items() if v is not None}


def _add_value(writer: Any, key: str, value: Any) -> None:
    adders = [(bool, writer.add_bool), (int, writer.add_uint32), (float, writer.add_float32)]
    adders += [(str, writer.add_string), (object, writer.add_array)]
    next(add for kind, add in adders if isinstance(value, kind))(key, value)


def _names(model: nn.Module) -> tuple[CausalLM, GGUFNames]:
    if not isinstance(model, CausalLM) or model.gguf is None:
        raise ValueError(
            f"a GGUF file needs a model whose names in it are built, found {type(model).__name__}; "
            "llama.cpp's own converters read PEFT's adapters and merged folders (minilora export, "
            "minilora merge)"
        )
    return model, model.gguf


def _stored_name(fqn: str, model: CausalLM, names: GGUFNames) -> str | None:
    """Return what a GGUF file calls a tensor of the model, None if it has no name."""
    module, _, leaf = fqn.rpartition(".")
    whole = {ours: theirs for theirs, ours in names.whole.items()}
    if module in whole:
        return f"{whole[module]}.{leaf}"
    if not module.startswith(f"{model.blocks_name}."):
        return None
    block, _, part = module.removeprefix(f"{model.blocks_name}.").partition(".")
    parts = {ours: theirs for theirs, ours in names.parts.items()}
    return f"blk.{block}.{parts[part]}.{leaf}" if part in parts else None


def _write(
    file: Path,
    architecture: str,
    metadata: dict[str, Any],
    tensors: dict[str, Tensor],
    type: str | None = None,
) -> None:
    """Write a file whole or not at all."""
    gguf = import_extra("gguf", "a GGUF file to be written")
    with beside(file, b"") as made:
        writer = gguf.GGUFWriter(made, architecture)
        try:
            for key, value in metadata.items():
                _add_value(writer, key, value)
            for name, tensor in tensors.items():
                _add(gguf, writer, name, tensor, type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        with open(made, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(made, file)


def _add(gguf: Any, writer: Any, name: str, tensor: Tensor, type: str | None) -> None:
    """Add a tensor; with a type a matrix becomes that, and anything else f32."""
    tensor = tensor.detach().cpu().contiguous()
    kinds = gguf.GGMLQuantizationType
    if type is not None:
        blocks = tensor.shape[-1] % 32 == 0
        kind = type if tensor.dim() > 1 and (type != "q8_0" or blocks) else "f32"
        if kind == "q8_0":
            raw = gguf.quants.quantize(tensor.float().numpy(), kinds.Q8_0)
            writer.add_tensor(name, raw, raw_dtype=kinds.Q8_0)
            return
        wide = tensor
        tensor = tensor.to(
            {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
        )
        if not is_finite(tensor):
            raise ValueError(
                f"{name} must be finite in {kind}, found values up to "
                f"{float(wide.abs().max()):.3g}; write another type (bf16 or f32)"
            )
    if tensor.dtype == torch.bfloat16:  # which numpy has no name for
        raw = tensor.view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=kinds.BF16)
    else:
        writer.add_tensor(name, tensor.numpy())
