"""Whole-model verbs over the adapters that are there: activate, delete, rename, eject."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from minilora.lora.layer import LoRALayer
from minilora.lora.survey import Survey
from minilora.lora.threads import require_free
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
    survey.require_layers("disabled")
    survey.require_unmerged("disabled")
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
