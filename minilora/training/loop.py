"""The training loop, to be read top to bottom: prepare, step, evaluate, save, finish."""

import math
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.data import Batch, Batches
from minilora.files import one_line
from minilora.kernels import keep_freed_memory
from minilora.lora import as_found, inference, weight_dtype, widened
from minilora.planning import Foretold
from minilora.running import Evaluation, Loss, compiled, device_of, evaluate
from minilora.training.callbacks import Callbacks
from minilora.training.config import TrainConfig
from minilora.training.feed import Feed
from minilora.training.gradient import Gradient
from minilora.training.health import Health
from minilora.training.lock import FolderLock, check_free
from minilora.training.measures import b_norms, evaluate_on_ranks
from minilora.training.monitor import CURVE_FILE, Monitor, draw_curve, seconds
from minilora.training.prepare import checkpointing, interruptible
from minilora.training.ranks import Ranks
from minilora.training.run import Run
from minilora.training.state import LAST, check_out, has_state

_RESUME = "resume=True (--resume)"
SAVE_SECONDS = 600  # between saves, where save_every is None


@dataclass(frozen=True)
class FitResult:
    """What a run came to.

    Attributes:
        steps: optimizer steps done, over all resumptions, skipped ones included.
        stopped: `"finished"`, `"time"` (max_minutes), `"early"` (patience) or `"interrupted"`
            (Ctrl-C, SIGTERM).
        minutes: time spent in training steps; evaluations and saving not counted.
        tokens: learned tokens processed.
        skipped: steps skipped for a non-finite loss or gradient.
        before: evaluation before the first step, None without `valid`.
        best: the best evaluation, None without `valid` or when none was finite.
        best_step: the step after which it was made; the model holds that step's adapter. 0: no
            evaluation was better than the one before the first step.
        losses: training loss of each step of this call, without the skipped ones.
        data_wait: share of this call's training time spent waiting for batches, in [0, 1].
    """

    steps: int
    stopped: str
    minutes: float
    tokens: int
    skipped: int
    before: Evaluation | None
    best: Evaluation | None
    best_step: int
    losses: list[float] = field(repr=False)
    data_wait: float = 0.0


_AT_WORK = threading.RLock()


@contextmanager
def _alone() -> Iterator[None]:
    """Keep other threads' runs out: dropout is drawn from random numbers that all threads share."""
    if not _AT_WORK.acquire(blocking=False):
        raise RuntimeError(
            "fit() needs torch's random numbers, which all threads share, for itself, found "
            "another run in a thread of this process; train one after the other, or in processes"
        )
    try:
        yield
    finally:
        _AT_WORK.release()


