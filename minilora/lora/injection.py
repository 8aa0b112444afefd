"""Put an adapter on the selected layers: everything is checked first, then swapped in."""

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from minilora.kernels import check_backend
from minilora.lora.adapter import FROM_WEIGHT, LoRAAdapter
from minilora.lora.base import Base
from minilora.lora.config import AdapterConfig, as_dtype, check_adapter_name
from minilora.lora.copies import TrainedCopies
from minilora.lora.layer import LoRALayer
from minilora.lora.modes import require_free
from minilora.lora.routes import check_fits
from minilora.lora.samples import drawn_modules
from minilora.lora.selection import WORTH_A_WARNING, select_targets, unreached
from minilora.lora.survey import Survey, parents
from minilora.lora.wrappers import check_open, named_parameters


def _warn_wide_ranks(chosen: dict[str, tuple[Base, int]]) -> None:
    wide = {name: (base.shape, r) for name, (base, r) in chosen.items() if r > min(base.shape)}
    for name, (shape, r) in wide.items():
        warnings.warn(
            f"minilora: r={r} is above min(in, out) of {len(wide)} layers (first: "
            f"{name}, {list(shape)}); B·A can't have a higher rank than the layer, so the "
            f"surplus only costs memory and time",
            stacklevel=4,
        )
        break


def _check_start(config: AdapterConfig, chosen: dict[str, tuple[Base, int]]) -> None:
    """Raise where layers of this type or rank can't start as the config says, or have no bias."""
    if config.dropout and all(base.family == "embedding" for base, _ in chosen.values()):
        raise ValueError(
            f"dropout acts on the input of linear layers and convolutions, found dropout="
            f"{config.dropout} and embeddings alone; leave it out"
        )
    for name, (base, r) in chosen.items():
        init = config.init
        if config.lora_bias and base.family == "embedding":
            raise ValueError(f"lora_bias=True is not for embeddings, and {name} is one")
        if init in ("kaiming", "gaussian"):
            continue
        if base.family != "linear":
            raise ValueError(
                f"init={init!r} is for linear layers, but {name} is a {base.type.__name__}; inject "
                f"that layer apart with init='kaiming'"
            )
        if init == "orthogonal" and r % 2:
            raise ValueError(f"init='orthogonal' needs an even r, found {r} for {name}")
        if FROM_WEIGHT.fullmatch(init) and r > min(base.shape):
            raise ValueError(
                f"init={init!r} takes r directions of the weight, but {name} of shape "
                f"{list(base.shape)} has fewer than r={r}; lower r there with rank_pattern"
            )


def _modules_to_save(survey: Survey, entries: list[Any]) -> list[str]:
    """Resolve `modules_to_save` to dotted names, the outermost; every entry has to match."""
    found: dict[str, None] = {}
    for entry in entries:
        hits = [n for n in survey.modules
                if isinstance(entry, str) and f".{n}".endswith(f".{entry}")]  # fmt: skip
        if not hits:
            raise ValueError(
                f"every entry of modules_to_save must match a module, {entry!r} matches none"
            )
        found.update(dict.fromkeys(hits))
    return [name for name in found if not any(outer in found for outer in parents(name))]


def _inside(name: str, modules: Iterable[str]) -> str | None:
    """Return which of these modules a name is, or lies in."""
    return next((outer for outer in (name, *parents(name)) if outer in modules), None)


def _copied_parameters(survey: Survey, names: list[str], bias: str, whole: list[str]) -> list[str]:
    """Resolve `bias` and the modules to save to dotted names of parameters."""
    chosen: list[str] = []
    if bias == "lora_only":
        chosen = [f"{name}.bias" for name in names if f"{name}.bias" in survey.parameters]
    elif bias == "all":
        chosen = [name for name in survey.parameters if "bias" in name.rpartition(".")[2]]
    if bias != "none" and not chosen:
        raise ValueError(f"bias={bias!r} must find a bias to train, found none")
    inside: dict[str, list[str]] = {hit: [] for hit in whole}
    stored: dict[str, list[str]] = {hit: [] for hit in whole}  # buffers that files would hold
    buffers = [
        f"{name}.{key}" for name, module in survey.modules.items() if whole
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    ]  # fmt: skip
    for found, parts in ((inside, survey.parameters), (stored, buffers)):
        for part in parts:
            for outer in parents(part):
                if outer in found:
                    found[outer].append(part)
    for name in names:
        if (hit := _inside(name, inside)) is not None:
            raise ValueError(
                f"modules_to_save trains a whole copy of {hit}, but {name} is a target of "
                f"LoRA too; name it in one of the two"
            )
    for hit in whole:
        if stored[hit] or not inside[hit]:
            what = f"the buffer {min(stored[hit])}, which is not copied" if stored[hit] else "none"
            raise ValueError(
                f"modules_to_save needs a module of parameters, found {what} in {hit}; name the "
                f"modules within it that have none"
            )
        chosen += inside[hit]
    for name in chosen:
        if not (value := survey.original(name)).is_floating_point():
            raise ValueError(
                f"bias and modules_to_save train copies of floating-point parameters, found "
                f"{value.dtype} in {name}, which is quantized; name modules that are not, or load "
                f"the base without quantizing this one"
            )
    return list(dict.fromkeys(chosen))


