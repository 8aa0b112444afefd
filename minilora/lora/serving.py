"""Several adapters at once: one per row of a batch, and switching that never recompiles."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from minilora.lora.by_model import all_adapter_names, copies_of, require_layers, require_unmerged
from minilora.lora.layer import LoRALayer
from minilora.lora.threads import claimed

BASE = "base"


@contextmanager
def mixed(model: nn.Module, rows: Sequence[str]) -> Iterator[None]:
    """Within the block each row of a batch is computed with its own adapter.

    Every layer forms one product over the ranks of all adapters named, with the columns of other
    rows' adapters masked; rows equal running each adapter alone, in inference and in training.

    Args:
        model: a model with adapters; what is active does not matter within the block.
        rows: an adapter's name per row (the first dimension of every layer's input), or `"base"`
            for none.

    Raises:
        TypeError: rows is no list of names.
        ValueError: an unknown name, an adapter with trained copies of base parameters (they act on
            the whole batch), a model without adapters; in the block, a batch of another size.
        RuntimeError: adapters are merged, or another thread is within `disabled` or `mixed`.
    """
    layers = require_layers(model, "mixed")
    require_unmerged(layers, "mixed")
    if isinstance(rows, str) or not all(isinstance(name, str) for name in rows):
        raise TypeError(f"mixed() takes a list of adapters' names, one per row, found {rows!r}")
    present = all_adapter_names(model)
    for name in dict.fromkeys(rows):
        if name != BASE and name not in present:
            raise ValueError(f"there is no adapter {name!r}; this model has: {', '.join(present)}")
        if copies_of(model, name):
            raise ValueError(
                f"adapter {name!r} brings trained copies of base parameters (bias= or "
                f"modules_to_save=), which act on the whole batch; run its rows apart"
            )
    plan = tuple(None if name == BASE else name for name in rows)
    with claimed(layers.values()):
        before = {name: layer.rows for name, layer in layers.items()}
        try:
            for layer in layers.values():
                layer.rows = plan
            yield
        finally:
            for name, layer in layers.items():
                layer.rows = before[name]


def prepare_switching(model: nn.Module, max_r: int) -> None:
    """Give every adapted layer a slot of fixed rank, so that `torch.compile` sees no switch.

    The forward reads the slot alone: A `[max_r, K]` and B `[N, max_r]` with the scaling in B and
    zeros behind the active ranks. `activate`, `disabled`, `delete` and `load(replace=True)` copy
    values into it in place, so a compiled model needs no recompilation. For inference only;
    `end_switching` takes the slots away.

    Args:
        model: a model with adapters; changed in place.
        max_r: the largest sum of ranks that will be active on a layer at a time (an adapter
            started by PiSSA or OLoRA counts twice its rank).

    Raises:
        ValueError: an adapter that doesn't fit or isn't plain LoRA (DoRA, lora_bias, trained
            copies), or a model without adapters.
        RuntimeError: adapters are merged.
    """
    layers = require_layers(model, "prepare_switching")
    require_unmerged(layers, "prepare_switching")
    if isinstance(max_r, bool) or not isinstance(max_r, int) or max_r < 1:
        raise ValueError(f"max_r must be a whole number of at least 1, found {max_r!r}")
    for adapter in all_adapter_names(model):
        if copies_of(model, adapter):
            raise ValueError(
                f"a slot holds plain LoRA, but adapter {adapter!r} brings trained copies of base "
                f"parameters; delete it, or switch without prepare_switching"
            )
    for name, layer in layers.items():
        for adapter, factors in layer.adapters.items():
            reason = layer.misfit(factors, max_r)
            if reason is not None:
                raise ValueError(f"adapter {adapter!r} on {name} {reason}")
        used = layer.ranks(layer.active)
        if used > max_r:
            raise ValueError(
                f"max_r must hold what is active, found ranks {used} on {name} and max_r={max_r}"
            )
    for layer in layers.values():
        _add_slot(layer, max_r)


def _add_slot(layer: LoRALayer, max_r: int) -> None:
    N, K = layer.weight_matrix().shape
    like = next(layer.adapters.parameters())
    layer.slot_A = torch.zeros(max_r, K, device=like.device, dtype=like.dtype)
    layer.slot_B = torch.zeros(N, max_r, device=like.device, dtype=like.dtype)
    layer.fill_slot()


def end_switching(model: nn.Module) -> None:
    """Take the slots away, so that the model can be trained again.

    Raises:
        ValueError: a model without adapters.
    """
    for layer in require_layers(model, "end_switching").values():
        layer.slot_A = layer.slot_B = None
