"""Verbs over the adapters that are there: activate, delete, rename, eject; one for each row."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from minilora.lora.layer import LoRALayer
from minilora.lora.modes import claimed, require_free
from minilora.lora.routes import PerRow, Slot, check_fits
from minilora.lora.survey import Survey
from minilora.lora.wrappers import named_parameters


def activate(
    model: nn.Module,
    adapters: str | Sequence[str] | None,
    *,
    trainable: str | Sequence[str] | None = None,
) -> None:
    """Choose which adapters add to the output; several sum, None leaves the base alone.

    Args:
        model: a model with adapters; changed in place.
        adapters: a name, several, or None for the base.
        trainable: when given, exactly these adapters require gradients afterwards (`[]`: none);
            None leaves every `requires_grad` as it is.

    Raises:
        ValueError: an unknown or repeated name, or a model without adapters.
        RuntimeError: adapters are merged, or a block of `mixed` is open.
    """
    survey = Survey(model)
    survey.require_layers("activate")
    names = () if adapters is None else survey.known(adapters, "activate")
    train = None if trainable is None else survey.known(trainable, "activate")
    survey.require_unmerged("activate")
    survey.require_unmixed("activate()")
    survey.require_compatible(names)
    for fqn, layer in survey.layers.items():
        room, used = layer.room, layer.rank(names)
        if room is not None and used > room:
            raise ValueError(
                f"active adapters must fit the slots of prepare_switching (max_r={room}), found "
                f"ranks {used} on {fqn}; prepare larger slots"
            )
    survey.activate(names)
    for name in survey.adapters if train is not None else ():
        survey.set_trainable(name, train is not None and name in train)


@contextmanager
def disabled(model: nn.Module, adapter: str | None = None) -> Iterator[None]:
    """Within the block the model is its base; afterwards the active adapters are back.

    The model serves one thread meanwhile: what others ask of it raises.

    Args:
        model: a model with adapters.
        adapter: the only one to leave out, while others that are active stay so; None: all.

    Raises:
        ValueError: a model without adapters, or an unknown name.
        RuntimeError: adapters are merged, a block of `mixed` is open, or another thread is within
            `disabled`.
    """
    survey = Survey(model)
    survey.require_layers("disabled", unmerged=True)
    left_out = survey.adapters if adapter is None else survey.known(adapter, "disabled")
    with survey.switched():
        survey.activate([name for name in survey.active if name not in left_out])
        yield


def _changeable(model: nn.Module, adapter: str, verb: str) -> tuple[Survey, str]:
    """Survey a model for a verb that changes which adapters there are."""
    survey = Survey(model)
    layers = survey.require_layers(verb)
    if not isinstance(adapter, str):
        raise TypeError(f"{verb}() takes one adapter's name, found {adapter!r}")
    adapter = survey.adapter(adapter, verb)
    survey.require_unmerged(verb)
    require_free(layers.values(), f"{verb}()")
    return survey, adapter


def delete(model: nn.Module, adapter: str) -> None:
    """Take one adapter off; a layer that held only this one becomes plain again.

    Args:
        model: a model with adapters; changed in place.
        adapter: its name. If it was active, the others that were stay so.

    Raises:
        ValueError: an unknown name, or a model without adapters.
        RuntimeError: adapters are merged, or a block of `disabled` or `mixed` is open.
    """
    survey, adapter = _changeable(model, adapter, "delete")
    if survey.adapters == [adapter]:
        eject(model)
        return
    survey.install([name for name in survey.active if name != adapter])
    survey.forget(adapter)
    for layer in survey.layers.values():
        layer.remove(adapter)
        if not layer.adapters:
            survey.replace(layer, layer.base)


def rename(model: nn.Module, adapter: str, new: str) -> None:
    """Give an adapter another name; its place in the order of the active ones stays.

    Args:
        model: a model with adapters; changed in place.
        adapter: its name now.
        new: the name to give it.

    Raises:
        ValueError: an unknown name, or a new one that is in use or can't be a name.
        RuntimeError: adapters are merged, or a block of `disabled` or `mixed` is open.
    """
    survey, adapter = _changeable(model, adapter, "rename")
    survey.require_new_name(new)
    survey.rename(adapter, new)


def say_untied(model: Any) -> list[Any]:
    """Make a config of transformers say so when a merge has given the head its own weight.

    Programs that read the folder would else take the embedding for the head. Returns the configs
    that said otherwise.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(type(config), "get_text_config"):
        return []
    configs = {id(one): one for one in (config, config.get_text_config())}.values()
    tied = [one for one in configs if getattr(one, "tie_word_embeddings", False)]
    try:
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    except NotImplementedError:  # as of models that read no tokens
        return []
    weights = [end.base.weight if isinstance(end, LoRALayer) else end.weight for end in ends if end]
    if len(weights) < 2 or weights[0] is weights[1]:
        return []
    for one in tied:
        one.tie_word_embeddings = False
    return tied


def eject(model: nn.Module) -> nn.Module:
    """Take every adapter off and give the plain model back, merged or not, in place.

    After `merge` the plain layers hold the merged weights, else the original ones. Parameters
    that required gradients before the first `inject` do so again.

    Args:
        model: a model with adapters; changed in place.

    Returns:
        The same model; its state dict has the keys it had before `inject`.

    Raises:
        ValueError: a model without adapters.
    """
    survey = Survey(model)
    survey.require_layers("eject")
    if not survey.merged:
        survey.install(())
    for adapter, copies in survey.copies.items():
        for parameter in copies.by_name.values():  # one that a merge left in place is plain now
            parameter.requires_grad_(False)
        survey.forget(adapter)
    for layer in survey.layers.values():
        survey.replace(layer, layer.base)
    say_untied(survey.root)
    for module in survey.everything.values():  # `inject` may have been called on a part
        trainable = set(module.__dict__.pop("_minilora_trainable", ()))
        module.__dict__.pop("save_pretrained", None)  # transformers' own again
        for name, parameter in named_parameters(module) if trainable else ():
            if name in trainable:
                parameter.requires_grad_(True)
    return model


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
    layers = survey.require_layers("mixed", unmerged=True)
    if isinstance(rows, str) or not all(isinstance(name, str) for name in rows):
        raise TypeError(f"mixed() takes a list of adapters' names, one per row, found {rows!r}")
    for name in survey.known([n for n in dict.fromkeys(rows) if n != "base"], "mixed"):
        if survey.copies_of(name):
            raise ValueError(
                f"adapter {name!r} brings trained copies of base parameters (bias= or "
                f"modules_to_save=), which act on the whole batch; run its rows apart"
            )
    plan = tuple(None if name == "base" else name for name in rows)
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
    layers = survey.require_layers("prepare_switching", unmerged=True)
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
            check_fits(adapter, name, factors, max_r)
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
