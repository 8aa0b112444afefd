"""What a run says when it begins and when it ends, well or not."""

from minilora.data import Batches, common_prefix, worth_sharing
from minilora.files import counted
from minilora.planning import ENOUGH_STEPS, MOST_EPOCHS
from minilora.running import shares_prefix
from minilora.training.lock import RESUME, to_resume
from minilora.training.progress import chosen_epochs
from minilora.training.result import FitResult
from minilora.training.run import Run
from minilora.training.state import LAST, has_state

UNFINISHED = ("interrupted", "paused")  # runs that another call goes on with


def announcement(run: Run) -> str:
    """Return the line that says what is about to be trained."""
    parameters = sum(p.numel() for p in run.names)
    base = next(iter(run.layers.values())).view.dtype
    how = f"autocast {run.dtype}" if run.dtype is not None else "no autocast"
    if run.scale.growth:
        how += f", losses scaled by {run.scale.value:g}"
    limits = [counted(run.total, "step")] if run.total else []
    if run.config.max_minutes is not None:
        limits.append(f"{run.config.max_minutes:g} minutes")
    first = ", whichever ends first" if len(limits) > 1 else ""
    ranks = run.ranks
    processes = f"; {ranks.world_size} processes ({ranks.parallel})" if ranks.parallel else ""
    if (loss := run.preference) is not None:
        how += f"; loss {loss.kind}, beta {loss.beta:g}"
        if loss.has_reference:
            how += ", reference: the model without this adapter"
    return (
        f"training {parameters:,} parameters of adapter '{run.adapter}' for {' or '.join(limits)}"
        f"{first}; base {base}, {how}; {run.batches.about()}{processes}"
    ).replace("torch.", "")


def sharing(run: Run) -> list[str]:
    """Return the line that says that rows begin alike, where that saves much."""
    if not isinstance(run.batches, Batches) or run.own_loss or not shares_prefix(run.model):
        return []
    examples = run.batches.examples
    rows = min(len(examples), run.config.batch_size)
    length = sum(len(example.input_ids) for example in examples) // len(examples)
    shared = worth_sharing(rows, length, common_prefix(examples))
    if not shared:
        return []
    return [f"all rows begin with the same {shared} tokens, which are computed once a pass"]


def choices(run: Run) -> str:
    """Return the line that says how a run learns, and why so long where nobody said how long."""
    config = run.config
    warmup = (
        f"{config.warmup:.0%}"
        if config.warmup_steps is None
        else counted(config.warmup_steps, "step")
    )
    lr = f"{config.lr:g}"
    if run.lr_is_chosen:
        lr += ", chosen by the model's size (--lr),"
    scaling = next(iter(run.factors.values())).scaling
    said = (
        f"learning rate {lr} after {warmup} of warmup, {config.schedule}; scaling {scaling:g}; "
        f"{counted(config.batch_size * config.accumulate, 'row')} a step"
    )
    if not isinstance(run.batches, Batches):
        return said
    rows = len(run.batches.examples)
    epochs = chosen_epochs(config, rows)
    if epochs is None:
        return said
    why = ""
    if config.epochs is None:
        why = f", as a first result takes about {ENOUGH_STEPS} steps (--epochs)"
        if epochs in (1, MOST_EPOCHS):
            why = f", chosen from 1 to {MOST_EPOCHS} by their number (--epochs)"
    return f"{said}; {epochs:g} epoch{'' if epochs == 1 else 's'} of {rows:,} rows{why}"


def conclusions(run: Run, stopped: str, began: int) -> list[str]:
    """Return what there is to say of a run's data and its end; this call `began` at that step."""
    lines = [] if run.held_out is None else [f"note: {each}" for each in run.held_out.found()]
    if stopped == "time" and began < run.step < (run.total or 0):
        more = f"; go on with {to_resume(run.out)} and a higher limit" if run.out else ""
        how = " (--minutes, in Python: max_minutes)" if run.out else ""
        lines.append(f"the time was up after step {run.step} of {run.total}{more}{how}")
    ended = _conclusion(run, stopped, began)
    return lines if ended is None else [*lines, ended]


