"""Causal language models of transformers: their loss without logits, and text through their cache.

Each class has a forward of its own. So whether its logits are the head's output and nothing else,
and whether it keeps documents in one row apart, is tried on a few tokens, once for each model and
implementation of its attention.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from minilora.data import IGNORE, Batch
from minilora.kernels import linear_cross_entropy
from minilora.lora import inference, widened
from minilora.models import is_plain_linear
from minilora.running.arguments import argument_names

Rows = list[list[int]]
_CACHES = ("past_key_values", "cache_params")  # names of what a model takes and returns
_LEAK = 1e-3  # of the difference that another document makes where nothing keeps it apart
_known: WeakKeyDictionary[nn.Module, dict[tuple[str, Any], bool]] = WeakKeyDictionary()


def is_foreign(model: nn.Module) -> bool:
    """Return whether a model is one of transformers', with a body and a head."""
    config = getattr(model, "config", None)
    return hasattr(config, "to_json_string") and hasattr(model, "base_model")


def _tried(model: Any, what: Callable[[Any], bool]) -> bool:
    known = _known.setdefault(model, {})
    attention = getattr(model.config.get_text_config(), "_attn_implementation", None)
    key = what.__name__, attention  # which `set_attn_implementation` changes
    if key not in known:
        with inference(model), widened(model):
            try:
                known[key] = what(model)
            except Exception:  # a stranger's: the model is run as a whole, and may raise then
                known[key] = False
    return known[key]


# --- loss


def mean_without_logits(model: Any, batch: Batch) -> Tensor | None:
    """Return the mean loss over the labels, or None where it takes the model's own logits."""
    hidden = read_by_head(model, batch)
    if hidden is None:
        return None
    rows = hidden[:, :-1].flatten(0, 1)
    target = batch.labels[:, 1:].reshape(-1)
    weight = model.get_output_embeddings().weight
    return linear_cross_entropy(rows, weight, target, ignore_index=IGNORE)


def read_by_head(model: Any, batch: Batch) -> Tensor | None:
    """Return what the head reads [B, T, hidden], None where logits take more than a plain head."""
    if not is_foreign(model):
        return None
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or not is_plain_linear(head) or hasattr(head.weight, "full_tensor"):
        return None  # or a shard: FSDP2 gathers within the model's own forward
    if not _tried(model, _head_is_all):
        return None
    body = model.base_model
    hidden = body(batch.input_ids, **_beside(body, batch))[0]
    if not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(head.weight.dtype)
    return hidden


def own_logits(model: Any, batch: Batch) -> Tensor:
    """Return the logits `[B, T, V]` of a batch, documents in one row kept apart."""
    output = model(batch.input_ids, **_beside(model, batch))
    return getattr(output, "logits", output)


