"""Save and load adapters as PEFT does: only here are PEFT's keys known.

Keys: huggingface/peft, `src/peft/utils/save_and_load.py`; the config: `adapter_config.py`; how the
two files are written and checked: `adapter_files.py`.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.files import read_tensors
from minilora.kernels import check_backend
from minilora.lora import (
    LoRAAdapter,
    LoRAConv2d,
    LoRAEmbedding,
    LoRALayer,
    TrainedCopies,
    all_adapter_names,
    as_dtype,
    attach,
    check_adapter_name,
    check_open,
    check_whole,
    compiled_pattern,
    copies_of,
    describe,
    drawn_modules,
    frozen_values,
    layer_class,
    lora_layers,
    matrix_shape,
    original_of,
    original_parameters,
    originals_in_place,
    parameter_places,
    pattern_value,
    plain_modules,
    require_layers,
    require_values,
    select_targets,
    set_trainable,
    true_name,
    unwrapped,
    weight_device,
    weight_sample,
)
from minilora.peft.config import config_of, not_for_peft, read_config, weights_named
from minilora.peft.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_base,
    check_pair,
    check_rest,
    find_pair,
    fingerprint,
    write_pair,
)
from minilora.quantization import QuantizedLinear, weight_values

_PREFIX = "base_model.model."


def _keys(fqn: str, kind: type[LoRALayer], config: dict) -> dict[str, str]:
    """Return an adapter's keys for one layer, by the attribute of `LoRAAdapter`."""
    start = f"{_PREFIX}{fqn}."
    if kind is LoRAEmbedding:
        keys = {"lora_A": f"{start}lora_embedding_A", "lora_B": f"{start}lora_embedding_B"}
    else:
        keys = {"lora_A": f"{start}lora_A.weight", "lora_B": f"{start}lora_B.weight"}
    if config.get("lora_bias") and kind is not LoRAEmbedding:
        keys["lora_bias"] = f"{start}lora_B.bias"
    if config.get("use_dora"):
        keys["magnitude"] = f"{start}lora_magnitude_vector"
    return keys


def _copy_key(name: str, targets: Any) -> str:
    """Return the key of a trained copy: PEFT wraps targets, so theirs lie in `base_layer`."""
    module, _, leaf = name.rpartition(".")
    return f"{_PREFIX}{module}.base_layer.{leaf}" if module in targets else f"{_PREFIX}{name}"


def save(
    model: nn.Module,
    folder: str | Path,
    adapter: str | None = None,
    *,
    base_name: str | None = None,
) -> Path:
    """Write an adapter as PEFT's two files, so that PEFT, vLLM and `load` read it.

    The adapter named `default` goes to `folder`, any other to `folder/<name>`. Both files are
    written aside first; killed at any moment, `load` finds the old or the new one. A merged
    model's adapter is written unmerged; one started by PiSSA or OLoRA as an ordinary adapter of
    twice the rank for the untouched base.

    Args:
        model: a model with adapters; not changed.
        folder: made if missing; the two files in it are replaced.
        adapter: which one; None when there is only one, or only one is active.
        base_name: what the config names as the base; None is where the model came from, of a
            model from the hub its name there.

    Returns:
        The folder that holds the two files.

    Raises:
        ValueError: no adapter, an unknown one, several without a name, factors with NaN or Inf,
            a parameter outside the adapter that is being trained.
        RuntimeError: the folder can't be written; what was there before stays.
    """
    layers = require_layers(model, "save")
    adapter = _only_adapter(model, layers) if adapter is None else adapter
    return save_adapter(
        model, Path(folder) if adapter == "default" else Path(folder) / adapter, adapter, base_name
    )


