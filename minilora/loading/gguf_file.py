"""The model that a GGUF file's metadata and tensors describe."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.files import one_line, short
from minilora.loading.gguf_reader import GGUF, read_tensor
from minilora.loading.source import Source
from minilora.models import FAMILIES, CausalLM, GGUFNames, ModelConfig


def open_gguf(file: GGUF) -> Source:
    """Return the model that a file holds.

    Raises:
        ValueError: an architecture or an option that is not built, by name.
    """
    family, names = _family(file)
    config = _config(file, family, names)
    stored = {_fqn(name, names, family.blocks_name): name for name in file.tensors}
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


def read_metadata(path: Path, metadata: dict[str, Any], tensors: list[str]) -> ModelConfig:
    """Return the configuration that a file with this metadata and these tensors would have."""
    vague: Any = dict.fromkeys(tensors)
    file = GGUF(path, metadata, vague)
    return _config(file, *_family(file))


def _family(file: GGUF) -> tuple[type[CausalLM], GGUFNames]:
    built = {f.gguf.architecture: (f, f.gguf) for f in FAMILIES.values() if f.gguf is not None}
    found = _need(file, "general.architecture")
    if not isinstance(found, str) or found not in built:
        raise ValueError(
            f"'{file.path}' must hold an architecture that is built ({', '.join(sorted(built))}), "
            f"found {short(found)}"
        )
    return built[found]


def _need(file: GGUF, key: str) -> Any:
    if key not in file.metadata:
        raise ValueError(f"'{file.path}' must state {key}, found no such metadata")
    return file.metadata[key]


def _config(file: GGUF, family: type[CausalLM], names: GGUFNames) -> ModelConfig:
    """Read the configuration from the metadata; refuse by name what is not built."""
    prefix = f"{names.architecture}."
    given = {
        key.removeprefix(prefix): value
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    known = names.required | names.optional | names.equal
    for key, value in given.items():
        if key not in known and not (key in names.neutral and value == names.neutral[key]):
            raise ValueError(
                f"'{file.path}': {prefix}{one_line(key, 80)} = {short(value)} is not built"
            )
    if "rope_freqs.weight" in file.tensors:
        raise ValueError(
            f"'{file.path}' scales its rotary frequencies (rope_freqs.weight), which is not built"
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
    config = family.config_class.from_dict(names.completed(entries))
    for key, field in names.equal.items():
        wanted = getattr(config, field)
        if given.get(key, wanted) != wanted:
            raise ValueError(
                f"'{file.path}': {prefix}{key} must be {field}, {wanted}, found "
                f"{short(given[key])}; anything else is not built"
            )
    return config


def _fqn(name: str, names: GGUFNames, blocks: str) -> str:
    """Return the name in the model; a name that the architecture does not have is unchanged."""
    stem, _, leaf = name.rpartition(".")
    if stem in names.whole:
        return f"{names.whole[stem]}.{leaf}"
    block, _, part = stem.removeprefix("blk.").partition(".")
    if stem.startswith("blk.") and block.isascii() and block.isdigit() and part in names.parts:
        return f"{blocks}.{int(block)}.{names.parts[part]}.{leaf}"
    return name
