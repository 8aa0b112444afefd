"""Read an adapter that `save` or PEFT wrote: all of it is checked before the model changes."""

from collections import Counter
from collections.abc import Collection, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.files import read_tensors
from minilora.kernels import check_backend
from minilora.lora import (
    LoRAAdapter,
    Survey,
    TrainedCopies,
    as_dtype,
    attach,
    base_of,
    check_adapter_name,
    check_open,
    check_way,
    compiled_pattern,
    select_targets,
    true_name,
    view,
)
from minilora.peft.config import (
    PREFIX,
    copy_key,
    keys_of,
    nested_copies,
    options_of,
    read_config,
    stored_shape,
)
from minilora.peft.files import adapter_folder, check_pair, require_pair
from minilora.peft.fingerprints import check_base


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
        folder: holds `adapter_config.json` and `adapter_model.safetensors`; or the name of an
            adapter on the Hugging Face hub, `"owner/name"` or `"owner/name@revision"`.
        adapter: the name to give it here.
        trainable: whether its parameters require gradients; other adapters keep theirs.
        replace: when an adapter of this name is there, put the file's values into its parameters
            (a hot swap: what is active and trainable stays, and the dtype; ranks and layers must
            be the same).
        dtype: of the factors here; None is float32, with replace=True the dtype they have.
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
    folder = adapter_folder(folder)
    check_adapter_name(adapter)
    check_backend(backend)
    check_open(model, "load")
    dtype = None if dtype is None else as_dtype(dtype)
    compute = None if compute_dtype is None else as_dtype(compute_dtype, "compute_dtype")
    survey = Survey(model)
    survey.require_unmerged("load")
    present = adapter in survey.adapters
    if present and not replace:
        raise ValueError(
            f"the model already has an adapter {adapter!r}; choose another adapter=..., or pass "
            f"replace=True to put the file's values into it"
        )
    if dtype is None:
        held = [p.dtype for one in survey.factors(adapter).values() for p in one.parameters()]
        dtype = reduce(torch.promote_types, held or [torch.float32])
    with survey.originals_in_place():
        files = _Files(survey, folder, verify)
        factors, copies = files.read(dtype, verify)
        if trainable and not present:
            files.refuse_tied(factors, copies.by_name)
    if present:
        check_way(survey, factors, compute, backend)
        _swap(survey, adapter, factors, copies.by_name)
    else:
        attach(survey, factors, adapter, copies, compute_dtype=compute, backend=backend)
        survey.set_trainable(adapter, trainable)
    return model


