"""Measure a model on held-out tokens: summed over tokens, so no number depends on the batches."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minilora.data import Batch, Batches, as_examples, pad
from minilora.files import short, ticking
from minilora.lora import Survey, inference, widened
from minilora.running.loss import Loss, token_loss
from minilora.running.preference import Preference


@dataclass(frozen=True)
class Evaluation:
    """Hold what was measured.

    Attributes:
        loss: mean negative log-likelihood per token, in nats.
        perplexity: exp(loss), inf beyond the range of a float.
        tokens: labels that entered the mean; of pairs of answers their number, as `loss` is a mean
            over pairs.
        accuracy: of pairs, the share whose better answer has the higher reward; None for texts.
        margin: of pairs, the mean difference of rewards; None for texts.
    """

    loss: float
    perplexity: float
    tokens: int
    accuracy: float | None = None
    margin: float | None = None

    def __str__(self) -> str:
        if self.accuracy is not None:
            return (
                f"loss {self.loss:.4f}, accuracy {self.accuracy:.3f}, margin {self.margin:.4g} "
                f"over {self.tokens} pairs"
            )
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:.4g} over {self.tokens} tokens"


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer, the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    batch_size: int = 8,
    loss: Loss | None = None,
    pad_id: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Measure loss and perplexity per token, without dropout and without gradients.

    loss = Σ over all batches of the summed loss, in float64, / Σ of the tokens

    The same for every batch size up to rounding, and the same bits for the same batches; but for
    models of transformers' own classes with a dynamic or LongRoPE rotary embedding, where a batch
    has the frequencies of its longest row.

    Args:
        model: left as it was, flags, buffers and torch's random state included.
        data: examples as `minilora.data.as_examples` takes them, sorted by length here; or
            `Batch`es, taken in their order. Of a `Batches` the examples and the batch size are
            taken, and its position in the data does not move.
        batch_size: examples per batch; more is faster and takes more memory.
        loss: what to sum, (model, batch) → (sum, tokens); `token_loss` if None. For pairs of
            answers a `minilora.running.Preference`.
        pad_id: token id in the padding, of no influence.
        progress: show on stderr how far it is, and the time left.

    Returns:
        The numbers as found: a loss that is infinite or not a number is not hidden.

    Raises:
        ValueError: data that is empty, malformed or without a label to learn; an adapter with NaN.
        TypeError: data that is no examples or batches.
        RuntimeError: within `mixed` data that is no list of `Batch`es: sorting exchanges its rows.
    """
    if not 1 <= batch_size < 2**31:
        raise ValueError(f"batch_size must be at least 1, found {short(batch_size)}")
    survey = Survey(model)
    survey.require_values("evaluate")
    survey.require_finite()
    total, tokens = 0.0, 0
    device = device_of(model)
    preference = loss if isinstance(loss, Preference) else None
    batches = list(_batches(survey, data, batch_size, pad_id, preference is not None))
    every = sum(batch.input_ids.numel() for batch in batches)
    with inference(model), widened(model), ticking("evaluating", every, "tokens", progress) as tick:
        if preference is not None:
            batches = [batch.to(device) for batch in batches]
            preference.prepare(model, batches)
        for batch in batches:
            part, count = (loss or token_loss)(model, batch.to(device))
            total += float(part)
            tokens += count
            tick(batch.input_ids.numel())
    return summarize(total, tokens, preference.told() if preference is not None else None)


def summarize(total: float, tokens: int, pairs: dict[str, float] | None = None) -> Evaluation:
    """Return mean and perplexity of a loss summed over tokens.

    `pairs` is what `Preference.told` returned, of a loss over pairs of answers.
    """
    if tokens == 0:
        raise ValueError("data must hold a label to learn, found none: loss counted 0 tokens")
    mean = total / tokens
    try:
        perplexity = math.exp(mean)
    except OverflowError:
        perplexity = math.inf
    found = (None, None) if pairs is None else (pairs["accuracy"], pairs["margin"])
    return Evaluation(mean, perplexity, tokens, *found)


def _batches(
    survey: Survey, data: Iterable[Any], batch_size: int, pad_id: int, pairs: bool
) -> Iterator[Batch]:
    """Yield batches in an order that no random number decides."""
    if isinstance(data, Batches):
        examples, batch_size, pad_id = data.examples, data.batch_size, data.pad_id
    else:
        data = list(data)
        if data and all(isinstance(item, Batch) for item in data):
            yield from data
            return
        examples = as_examples(data, pairs)
    survey.require_unmixed("evaluate() of examples, which it sorts,")
    examples = sorted(examples, key=lambda example: len(example.input_ids))
    for i in range(0, len(examples), batch_size):
        yield pad(examples[i : i + batch_size], pad_id)
