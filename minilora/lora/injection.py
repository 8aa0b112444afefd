"""Put an adapter on the selected layers: everything is checked first, then swapped in."""

import re
import sys
import warnings
import weakref
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from minilora.files import short
from minilora.kernels import check_backend
from minilora.lora.adapter import FROM_WEIGHT, INITS, LoRAAdapter
from minilora.lora.bare_parameters import WORTH_A_WARNING, unreached
from minilora.lora.copies import (
    TrainedCopies,
    add_copies,
    all_adapter_names,
    install,
    original_of,
    originals_in_place,
)
from minilora.lora.kinds import LoRALinear, layer_class
from minilora.lora.layer import lora_layers, weight_device
from minilora.lora.samples import drawn_modules
from minilora.lora.selection import (
    check_patterns,
    check_rank,
    matrix_shape,
    parameter_places,
    pattern_value,
    plain_modules,
    select_targets,
)
from minilora.lora.wrappers import check_open, named_modules, named_parameters, unwrapped


def check_alpha(alpha: object, what: str = "alpha") -> float:
    """Return alpha if it is a finite number other than 0, else raise."""
    ok = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    # Compared, not converted: an int beyond any float is refused too, and NaN compares false.
    if not ok or not 0 < abs(alpha) <= sys.float_info.max:  # type: ignore[arg-type]
        raise ValueError(f"{what} must be a finite number other than 0, found {short(alpha)}")
    return alpha  # type: ignore[return-value]


def check_dropout(p: object) -> float:
    """Return p if it lies in [0, 1), else raise."""
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p < 1:
        raise ValueError(f"dropout must lie in [0, 1), found {short(p)}")
    return float(p)


def check_adapter_name(name: object) -> str:
    """Return the name if it can name a folder, a module and a key part, else raise."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_\-]+", name):
        raise ValueError(
            f"an adapter's name must consist of letters, digits, '_' and '-', found {name!r}"
        )
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"the adapter name {name!r} is taken by torch.nn.ModuleDict itself; choose another, "
            f"such as '{name}_1'"
        )
    return name


def as_dtype(dtype: object, what: str = "dtype") -> torch.dtype:
    """Return a floating torch dtype from itself or its name ("bfloat16"), else raise."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(
            f"{what} must be a floating-point torch dtype of 16 bits or more, or its name, found "
            f"{dtype!r}"
        )
    return found


