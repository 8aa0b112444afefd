"""The model that a GGUF file's metadata and tensors describe."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.files import one_line, short
from minilora.loading.gguf_reader import GGUF, read_tensor
from minilora.loading.source import Source, nearest_of
from minilora.models import (
    FAMILIES,
    ROPE_TENSORS,
    CausalLM,
    GGUFNames,
    ModelConfig,
    is_rope_key,
    read_scaling,
)


def open_gguf(file: GGUF) -> Source:
    """Return the model that a file holds."""
    family, names = _family(file)
    rope = {name: read_tensor(file, name) for name in ROPE_TENSORS if name in file.tensors}
    config = _config(file, family, names, rope)
    weights = [name for name in file.tensors if name not in rope]
    stored = {_fqn(name, names, family.blocks_name): name for name in weights}
    shapes = {fqn: file.tensors[name].shape for fqn, name in stored.items()}
    turned = {fqn for fqn, name in stored.items() if names.turns(name)}
    shapes |= {fqn: shapes[fqn][::-1] for fqn in turned}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for fqn, name in stored.items():
            tensor = read_tensor(file, name)
            tensor = tensor.mT.contiguous() if fqn in turned else tensor
            yield fqn, names.restored(fqn, tensor, config)

    return Source(
        file.path, family, config, shapes, tensors(), torch.float32, metadata=file.metadata
    )


def read_metadata(
    path: Path, family: type[CausalLM], metadata: dict[str, Any], tensors: dict[str, Tensor]
) -> ModelConfig:
    """Return the configuration that a family's file with this metadata and these tensors has."""
    names: Any = family.gguf
    vague: Any = dict.fromkeys(tensors)
    rope = {name: tensors[name] for name in ROPE_TENSORS if name in tensors}
    return _config(GGUF(path, metadata, vague), family, names, rope)


def _family(file: GGUF) -> tuple[type[CausalLM], GGUFNames]:
    """Return the family of a file; of those that share an architecture, the first."""
    known = [(family, family.gguf) for family in FAMILIES.values() if family.gguf is not None]
    built = {names.architecture: (family, names) for family, names in reversed(known)}
    found = _need(file, "general.architecture")
    if not isinstance(found, str) or found not in built:
        raise ValueError(
            f"'{file.path}' must hold an architecture that is built ({', '.join(sorted(built))}), "
            f"found {short(found)}{nearest_of(str(found), built)}; load the model's folder or its "
            f"name on the hub, which transformers may know"
        )
    return built[found]


def _need(file: GGUF, key: str) -> Any:
    if key not in file.metadata:
        raise ValueError(f"'{file.path}' must state {key}, found no such metadata")
    return file.metadata[key]


def _config(
    file: GGUF, family: type[CausalLM], names: GGUFNames, rope: dict[str, Tensor]
) -> ModelConfig:
    """Read the configuration from the metadata; refuse by name what is not built."""
    prefix = f"{names.architecture}."
    given = {
        key.removeprefix(prefix): value
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    known = names.required | names.optional | names.equal
    for key, value in given.items():
        scales = is_rope_key(key) and names.ropes
        if not (key in known or scales or value in names.neutral.get(key, ())):
            raise ValueError(
                f"'{file.path}': {prefix}{one_line(key, 80)} = {short(value)} is not built"
            )
    entries = {field: _need(file, prefix + key) for key, field in names.required.items()}
    entries |= {field: given[key] for key, field in names.optional.items() if key in given}
    # What llama.cpp takes where there is no key; a family's config.json may have other defaults.
    for field, value in (("head_dim", None), ("rope_theta", 10000.0)):
        if field in names.optional.values():
            entries.setdefault(field, value)
    if not entries.get("vocab_size"):
        if "token_embd.weight" not in file.tensors:
            raise ValueError(f"'{file.path}' must hold token_embd.weight, found no such tensor")
        entries["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    entries |= {field: tensor in file.tensors for tensor, field in names.biases.items()}
    for field, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        entries[f"{field}_token_id"] = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    entries["tie_word_embeddings"] = "output.weight" not in file.tensors
    entries["model_type"] = family.config_class.model_type
    entries |= _scaling(file, names, given, rope, entries)
    with suppress(TypeError, ZeroDivisionError):  # of a number that from_dict refuses by name
        entries = names.completed(entries)
    config = family.config_class.from_dict(entries)
    for key, field in names.equal.items():
        wanted = getattr(config, field)
        if given.get(key, wanted) != wanted:
            raise ValueError(
                f"'{file.path}': {prefix}{key} must be {field}, {wanted}, found "
                f"{short(given[key])}; anything else is not built"
            )
    return config


def _scaling(
    file: GGUF,
    names: GGUFNames,
    given: dict[str, Any],
    rope: dict[str, Tensor],
    entries: dict[str, Any],
) -> dict[str, Any]:
    """Return the entries of `config.json` that say how rotary frequencies are scaled."""
    if not names.ropes or type(entries.get("rope_theta")) not in (int, float):
        return {}  # such a number is refused by name later
    with suppress(TypeError, ZeroDivisionError):  # of a number that from_dict refuses by name
        heads = entries["hidden_size"] // entries["num_attention_heads"]
        pairs = (given.get("rope.dimension_count") or entries["head_dim"] or heads) // 2
        for name, tensor in rope.items():
            if tensor.shape != (pairs,):
                raise ValueError(
                    f"'{file.path}': {name} must have {pairs} numbers, one for each rotated pair, "
                    f"found {list(tensor.shape)}; fetch another file of the model"
                )
    try:
        theta, context = entries["rope_theta"], entries["max_position_embeddings"]
        found = read_scaling(given, rope, theta, context)
        if found is not None and found.rope_type not in names.ropes:
            raise ValueError(f"the rotary embedding {found.rope_type!r} is not built for it")
    except ValueError as why:
        raise ValueError(f"'{file.path}', of architecture {names.architecture}: {why}") from None
    if found is None:
        return {}
    scaling = found.entries()
    original = scaling.get("original_max_position_embeddings")
    return {"rope_scaling": scaling, "original_max_position_embeddings": original}


def _fqn(name: str, names: GGUFNames, blocks: str) -> str:
    """Return the name in the model; a name that the architecture does not have is unchanged."""
    stem, _, leaf = name.rpartition(".")
    if stem in names.whole:
        return f"{names.whole[stem]}.{leaf}"
    block, _, part = stem.removeprefix("blk.").partition(".")
    if stem.startswith("blk.") and block.isascii() and block.isdigit() and part in names.parts:
        return f"{blocks}.{int(block)}.{names.parts[part]}.{leaf}"
    return name