def _beside(module: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return what goes beside the ids. Padding behind packed rows is a document of its own."""
    names = argument_names(module.forward)
    given: dict[str, Any] = {"use_cache": False}
    if batch.documents is not None:  # transformers masks what positions tell apart
        given["position_ids"] = batch.positions()
    elif batch.attention_mask is not None:
        given["attention_mask"] = batch.attention_mask.long()
    return {name: value for name, value in given.items() if name in names}


def _ids(model: Any, *rows: tuple[int, ...]) -> Tensor:
    device = next(model.parameters()).device
    return torch.tensor(rows, device=device) % model.config.vocab_size


def _head_is_all(model: Any) -> bool:
    """Whether logits are `head(x)`, of an x that is what the body returns."""
    body, head = model.base_model, model.get_output_embeddings()
    if body is model:
        return False
    given: list[Tensor] = []
    hidden: list[Tensor] = []
    hooks = (
        head.register_forward_hook(lambda _, args, output: given.extend((args[0], output))),
        body.register_forward_hook(lambda _, __, output: hidden.append(output[0])),
    )
    try:
        logits = model(_ids(model, (1, 3, 2, 5))).logits
    finally:
        for hook in hooks:
            hook.remove()
    pairs = [(given[0], hidden[0]), (given[1], logits)]
    once = len(given) == 2 and len(hidden) == 1
    return once and all(a.shape == b.shape and torch.equal(a.float(), b.float()) for a, b in pairs)


def keeps_apart(model: nn.Module) -> bool:
    """Return whether a model keeps documents in one row apart that restart the positions."""
    if not is_foreign(model) or "position_ids" not in argument_names(model.forward):
        return False
    return _tried(model, _sees_one_document)


def _sees_one_document(model: Any) -> bool:
    """Return whether packing a document after another leaves its logits as they are alone.

    In two rows: flash attention in transformers 5 reads documents off the positions of one alone.
    """
    first, other, second = (1, 7, 2, 6, 3), (5, 4, 6, 2, 7), (2, 7, 1, 5, 3, 6)
    if model.config.vocab_size < 8:
        return False
    restart = _positions(model, len(first), len(second))

    def logits(*rows: tuple[int, ...], **options: Any) -> Tensor:
        found = model(_ids(model, *rows), use_cache=False, **options).logits
        return found[:, -len(second) :].double()

    rows = (first + second, other + second)
    packed = logits(*rows, position_ids=restart.repeat(2, 1))
    mixed, alone = logits(*rows), logits(second)
    eps = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    near = max(_LEAK, 4 * eps)  # experts, and GEMMs of other sizes, round otherwise
    return bool(
        (packed[0] - packed[1]).abs().max() <= near * (mixed[0] - mixed[1]).abs().max()
        and (packed - alone).abs().max() <= near * (mixed - alone).abs().max()
    )


def _positions(model: nn.Module, *lengths: int) -> Tensor:
    device = next(model.parameters()).device
    return torch.cat([torch.arange(n, device=device) for n in lengths])[None]


# --- text


def cached_steps(model: nn.Module, rows: Rows, new: int) -> Callable[[Rows], Tensor] | None:
    """Return a function from all ids so far to the logits [B, V] after them, None without a cache.

    A row gets `new` tokens at most. Prompts are padded on the left where the model is told so by
    mask and positions. Others (a recurrent state would run over the padding; rotary frequencies
    may change at a length; some count positions in another way) are fed apart, by length.
    """
    names = argument_names(model.forward)
    if not is_foreign(model) or "use_cache" not in names or not names.intersection(_CACHES):
        return None
    stateful = getattr(model, "_is_stateful", False)
    change = _changes_at(model)
    apart = stateful or (change is not None and max(map(len, rows)) + new > change)
    counted = "position_ids" in names and _tried(model, _counts_from_zero)
    if not apart and counted and "attention_mask" in names:
        return _Cached(model, counted)
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(len(row), []).append(i)
    steps = [(group, _Cached(model, counted)) for group in groups.values()]

    def step(rows: Rows) -> Tensor:
        found: dict[int, Tensor] = {}
        for group, one in steps:
            found |= zip(group, one([rows[i] for i in group]), strict=True)
        return torch.stack([found[i] for i in range(len(rows))])

    return step


def _counts_from_zero(model: Any) -> bool:
    """Return whether positions from 0 on are those that the model counts by itself.

    RoBERTa counts from its padding's id on.
    """
    ids = _ids(model, (2, 7, 3, 6, 5))
    given = model(ids, use_cache=False, position_ids=_positions(model, ids.shape[1])).logits
    return torch.equal(given, model(ids, use_cache=False).logits)


def _changes_at(model: Any) -> int | None:
    """Return the length above which transformers takes another set of rotary frequencies, or None.

    For these classes it computes all again there (`prepare_inputs_for_generation` of
    `models/phi3/modeling_phi3.py`).
    """
    if model.config.model_type not in ("phi3", "phimoe", "phi4_multimodal"):
        return None
    return getattr(model.config, "original_max_position_embeddings", None)


class _Cached:
    """Feed the prompts padded on the left, then one token a row; all again without a cache."""

    def __init__(self, model: nn.Module, counted: bool):
        self.model, self.names, self.counted = model, argument_names(model.forward), counted
        self.cache_name = next(name for name in _CACHES if name in self.names)
        self.changes_at = _changes_at(model)
        self.cache: Any = None
        self.past = 0
        self.pads: list[int] = []

    def __call__(self, rows: Rows) -> Tensor:
        if self.changes_at is not None and self.past <= self.changes_at < len(rows[0]):
            self.cache = None
        if self.cache is None:
            longest, self.past = max(map(len, rows)), 0
            self.pads = [longest - len(row) for row in rows]
            fed = [[0] * n + row for n, row in zip(self.pads, rows, strict=True)]
        else:
            fed = [row[-1:] for row in rows]
        device = next(self.model.parameters()).device
        ids = torch.tensor(fed, device=device)
        given: dict[str, Any] = {"use_cache": True, self.cache_name: self.cache}
        if "logits_to_keep" in self.names:
            given["logits_to_keep"] = 1
        pads = torch.tensor(self.pads, device=device)[:, None]
        seen = torch.arange(self.past + ids.shape[1], device=device)
        if any(self.pads):
            given["attention_mask"] = (seen >= pads).long()
        if self.counted:  # some count the tokens of a call, or those that the first layer keeps
            given["position_ids"] = (seen[self.past :] - pads).clamp(min=0)
        output = self.model(ids, **given)
        self.cache = getattr(output, self.cache_name, None)
        self.past += ids.shape[1]
        return output.logits[:, -1]
