"""What a run plans before its steps, and measures besides its losses."""

from collections.abc import Callable

import torch

from minilora.data import Batches, pad
from minilora.lora import inference
from minilora.planning import Forecast
from minilora.running import Evaluation, Loss, summarize
from minilora.training.gradient import pass_tokens
from minilora.training.monitor import Monitor
from minilora.training.run import Run


def forecast(run: Run, monitor: Monitor) -> Forecast:
    """Plan a run that is about to begin, and follow its steps."""
    monitor.begin("planning")
    if run.preference is not None:
        raise ValueError(
            f"--plan (in Python: plan=True) knows no loss over pairs of answers, found "
            f"loss {run.preference.kind!r}; leave it out"
        )
    if not isinstance(run.batches, Batches):
        raise ValueError(
            "--plan (in Python: plan=True) needs a list of examples, found a stream; plan its size "
            "apart"
        )
    config, ranks = run.config, run.ranks
    minutes = config.max_minutes
    found = Forecast(
        run.model, run.batches, run.dtype, config.accumulate, config.checkpointing,
        ranks.world_size, ranks.parallel, monitor.say, run.compile, pass_tokens(run),
        steps=None if run.total is None else run.total - run.step,
        minutes=None if minutes is None else minutes - run.elapsed / 60,
        elapsed=run.elapsed,
        clock=monitor.clock,
        own=not run.own_loss,
    )  # fmt: skip
    monitor.callbacks.objects.append(found)
    return found


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
    for fqn, factors in run.factors.items():
        norm = torch.linalg.vector_norm(factors.lora_B.detach())
        norms[fqn] = run.ranks.full(norm).float()
    values = torch.stack(list(norms.values())).tolist()  # on a GPU each reading waits for it
    return dict(zip(norms, values, strict=True))
