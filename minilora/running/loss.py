"""The loss of a batch, for a model of any make; `training/loss.py` chooses what a run minimises.

Models of `minilora.models` compute it themselves (`models/causal.py`, `kernels/cross_entropy.py`).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from minilora.data import IGNORE, NOT_ONE_TEXT, Batch, PairBatch, positions_in
from minilora.lora import LoRALayer
from minilora.running.arguments import argument_names
from minilora.running.foreign import is_foreign, keeps_apart, mean_without_logits, own_logits

Loss = Callable[[nn.Module, Batch], tuple[torch.Tensor, int]]
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# Modules of torch that compute each token by itself, and containers.
_BY_TOKENS = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Module, nn.ModuleList, nn.ModuleDict)


def token_loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
    """Sum the next-token loss of a batch.

    loss = − Σ log p(labels[b, t] | input_ids[b, :t]) over t ≥ 1 with labels[b, t] ≠ -100

    Args:
        model: has a method `loss(input_ids, labels)` that returns the mean over those labels, or
            returns logits [B, T, V], or something with `.logits`. The attention mask is passed
            where `forward` names it. No logits are kept of a model of transformers whose logits
            are those of a head without bias.
        batch: on the device of the model.

    Returns:
        The sum, a scalar f32 tensor (f64 for an f64 model) that carries the gradient, and the
        number of labels in it.

    Raises:
        ValueError: no label counts, so that their mean has no meaning; pairs of answers.
    """
    if isinstance(batch, PairBatch):
        found = NOT_ONE_TEXT[bool((batch.wanted >= 0).any())]
        raise ValueError(f"a batch must hold texts, found {found}")
    tokens = batch.tokens
    if tokens == 0:
        raise ValueError(
            f"a batch must have a label to learn, found {tuple(batch.labels.shape)} labels of "
            f"which all after the first column are {IGNORE}; leave such batches out"
        )
    packed = batch.documents is not None
    if packed and not takes_packed(model):
        raise ValueError(
            f"packed rows need a model that keeps their documents apart, found "
            f"{type(model).__name__}; do not pack for it"
        )
    known = argument_names(getattr(type(model), "loss", None))
    if known >= {"input_ids", "labels"}:
        beside: dict[str, Any]
        if packed:
            beside = {"positions": batch.positions(), "mask": batch.document_mask()}
        else:
            beside = beside_padding(model, batch.attention_mask)
            if batch.shared and shares_prefix(model):
                beside["shared"] = batch.shared
        mean = model.loss(batch.input_ids, batch.labels, **beside)  # type: ignore[operator]
        return at_least_f32(mean) * tokens, tokens
    if (mean := mean_without_logits(model, batch)) is not None:
        return at_least_f32(mean) * tokens, tokens
    if is_foreign(model):
        logits = own_logits(model, batch)
    else:
        logits = forward_logits(model, batch.input_ids, batch.attention_mask)
    labels = batch.labels[:, 1:]
    counts = labels != IGNORE
    chosen = at_least_f32(logits[:, :-1][counts])
    return F.cross_entropy(chosen, labels[counts], reduction="sum"), tokens


def shares_prefix(model: nn.Module) -> bool:
    """Return whether the first tokens that rows share may be computed once.

    Only where nothing but our attention can look at rows: no modules, methods or hooks that are not
    ours, no dropout, whose masks differ from row to row, no adapters row by row, and no rotary
    embeddings that depend on a row's length.
    """
    everywhere = (getattr(nn.modules.module, f"_global{name}", None) for name in _HOOKS)
    if getattr(model, "by_length", True) or any(everywhere):
        return False
    if "shared" not in argument_names(getattr(type(model), "loss", None)):
        return False
    for module in model.modules():
        ours = type(module).__module__.startswith("minilora.") or type(module) in _BY_TOKENS
        if not ours or not all(getattr(f, "only_watches", False) for f in _added(module)):
            return False
        if isinstance(module, LoRALayer):
            dropped = any(module.adapters[name].dropout for name in module.active)
            if dropped or any(route.rows for route in module.routes()):
                return False
    return True


def only_watches(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a hook, or another `forward`, as one that computes for each token what was computed."""
    function.only_watches = True  # type: ignore[attr-defined]
    return function


def _added(module: nn.Module) -> Iterator[Any]:
    """Yield a module's hooks, and what stands for methods of its class."""
    for name in _HOOKS:
        yield from getattr(module, name).values()
    yield from (
        vars(module)[name] for name in ("forward", "loss", "hidden") if name in vars(module)
    )


def takes_packed(model: nn.Module) -> bool:
    """Return whether the model keeps documents in one row apart; one of transformers' is tried."""
    needed = {"input_ids", "labels", "positions", "mask"}
    return argument_names(getattr(type(model), "loss", None)) >= needed or keeps_apart(model)


def at_least_f32(tensor: torch.Tensor) -> torch.Tensor:
    """Widen what is narrower than f32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def beside_padding(model: Any, attention_mask: torch.Tensor | None) -> dict[str, Any]:
    """Return the positions that one of our models needs lest padding count into a row's length.

    Rotary embeddings of some types depend on that; with others positions need not be given.
    """
    if attention_mask is None or not getattr(model, "by_length", False):
        return {}
    return {"positions": positions_in(attention_mask)}


def forward_logits(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Run a model of any make and return its logits.

    Args:
        model: returns logits, or something with `.logits`.
        input_ids: [B, T] int64.
        attention_mask: [B, T] bool, False on padding at the right; passed on as integers if
            `forward` has an argument of that name.

    Returns:
        [B, T, V] in the model's dtype.
    """
    kwargs = beside_padding(model, attention_mask)
    if attention_mask is not None and "attention_mask" in argument_names(model.forward):
        kwargs["attention_mask"] = attention_mask.long()
    output = model(input_ids, **kwargs)
    return getattr(output, "logits", output)