@_alone()
def fit(
    model: nn.Module,
    train: Iterable[Any],
    valid: Iterable[Any] | None = None,
    *,
    config: TrainConfig | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    loss: Loss | None = None,
    pad_id: int = 0,
    quiet: bool = False,
    callbacks: Sequence[Any] = (),
    sample: Callable[[nn.Module], str] | None = None,
    plan: bool = False,
) -> FitResult:
    """Train the model's active, trainable adapter with AdamW.

    The step's gradient is that of `Σ loss over tokens / Σ tokens` over all its micro-batches. At
    the end the model and `out` hold the adapter of the best evaluation, which may be the one
    before the first step (of the last step without `valid`). A run that was interrupted leaves
    the last step's in the model; `out` has the best of the evaluations so far, if any step's.

    Args:
        model: with adapters; changed in place. Only what belongs to the active adapter and
            requires gradients is trained.
        train: examples as `minilora.data.as_examples` takes them, none longer than the model's
            context.
        valid: held-out examples; evaluated before the first step, every `config.eval_every`, and
            after the last.
        config: settings; `TrainConfig()` if None.
        out: folder for the best adapter (PEFT's two files), the last one in `last/`,
            `state.safetensors` with the one before it, `metrics.jsonl` and `loss.png`; None
            leaves nothing behind. One process at a time may work in it.
        resume: continue the run whose state lies in `out`, with the same base, adapter, data and
            config; limits, lr and what only reports may differ.
        loss: (model, batch) → (loss summed over tokens, tokens); `evaluation.token_loss` if None.
            The counts it returns are what the sums are divided by.
        pad_id: token id put into the padding, of no influence.
        quiet: print nothing.
        callbacks: objects with any of the methods on_step, on_eval, on_save, on_log; see
            `minilora.training.Callbacks`. Each process calls its own.
        sample: writes some text with the model; called at each evaluation (in evaluation mode,
            without gradients), and the text is said and put into `metrics.jsonl`.
        plan: say first what memory and time are planned (which takes some seconds), and after the
            last step what was measured. For Llama and GPT2 of minilora.models.

    Returns:
        A `FitResult`. Ctrl-C or SIGTERM end the run after the step in hand, with the state saved.

    Raises:
        ValueError: nothing to train, data that does not fit the model, a state of another run or
            a damaged one, an `out` that holds a run while `resume` is False.
        TypeError: data or a loss of another kind.
        RuntimeError: a merged model; an adapted layer that gets no gradient; too many non-finite
            steps in a row; a run in another thread; another process at work in `out`, or no room
            there. On any error after a step the state of the last complete one is saved.
    """
    config, told = config or TrainConfig(), Callbacks(callbacks)
    if sample is not None and (valid is None or not callable(sample)):
        found = "no valid" if callable(sample) else type(sample).__name__
        raise ValueError(
            f"sample must be a function that is called with the model at each evaluation, which "
            f"needs valid, found {found}; pass both, or leave it out"
        )
    if out == "":
        raise ValueError("out must name a folder, found ''; pass None to leave nothing behind")
    place = None if out is None else Path(out)
    lock = None
    ranks = Ranks(config.parallel, device_of(model))
    if place is not None and ranks.rank == 0:
        check_free(place)
        check_out(place, resume)
        lock = FolderLock(place)
    try:
        if lock is not None and place is not None:
            check_out(place, resume, begun=lock.left)  # as another run may just have ended
        run = Run(model, train, valid, config, place, resume, loss, pad_id, ranks)
        run.sweep()
    except BaseException:
        if lock is not None:
            lock.withdraw()
        raise
    try:
        with interruptible() as interrupted, _training(run):
            first = ranks.rank == 0
            written, mute = run.out if first else None, quiet or not first
            monitor = Monitor(run.total, run.step, written, config.log_every, mute, told)
            try:
                foretold = _foretold(run, monitor) if plan and first else None
                if foretold is not None:
                    monitor.callbacks.objects.append(foretold)
                loop = _Loop(run, monitor, interrupted, sample)
                result = loop.train()
                if foretold is not None:
                    foretold.after()
                return result
            finally:
                monitor.close()
    finally:
        ranks.close()
        if lock is not None:
            lock.release()


def _foretold(run: Run, monitor: Monitor) -> Foretold:
    """Plan a run that is about to begin."""
    if not isinstance(run.batches, Batches):
        raise ValueError("plan=True needs a list of examples, found a stream; plan its size apart")
    config, ranks = run.config, run.ranks
    minutes = config.max_minutes
    return Foretold(
        run.model, run.batches, run.dtype, config.accumulate, config.checkpointing, ranks.world,
        ranks.kind, monitor.say,
        steps=None if run.total is None else run.total - run.step,
        minutes=None if minutes is None else minutes - run.elapsed / 60,
        elapsed=run.elapsed,
    )  # fmt: skip


@contextmanager
def _training(run: Run) -> Iterator[None]:
    """Training mode, checkpointing and the run's own random numbers, all put back after."""
    if run.ranks.kind != "fsdp":  # which lives of what is given back
        keep_freed_memory()
    with (
        as_found(run.model, buffers=False),
        checkpointing(run.model, run.config.checkpointing),
        widened(run.model),
        compiled(run.model, run.compile),
    ):
        try:
            run.model.train()
            for module in run.model.modules():  # the base is frozen, and so are its statistics
                if getattr(module, "running_mean", None) is not None:
                    module.eval()
            yield
        finally:
            run.optimizer.zero_grad(set_to_none=True)  # else a loop that follows would add to it


