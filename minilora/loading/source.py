"""A model on the disk, however it is stored, put together one tensor at a time."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.files import nearest, short
from minilora.kernels import fastest_dtype
from minilora.loading.fetching import hub_name
from minilora.lora import as_dtype, base_of, check_quantizable, select_targets
from minilora.models import FAMILIES, CausalLM, NotBuiltError
from minilora.quantization import Quantization, QuantizedLinear, is_finite

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HEAD = "lm_head.weight"

# By name: how a layer is stored, and whether it has a bias.
Layers = dict[str, tuple[Quantization, bool]]
Put = Callable[[str, Any], None]  # takes a name in the model, and a tensor or a QuantizedLinear
Prepare = Callable[[Any], Put]  # takes the model on the meta device


@dataclass(frozen=True)
class Source:
    """What a folder or file holds.

    Attributes:
        path: named in messages.
        family, config: of the model.
        shapes: of the stored tensors, by their names in the model.
        tensors: the same names with the tensors, read when asked for the next.
        dtype: of the floating-point tensors.
        layers: those that are stored quantized.
        metadata: of a GGUF file, which describes the tokenizer too; None for a folder.
    """

    path: Path
    family: type[CausalLM]
    config: Any
    shapes: dict[str, tuple[int, ...]]
    tensors: Iterable[tuple[str, Tensor]]
    dtype: torch.dtype
    layers: Layers = field(default_factory=dict)
    metadata: dict[str, Any] | None = None

    @property
    def end_of_text(self) -> str | None:
        """The token that ends a text where the tokenizer's files name none."""
        return self.family.end_of_text


def family_of(entries: dict[str, Any], file: Path) -> type[CausalLM]:
    """Return the family that a `config.json` names."""
    named = entries.get("model_type")
    if not isinstance(named, str) or named not in FAMILIES:
        kind = NotBuiltError if isinstance(named, str) else ValueError
        raise kind(
            f"'{file}' must name a model_type that is built ({', '.join(sorted(FAMILIES))}), found "
            f"{short(named)}{nearest_of(str(named), FAMILIES)}"
        )
    return FAMILIES[named]


def nearest_of(named: str, known: Iterable[str]) -> str:
    """Say which known name a name begins with, as later versions do, or else is most like."""
    begun = [each for each in known if named.startswith(each)]
    return f"; nearest: {max(begun, key=len)}" if begun else nearest(named, known)


def resolve_dtype(
    dtype: torch.dtype | str | None, device: torch.device | str = "cpu"
) -> torch.dtype | None:
    """Turn `"auto"` into the fastest dtype there, and a name into its dtype; None stays."""
    if dtype == "auto":
        return fastest_dtype(torch.device(device))
    return None if dtype is None else as_dtype(dtype)


def make_model(
    source: Source,
    dtype: torch.dtype | None,
    device: torch.device | str,
    quantize: Quantization | None = None,
    targets: tuple[Any, ...] = (),
    prepare: Prepare | None = None,
) -> CausalLM:
    """Check that a source holds its model, then put its tensors in.

    Only one stored tensor is alive beside what has been put in. With `quantize`, the layers that
    `targets`, arguments of `select_targets`, choose are quantized.
    """
    blocks, stored = source.config.num_hidden_layers, len(source.shapes)
    if blocks > stored:  # before any is built
        raise ValueError(
            f"a model must have a tensor for each of its blocks, found {blocks} blocks in the "
            f"configuration and {stored} tensors in '{source.path}'; the weights and the "
            f"configuration do not belong together"
        )
    model = source.family(source.config, device="meta").eval()
    empty = partial(_put_empty, source, model, dtype or source.dtype)
    read = {name: empty(name, *row) for name, row in source.layers.items()}
    _check_names_and_shapes(model, source)
    made = {}
    if quantize is not None:
        modules: Any = dict(model.named_modules())
        for name in select_targets(model, *targets):
            made[name] = empty(name, quantize, modules[name].bias is not None)
    if "lm_head" in read or "lm_head" in made:  # which shares no memory with an embedding
        model.config = source.config.replace(tie_word_embeddings=False)
    if prepare is not None:
        dtype = dtype or source.dtype
    put = _set_in(model) if prepare is None else prepare(model.to(dtype))
    for fqn, value in _values(source, read, made, dtype, device):
        put(fqn, value)
    if prepare is None:
        model.tie_weights()
    model.name_or_path = hub_name(source.path) or str(source.path)
    return model


def _put_empty(
    source: Source, model: nn.Module, dtype: torch.dtype, name: str, spec: Quantization, bias: bool
) -> QuantizedLinear:
    """Put a quantized layer on the meta device where a plain one is, and return it."""
    try:
        old: Any = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"'{source.path}' names a quantized layer {name}, which the model of its config.json "
            f"does not have"
        ) from None
    check_quantizable(name, old, spec, values=False)
    N, K = base_of(old).shape
    empty = torch.empty(N, dtype=dtype, device="meta") if bias else None
    small = QuantizedLinear(spec.empty(N, K), K, N, spec, bias=empty, dtype=dtype, plain=type(old))
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, small.eval())
    return small


