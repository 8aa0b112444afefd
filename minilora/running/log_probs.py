"""Log-probabilities of the answers of pairs, with their gradient and without whole logits."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minilora.data import IGNORE, Batch, PairBatch
from minilora.kernels import linear_cross_entropy
from minilora.models import CausalLM, is_plain_linear
from minilora.running.foreign import is_foreign, own_logits, read_by_head
from minilora.running.loss import at_least_f32, beside_padding, forward_logits

_CHUNK_ELEMENTS = 2**24  # logits held at a time where a head is wrapped or trained


def pair_log_probs(
    model: nn.Module, batch: PairBatch, answers: Sequence[int] = (1, 2)
) -> tuple[Tensor, Tensor]:
    """Sum log p over the learned tokens of each answer, or of one of the two.

    Returns the sums `[B, answers]`, f32 (f64 of an f64 model), and the numbers of tokens in that
    shape and dtype.
    """
    if len(answers) == 2 and shares_prompts(model, batch):
        losses, owners = _in_one_row(model, batch)  # type: ignore[arg-type]
    else:
        losses, owners = _in_rows(model, batch.apart(answers))
    zeros = losses.new_zeros(len(answers) * len(batch))
    sums = zeros.index_add(0, owners, -losses)
    tokens = zeros.index_add(0, owners, torch.ones_like(losses.detach()))
    return sums.view(-1, len(answers)), tokens.view(-1, len(answers))


def shares_prompts(model: nn.Module, batch: Batch) -> bool:
    """Return whether one row for prompt and both answers computes what two rows would.

    A window counts places in the row, and some rotary embeddings depend on a row's length, so that
    an answer would be seen in those of the other one.
    """
    if not isinstance(model, CausalLM):
        return False
    tokens = batch.input_ids.shape[1]
    return (
        tokens <= model.config.context_length
        and all(window is None or window >= tokens for window in model.windows)
        and not model.by_length
    )


def _in_one_row(model: CausalLM, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Return each learned token's loss, and which answer (2 · row + side) it is of."""
    hidden = model.hidden(
        batch.input_ids, positions=batch.positions(), mask=batch.document_mask()
    ).flatten(0, 1)
    learned = batch.labels != IGNORE
    row, place = learned.nonzero(as_tuple=True)
    before = batch.before()[row, place]
    owners = 2 * row + batch.parts[row, place] - 1
    read = hidden.index_select(0, row * batch.input_ids.shape[1] + before)
    return _own_head(model, read, batch.labels[row, place]), owners


def _in_rows(model: nn.Module, rows: Batch) -> tuple[Tensor, Tensor]:
    """Return each learned token's loss, and which row it is of."""
    labels = rows.labels[:, 1:]
    learned = labels != IGNORE
    owners = learned.nonzero(as_tuple=True)[0]
    if isinstance(model, CausalLM):
        beside = beside_padding(model, rows.attention_mask)
        read = model.hidden(rows.input_ids, **beside)[:, :-1][learned]
        return _own_head(model, read, labels[learned]), owners
    if (hidden := read_by_head(model, rows)) is not None:
        head: nn.Linear = model.get_output_embeddings()  # type: ignore[operator]
        read = hidden[:, :-1][learned]
        if _is_frozen(head):
            return _frozen_head(read, head, labels[learned]), owners
        return _by_chunks(head, len(head.weight), read, labels[learned]), owners
    if is_foreign(model):
        logits = own_logits(model, rows)
    else:
        logits = forward_logits(model, rows.input_ids, rows.attention_mask)
    return _losses(logits[:, :-1][learned], labels[learned]), owners


def _own_head(model: CausalLM, read: Tensor, labels: Tensor) -> Tensor:
    head = model.lm_head
    if is_plain_linear(head) and _is_frozen(head):
        fused = model.compiled_loss and read.device.type == "cpu"
        return _frozen_head(read, head, labels, fused=fused, cap=model.logit_cap)  # type: ignore[arg-type]
    return _by_chunks(model.logits, model.config.vocab_size, read, labels)


def _is_frozen(head: nn.Module) -> bool:
    return not (torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters()))


def _frozen_head(read: Tensor, head: nn.Linear, labels: Tensor, **options: object) -> Tensor:
    return linear_cross_entropy(read, head.weight, labels, reduction="none", **options)  # type: ignore[arg-type]


def _by_chunks(
    head: Callable[[Tensor], Tensor], vocabulary: int, read: Tensor, labels: Tensor
) -> Tensor:
    """Run a head that is wrapped or trained chunk by chunk, again in the backward pass."""
    size = max(32, _CHUNK_ELEMENTS // vocabulary)
    parts: list[Any] = [
        checkpoint(lambda x, y: _losses(head(x), y), some, wanted, use_reentrant=False)
        for some, wanted in zip(read.split(size), labels.split(size), strict=True)
    ]
    return torch.cat(parts)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(at_least_f32(logits), labels, reduction="none")