def places_of(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return every place that holds `module`: a module shared by two parents is wrapped in both.

    Where a wrapper holds it, the place is the wrapper's own: one around a single layer is replaced
    with the layer, since torch.compile's keeps calling the module that it was given.
    """
    return [
        (parent, name)
        for _, parent in named_modules(model)
        for name, child in parent._modules.items()
        if child is not None and module in (child, unwrapped(child))
    ]


def _warn_wide_ranks(model: nn.Module, names: list[str], ranks: dict[str, int]) -> None:
    modules = plain_modules(model)
    shapes = {name: matrix_shape(modules[name]) for name in names}
    wide = [n for n in names if ranks[n] > min(shapes[n])]
    if wide:
        name = wide[0]
        warnings.warn(
            f"minilora: r={ranks[name]} is above min(in, out) of {len(wide)} layers (first: "
            f"{name}, {list(shapes[name])}); B·A can't have a higher rank than the layer, so the "
            f"surplus only costs memory and time",
            UserWarning,
            stacklevel=3,
        )


def _check_flag(value: object, what: str) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{what} must be True or False, found {value!r}")


def _check_init(init: object, modules: dict[str, nn.Module], ranks: dict[str, int]) -> None:
    """Check the name of an init, and that it exists for these layers and ranks."""
    simple = init in INITS[:3]
    if not isinstance(init, str) or not (simple or FROM_WEIGHT.fullmatch(init)):
        raise ValueError(f"init must be one of {', '.join(INITS)}, found {init!r}")
    if init in ("kaiming", "gaussian"):
        return
    for name, r in ranks.items():
        kind = layer_class(modules[name])
        if kind is not LoRALinear:
            raise ValueError(
                f"init={init!r} is for linear layers, but {name} is a "
                f"{type(modules[name]).__name__}; inject that layer apart with init='kaiming'"
            )
        if init == "orthogonal" and r % 2:
            raise ValueError(f"init='orthogonal' needs an even r, found {r} for {name}")
        if FROM_WEIGHT.fullmatch(init) and r > min(matrix_shape(modules[name])):
            raise ValueError(
                f"init={init!r} takes r directions of the weight, but {name} of shape "
                f"{list(matrix_shape(modules[name]))} has fewer than r={r}; lower r there with "
                f"rank_pattern"
            )


def _copied_parameters(
    model: nn.Module, names: list[str], bias: object, saved: list[str]
) -> list[str]:
    """Resolve `bias` and the modules to save to dotted names of parameters."""
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"bias must be 'none', 'all' or 'lora_only', found {bias!r}")
    places = parameter_places(model)
    chosen: list[str] = []
    if bias == "lora_only":
        chosen = [f"{name}.bias" for name in names if f"{name}.bias" in places]
    elif bias == "all":
        chosen = [name for name in places if "bias" in name.rpartition(".")[2]]
    if bias != "none" and not chosen:
        raise ValueError(f"bias={bias!r} must find a bias to train, found none")
    modules = plain_modules(model)
    for hit in saved:
        inside = [n for n in places if n.startswith(f"{hit}.")]
        target = next((n for n in names if _within(n, hit)), None)
        if target is not None:
            raise ValueError(
                f"modules_to_save trains a whole copy of {hit}, but {target} is a target of "
                f"LoRA too; name it in one of the two"
            )
        stored = {
            f"{n}.{key}" for n, m in modules.items() if _within(n, hit)
            for key, buffer in m._buffers.items()
            if buffer is not None and key not in m._non_persistent_buffers_set
        }  # fmt: skip
        if not inside or stored:
            found = f"the buffer {min(stored)}, which is not copied" if stored else "none"
            raise ValueError(
                f"modules_to_save needs a module of parameters, found {found} in {hit}; name the "
                f"modules within it that have none"
            )
        chosen += inside
    return list(dict.fromkeys(chosen))


def _within(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}.")


def _modules_to_save(model: nn.Module, entries: object) -> list[str]:
    """Resolve `modules_to_save` to dotted names; every entry has to match."""
    entries = [entries] if isinstance(entries, str) else entries
    if not isinstance(entries, Iterable) or isinstance(entries, Mapping):
        raise TypeError(f"modules_to_save must be a list of module names, found {entries!r}")
    found: list[str] = []
    modules = plain_modules(model)
    for entry in entries:
        hits = [n for n in modules if isinstance(entry, str) and f".{n}".endswith(f".{entry}")]
        if not hits:
            raise ValueError(
                f"every entry of modules_to_save must match a module, {entry!r} matches none"
            )
        found += hits
    return list(dict.fromkeys(found))


def _refuse_drawn(model: nn.Module, copied: Container[str]) -> None:
    """Refuse values that are random in this process alone and would be lost with it."""
    drawn = drawn_modules(model, copied)
    if drawn:
        raise ValueError(
            f"{', '.join(drawn[:4])} {'hold' if len(drawn) > 1 else 'holds'} values drawn at "
            f"random, which the checkpoint did not have (a new head, new rows of a vocabulary): "
            f"the adapter's files would not hold them, and the next process draws others; pass "
            f"modules_to_save={drawn[:4]} to train and save them with the adapter, or write the "
            f"base with model.save_pretrained(folder) and load it from there"
        )


def _warn_moving(model: nn.Module) -> None:
    moving = [
        name for name, module in plain_modules(model).items()
        if getattr(module, "running_mean", None) is not None
    ]  # fmt: skip
    if moving:
        warnings.warn(
            f"minilora: {moving[0]} ({len(moving)} in all) moves its running statistics in "
            f"training mode, and the adapter's files don't hold them; call .eval() on such "
            f"layers after model.train(), as fit does",
            UserWarning,
            stacklevel=3,
        )


def inject(
    model: nn.Module,
    r: int = 8,
    alpha: float | None = None,
    *,
    targets: object = "all-linear",
    exclude: object = (),
    layers: Iterable[int] | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    bias: str = "none",
    lora_bias: bool = False,
    modules_to_save: Iterable[str] | str = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    init: str = "kaiming",
    adapter: str = "default",
    dtype: torch.dtype | str = torch.float32,
    compute_dtype: torch.dtype | str | None = None,
    backend: str = "auto",
) -> nn.Module:
    """Freeze the model and put a trainable adapter on its linear layers, in place.

    `y = base(x) + scaling · lora_B lora_A x`, scaling = alpha / r. The new adapter becomes the
    only active one; adapters already there keep their `requires_grad`. Everything is checked
    before the first change: an error leaves the model as it was.

    Args:
        model: any module with linear layers; changed in place.
        r: rank, at least 1 (above min(in, out) of a layer: a warning).
        alpha: numerator of the scaling; None means r, so that scaling is 1 (PEFT's default).
        targets: `"all-linear"` (every Linear and Conv1D but the head), a list of dotted names or
            whole-segment endings (`["q_proj", "mlp.up_proj"]`), or one regex that must match whole
            dotted names. Every entry has to match. Embeddings and 2-D convolutions have to be
            named.
        exclude: list or regex in the same form, taken away from `targets`.
        layers: block numbers to keep, read from the first number in a dotted name.
        dropout: on the branch's input while training, in [0, 1).
        rslora: scaling = alpha / sqrt(r).
        dora: train each row's length apart from its direction (Liu et al. 2024, arXiv:2402.09353).
        bias: `"none"`, `"lora_only"` (a trained copy of the targets' biases) or `"all"` (of every
            bias in the model).
        lora_bias: a bias on B.
        modules_to_save: modules of which the adapter trains and keeps a whole copy, such as a new
            head, or embedding and head of a vocabulary that has grown; names as in `targets`, from
            which "all-linear" leaves them out.
        rank_pattern: r by regex over the end of a dotted name, first match wins.
        alpha_pattern: alpha likewise.
        init: `"kaiming"`, `"gaussian"`, `"orthogonal"`, `"pissa"`, `"pissa_niter_<n>"` or
            `"olora"`, see `minilora.lora.LoRAAdapter`.
        adapter: its name: letters, digits, `_`, `-`.
        dtype: of the factors.
        compute_dtype: of the branch; None computes in the input's dtype, `"float32"` is what PEFT
            does on a bf16 base.
        backend: `"auto"`, `"torch"` or `"triton"`; an explicit choice that can't run raises.

    Returns:
        The same model.

    Raises:
        ValueError: anything above violated, a target that is already adapted under this name, a
            child of nn.MultiheadAttention, values that transformers drew at random on loading and
            that `modules_to_save` does not name.
        TypeError: targets, exclude or model of another type.
        RuntimeError: adapters are merged, or the backend can't run.

    Hu et al. 2021, "LoRA", arXiv:2106.09685.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"inject() needs an nn.Module, found {type(model).__name__}")
    check_rank(r)
    alpha = check_alpha(r if alpha is None else alpha)
    dropout = check_dropout(dropout)
    check_adapter_name(adapter)
    dtype = as_dtype(dtype)
    compute = None if compute_dtype is None else as_dtype(compute_dtype, "compute_dtype")
    for flag, what in ((rslora, "rslora"), (dora, "dora"), (lora_bias, "lora_bias")):
        _check_flag(flag, what)
    check_backend(backend)
    check_open(model, "inject")
    present = lora_layers(model)
    if any(layer.merged for layer in present.values()):
        raise RuntimeError("inject() needs unmerged weights; call minilora.unmerge(model) first")
    with originals_in_place(model):  # a copy would hide a tied head
        names = select_targets(model, targets, exclude, layers)
    whole = _modules_to_save(model, modules_to_save)
    if targets == "all-linear":
        names = [n for n in names if not any(_within(n, module) for module in whole)]
        if not names:
            raise ValueError(f"modules_to_save={whole} leaves no layer of targets='all-linear'")
    taken = [name for name in names if name in present and adapter in present[name].adapters]
    if taken or adapter in all_adapter_names(model):
        where = f"{taken[0]} already has" if taken else "the model already has"
        raise ValueError(
            f"{where} an adapter named {adapter!r} ({len(taken)} layers in all); choose another "
            f"name with adapter=..., or minilora.eject(model) first"
        )
    check_patterns(rank_pattern, names, "rank_pattern")
    check_patterns(alpha_pattern, names, "alpha_pattern")
    ranks = {n: check_rank(pattern_value(n, rank_pattern, r), "rank_pattern") for n in names}
    alphas = {
        n: check_alpha(pattern_value(n, alpha_pattern, alpha), "alpha_pattern") for n in names
    }
    modules = plain_modules(model)
    _check_init(init, modules, ranks)
    _check_combination(modules, names, init, dora, lora_bias)
    copied = _copied_parameters(model, names, bias, whole)
    _refuse_drawn(model, copied)
    _warn_wide_ranks(model, names, ranks)
    _warn_moving(model)
    share, note = unreached({"": model, **modules})
    if share >= WORTH_A_WARNING and not present:
        warnings.warn(f"minilora: {note}; they stay as they are", UserWarning, stacklevel=2)
    with originals_in_place(model):  # DoRA, PiSSA and OLoRA read the base's own weight
        new = {
            name: _fresh(modules[name], {
                "r": ranks[name], "alpha": alphas[name], "dropout": dropout, "rslora": rslora,
                "dora": dora, "init": init, "lora_bias": lora_bias,
                "device": weight_device(modules[name]), "dtype": dtype,
            })
            for name in names
        }  # fmt: skip
    places = parameter_places(model)
    values = {n: nn.Parameter(original_of(model, n, places).detach().clone()) for n in copied}
    copies = TrainedCopies(values, bias, whole) if values else None
    attach(model, new, adapter, copies, compute_dtype=compute, backend=backend)
    return model


def _check_combination(modules, names, init, dora, lora_bias) -> None:
    """Refuse options that have no meaning together, as PEFT does, or that are not built."""
    if lora_bias and (dora or init not in ("kaiming", "gaussian")):
        other = "dora=True" if dora else f"init={init!r}"
        raise ValueError(f"lora_bias=True has no meaning with {other}; leave one of them out")
    if lora_bias:
        embedding = next((n for n in names if isinstance(modules[n], nn.Embedding)), None)
        if embedding is not None:
            raise ValueError(f"lora_bias=True is not for embeddings, and {embedding} is one")


def _fresh(base: nn.Module, options: dict[str, Any]) -> LoRAAdapter:
    kind = layer_class(base)
    assert kind is not None  # select_targets let only such modules through
    return kind(base).new_adapter(**options)


_writers: list[Callable[..., None]] = []


def write_pretrained_by(writer: Callable[..., None]) -> None:
    """Set what a transformers model with adapters does instead of its own `save_pretrained`."""
    _writers[:] = [writer]


class _SavePretrained:
    """`save_pretrained` of one model, which is not kept alive by it and is copied along with it."""

    def __init__(self, model: nn.Module):
        self.model = weakref.ref(model)

    def __call__(self, *args: Any, **options: Any) -> None:
        _writers[0](self.model(), *args, **options)

    def __reduce__(self) -> tuple:
        return type(self), (self.model(),)


def _save_as_plain(model: nn.Module) -> None:
    """Let a transformers model write what reads back as itself."""
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if _writers and "PreTrainedModel" in kinds:
        model.save_pretrained = _SavePretrained(model)  # type: ignore[assignment]


def _stay_called(*_: object) -> None:
    """Do nothing: nn.TransformerEncoderLayer reads `.weight` itself unless a child has a hook."""


def attach(
    model: nn.Module,
    new: Mapping[str, LoRAAdapter],
    adapter: str,
    copies: TrainedCopies | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> None:
    """Put ready adapters on layers by dotted name, freeze the rest and activate them alone.

    Checks were done before, but for the slots of a model prepared for switching.
    """
    present = lora_layers(model)
    root = unwrapped(model)
    for name, factors in new.items():
        layer = present.get(name)
        reason = None if layer is None else layer.misfit(factors, layer.slot_room())
        if reason is not None:
            raise ValueError(f"adapter {adapter!r} on {name} {reason}")
    places = parameter_places(model)
    if not hasattr(root, "_minilora_trainable"):
        factors_there = {id(p) for m in present.values() for p in m.adapters.parameters()}
        every = named_parameters(model)  # a tied one under all its names
        others = {n: p for n, p in every if id(p) not in factors_there}
        lazy = next((n for n, p in others.items() if nn.parameter.is_lazy(p)), None)
        if lazy is not None:
            raise ValueError(
                f"{lazy} has no weight yet (it is lazy); run the model once before injecting"
            )
        trainable = tuple(name for name, p in others.items() if p.requires_grad)
        root._minilora_trainable = trainable
        for parameter in others.values():
            parameter.requires_grad_(False)
    modules = plain_modules(model)
    for name, factors in new.items():
        layer = present.get(name)
        if layer is None:
            base = modules[name]
            holders = places_of(model, base)
            kind = layer_class(base)
            assert kind is not None
            layer = kind(base, compute_dtype=compute_dtype, backend=backend)
            for parent, child in holders:
                parent._modules[child] = layer
                if isinstance(parent, nn.TransformerEncoderLayer):
                    layer.register_forward_hook(_stay_called)
        factors.train(layer.training)
        layer.adapters[adapter] = factors
    add_copies(model, adapter, copies, places)
    _save_as_plain(root)
    for name, layer in lora_layers(model).items():
        layer.activate((adapter,) if name in new else ())
    install(model, (adapter,))
