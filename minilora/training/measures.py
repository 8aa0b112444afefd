"""What a run measures besides its losses, on one process or several."""

from collections.abc import Callable

import torch

from minilora.data import Batches, pad
from minilora.lora import inference
from minilora.running import Evaluation, Loss, summarize
from minilora.training.run import Run


def evaluate(run: Run, valid: Batches, loss: Loss, tick: Callable[[int], None]) -> Evaluation:
    """Evaluate with each rank taking a part of each batch; sums are over all ranks' tokens.

    `tick` is told of the tokens that were processed, as they are.
    """
    ranks = run.ranks
    examples = sorted(valid.examples, key=lambda example: len(example.input_ids))
    total, tokens = 0.0, 0
    starts = range(0, len(examples), valid.batch_size)
    parts = [examples[i : i + valid.batch_size][ranks.rank :: ranks.world_size] for i in starts]
    preference = run.preference
    with inference(run.model):
        if preference is not None:
            batches = [pad(rows, valid.pad_id).to(run.device) for rows in parts if rows]
            preference.prepare(run.model, batches, 0, ranks.merge, ranks.all_reduce)
        for rows in parts:
            if rows or ranks.parallel == "fsdp":  # sharded: all must compute, even without a row
                batch = pad(rows or examples[:1], valid.pad_id).to(run.device)
                part, count = loss(run.model, batch)
                total += float(part) if rows else 0.0
                tokens += int(count) if rows else 0
            tick(ranks.world_size * sum(len(example.input_ids) for example in rows))
    total, counted = ranks.all_reduce(total, tokens)
    pairs = preference.told(ranks.all_reduce) if preference is not None else None
    return summarize(total, int(counted), pairs)


def b_norms(run: Run) -> dict[str, float]:
    """Return the norm of each layer's B: which layers learn, and how much."""
    norms: dict[str, torch.Tensor] = {}
    for fqn, layer in run.layers.items():
        if run.adapter in layer.adapters:
            factors = layer.adapters[run.adapter]
            norm = torch.linalg.vector_norm(factors.lora_B.detach())
            norms[fqn] = run.ranks.full(norm).float()
    values = torch.stack(list(norms.values())).tolist()  # on a GPU each reading waits for it
    return dict(zip(norms, values, strict=True))