def save_adapter(model: nn.Module, out: Path, adapter: str, base_name: str | None = None) -> Path:
    """Write the two files into exactly this folder, whatever the adapter's name; see `save`."""
    layers = require_layers(model, "save")
    check_whole(model, "save")
    require_values(model, "save")
    layers = {fqn: layer for fqn, layer in layers.items() if adapter in layer.adapters}
    if not layers:
        raise ValueError(
            f"there is no adapter {adapter!r}; this model has: "
            f"{', '.join(all_adapter_names(model))}"
        )
    config = config_of(model, layers, adapter, base_name)
    tensors: dict[str, Tensor] = {}
    for fqn, layer in layers.items():
        factors: Any = layer.adapters[adapter]
        values = dict(factors.named_parameters(recurse=False))
        values["lora_A"], values["lora_B"] = factors.plain()[:2]
        if type(layer) is LoRAConv2d and "magnitude" in values:
            values["magnitude"] = values["magnitude"].reshape(1, -1, 1, 1)
        for name, key in _keys(fqn, type(layer), config).items():
            _require_finite(values[name], f"{fqn}: {name} of adapter {adapter!r}")
            tensors[key] = values[name]
    places = parameter_places(model)
    for name, value in copies_of(model, adapter).items():
        if name not in places:
            raise ValueError(
                f"the adapter has a trained copy of {name}, and this model has no such parameter; "
                f"call save with the module that inject was called with"
            )
        _require_finite(value, f"{name} of adapter {adapter!r}")
        tensors[_copy_key(name, layers)] = value
    copied = copies_of(model, adapter)
    frozen = frozen_values(model, layers, copied)
    if drawn := drawn_modules(model, copied):
        warnings.warn(
            f"minilora: {', '.join(drawn[:4])} of the base holds values drawn at random since it "
            f"was loaded (new rows of a vocabulary, a new head), which the adapter's files do not "
            f"hold: save the base too, with adapters ejected, or the adapter will not load",
            UserWarning,
            stacklevel=3,
        )
    loose = next((name for name, value in frozen.items() if value.requires_grad), None)
    if loose is not None:
        raise ValueError(
            f"{loose} requires gradients, and the adapter's files do not hold it: what is trained "
            f"there would be lost; inject with modules_to_save=[{loose.rpartition('.')[0]!r}], or "
            f"set requires_grad_(False) on it to save the adapter without it"
        )
    _warn_unmoved(layers, adapter)
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    text = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    metadata = {
        "format": "pt",
        "minilora_base": fingerprint(layers, original_parameters(model)),
        "minilora_rest": describe(frozen),
    }
    problem = not_for_peft(model, layers, adapter)
    if problem is not None:
        metadata["minilora_not_for_peft"] = problem
        warnings.warn(f"minilora: {problem}", UserWarning, stacklevel=3)
    write_pair(out, tensors, metadata, text)
    return out


def _warn_unmoved(layers: dict[str, LoRALayer], adapter: str) -> None:
    """Warn of layers that training has left at 0 while it moved others."""
    factors: dict[str, Any] = {fqn: layer.adapters[adapter] for fqn, layer in layers.items()}
    still = [
        fqn for fqn, one in factors.items()
        if one.zero_factor and not getattr(one, one.zero_factor).detach().any()
    ]  # fmt: skip
    if 0 < len(still) < len(factors):
        warnings.warn(
            f"minilora: adapter {adapter!r} adds nothing in {len(still)} of {len(factors)} layers "
            f"(first: {still[0]}): no gradient has reached them; does the model call these "
            f"modules, or others that it kept before inject?",
            UserWarning,
            stacklevel=4,
        )


def _require_finite(value: Tensor, what: str) -> None:
    if not torch.isfinite(value).all():
        raise ValueError(f"{what} must be finite, found NaN or Inf; nothing was written")


def _only_adapter(model: nn.Module, layers: dict[str, LoRALayer]) -> str:
    names = all_adapter_names(model)
    in_use = {name for layer in layers.values() for name in (layer.merged or layer.active)}
    for choice in (names, sorted(in_use)):
        if len(choice) == 1:
            return choice[0]
    raise ValueError(f"several adapters are there ({', '.join(names)}); say which with adapter=...")


def _list_some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _matching(entries: Any, modules: dict[str, Any]) -> Any:
    """Leave out what matches no module: list entries, or a whole regex.

    PEFT writes entries that never matched anything. Nothing is lost by it: `_match_keys` requires
    every key of the file to find its layer.
    """
    if isinstance(entries, str):
        pattern = compiled_pattern(entries, "the config's regular expression")
        return entries if any(map(pattern.fullmatch, modules)) else []
    names = [f".{name}" for name in modules]
    return [e for e in entries if any(name.endswith(f".{e}") for name in names)]


def _wanted_copies(model: nn.Module, config: dict, names: list[str]) -> list[str]:
    """Return the parameters of which the config promises a copy, by dotted name."""
    places = parameter_places(model)
    entries = config.get("modules_to_save") or []
    entries = [entries] if isinstance(entries, str) else entries
    wanted = []
    for name in places:
        module, _, leaf = name.rpartition(".")
        path = f".{module}."
        whole = any(f".{entry}." in path for entry in entries)
        biased = config["bias"] == "all" and "bias" in leaf
        if (
            whole
            or biased
            or (config["bias"] == "lora_only" and module in names and leaf == "bias")
        ):
            wanted.append(name)
    return wanted