def _refuse_drawn(survey: Survey, copied: list[str]) -> None:
    """Refuse values that are random in this process alone and would be lost with it."""
    drawn = drawn_modules(survey, copied)
    if drawn:
        raise ValueError(
            f"{', '.join(drawn[:4])} {'hold' if len(drawn) > 1 else 'holds'} values drawn at "
            f"random, which the checkpoint did not have (a new head, new rows of a vocabulary): "
            f"the adapter's files would not hold them, and the next process draws others; pass "
            f"modules_to_save={drawn[:4]} to train and save them with the adapter, or write the "
            f"base with model.save_pretrained(folder) and load it from there"
        )


def _warn_moving(survey: Survey) -> None:
    moving = [n for n, m in survey.modules.items() if getattr(m, "running_mean", None) is not None]
    if moving:
        warnings.warn(
            f"minilora: {moving[0]} ({len(moving)} in all) moves its running statistics in "
            f"training mode, and the adapter's files don't hold them; call .eval() on such "
            f"layers after model.train(), as fit does",
            stacklevel=4,
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
        alpha: numerator of the scaling. None means the r of each layer, so that scaling is 1 (√r
            with rslora); a number is that of all layers, as in PEFT, whatever r rank_pattern
            gives them.
        targets: `"all-linear"` (every Linear and Conv1D but the head), a list of dotted names or
            whole-segment endings (`["q_proj", "mlp.up_proj"]`), or one regex that must match whole
            dotted names. Every entry has to match. Embeddings and 2-D convolutions have to be
            named.
        exclude: list or regex in the same form, taken away from `targets`.
        layers: block numbers to keep, read from the first number in a dotted name.
        dropout: on the branch's input while training, in [0, 1). Embeddings, which read ids, have
            none, as in PEFT.
        rslora: scaling = alpha / sqrt(r).
        dora: train each row's length apart from its direction (Liu et al. 2024, arXiv:2402.09353).
        bias: `"none"`, `"lora_only"` (a trained copy of the targets' biases) or `"all"` (of every
            bias in the model).
        lora_bias: a bias on B.
        modules_to_save: modules of which the adapter trains and keeps a whole copy, such as a new
            head, or embedding and head of a vocabulary that has grown; names as in `targets`, from
            which "all-linear" leaves them out.
        rank_pattern: r by regex over the end of a dotted name, first match wins.
        alpha_pattern: alpha in the same form.
        init: `"kaiming"`, `"gaussian"`, `"orthogonal"`, `"pissa"`, `"pissa_niter_<n>"` or
            `"olora"`, see `minilora.lora.LoRAAdapter`.
        adapter: its name: letters, digits, `_`, `-`.
        dtype: of the factors.
        compute_dtype: of the branch; None computes in the input's dtype, `"float32"` is what PEFT
            does on a bf16 base. All adapters of a layer have the same, and the same backend.
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
    config = AdapterConfig.among(locals())
    check_adapter_name(adapter)
    dtype = as_dtype(dtype)
    compute = None if compute_dtype is None else as_dtype(compute_dtype, "compute_dtype")
    check_backend(backend)
    check_open(model, "inject")
    survey = Survey(model)
    if survey.merged:
        raise RuntimeError("inject() needs unmerged weights; call minilora.unmerge(model) first")
    new, copies = _made(survey, config, adapter, dtype)
    attach(survey, new, adapter, copies, compute_dtype=compute, backend=backend)
    return model


def _made(
    survey: Survey, config: AdapterConfig, adapter: str, dtype: torch.dtype
) -> tuple[dict[str, LoRAAdapter], TrainedCopies]:
    """Check all that depends on the model, then make the factors and copies of a new adapter."""
    names = select_targets(survey, config.targets, config.exclude, config.layers)
    whole = _modules_to_save(survey, list(config.modules_to_save))
    if config.targets == "all-linear":
        saved = set(whole)
        names = [name for name in names if not _inside(name, saved)]
        if not names:
            raise ValueError(f"modules_to_save={whole} leaves no layer of targets='all-linear'")
    if adapter in survey.adapters:
        taken = [name for name in names if name in survey.with_adapter(adapter)]
        where = f"{taken[0]} already has" if taken else "the model already has"
        raise ValueError(
            f"{where} an adapter named {adapter!r} ({len(taken)} layers in all); choose another "
            f"name with adapter=..., or minilora.eject(model) first"
        )
    config.check_patterns(names)
    options = {name: config.factor_options(name) for name in names}
    chosen = {name: (survey.bases[name], options[name]["r"]) for name in names}
    _check_start(config, chosen)
    copied = _copied_parameters(survey, names, config.bias, whole)
    _refuse_drawn(survey, copied)
    _warn_wide_ranks(chosen)
    _warn_moving(survey)
    share, note = unreached(survey)
    if share >= WORTH_A_WARNING and not survey.layers:
        warnings.warn(f"minilora: {note}; they stay as they are", stacklevel=3)
    new = {}
    with survey.originals_in_place():  # DoRA, PiSSA and OLoRA read the base's own weight
        for name, (base, _) in chosen.items():
            new[name] = base.new_adapter(**options[name], device=base.device, dtype=dtype)
    copies = {name: nn.Parameter(survey.original(name).detach().clone()) for name in copied}
    return new, TrainedCopies(copies, config.bias, whole)


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


def _stay_called(*_: object) -> None:
    """Do nothing: nn.TransformerEncoderLayer reads `.weight` itself unless a child has a hook."""


def attach(
    model: nn.Module | Survey,
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
    survey = Survey.of(model)
    root, layers = survey.root, survey.layers
    require_free(layers.values(), "inject() and load()")
    check_room(survey, adapter, new)
    check_way(survey, new, compute_dtype, backend)
    if not hasattr(root, "_minilora_trainable"):
        _freeze(survey)
    for name, factors in new.items():
        if name not in layers:
            base: Any = survey.modules[name]
            layer = LoRALayer(base, compute_dtype=compute_dtype, backend=backend)
            layers[name] = layer
            for parent, _ in survey.positions(base):
                if isinstance(parent, nn.TransformerEncoderLayer):
                    layer.register_forward_hook(_stay_called)
            survey.replace(base, layer)
        layers[name].add(adapter, factors)
    if copies is not None:
        survey.keep(adapter, copies)
    if _writers and any(kind.__name__ == "PreTrainedModel" for kind in type(root).__mro__):
        root.save_pretrained = _SavePretrained(root)  # what it writes reads back as itself
    for name, layer in layers.items():
        layer.activate((adapter,) if name in new else ())
    survey.install((adapter,))


def check_room(survey: Survey, adapter: str, new: Mapping[str, LoRAAdapter]) -> None:
    """Raise where an adapter does not fit the slot of a model prepared for switching."""
    for name, factors in new.items():
        if name in survey.layers:
            check_fits(adapter, name, factors, survey.layers[name].room)


def check_way(
    survey: Survey, names: Iterable[str], compute_dtype: torch.dtype | None, backend: str
) -> None:
    """Raise where a layer that has adapters already computes otherwise than is asked for."""
    for name in names:
        if (layer := survey.layers.get(name)) is None:
            continue
        for what, asked, usual in (("compute_dtype", compute_dtype, None),
                                   ("backend", backend, "auto")):  # fmt: skip
            if asked not in (usual, found := getattr(layer, what)):
                raise ValueError(
                    f"the adapters of a layer share its {what}, found {asked} for {name}, which "
                    f"has {found} from an adapter before; pass that, or leave {what} out"
                )


def _freeze(survey: Survey) -> None:
    """Let nothing but factors and copies require gradients; `eject` brings the flags back."""
    factors = {p for layer in survey.layers.values() for p in layer.adapters.parameters()}
    factors |= {p for copies in survey.copies.values() for p in copies.by_name.values()}
    every = named_parameters(survey.model)  # a tied one under all its names
    others = {name: p for name, p in every if p not in factors}
    lazy = next((name for name, p in others.items() if nn.parameter.is_lazy(p)), None)
    if lazy is not None:
        raise ValueError(
            f"{lazy} has no weight yet (it is lazy); run the model once before injecting"
        )
    survey.root._minilora_trainable = tuple(n for n, p in others.items() if p.requires_grad)
    for parameter in others.values():
        parameter.requires_grad_(False)