class _Files:
    """An adapter's two files, read for a model, which is not changed."""

    def __init__(self, survey: Survey, folder: Path, verify: bool):
        self.survey, self.folder = survey, folder
        self.config_file, self.file = require_pair(folder)
        self.config = read_config(self.config_file)
        self.options = options_of(self.config)
        tensors, self.metadata = read_tensors(self.file, check=verify)
        if verify:
            check_pair(folder, self.config_file.read_bytes(), self.metadata)
        self.tensors = _plain_keys(tensors, "module" in survey.root._modules)
        self.tied: dict[str, int] = {}  # modules by a weight they share, which PEFT trains as one
        if self.config.get("ensure_weight_tying"):
            weights = {n: id(survey.original(n)) for n in survey.parameters}
            uses = Counter(weights.values())
            self.tied = {n.rpartition(".")[0]: w for n, w in weights.items() if uses[w] > 1}

    def read(
        self, dtype: torch.dtype, verify: bool
    ) -> tuple[dict[str, LoRAAdapter], TrainedCopies]:
        """Return factors by layer, and trained copies."""
        factors = self._empty_factors()
        asked = self._asked_copies(factors)
        replaced = self._replaced(factors, asked)
        copied = asked | replaced
        frozen = {n: f"{PREFIX}{n}.base_layer.weight" for n in factors}
        frozen = {n: key for n, key in frozen.items() if key in self.tensors}
        keys = {key for n, one in factors.items() for key in keys_of(n, one).values()}
        self._match_keys(keys | set(copied.values()) | set(frozen.values()))
        for name, one in factors.items():
            self._fill(name, one, dtype)
        values = {}
        for name, key in copied.items():
            own = self.survey.original(name)
            shape, of = list(own.shape), f"as {name} has here"
            values[name] = self._take(key, shape, own.device, own.dtype, of)
        if verify:
            check_base(self.survey, self.folder, self.metadata, factors, copied)
            self._check_frozen(frozen)
        saved = [*self.options.modules_to_save, *(n.rpartition(".")[0] for n in replaced)]
        return factors, TrainedCopies(values, self.options.bias, list(dict.fromkeys(saved)))

    def refuse_tied(self, factors: Collection[str], copied: Collection[str]) -> None:
        """Refuse to train apart what PEFT trained as one."""
        trained = sorted({*factors, *(name.rpartition(".")[0] for name in copied)} & {*self.tied})
        for weight in {self.tied[name] for name in trained}:
            tied = [name for name in trained if self.tied[name] == weight]
            if len(tied) == 1:
                continue
            raise ValueError(
                f"{self.config_file}: ensure_weight_tying=True trains one matrix for layers that "
                f"share a weight, found {' and '.join(tied)}, which would be trained apart here; "
                f"load with trainable=False, or train it in PEFT"
            )

    def _targets(self) -> dict[str, bool]:
        """Return the adapted layers in module order, and whether the config names the weight."""
        options, modules = self.options, self.survey.modules
        adaptable = [name for name, module in modules.items() if view(module) is not None]
        by_weight = self._weights_named()
        try:
            chosen = options.targets and select_targets(
                self.survey,
                _matching(options.targets, modules) or options.targets,
                _matching(options.exclude, adaptable),
                options.layers,
                self.config["layers_pattern"] or r"[^.]*",  # PEFT's reading of "no pattern"
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.config_file} does not fit this model: {error}") from None
        shared = {self.tied[name] for name in chosen if name in self.tied}  # PEFT lists one of them
        chosen = [
            *chosen,
            *(n for n, w in self.tied.items() if w in shared and self._has_factors(n)),
        ]
        return {
            n: n in by_weight
            for n in modules
            if (n in chosen and not self._is_copied(n)) or n in by_weight
        }

    def _is_copied(self, fqn: str) -> bool:
        """Whether PEFT trains a whole copy of a target, and no factors."""
        entries = self.options.modules_to_save
        inside = any(f".{entry}." in f".{fqn}." for entry in entries)
        return inside and not self._has_factors(fqn)

    def _has_factors(self, fqn: str) -> bool:
        return any(key.startswith(f"{PREFIX}{fqn}.lora_") for key in self.tensors)

    def _weights_named(self) -> list[str]:
        """Return the linears whose weight `target_parameters` names; refuse other parameters."""
        places, entries = self.survey.parameters, self.config["target_parameters"] or ()
        hits = [n for n in places if any(f".{n}".endswith(f".{e}") for e in entries)]
        for name in hits:
            module, key = places[name]
            if key != "weight" or not isinstance(module, nn.Linear):
                raise ValueError(
                    f"{self.config_file}: target_parameters must name weights of linear layers, "
                    f"found {name} {list(getattr(module, key).shape)}, which is none; adapters on "
                    f"such parameters (stacked experts) can't be loaded here, only in PEFT"
                )
        return [name.rpartition(".")[0] for name in hits]

    def _empty_factors(self) -> dict[str, LoRAAdapter]:
        """Return factors on the meta device, as the config describes them."""
        made = {}
        for fqn, by_weight in self._targets().items():
            options = self.options.factor_options(f"{fqn}.weight" if by_weight else fqn)
            base = base_of(self.survey.modules[fqn])
            options["lora_bias"] &= base.family != "embedding"
            made[fqn] = base.new_adapter(device="meta", **options)
        return made

    def _asked_copies(self, targets: Collection[str]) -> dict[str, str]:
        """Return the parameters of which the config promises a copy, with their keys."""
        bias, entries = self.options.bias, self.options.modules_to_save
        if nested := nested_copies(self.survey.modules, entries):
            raise ValueError(
                f"{self.config_file}: modules_to_save must not name a module within another, found "
                f"{nested[0]} in {nested[1]}: PEFT trains both and writes one of the two; train "
                f"again with {nested[1]} alone"
            )

        def asked(module: str, leaf: str) -> bool:
            if bias == "all" and "bias" in leaf:  # PEFT leaves out others than `.bias`
                name = f"{module}.{leaf}" if module else leaf
                return leaf == "bias" or copy_key(name, targets) in self.tensors
            if bias == "lora_only" and leaf == "bias" and module in targets:
                return True
            return any(f".{entry}." in f".{module}." for entry in entries)

        names = [n for n in self.survey.parameters if asked(*n.rpartition(".")[::2])]
        return {name: copy_key(name, targets) for name in names}

    def _replaced(self, targets: Collection[str], asked: Collection[str]) -> dict[str, str]:
        """Return parameters that the file replaces though no config says so, with their keys.

        PEFT writes embedding and head along when their vocabulary has grown
        (`save_embedding_layers`), and puts any such key into the base. A layer that is tied to one
        of them follows it.
        """
        places = self.survey.parameters
        own = {n: m._parameters[k] for n, (m, k) in places.items() if n not in asked}
        found = {}
        for name in own:
            owner, module = name.rpartition(".")[0], places[name].owner
            parts = [key for key, value in module._parameters.items() if value is not None]
            whole = all(f"{PREFIX}{owner}.{key}" in self.tensors for key in parts)
            if owner not in targets and whole:
                found[name] = f"{PREFIX}{name}"
        tied = {id(own[name]): key for name, key in found.items()}
        return {n: found.get(n, tied[id(p)]) for n, p in own.items() if id(p) in tied}

    def _match_keys(self, expected: set[str]) -> None:
        """Require exactly the keys that the config calls for."""
        wrong = {
            "missing": expected - set(self.tensors),
            "not called for by target_modules or the model": set(self.tensors) - expected,
        }
        parts = [f"; {what}: {_list_some(keys)}" for what, keys in wrong.items() if keys]
        if parts:
            raise ValueError(
                f"{self.file} must hold exactly the factors of the targeted layers{''.join(parts)}"
            )

    def _fill(self, fqn: str, factors: LoRAAdapter, dtype: torch.dtype) -> None:
        """Put the file's values into a layer's factors."""
        base = base_of(self.survey.modules[fqn])
        size = base.shape if base.family == "linear" else base.module.weight.shape
        of = f"r={factors.r}, {fqn} is {list(size)}"
        for part, key in keys_of(fqn, factors).items():
            shape = stored_shape(part, factors)
            value = self._take(key, shape, base.device, dtype, of)
            setattr(factors, part, nn.Parameter(value.reshape(getattr(factors, part).shape)))

    def _take(
        self, key: str, shape: list[int], device: torch.device, dtype: torch.dtype, of: str
    ) -> nn.Parameter:
        """Return a parameter of this shape; refuse what isn't finite floats."""
        value = self.tensors[key]
        if list(value.shape) != shape:
            do, rows = "is this the model the adapter was trained on?", self._vocabulary()
            if rows in shape and value.dim() == len(shape):
                rows = value.shape[shape.index(rows)]
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

    def _vocabulary(self) -> int | None:
        """Return the rows of the input embedding, where the model says which that is."""
        getter = getattr(self.survey.root, "get_input_embeddings", None)
        return len(getter().weight) if callable(getter) else None

    def _check_frozen(self, frozen: Mapping[str, str]) -> None:
        """Compare embeddings' own weights, which PEFT writes along, with the model's."""
        for fqn, key in frozen.items():
            here = self.survey.modules[fqn].weight.detach().cpu()
            if not torch.equal(self.tensors[key].to(here.dtype), here):
                raise ValueError(
                    f"{self.file}: {key} must be the weight that {fqn} has in this model, found "
                    f"other values; load the base it was trained on (in Python, verify=False "
                    f"keeps this model's)"
                )