def _replaced(
    model: nn.Module, tensors: dict[str, Tensor], adapted: set[str], copied: dict[str, str]
) -> dict[str, str]:
    """Return parameters that the file replaces though no config says so, with their keys.

    PEFT writes embedding and head along when their vocabulary has grown (`save_embedding_layers`),
    and puts any such key into the base. A layer that is tied to one of them follows it.
    """
    places = parameter_places(model)
    found: dict[str, str] = {}
    for name, (module, _) in places.items():
        owner = name.rpartition(".")[0]
        keys = [
            f"{_PREFIX}{owner}.{leaf}" for leaf, p in module._parameters.items() if p is not None
        ]
        if name not in copied and owner not in adapted and all(key in tensors for key in keys):
            found[name] = f"{_PREFIX}{name}"
    held = {id(module._parameters[key]): found[name] for name, (module, key) in places.items()
            if name in found}  # fmt: skip
    for name, (module, key) in places.items():
        if name not in copied and id(module._parameters[key]) in held:
            found.setdefault(name, held[id(module._parameters[key])])
    return found


def _vocabulary(model: nn.Module) -> int | None:
    """Return the rows of the input embedding, where the model says which that is."""
    getter = getattr(unwrapped(model), "get_input_embeddings", None)
    return len(getter().weight) if callable(getter) else None


def _match_keys(file: Path, tensors: dict[str, Tensor], expected: set[str]) -> None:
    """Require exactly the keys that the config calls for."""
    missing, surplus = expected - set(tensors), set(tensors) - expected
    if missing or surplus:
        parts = []
        if missing:
            parts.append(f"missing: {_list_some(missing)}")
        if surplus:
            parts.append(f"not called for by target_modules or the model: {_list_some(surplus)}")
        raise ValueError(
            f"{file} must hold exactly the factors of the targeted layers; {'; '.join(parts)}"
        )


def _unwrapped_keys(tensors: dict[str, Tensor], as_named: bool) -> dict[str, Tensor]:
    """Name tensors as a plain model does: other programs save through wrappers too.

    `as_named` keeps a leading `module`, where the model has such a child of its own.
    """
    tensors = {true_name(key): value for key, value in tensors.items()}
    start = f"{_PREFIX}module."
    if as_named or not all(key.startswith(start) for key in tensors):
        return tensors
    return {_PREFIX + key.removeprefix(start): value for key, value in tensors.items()}


class _Reader:
    """Takes tensors out of a file by key, each checked against the model it is for."""

    def __init__(self, file: Path, tensors: dict[str, Tensor], vocabulary: int | None):
        self.file, self.tensors, self.vocabulary = file, tensors, vocabulary

    def take(self, key: str, shape: list[int], device: torch.device, dtype: torch.dtype, of: str):
        """Return a parameter of this shape there; refuse what isn't finite floats."""
        value = self.tensors[key]
        if list(value.shape) != shape:
            do = "is this the model the adapter was trained on?"
            if self.vocabulary in shape and value.dim() == len(shape):
                rows = value.shape[shape.index(self.vocabulary)]
                do = (
                    f"if its vocabulary was grown, call model.resize_token_embeddings({rows}) first"
                )
            raise ValueError(
                f"{self.file}: {key} must have shape {shape} ({of}), found {list(value.shape)}; "
                f"{do}"
            )
        if value.is_floating_point():  # copied: the tensors of the file are mapped from it
            value = value.to(device, dtype, copy=True)
        if not value.is_floating_point() or not torch.isfinite(value).all():
            raise ValueError(
                f"{self.file}: {key} must hold floats that are finite in {dtype}, found "
                f"{self.tensors[key].dtype}"
            )
        return nn.Parameter(value)


