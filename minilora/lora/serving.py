"""Several adapters at once: one per row of a batch, and switching that never recompiles."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from minilora.lora.layer import LoRALayer
from minilora.lora.routes import PerRow, Slot, misfit
from minilora.lora.survey import Survey
from minilora.lora.threads import claimed

BASE = "base"


@contextmanager
def mixed(model: nn.Module, rows: Sequence[str]) -> Iterator[None]:
    """Within the block each row of a batch is computed with its own adapter.

    Every layer forms one product over the ranks of all adapters named, with the columns of other
    rows' adapters masked; rows equal running each adapter alone, in inference and in training.

    Args:
        model: a model with adapters. What is active does not matter within the block; verbs that
            switch adapters or sort rows (`disabled`, `evaluate` of examples, `fit`) are refused.
        rows: an adapter's name per row (the first dimension of every layer's input), or `"base"`
            for none.

    Raises:
        TypeError: rows is no list of names.
        ValueError: an unknown name, an adapter with trained copies of base parameters (they act on
            the whole batch), a model without adapters; in the block, a batch of another size.
        RuntimeError: adapters are merged, or another thread is within `disabled` or `mixed`.
    """
    survey = Survey(model)
    layers = survey.require_layers("mixed")
    survey.require_unmerged("mixed")
    if isinstance(rows, str) or not all(isinstance(name, str) for name in rows):
        raise TypeError(f"mixed() takes a list of adapters' names, one per row, found {rows!r}")
    for name in survey.known([n for n in dict.fromkeys(rows) if n != BASE], "mixed"):
        if survey.copies_of(name):
            raise ValueError(
                f"adapter {name!r} brings trained copies of base parameters (bias= or "
                f"modules_to_save=), which act on the whole batch; run its rows apart"
            )
    plan = tuple(None if name == BASE else name for name in rows)
    with claimed(layers.values()), survey.originals_in_place():
        entered = [(layer, PerRow(plan)) for layer in layers.values()]
        try:
            for layer, route in entered:
                layer.enter(route)
            yield
        finally:
            for layer, route in entered:
                layer.leave(route)


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
        RuntimeError: adapters are merged, or a block of `disabled` or `mixed` is open.
    """
    survey = Survey(model)
    layers = survey.require_layers("prepare_switching")
    survey.require_unmerged("prepare_switching")
    if any(layer.thread is not None for layer in layers.values()):
        raise RuntimeError(
            "prepare_switching() must be called outside of disabled() and mixed(), whose rows a "
            "slot would override; end the block first"
        )
    if isinstance(max_r, bool) or not isinstance(max_r, int) or max_r < 1:
        raise ValueError(f"max_r must be a whole number of at least 1, found {max_r!r}")
    for adapter in survey.copies:
        raise ValueError(
            f"a slot holds plain LoRA, but adapter {adapter!r} brings trained copies of base "
            f"parameters; delete it, or switch without prepare_switching"
        )
    for name, layer in layers.items():
        for adapter, factors in layer.adapters.items():
            reason = misfit(factors, max_r)
            if reason is not None:
                raise ValueError(f"adapter {adapter!r} on {name} {reason}")
        used = layer.rank(layer.active)
        if used > max_r:
            raise ValueError(
                f"max_r must hold what is active, found ranks {used} on {name} and max_r={max_r}"
            )
    for layer in layers.values():
        _leave_slot(layer)
        layer.enter(Slot(layer, max_r))


def end_switching(model: nn.Module) -> None:
    """Take the slots away, so that the model can be trained again.

    Raises:
        ValueError: a model without adapters.
    """
    for layer in Survey(model).require_layers("end_switching").values():
        _leave_slot(layer)


def _leave_slot(layer: LoRALayer) -> None:
    for route in list(layer.routes()):
        if isinstance(route, Slot):
            layer.leave(route)