class _InterruptedError(Exception):
    """Ends an evaluation on Ctrl-C."""


class _Loop:
    """The steps of one call of `fit`."""

    def __init__(
        self,
        run: Run,
        monitor: Monitor,
        interrupted: Callable[[], bool],
        sample: Callable[[nn.Module], str] | None,
    ):
        self.run, self.config, self.monitor, self.ranks = run, run.config, monitor, run.ranks
        self.interrupted, self.sample = interrupted, sample
        self.feed = Feed(run.batches, run.device)
        self.gradient = Gradient(run, self._autocast, monitor.say)
        self.health = Health(run.model, resumed=run.step > 0)
        self.losses: list[float] = []
        self.start = run.step
        self.updating = False
        self.saved = seconds()
        self.took = self.waited = 0.0

    def train(self) -> FitResult:
        """Step until a limit is reached."""
        self._announce()
        try:
            try:
                stopped = self._steps()
                if stopped != "interrupted" and 0 < self.run.step == self.run.skipped:
                    self._refuse_nothing()
                if stopped != "interrupted":
                    self._evaluate()
            except _InterruptedError:
                stopped = "interrupted"
            return self._finish(stopped)
        except BaseException as error:
            self._rescue()
            if self.ranks.lost(error):
                raise self._lost(error) from error
            raise

    def _steps(self) -> str:
        """Step, evaluate and save in turn; return why it ended."""
        run = self.run
        if run.step == 0 or self._due(self.config.eval_every):
            self._evaluate()
        if self._patience_over():
            return "early"
        with closing(self._groups()) as groups:
            return self._step_through(groups)

    def _step_through(self, groups: Iterable[tuple[list[Batch], dict]]) -> str:
        run = self.run
        for micro, place in groups:
            stop, save_now = self._agreed()
            if stop:
                return "interrupted"
            if run.out_of_time():
                return "time"
            self._step(micro, place)
            if run.bad >= self.config.max_bad_steps:
                self._give_up()
            if self._due(self.config.eval_every):
                self._evaluate()
            if self._due(self.config.save_every) or (save_now and self.config.save_every is None):
                self._save()
            if self._patience_over():
                return "early"
        return "finished"

    def _agreed(self) -> tuple[bool, bool]:
        """Ask all ranks whether to stop and rank 0 whether to save; take over rank 0's clock."""
        run, first = self.run, self.ranks.rank == 0
        late = first and seconds() - self.saved >= SAVE_SECONDS
        elapsed = run.elapsed if first else 0.0
        stop, save_now, run.elapsed = self.ranks.sums(self.interrupted(), late, elapsed)
        return bool(stop), bool(save_now)

    def _patience_over(self) -> bool:
        return self.config.patience is not None and self.run.stale >= self.config.patience

    def _save(self) -> None:
        run = self.run
        run.save()
        self.saved = seconds()
        if run.out is not None:
            self.monitor.callbacks("on_save", run.out)

    def _due(self, every: int | None) -> bool:
        """Tell whether this step is one of every so many, and not the last."""
        step = self.run.step
        return every is not None and step % every == 0 and step != self.run.total

    # --- one step

    def _groups(self) -> Generator[tuple[list[Batch], dict], None, None]:
        """Yield each step's micro-batches and the place after them, epoch after epoch."""
        run = self.run
        group: list[Batch] = []
        while run.total is None or run.step < run.total:
            with closing(self.feed.epoch()) as epoch:
                for batch, place in epoch:
                    group.append(batch)
                    if len(group) == self.config.accumulate:
                        yield group, place
                        group = []
                    if run.total is not None and run.step >= run.total:
                        return
            if group:  # an epoch's tail is a step of its own: no window spans two epochs
                yield group, place
                group = []

    def _step(self, micro: list[Batch], place: dict) -> None:
        """Do one optimizer step, or skip it where loss or gradient are not finite."""
        run = self.run
        lr, begin = run.rate(), seconds()
        self.health.begin()
        value, norm, tokens = self.gradient.of(micro)
        good = math.isfinite(value) and math.isfinite(norm)
        if good:
            for remark in self.health.check():
                self.monitor.say(f"note: {remark}")
        self.updating = True
        if good:
            self._update(lr, norm)
            self.losses.append(value)
        overflow = tokens > 0 and math.isfinite(value) and not good and run.scale.may_shrink()
        if tokens:
            run.scale.after(math.isfinite(norm))
        if not overflow:  # the next step has half the scale: only what it can't mend counts
            run.bad = 0 if good else run.bad + 1
        run.skipped += not good
        run.step += 1
        run.tokens += tokens
        run.lr, run.place = lr, place
        self.updating = False
        waited, self.waited = self.feed.waited - self.waited, self.feed.waited
        took = seconds() - begin + waited
        run.elapsed += took
        self.took += took
        if not good:
            self.monitor.say(
                f"step {run.step} skipped: loss {value} over {tokens} tokens, gradient norm {norm} "
                f"(not finite){f'; loss scale now {run.scale.value:g}' if overflow else ''}"
            )
        row: dict[str, Any] = {
            "step": run.step, "loss": value, "lr": lr, "grad_norm": norm, "tokens": tokens,
            "tokens_per_s": tokens / took, "elapsed_s": run.elapsed, "data_wait": waited / took,
        }  # fmt: skip
        if run.step % self.config.log_every == 0:
            row["b_norm"] = b_norms(run)
        if run.scale.growth:
            row["loss_scale"] = run.scale.value
        self.monitor.step(row, run.time_left())

    def _update(self, lr: float, norm: float) -> None:
        if self.config.clip is not None and norm > self.config.clip:
            for parameter in self.run.names:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.config.clip / norm)
        for group in self.run.optimizer.param_groups:
            group["lr"] = lr * group["ratio"]
        self.run.optimizer.step()

    def _give_up(self) -> None:
        bad, self.run.bad = self.run.bad, 0  # who resumes may try as many again
        where = f" and saved in {self.run.out / LAST}" if self.run.out else ""
        again = f" and {_RESUME}" if self.run.out else ""
        raise RuntimeError(
            f"{bad} steps in a row had a non-finite loss or gradient; the adapter is as it was "
            f"before them{where}; go on with a lower lr{again}, or start anew in float32"
        )

    def _refuse_nothing(self) -> None:
        scale = self.run.scale.value if self.run.scale.growth else None
        why = "" if scale is None else f", the loss scaled by {scale:g} in the end"
        raise RuntimeError(
            f"a run must do at least one step, found all {self.run.step} skipped for a non-finite "
            f"loss or gradient{why}; nothing was trained: check the base and the adapter for NaN, "
            f"lower lr, or compute in float32"
        )

    def _autocast(self):
        if self.run.dtype is None:
            return nullcontext()
        return torch.autocast(self.run.device.type, dtype=self.run.dtype)

    # --- evaluation, the end

    def _evaluate(self) -> None:
        run = self.run
        if run.valid is None or run.evaluated == run.step:
            return

        def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
            if self.interrupted():
                raise _InterruptedError
            total, count = run.loss(model, batch)
            return total, int(count)

        with self._autocast():
            if self.ranks.world == 1:
                found = evaluate(run.model, run.valid, loss=loss)
            else:
                found = evaluate_on_ranks(run, run.valid)
        self.monitor.evaluation(
            {"step": run.step, "eval_loss": found.loss, "eval_perplexity": found.perplexity}
        )
        if run.keep(found) and run.step:
            run.save_adapter()
        if self.sample is not None:
            with inference(run.model), self._autocast():
                self.monitor.sample(run.step, self.sample(run.model))

    def _rescue(self) -> None:
        """On an error, save the state as of the last complete step of this call."""
        run = self.run
        if run.out is None or run.step == self.start or self.updating:
            return
        if self.ranks.rank > 0 or self.ranks.kind == "fsdp":
            self.monitor.say(
                f"the last save in {run.out} is what {_RESUME} goes on from, on any number of ranks"
            )
            return
        try:
            run.save()
            self.monitor.say(f"saved after step {run.step} in {run.out}; go on with {_RESUME}")
        except (OSError, ValueError, RuntimeError) as error:  # what ended the run matters more
            self.monitor.say(f"the state could not be saved: {error}")

    def _lost(self, error: BaseException) -> RuntimeError:
        out, ranks = self.run.out, self.ranks
        saved = out is not None and has_state(out)
        go_on = f"the state in {out} is whole: start all again with {_RESUME}, on any number of "
        go_on = f"{go_on}processes" if saved else "nothing was saved: start all again"
        return RuntimeError(
            f"all {ranks.world} processes must go on together, but process {ranks.rank} lost "
            f"another one after step {self.run.step} ({str(error).splitlines()[0]:.120}); {go_on}"
        )

    def _finish(self, stopped: str) -> FitResult:
        run = self.run
        interrupted = stopped == "interrupted"
        if not interrupted or run.step:
            self._save()
        if not interrupted:
            self.updating = True  # the model is no longer that of the state, which is saved
            run.restore_best()
        if not interrupted or (run.step and run.best_step == 0):
            run.save_adapter()
        if run.out is not None and self.ranks.rank == 0:
            try:
                draw_curve(run.out)
            except Exception as error:  # whatever it is: the run is whole without it
                self.monitor.say(one_line(f"{CURVE_FILE} could not be drawn in {run.out}: {error}"))
        if interrupted and run.step == 0:
            self.monitor.say("stopped before the first step: nothing was trained or saved")
        elif interrupted:
            go_on = f" and saved in {run.out}; continue with {_RESUME}" if run.out else ""
            self.monitor.say(f"stopped after step {run.step}{go_on}")
        elif run.best is not None and run.best_step == 0:
            last = f"; the last step's is in {run.out / LAST}" if run.out else ""
            self.monitor.say(
                f"no evaluation was better than the one before the first step (held-out loss "
                f"{run.best.loss:.4f}), so the adapter is the one the run began with{last}"
            )
        elif stopped == "early":
            self.monitor.say(
                f"stopped after step {run.step}: {run.stale} evaluations in a row were not better "
                f"than the one after step {run.best_step}, whose adapter is kept"
            )
        elif run.valid is not None and run.best is None:
            self.monitor.say("no evaluation was finite: the adapter is that of the last step")
        if self.took and self.ranks.rank == 0:
            self.monitor.say(
                f"{100 * self.waited / self.took:.2f} % of the training time went into waiting for "
                f"data"
            )
        for parameter in run.names:
            parameter.grad = None
        return FitResult(run.step, stopped, run.elapsed / 60, run.tokens, run.skipped, run.before,
                         run.best, run.best_step, self.losses,
                         self.waited / self.took if self.took else 0.0)  # fmt: skip

    def _announce(self) -> None:
        run = self.run
        parameters = sum(p.numel() for p in run.names)
        dtype = weight_dtype(next(iter(run.layers.values())).base)
        how = f"autocast {run.dtype}" if run.dtype is not None else "no autocast"
        limits = [f"{run.total} steps"] if run.total else []
        if self.config.max_minutes is not None:
            limits.append(f"{self.config.max_minutes:g} minutes")
        if run.scale.growth:
            how += f", losses scaled by {run.scale.value:g}"
        plain = [str(text).replace("torch.", "") for text in (dtype, how)]
        self.monitor.say(
            f"training {parameters:,} parameters of adapter '{run.adapter}' for "
            f"{' or '.join(limits)}{', whichever ends first' if len(limits) > 1 else ''}; base "
            f"{plain[0]}, {plain[1]}; {run.batches.about()}"
            f"{f'; {self.ranks.world} processes ({self.ranks.kind})' if self.ranks.kind else ''}"
        )
        for remark in run.remarks:
            self.monitor.say(f"note: {remark}")
