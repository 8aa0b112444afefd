"""Modules by the names they have without wrappers such as torch.compile's.

A wrapper holds the module it stands for as its only child, which adds a segment to every name:
`_orig_mod.model.layers.0` (torch.compile), `module.model.layers.0` (DataParallel, DDP). An adapter
saved under such names fits no plain model.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

# Private names of torch's: its compiler, FSDP1 and activation checkpointing. No model has them.
MARKS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_REPLICAS = (DataParallel, DistributedDataParallel, AveragedModel)


def _child(module: nn.Module) -> str | None:
    """Return the name under which a wrapper holds its module, None for any other module."""
    if isinstance(module, _REPLICAS):
        return "module"
    return next((mark for mark in MARKS if mark in module._modules), None)


def unwrapped(module: nn.Module) -> Any:
    """Return the module that wrappers stand for, or the module itself."""
    while (name := _child(module)) is not None:
        module = module._modules[name]  # type: ignore[assignment]
    return module


def joined(module: str, key: str) -> str:
    """Return the dotted name of what a module holds; the root's name is empty."""
    return f"{module}.{key}" if module else key


def named_modules(
    module: nn.Module, name: str = "", seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module once, as `nn.Module.named_modules` does, wrappers passed over."""
    module, seen = unwrapped(module), set() if seen is None else seen
    if module not in seen:
        seen.add(module)
        yield name, module
        for child, inner in module._modules.items():
            if inner is not None:
                yield from named_modules(inner, joined(name, child), seen)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter by its name without wrappers, a tied one under all its names."""
    for name, module in named_modules(model):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield joined(name, key), parameter


def true_name(name: str) -> str:
    """Return a dotted name without the segments of torch's wrappers."""
    return ".".join(part for part in name.split(".") if part not in MARKS)


def check_whole(model: nn.Module, verb: str) -> None:
    """Raise for parameters that FSDP1 has flattened: a layer's own are empty on most ranks."""
    if any("_fsdp_wrapped_module" in module._modules for module in model.modules()):
        raise ValueError(
            f"{verb}() needs whole parameters, found FullyShardedDataParallel, which flattens "
            f"them; use torch's fully_shard, or minilora.fit with parallel='fsdp'"
        )


def check_open(model: nn.Module, verb: str) -> None:
    """Raise where new parameters would not be synchronized by a wrapper that is there already."""
    check_whole(model, verb)
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            f"{verb}() adds parameters, found DistributedDataParallel around the model, which "
            f"would leave them out when it synchronizes gradients; call {verb}() on the plain "
            f"model and wrap it afterwards"
        )
