"""A run's plan: what memory and time it will take, and afterwards what it took."""

from minilora.data import Batches
from minilora.planning import Forecast
from minilora.training.gradient import pass_tokens
from minilora.training.monitor import Monitor
from minilora.training.run import Run


def forecast(run: Run, monitor: Monitor) -> Forecast:
    """Plan a run that is about to begin, and follow its steps."""
    monitor.begin("planning")
    if run.preference is not None:
        raise ValueError(
            f"plan=True (--plan) knows no loss over pairs of answers, found "
            f"loss={run.preference.kind!r}; leave it out"
        )
    if not isinstance(run.batches, Batches):
        raise ValueError("plan=True needs a list of examples, found a stream; plan its size apart")
    config, ranks = run.config, run.ranks
    minutes = config.max_minutes
    found = Forecast(
        run.model, run.batches, run.dtype, config.accumulate, config.checkpointing,
        ranks.world_size, ranks.parallel, monitor.say, run.compile,
        pass_tokens(run),
        steps=None if run.total is None else run.total - run.step,
        minutes=None if minutes is None else minutes - run.elapsed / 60,
        elapsed=run.elapsed,
        clock=monitor.clock,
        own=not run.own_loss,
    )  # fmt: skip
    monitor.callbacks.objects.append(found)
    return found