def _conclusion(run: Run, stopped: str, began: int) -> str | None:
    """Return the line that says how a run ended, where there is something to say."""
    if stopped == "early" and 0 < run.step == began:
        return (
            f"the run had already finished: no evaluation after step {run.best_step} was better, "
            f"so patience {run.config.patience} ended it; to go on, give its command --resume and "
            f"a higher --patience, or none"
        )
    if stopped in ("finished", "time") and 0 < run.step == began:
        names = ("max_minutes", "max_steps", "epochs")
        limits = [f"{n} {v:g}" for n in names if (v := getattr(run.config, n)) is not None]
        return (
            f"the run had already finished after step {run.step}, and its limits "
            f"({', '.join(limits) or 'epochs as chosen'}) allow no more; to go on, raise "
            f"--max-steps, --epochs or --minutes"
        )
    if stopped == "paused":
        return f"paused after step {run.step}" + (
            f"; go on with {to_resume(run.out)}" if run.out else ""
        )
    if stopped == "interrupted" and run.step == 0:
        return "stopped before the first step: nothing was trained or saved"
    if stopped == "interrupted":
        saved = f" and saved in {run.out}; go on with {to_resume(run.out)}" if run.out else ""
        return f"stopped after step {run.step}{saved}"
    if run.best is not None and run.best_step == 0:
        last = f"; the last step's is in {run.out / LAST}" if run.out else ""
        return (
            f"no evaluation was better than the one before the first step (held-out loss "
            f"{run.best.loss:.4f}), so the adapter is the one the run began with{last}"
        )
    if run.valid is not None and run.best is None:
        return "no evaluation was finite: the adapter is that of the last step"
    if stopped == "early":
        return (
            f"stopped after step {run.step}: {run.stale} evaluations in a row were not better "
            f"than the one after step {run.best_step}, whose adapter is kept"
        )
    return None


def times(result: FitResult, whole: float, resumed: bool) -> str:
    """Return the line that says where a call's time went; `whole` is all of it, in minutes."""
    longest = max(whole, result.minutes)
    parts = [f"training {spent(result.trained, longest)}"]
    if result.evaluating:
        parts.append(f"evaluation {spent(result.evaluating, longest)}")
    if result.compiling:
        parts.append(f"of both {spent(result.compiling, longest)} compiling")
    line = f"{', '.join(parts)}; {spent(whole, longest)} in all"
    if not resumed:
        return f"time: {line}"
    return f"time of this call: {line}; training in the whole run: {spent(result.minutes, longest)}"


def spent(minutes: float, longest: float) -> str:
    """Write a time in the unit that suits the longest of those beside it."""
    if longest < 2:
        return f"{60 * minutes:.{0 if longest > 0.15 else 1}f} s"
    return f"{minutes:.1f} min" if longest < 120 else f"{minutes / 60:.1f} h"


class DivergedError(RuntimeError):
    """Losses or gradients that are not finite ended a run."""


def too_many_bad_steps(run: Run, bad: int) -> DivergedError:
    """Return the error for steps in a row that were skipped."""
    out = run.out if run.ranks.parallel != "fsdp" else None  # whose state can't be gathered then
    saved = f" and saved in {out / LAST}" if out else ""
    again = f" and {RESUME}" if out else ""
    return DivergedError(
        f"{bad} steps in a row had a non-finite loss or gradient; the adapter is as it was "
        f"before them{saved}; go on with a lower lr{again}, or start anew in float32"
    )


def nothing_trained(run: Run) -> DivergedError:
    """Return the error for a run of which every step was skipped."""
    scaled = f", the loss scaled by {run.scale.value:g} in the end" if run.scale.growth else ""
    return DivergedError(
        f"a run must do at least one step, found all {run.step} skipped for a non-finite "
        f"loss or gradient{scaled}; nothing was trained: check the base and the adapter for NaN, "
        f"lower lr, or compute in float32"
    )


def lost_process(run: Run, error: BaseException) -> RuntimeError:
    """Return the error for another process that is gone."""
    go_on = "nothing was saved: start all again"
    if run.out is not None and has_state(run.out):
        go_on = f"the state in {run.out} is whole: start all again with {RESUME}, on any number of "
        go_on += "processes"
    return RuntimeError(
        f"all {run.ranks.world_size} processes must go on together, but process {run.ranks.rank} "
        f"lost another one after step {run.step} ({str(error).splitlines()[0]:.120}); {go_on}"
    )