def _plain_keys(tensors: dict[str, Tensor], as_named: bool) -> dict[str, Tensor]:
    """Name tensors as a plain model does: other programs save through wrappers too.

    `as_named` keeps a leading `module`, where the model has such a child of its own.
    """
    tensors = {true_name(key): value for key, value in tensors.items()}
    start = f"{PREFIX}module."
    if as_named or not all(key.startswith(start) for key in tensors):
        return tensors
    return {PREFIX + key.removeprefix(start): value for key, value in tensors.items()}


def _matching(entries: Any, modules: Collection[str]) -> Any:
    """Leave out what matches no module: list entries, or a whole regex.

    PEFT writes entries that never matched anything. Nothing is lost by it: `_match_keys` requires
    every key of the file to find its layer.
    """
    if isinstance(entries, str):
        pattern = compiled_pattern(entries, "the config's regular expression")
        return entries if any(map(pattern.fullmatch, modules)) else []
    return [e for e in entries if any(f".{name}".endswith(f".{e}") for name in modules)]


def _list_some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _swap(
    survey: Survey, adapter: str, factors: dict[str, LoRAAdapter], copies: Mapping[str, Tensor]
) -> None:
    """Put new values into an adapter's parameters, which stay the same objects."""
    old = survey.factors(adapter)
    here, there = _tensors(old, survey.copies_of(adapter)), _tensors(factors, copies)
    if {n: t.shape for n, t in here.items()} != {n: t.shape for n, t in there.items()}:
        raise ValueError(
            f"replace=True needs the layers, ranks and options that adapter {adapter!r} has here, "
            f"found others in the file; minilora.delete it first and load without replace"
        )
    with torch.no_grad():
        for key, value in there.items():
            here[key].copy_(value)
    for fqn, one in factors.items():
        options = {k: v for k, v in vars(one).items() if k[0] != "_" and k != "training"}
        vars(old[fqn]).update(options)  # alpha, dropout and the like
        survey.layers[fqn].refill()


def _tensors(
    factors: Mapping[str, nn.Module], copies: Mapping[str, Tensor]
) -> dict[tuple[str, str], Tensor]:
    """Return all that an adapter holds by layer and name."""
    held = {(fqn, key): value for fqn, one in factors.items()
            for key, value in one.state_dict(keep_vars=True).items()}  # fmt: skip
    return held | {("", name): value for name, value in copies.items()}
