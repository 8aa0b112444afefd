"""What a run measures besides its losses, on one process or several."""

import torch

from minilora.data import Batches, pad
from minilora.lora import inference
from minilora.running import Evaluation, Loss, summarize
from minilora.training.run import Run


def evaluate(run: Run, valid: Batches, loss: Loss) -> Evaluation:
    """Evaluate with each rank taking a part of each batch; sums are over all ranks' tokens."""
    ranks = run.ranks
    examples = sorted(valid.examples, key=lambda example: len(example.input_ids))
    total, tokens = 0.0, 0
    with inference(run.model):
        for start in range(0, len(examples), valid.batch_size):
            rows = examples[start : start + valid.batch_size][ranks.rank :: ranks.world_size]
            if rows or ranks.parallel == "fsdp":  # sharded: all must compute, even without a row
                batch = pad(rows or examples[:1], valid.pad_id).to(run.device)
                part, count = loss(run.model, batch)
                total += float(part) if rows else 0.0
                tokens += int(count) if rows else 0
    total, counted = ranks.all_reduce(total, tokens)
    return summarize(total, int(counted))


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
