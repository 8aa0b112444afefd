"""The training loop, to be read top to bottom: prepare, step, evaluate, save, finish."""

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.data import Batch
from minilora.files import one_line
from minilora.lora import inference
from minilora.running import CompileClock, Loss, compiled, device_of
from minilora.training import messages
from minilora.training.boards import board, check_board
from minilora.training.callbacks import Callbacks
from minilora.training.config import TrainConfig
from minilora.training.feed import Feed
from minilora.training.gradient import Gradient
from minilora.training.health import Health
from minilora.training.lock import FolderLock, check_free, to_resume
from minilora.training.measures import b_norms, evaluate, forecast
from minilora.training.monitor import CURVE_FILE, Monitor, draw_curve, seconds
from minilora.training.progress import check_until
from minilora.training.ranks import Ranks
from minilora.training.result import FitResult
from minilora.training.run import Run
from minilora.training.session import alone, interruptible, training
from minilora.training.state import check_out, has_state

SAVE_SECONDS = 600  # between saves, where save_every is None


@alone()
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
    until: int | None = None,
) -> FitResult:
    """Train the model's active, trainable adapter with AdamW.

    The step's gradient is that of `Σ loss over tokens / Σ tokens` over all its micro-batches (of
    `Σ loss over pairs / pairs` where `config.loss` compares answers). At
    the end the model and `out` hold the adapter of the best evaluation, which may be the one
    before the first step (of the last step without `valid`). A run that was interrupted leaves
    the last step's in the model; `out` has the best of the evaluations so far, if any step's.

    Args:
        model: with adapters; changed in place. Only what belongs to the active adapter and
            requires gradients is trained.
        train: examples as `minilora.data.as_examples` takes them, none longer than the model's
            context; or `minilora.data.Pair`s, where `config.loss` compares answers.
        valid: held-out examples; evaluated before the first step, every `config.eval_every`, and
            after the last.
        config: settings; `TrainConfig()` if None.
        out: folder for the best adapter (PEFT's two files), the last one in `last/`,
            `state.safetensors` with the one before it, `metrics.jsonl` and `loss.png`; None
            leaves nothing behind. One process at a time may work in it.
        resume: continue the run whose state is in `out`, with the same base, adapter, data and
            config; limits, lr and what only reports may differ.
        loss: (model, batch) → (loss summed over tokens, tokens), to train and to evaluate with;
            `minilora.running.token_loss` if None. The counts it returns are what the sums are
            divided by.
        pad_id: token id of the padding; it does not affect the result.
        quiet: print nothing.
        callbacks: objects with any of the methods on_step, on_eval, on_save, on_log; see
            `minilora.training.Callbacks`. Each process calls its own.
        sample: writes some text with the model; called at each evaluation (in evaluation mode,
            without gradients), and the text is said and put into `metrics.jsonl`.
        plan: say first what memory and time are planned (which takes some seconds), and after the
            last step what was measured. For models of minilora.models.
        until: end this call after that step of the run, with the state saved for `resume`; 0 only
            evaluates. The learning rates are those of the whole run, so nothing else differs.

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
    check_until(until)
    if out == "":
        raise ValueError("out must name a folder, found ''; pass None to leave nothing behind")
    folder = None if out is None else Path(out)
    check_board(config.log, folder)
    lock = None
    ranks = Ranks(config.parallel, device_of(model))
    if folder is not None and ranks.rank == 0:
        check_free(folder)
        check_out(folder, resume)
        lock = FolderLock(folder)
    try:
        if lock is not None and folder is not None:
            check_out(folder, resume, begun=lock.left)  # as another run may just have ended
        run = Run(model, train, valid, config, folder, resume, loss, pad_id, ranks)
        run.until = until
        run.sweep()
    except BaseException:
        if lock is not None:
            lock.withdraw()
        raise
    try:
        with interruptible() as interrupted, training(run):
            rank0 = ranks.rank == 0
            clock = CompileClock()
            monitor = Monitor(
                run.total, run.step, folder if rank0 else None, config.log_every,
                quiet or not rank0, told, clock, run.evaluated >= 0 or run.step > 0,
            )  # fmt: skip
            log = config.log if rank0 else None
            with (
                closing(monitor),
                clock if run.compile else nullcontext(),
                board(log, folder, run.config.to_dict(), run.step) as boards,
            ):
                told.objects += boards
                planned = forecast(run, monitor) if plan and rank0 else None
                with compiled(run.model, run.compile):  # after the plan, which traces them itself
                    result = _Loop(run, monitor, interrupted, sample).train()
                if planned is not None:
                    planned.after()
                return result
    finally:
        ranks.close()
        if lock is not None:
            lock.release()


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
        self.saved = self.began = seconds()
        self.took = self.waited = self.evaluated = 0.0

    def train(self) -> FitResult:
        """Step until a limit is reached."""
        said = [messages.announcement(self.run), messages.choices(self.run)]
        said += messages.sharing(self.run)
        for line in (*said, *(f"note: {r}" for r in self.run.remarks)):
            self.monitor.say(line)
        try:
            try:
                stopped = self._steps()
                if stopped != "interrupted" and 0 < self.run.step == self.run.skipped:
                    raise messages.nothing_trained(self.run)
                if stopped not in messages.UNFINISHED:
                    self._evaluate()
            except _InterruptedError:
                stopped = "interrupted"
            return self._finish(stopped)
        except BaseException as error:
            self._rescue()
            if self.ranks.has_lost_peer(error):
                raise messages.lost_process(self.run, error) from error
            raise

    def _steps(self) -> str:
        """Step, evaluate and save in turn; return why it ended."""
        run, config = self.run, self.config
        if run.step == 0 or self._due(config.eval_every):
            self._evaluate()
        if run.out_of_patience() or run.paused():
            return "paused" if run.paused() else "early"
        with closing(self._groups()) as groups:
            for micro, position in groups:
                stop, save_now = self._agree()
                if stop:
                    return "interrupted"
                if run.out_of_time():
                    return "time"
                self._step(micro, position)
                if run.bad >= config.max_bad_steps:
                    bad, run.bad = run.bad, 0  # who resumes may try as many again
                    raise messages.too_many_bad_steps(run, bad)
                if self._due(config.eval_every):
                    self._evaluate()
                if self._due(config.save_every) or (save_now and config.save_every is None):
                    self._save()
                if run.out_of_patience():
                    return "early"
                if run.paused():
                    return "paused"
        return "finished"

    def _agree(self) -> tuple[bool, bool]:
        """Return whether any rank wants to stop and rank 0 to save; take over rank 0's clock."""
        run, rank0 = self.run, self.ranks.rank == 0
        late = rank0 and seconds() - self.saved >= SAVE_SECONDS
        elapsed = run.elapsed if rank0 else 0.0
        stop, save_now, run.elapsed = self.ranks.all_reduce(self.interrupted(), late, elapsed)
        return bool(stop), bool(save_now)

    def _due(self, every: int | None) -> bool:
        """Return whether this step is one of every so many, and not the last."""
        step = self.run.step
        return every is not None and step % every == 0 and step != self.run.total

    def _save(self) -> None:
        self.monitor.begin("saving")
        self.run.save()
        self.saved = seconds()
        if self.run.out is not None:
            self.monitor.callbacks("on_save", self.run.out)

    # --- one step

    def _groups(self) -> Generator[tuple[list[Batch], dict], None, None]:
        """Yield each step's micro-batches and the position after them, epoch after epoch."""
        run = self.run
        group: list[Batch] = []
        while run.total is None or run.step < run.total:
            with closing(self.feed.epoch()) as epoch:
                for batch, position in epoch:
                    group.append(batch)
                    if len(group) == self.config.accumulate:
                        yield group, position
                        group = []
                    if run.total is not None and run.step >= run.total:
                        return
            if group:  # an epoch's tail is a step of its own: no window spans two epochs
                yield group, position
                group = []

    def _step(self, micro: list[Batch], position: dict) -> None:
        """Do one optimizer step, or skip it where loss or gradient are not finite."""
        run = self.run
        lr, begin = run.rate(), seconds()
        self.monitor.begin(f"step {run.step + 1}")
        self.health.begin()
        value, norm, tokens = self.gradient.of(micro)
        pairs = None
        if run.preference is not None:
            pairs = run.preference.told(self.ranks.all_reduce)
            tokens = int(self.ranks.all_reduce(sum(batch.tokens for batch in micro))[0])
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
        run.lr, run.position = lr, position
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
            **(pairs or {}),
        }  # fmt: skip
        if run.step % self.config.log_every == 0:
            row["b_norm"] = b_norms(run)
        if run.scale.growth:
            row["loss_scale"] = run.scale.value
        self.monitor.step(row, run.time_left())

    def _update(self, lr: float, norm: float) -> None:
        if self.config.clip is not None and norm > self.config.clip:
            gradients = [p.grad for p in self.run.names if p.grad is not None]
            torch._foreach_mul_(gradients, self.config.clip / norm)
        for group in self.run.optimizer.param_groups:
            group["lr"] = lr * group["ratio"]
        self.run.optimizer.step()

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
            if self.ranks.world_size == 1 and self.interrupted():
                raise _InterruptedError
            return run.loss(model, batch)

        begin = seconds()
        tokens = sum(len(example.input_ids) for example in run.valid.examples)
        with self._autocast(), self.monitor.evaluating(tokens) as tick:
            evaluation = evaluate(run, run.valid, loss, tick)
        self.evaluated += seconds() - begin
        self.monitor.evaluation(run.step, evaluation)
        if run.keep(evaluation) and run.step:
            run.save_adapter()
        if self.sample is not None:
            self.monitor.begin("sampling")
            with inference(run.model), self._autocast():
                self.monitor.sample(run.step, self.sample(run.model))

    def _rescue(self) -> None:
        """On an error, save the state as of the last complete step of this call."""
        run, again = self.run, to_resume(self.run.out)
        if run.out is None or run.step == self.start or self.updating:
            return
        if self.ranks.rank > 0 or self.ranks.parallel == "fsdp":
            if has_state(run.out):
                self.monitor.say(f"the last save in {run.out} is what {again} goes on from")
            return
        try:
            run.save()
            self.monitor.say(f"saved after step {run.step} in {run.out}; go on with {again}")
        except (OSError, ValueError, RuntimeError) as error:  # what ended the run matters more
            self.monitor.say(f"the state could not be saved: {error}")

    def _finish(self, stopped: str) -> FitResult:
        run = self.run
        unfinished = stopped in messages.UNFINISHED
        if stopped != "interrupted" or run.step:
            self._save()
        if not unfinished:
            self.updating = True  # the model is no longer that of the state, which is saved
            run.restore_best()
        if not unfinished or (run.step and run.best_step == 0):
            run.save_adapter()
        if run.out is not None and self.ranks.rank == 0 and stopped != "paused":
            try:
                draw_curve(run.out)
            except Exception as error:  # whatever it is: the run is whole without it
                self.monitor.say(one_line(f"{CURVE_FILE} could not be drawn in {run.out}: {error}"))
        waited = self.waited / self.took if self.took else 0.0
        for line in messages.conclusions(run, stopped, self.start):
            self.monitor.say(line)
        if self.took and self.ranks.rank == 0:
            self.monitor.say(f"{waited:.2%} of the training time went into waiting for data")
        result = FitResult(run.step, stopped, run.elapsed / 60, run.tokens, run.skipped,
                           run.before, run.best, run.best_step, self.losses, waited,
                           self.took / 60, self.evaluated / 60,
                           self.monitor.clock.seconds / 60)  # fmt: skip
        self.monitor.say(messages.times(result, (seconds() - self.began) / 60, self.start > 0))
        return result
