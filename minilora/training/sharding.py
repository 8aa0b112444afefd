"""FSDP2: shard a model with adapters, and read it so that no process ever holds all of it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minilora.lora import FROM_WEIGHT, LoRAAdapter, Survey, base_of, lora_layers, weight_sample
from minilora.training.ranks import Ranks


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model went through `shard`."""
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard a model with adapters over all ranks by FSDP2, block by block.

    Frozen parameters of any dtype (codes in uint8 or int8, scales) are sharded beside the trained
    ones, which must be of one dtype. The model may be on the meta device.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    survey = Survey(model)
    for adapter in survey.copies:
        raise ValueError(
            f"parallel='fsdp' shards factors only, but {adapter!r} has trained copies of base "
            f"parameters (bias or modules_to_save); use parallel='ddp'"
        )
    dtypes = {str(p.dtype) for p in model.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        raise ValueError(
            f"parallel='fsdp' needs trained parameters of one dtype, found "
            f"{', '.join(sorted(dtypes))}; inject with one dtype"
        )
    for fqn, layer in survey.layers.items():  # the whole weight is not at hand later
        if layer.sample is None and layer.view.device.type != "meta":
            layer.keep_sample(weight_sample(fqn, layer.view.values()))
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*survey.blocks.values(), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    if callable(getattr(model, "loss", None)):
        register_fsdp_forward_method(model, "loss")


@contextmanager
def whole_factors(factors: Iterable[LoRAAdapter]) -> Iterator[None]:
    """Within the block an adapter's factors are whole tensors; all ranks must enter."""
    swapped = []
    for held in (each._parameters for each in factors):
        for key, parameter in held.items():
            if parameter is not None and hasattr(parameter, "full_tensor"):
                swapped.append((held, key, parameter))
                held[key] = nn.Parameter(parameter.full_tensor().detach())
    try:
        yield
    finally:
        for held, key, parameter in swapped:
            held[key] = parameter


def sharded(
    ranks: Ranks, inject: Callable[[nn.Module], Any]
) -> Callable[[nn.Module], Callable[[str, Any], None]]:
    """Return the `prepare` of `load_model` that loads for FSDP2.

    The model of shapes alone gets its adapters and is sharded; then every rank keeps its shard of
    each tensor as it is read, of a quantized layer its shards of codes and scales. The factors
    start as in one process with the same random state.

    Args:
        ranks: with `parallel="fsdp"`.
        inject: puts the adapters on a model.

    Raises:
        ValueError: (from what is returned) adapters whose start depends on the base's weights.
    """

    def prepare(model: nn.Module) -> Callable[[str, Any], None]:
        inject(model)
        layers = lora_layers(model)
        for fqn, layer in layers.items():
            for one in layer.adapters.values():
                if FROM_WEIGHT.fullmatch(one.init) or one.magnitude is not None:
                    raise ValueError(
                        f"parallel='fsdp' reads the base in parts, so an adapter can't start from "
                        f"its weights, found init={one.init!r}"
                        f"{' and dora' * (one.magnitude is not None)} on {fqn}; use --init kaiming "
                        f"without --dora, or --parallel ddp"
                    )
        shard(model, ranks.device)
        model.to_empty(device=ranks.device)
        model.tie_weights()  # type: ignore[operator]
        for layer in layers.values():
            for one in layer.adapters.values():  # its factors start as a process alone would
                fresh = layer.view.new_adapter(**one.options(), dtype=one.lora_A.dtype)
                for name, value in fresh.named_parameters():
                    ranks.put(one.get_parameter(name), value)
        targets = {name.replace(".base.", "."): p for name, p in model.named_parameters()}

        def put(fqn: str, value: Tensor | nn.Module) -> None:
            name = fqn.removesuffix(".weight")
            if isinstance(value, nn.Module):
                for part, tensor in value.named_parameters():
                    ranks.put(targets[f"{name}.{part}"], tensor)
                value = base_of(value).values()
            else:
                ranks.put(targets[fqn], value)
            if name in layers:  # the whole weight is not at hand later
                layers[name].keep_sample(weight_sample(name, value))

        return put

    return prepare