def _check_names_and_shapes(model: CausalLM, source: Source) -> None:
    """Raise, by name, unless the tensors are those of the model; a tied head may be missing."""
    parameters = model.named_parameters(remove_duplicate=False)
    wanted = {fqn: tuple(parameter.shape) for fqn, parameter in parameters}
    stored = source.shapes
    missing = wanted.keys() - stored.keys()
    if model.config.tie_word_embeddings:
        missing.discard(HEAD)
    wrong = [
        f"{fqn} {list(stored[fqn])} instead of {list(wanted[fqn])}"
        for fqn in sorted(wanted.keys() & stored.keys())
        if stored[fqn] != wanted[fqn]
    ]
    problems = {
        "missing": sorted(missing),
        "unexpected": sorted(stored.keys() - wanted.keys()),
        "of another shape": wrong,
    }
    refuse_other_tensors(source.path, problems)


def refuse_other_tensors(path: Path, problems: dict[str, list[str]]) -> None:
    """Raise where stored tensors are not those of the model; the names of each problem."""
    if any(problems.values()):
        listed = "; ".join(f"{what}: {some(names)}" for what, names in problems.items() if names)
        raise ValueError(
            f"the tensors in '{path}' must be those its configuration describes, found {listed}; "
            f"the weights and the configuration do not belong together"
        )


def some(names: list[str]) -> str:
    """Join the first five names, and say how many more there are."""
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest


def _set_in(model: CausalLM) -> Put:
    """Return what makes a tensor a parameter of the model."""

    def put(fqn: str, value: Any) -> None:
        name, _, leaf = fqn.rpartition(".")
        owner = model.get_submodule(name)
        if isinstance(value, QuantizedLinear):
            for part, stored in value.named_parameters():
                setattr(owner, part, stored)
            return
        frozen = isinstance(owner, QuantizedLinear)
        setattr(owner, leaf, nn.Parameter(value, requires_grad=not frozen))

    return put


def _values(
    source: Source,
    read: dict[str, QuantizedLinear],
    made: dict[str, QuantizedLinear],
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> Iterator[tuple[str, Any]]:
    """Yield what belongs into a model: tensors in their dtype, and quantized layers.

    `read` are the layers that are stored quantized, `made` those to quantize; both are empty.
    """
    tied = source.config.tie_word_embeddings
    held: dict[str, dict[str, Tensor]] = {}  # parts of layers that are not complete yet
    for fqn, tensor in source.tensors:
        owner, _, leaf = fqn.rpartition(".")
        # A copy even where nothing changes: a parameter must not be a view of a mapped file.
        if owner in read and leaf != "bias":
            parts = held.setdefault(owner, {})
            parts[leaf] = tensor.to(device, copy=True)
            if len(parts) == len(read[owner].parts):
                yield f"{owner}.weight", _assembled(owner, held.pop(owner), read[owner], source)
            continue
        if tied and fqn == HEAD:
            continue
        value = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)
        check_finite(fqn, tensor, value)
        # No tensor is read for a head that shares the embedding's.
        names = [owner, "lm_head"] if tied and owner == source.family.embedding_name else [owner]
        for name in names:
            if leaf == "weight" and name in made:
                yield f"{name}.weight", _quantized(value, made[name])
            elif name == owner:
                yield fqn, value


def check_finite(fqn: str, stored: Tensor, value: Tensor) -> None:
    """Raise where a stored tensor's value in another dtype isn't finite."""
    if is_finite(value):
        return
    if is_finite(stored):
        raise ValueError(
            f"{fqn} must be finite in {value.dtype}, found values up to "
            f"{float(stored.abs().max()):.3g}, which that can't hold; name a dtype that can, such "
            f"as dtype=torch.bfloat16 or torch.float32"
        )
    raise ValueError(f"{fqn} must be finite, found NaN or Inf; fetch or write the file again")


def _quantized(weight: Tensor, empty: QuantizedLinear) -> QuantizedLinear:
    matrix = weight if empty.plain is nn.Linear else weight.T  # a Conv1D's is [in, out]
    return _filled(empty, empty.spec.encode(matrix))


def _assembled(
    name: str, parts: dict[str, Tensor], empty: QuantizedLinear, source: Source
) -> QuantizedLinear:
    """Return a layer of stored parts, or raise where they are damaged."""
    reason = empty.spec.damage(parts, empty.out_features, empty.in_features)
    if reason is not None:
        raise ValueError(f"{name} in '{source.path}' {reason}; the file is damaged")
    layer = _filled(empty, parts)
    if layer.dtype == torch.float16 and not is_finite(layer.weight):
        raise ValueError(
            f"{name} in '{source.path}' must be finite in torch.float16, found weights which that "
            f"can't hold; name a dtype that can, such as dtype=torch.bfloat16 or torch.float32"
        )
    return layer


def _filled(empty: QuantizedLinear, parts: dict[str, Tensor]) -> QuantizedLinear:
    """Return a layer without bias that stores these parts, the rest as in the empty one."""
    sizes = empty.in_features, empty.out_features
    rest: Any = {"bias": None, "dtype": empty.dtype, "plain": empty.plain}
    return QuantizedLinear(parts, *sizes, empty.spec, **rest)