def _build(
    reader: _Reader, config: dict, fqn: str, base: nn.Module, dtype: torch.dtype, by_weight: bool
) -> LoRAAdapter:
    """Make one layer's factors from the file."""
    kind: Any = layer_class(base)
    looked_up = f"{fqn}.weight" if by_weight else fqn
    r = int(pattern_value(looked_up, config["rank_pattern"], config["r"]))
    factors = kind(base).new_adapter(
        r=r,
        alpha=pattern_value(looked_up, config["alpha_pattern"], config["lora_alpha"]),
        dropout=config["lora_dropout"],
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        lora_bias=bool(config.get("lora_bias")) and kind is not LoRAEmbedding,
        init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
        device="meta",
    )
    linear = isinstance(base, (nn.Linear, QuantizedLinear))  # their weight may be packed
    shown = matrix_shape(base) if linear else base.weight.shape
    of = f"r={r}, {fqn} is {list(shown)}"  # type: ignore[arg-type]
    for name, key in _keys(fqn, kind, config).items():
        shape = list(getattr(factors, name).shape)
        if name == "magnitude" and kind is LoRAConv2d:
            shape = [1, *shape, 1, 1]
        value = reader.take(key, shape, weight_device(base), dtype, of)
        if name == "magnitude":
            value = nn.Parameter(value.detach().flatten())
        setattr(factors, name, value)
    return factors


def _check_frozen(reader: _Reader, frozen: dict[str, str], modules: dict[str, Any]) -> None:
    """Compare embeddings' own weights, which PEFT writes along, with the model's."""
    for fqn, key in frozen.items():
        here = modules[fqn].weight.detach().cpu()
        if not torch.equal(reader.tensors[key].to(here.dtype), here):
            raise ValueError(
                f"{reader.file}: {key} must be the weight that {fqn} has in this model, found "
                f"other values; load the base it was trained on, or pass verify=False to keep "
                f"this model's"
            )


def load(
    model: nn.Module,
    folder: str | Path,
    adapter: str = "default",
    *,
    trainable: bool = False,
    replace: bool = False,
    dtype: torch.dtype | str | None = None,
    compute_dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    verify: bool = True,
) -> nn.Module:
    """Put an adapter that `save` or PEFT wrote onto the model, and activate it alone.

    Everything is checked before the first change: an error leaves the model as it was.

    Args:
        model: a plain model, or one with adapters of other names; changed in place.
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        adapter: the name to give it here.
        trainable: whether its parameters require gradients; other adapters keep theirs.
        replace: when an adapter of this name is there, put the file's values into its parameters
            (a hot swap: what is active and trainable stays; ranks and layers must be the same).
        dtype: of the factors here; None is float32.
        compute_dtype: as for `inject`.
        backend: as for `inject`.
        verify: False skips the pairing of the two files, the checksums of the values and the
            comparison of the base with the one the adapter was trained on (keys, shapes and that
            values are finite are always checked).

    Returns:
        The same model.

    Raises:
        ValueError: a missing or damaged file, an unsupported option, keys or shapes that do not
            fit the model, another base, a name in use.
        RuntimeError: adapters are merged, or the backend can't run.
    """
    folder = Path(folder)
    check_adapter_name(adapter)
    check_backend(backend)
    check_open(model, "load")
    dtype = torch.float32 if dtype is None else as_dtype(dtype)
    compute = None if compute_dtype is None else as_dtype(compute_dtype, "compute_dtype")
    if any(layer.merged for layer in lora_layers(model).values()):
        raise RuntimeError("load() needs unmerged weights; call minilora.unmerge(model) first")
    present = adapter in all_adapter_names(model)
    if present and not replace:
        raise ValueError(
            f"the model already has an adapter {adapter!r}; choose another adapter=..., or pass "
            f"replace=True to put the file's values into it"
        )
    for file, name in zip(find_pair(folder), (CONFIG_FILE, WEIGHTS_FILE), strict=True):
        if not file.is_file():
            raise ValueError(
                f"{folder} must hold {CONFIG_FILE} and {WEIGHTS_FILE}; {name} is missing"
                f"{_adapters_below(folder)}"
            )
    with originals_in_place(model):
        built, copies = _read(model, folder, dtype, verify)
    if present:
        _swap(model, adapter, built, {} if copies is None else copies.items())
        return model
    attach(model, built, adapter, copies, compute_dtype=compute, backend=backend)
    set_trainable(model, adapter, trainable)
    return model


def _read(
    model: nn.Module, folder: Path, dtype: torch.dtype, verify: bool
) -> tuple[dict[str, LoRAAdapter], TrainedCopies | None]:
    """Read an adapter's files for this model; nothing is changed."""
    config_file, weights_file = find_pair(folder)
    config = read_config(config_file)
    tensors, metadata = read_tensors(weights_file, check=verify)
    if verify:
        check_pair(folder, config_file.read_bytes(), metadata)
    modules = plain_modules(model)
    tensors = _unwrapped_keys(tensors, "module" in unwrapped(model)._modules)
    adaptable = {name: m for name, m in modules.items() if layer_class(m) is not None}
    entries, excluded = config["target_modules"], config.get("exclude_modules") or ()
    by_weight = weights_named(model, config, folder / CONFIG_FILE)
    try:
        chosen = entries and select_targets(
            model,
            _matching(entries, modules) or entries,
            _matching(excluded, adaptable),
            config.get("layers_to_transform"),
            config.get("layers_pattern") or r"[^.]*",  # PEFT's reading of "no pattern"
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} does not fit this model: {error}") from None
    wanted = {*chosen, *by_weight}
    names = [n for n in modules if n in wanted]
    copied = {n: _copy_key(n, names) for n in _wanted_copies(model, config, names)}
    replaced = _replaced(model, tensors, wanted, copied)
    copied |= replaced
    keys = {key for n in names for key in _keys(n, _kind(modules[n]), config).values()}
    base_keys = {n: f"{_PREFIX}{n}.base_layer.weight" for n in names}
    frozen = {n: key for n, key in base_keys.items() if key in tensors}
    _match_keys(folder / WEIGHTS_FILE, tensors, keys | set(copied.values()) | set(frozen.values()))
    reader = _Reader(folder / WEIGHTS_FILE, tensors, _vocabulary(model))
    built = {n: _build(reader, config, n, modules[n], dtype, n in by_weight) for n in names}
    places = parameter_places(model)
    values = {}
    for name, key in copied.items():
        own = original_of(model, name, places)
        values[name] = reader.take(
            key, list(own.shape), own.device, own.dtype, f"as {name} has here"
        )
    if verify:
        samples = {n: weight_sample(n, weight_values(modules[n])) for n in names}
        known = check_base(folder, metadata, modules, samples)
        check_rest(folder, metadata, frozen_values(model, wanted, copied))
        _check_frozen(reader, frozen, modules)
        if not known and "minilora_base" in metadata:  # PEFT writes nothing of the kind
            warnings.warn(
                f"minilora: {folder} says nothing of the base it was trained on, so a wrong base "
                f"can't be told here; compare outputs",
                stacklevel=3,
            )
    if not values:
        return built, None
    whole = config.get("modules_to_save") or []
    whole = [whole] if isinstance(whole, str) else list(whole)
    whole += dict.fromkeys(name.rpartition(".")[0] for name in replaced)
    return built, TrainedCopies(values, config["bias"], whole)


def _kind(base: nn.Module) -> type[LoRALayer]:
    kind = layer_class(base)
    assert kind is not None  # select_targets let only such modules through
    return kind


def _swap(
    model: nn.Module,
    adapter: str,
    built: dict[str, LoRAAdapter],
    copies: dict[str, nn.Parameter],
) -> None:
    """Put new values into an adapter's parameters, which stay the same objects."""
    layers = {n: m for n, m in lora_layers(model).items() if adapter in m.adapters}
    pairs: list[tuple[Tensor | None, Tensor | None]] = []
    same = set(layers) == set(built) and set(copies) == set(copies_of(model, adapter))
    for name, factors in built.items() if same else ():
        old: Any = layers[name].adapters[adapter]
        for part in ("lora_A", "lora_B", "lora_bias", "magnitude", "offset_A"):
            pairs.append((getattr(old, part), getattr(factors, part)))
    pairs += [(copies_of(model, adapter).get(name), value) for name, value in copies.items()]
    for old_value, value in pairs:
        same = same and (
            old_value is None if value is None
            else old_value is not None and old_value.shape == value.shape
        )  # fmt: skip
    if not same:
        raise ValueError(
            f"replace=True needs the layers, ranks and options that adapter {adapter!r} has here, "
            f"found others in the file; minilora.delete it first and load without replace"
        )
    with torch.no_grad():
        for old_value, value in pairs:
            if old_value is not None and value is not None:
                old_value.copy_(value)
    for name, factors in built.items():
        old = layers[name].adapters[adapter]
        old.alpha, old.rslora, old.dropout = factors.alpha, factors.rslora, factors.dropout
        layers[name].fill_slot()


def _adapters_below(folder: Path) -> str:
    if not folder.is_dir():
        return ""
    below = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG_FILE}"))
    return f"; did you mean {folder / below[0]}?" if below else ""


__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "load", "save"]
