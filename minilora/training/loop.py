"""The training loop, to be read top to bottom: prepare, step, evaluate, save, finish."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters import require_layers
from minilora.checkpoint import save_adapter
from minilora.data import Batch, Batches
from minilora.evaluation import Evaluation, Loss, device_of, evaluate, token_loss
from minilora.training.config import TrainConfig, learning_rate
from minilora.training.monitor import Health, Monitor, draw_curve, seconds
from minilora.training.prepare import (
    checkpointing,
    compute_dtype,
    interruptible,
    mix_seed,
    planned_steps,
    trained,
    trained_adapter,
)
from minilora.training.state import (
    check_same_run,
    load_state,
    optimizer_tensors,
    restore_optimizer,
    save_state,
)

LAST = "last"


@dataclass(frozen=True)
class FitResult:
    """What a run came to.

    Attributes:
        steps: optimizer steps done, over all resumptions.
        stopped: `"finished"`, `"time"` (max_minutes) or `"interrupted"` (Ctrl-C).
        minutes: time spent in training steps; evaluations and saving not counted.
        tokens: learned tokens processed.
        skipped: steps skipped for a non-finite loss or gradient.
        before: evaluation before the first step, None without `valid`.
        best: the best evaluation, None without `valid`.
        best_step: the step after which it was made; the model holds that step's adapter.
        losses: training loss of each step of this call.
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
) -> FitResult:
    """Train the model's active, trainable adapter with AdamW.

    The step's gradient is that of `Σ loss over tokens / Σ tokens` over all its micro-batches. At
    the end the model holds the adapter of the best evaluation (of the last step without `valid`).

    Args:
        model: with adapters; changed in place. Only parameters of active adapters that require
            gradients are trained.
        train: examples as `minilora.data.as_examples` takes them.
        valid: held-out examples; evaluated before the first step, every `config.eval_every`, and
            after the last.
        config: settings; `TrainConfig()` if None.
        out: folder for the best adapter (PEFT's two files), `last/`, `state.safetensors`,
            `metrics.jsonl` and `loss.png`; None leaves nothing behind.
        resume: continue the run whose state lies in `out`, with the same data and config (limits
            on steps and time may differ).
        loss: (model, batch) → (loss summed over tokens, tokens); `evaluation.token_loss` if None.
        pad_id: token id put into the padding, of no influence.
        quiet: print nothing.

    Returns:
        A `FitResult`. Ctrl-C ends the run after the step in hand, with the state saved.

    Raises:
        ValueError: nothing to train, bad data, a state of another run, an `out` that holds a run
            while `resume` is False.
        RuntimeError: a merged model; an adapted layer that gets no gradient; too many non-finite
            steps in a row (the state before them is saved).

    Token-weighted accumulation: Loshchilov & Hutter 2019 for AdamW, arXiv:1711.05101.
    """
    run = _Run(model, train, valid, config or TrainConfig(), out, resume, loss, pad_id, quiet)
    with run.scope(), interruptible() as interrupted:
        return run.train(interrupted)


class _Run:
    """One call of `fit`: the pieces that a state file must bring back, and the steps over them."""

    def __init__(self, model, train, valid, config, out, resume, loss, pad_id, quiet):
        self.model, self.config = model, config
        self.out = None if out is None else Path(out)
        self.loss: Loss = loss or token_loss
        self.layers = require_layers(model, "fit")
        if any(layer.merged for layer in self.layers.values()):
            raise RuntimeError("fit() needs unmerged weights; call minilora.unmerge(model) first")
        self.parameters = trained(model, self.layers)
        self.names = {p: n for n, p in model.named_parameters() if p in self.parameters}
        self.adapter = trained_adapter(self.layers)
        self.device = device_of(model)
        self.batches = Batches(
            train,
            batch_size=config.batch_size,
            shuffle=config.shuffle,
            group_by_length=config.group_by_length,
            seed=config.seed,
            pad_id=pad_id,
        )
        self.valid = None
        if valid is not None:
            size = config.eval_batch_size or config.batch_size
            self.valid = Batches(valid, batch_size=size, pad_id=pad_id)
        self.dtype = compute_dtype(model, config.dtype, self.device)
        self.optimizer = torch.optim.AdamW(
            list(self.names),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        self.total = planned_steps(config, len(self.batches))
        self.step = self.tokens = self.skipped = self.bad = self.best_step = 0
        self.elapsed = 0.0
        self.before: Evaluation | None = None
        self.best: Evaluation | None = None
        self.best_factors: dict[str, Tensor] = {}
        if resume:
            self._resume()
        elif self.out is not None and (self.out / "state.safetensors").exists():
            raise ValueError(
                f"{self.out} holds the state of an earlier run; pass resume=True (--resume) to "
                f"continue it, or another folder to start anew"
            )
        self.monitor = Monitor(self.total, self.step, self.out, config.log_every, quiet)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Training mode, checkpointing and the run's own random numbers, all put back after."""
        flags = [(module, module.training) for module in self.model.modules()]
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), checkpointing(self.model, self.config):
                self.model.train()
                yield
        finally:
            self.monitor.close()
            for module, training in flags:
                module.training = training

    def train(self, interrupted: Callable[[], bool]) -> FitResult:
        """Step until a limit is reached."""
        self._announce()
        losses: list[float] = []
        if self.step == 0:
            self._evaluate()
        health = Health(self.model)
        checked = 0  # steps since Health began to watch
        stopped = "finished"
        for micro in self._groups():
            lr = self._rate()
            begin = seconds()
            value, norm, count = self._gradient(micro)
            good = math.isfinite(value) and math.isfinite(norm)
            if good:
                checked += 1
                for remark in health.check(checked):
                    self.monitor.say(f"note: {remark}")
                self._update(lr, norm)
                losses.append(value)
            self._count_bad(good, value, norm)
            self.step += 1
            self.tokens += count
            took = seconds() - begin
            self.elapsed += took
            row = {
                "step": self.step,
                "loss": value,
                "lr": lr,
                "grad_norm": norm,
                "tokens": count,
                "tokens_per_s": sum(batch.input_ids.numel() for batch in micro) / took,
                "elapsed_s": self.elapsed,
            }
            self.monitor.step(row, self._time_left())
            last = self.step == self.total
            every = self.config.eval_every
            if not last and every and self.step % every == 0:
                self._evaluate()
            if not last and self.config.save_every and self.step % self.config.save_every == 0:
                self._save()
            if last:
                break
            # Only here is the place in the data that of the last update: the next group, once
            # drawn, would count as done.
            if interrupted() or self._out_of_time():
                stopped = "interrupted" if interrupted() else "time"
                break
        if stopped != "interrupted":
            self._evaluate()
        return self._finish(stopped, losses)

    # --- one step

    def _groups(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each optimizer step, over as many epochs as it takes."""
        group: list[Batch] = []
        while self.total is None or self.step < self.total:
            for batch in self.batches:
                group.append(batch)
                if len(group) == self.config.accumulate:
                    yield group
                    group = []
                if self.total is not None and self.step >= self.total:
                    return
            if group:  # an epoch's tail is a step of its own: no window spans two epochs
                yield group
                group = []

    def _gradient(self, micro: list[Batch]) -> tuple[float, float, int]:
        """Accumulate the gradient of the mean over all tokens; return loss, norm and tokens."""
        self.optimizer.zero_grad(set_to_none=True)
        count = sum(batch.tokens for batch in micro)
        value = 0.0
        for index, batch in enumerate(micro):
            # Dropout depends on where in the run we are, not on what ran before: so a resumed
            # run draws the same masks.
            torch.manual_seed(mix_seed(self.config.seed, self.step, index))
            with self._autocast():
                total, tokens = self.loss(self.model, batch.to(self.device))
            if tokens != batch.tokens and self.loss is token_loss:
                raise RuntimeError(f"loss counted {tokens} tokens, the batch has {batch.tokens}")
            (total / count).backward()
            value += float(total.detach()) / count
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.names if p.grad is not None]  # type: ignore[attr-defined]
        )
        return value, float(norm), count

    def _update(self, lr: float, norm: float) -> None:
        if self.config.clip is not None and norm > self.config.clip:
            for parameter in self.names:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.config.clip / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def _count_bad(self, good: bool, value: float, norm: float) -> None:
        if good:
            self.bad = 0
            return
        self.bad += 1
        self.skipped += 1
        self.monitor.say(
            f"step {self.step + 1} skipped: loss {value}, gradient norm {norm} (not finite)"
        )
        if self.bad >= self.config.max_bad_steps:
            self._save()
            raise RuntimeError(
                f"{self.bad} steps in a row had a non-finite loss or gradient; the adapter is as "
                f"it was before them{self._saved_where()}; lower lr, or train in float32"
            )

    def _autocast(self):
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    # --- limits

    def _progress(self) -> float:
        steps = self.step / self.total if self.total else 0.0
        minutes = self.config.max_minutes
        return max(steps, self.elapsed / 60 / minutes if minutes else 0.0)

    def _rate(self) -> float:
        share = 1 / self.total if self.total else self._progress() / max(1, self.step)
        if self.step == 0 and not self.total:
            share = 0.1 * self.config.warmup
        return learning_rate(self.config, min(1.0, self._progress()), share)

    def _out_of_time(self) -> bool:
        minutes = self.config.max_minutes
        return minutes is not None and self.elapsed >= 60 * minutes

    def _time_left(self) -> float | None:
        progress = self._progress()
        return self.elapsed * (1 - progress) / progress if progress else None

    # --- evaluation, saving

    def _evaluate(self) -> None:
        if self.valid is None:
            return
        with self._autocast():
            found = evaluate(self.model, self.valid, loss=self.loss)
        self.monitor.evaluation(
            {"step": self.step, "eval_loss": found.loss, "eval_perplexity": found.perplexity}
        )
        if self.before is None:
            self.before = found
        if self.best is None or found.loss < self.best.loss:
            self.best, self.best_step = found, self.step
            self.best_factors = {n: p.detach().clone() for p, n in self.names.items()}
            if self.out is not None and self.step:
                save_adapter(self.model, self.out, self.adapter)

    def _save(self) -> None:
        if self.out is None:
            return
        tensors = {f"parameter.{name}": p for p, name in self.names.items()}
        tensors |= {f"best.{name}": value for name, value in self.best_factors.items()}
        tensors |= optimizer_tensors(self.optimizer, self.names)  # type: ignore[arg-type]
        facts = {
            "step": self.step,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "bad": self.bad,
            "elapsed": self.elapsed,
            "best_step": self.best_step,
            "before": None if self.before is None else vars(self.before),
            "best": None if self.best is None else vars(self.best),
            "config": self.config.to_dict(),
            "dtype": str(self.dtype),
            "data": self.batches.state_dict(),
        }
        save_state(self.out, tensors, facts)

    def _saved_where(self) -> str:
        return "" if self.out is None else f" and saved in {self.out}"

    def _finish(self, stopped: str, losses: list[float]) -> FitResult:
        if self.out is not None:
            self._save()
            save_adapter(self.model, self.out / LAST, self.adapter)
            if self.best is None or self.best_step == 0:
                save_adapter(self.model, self.out, self.adapter)
            draw_curve(self.out)
        if stopped == "interrupted":
            go_on = f"; continue with resume=True (--resume) and out={self.out}" if self.out else ""
            self.monitor.say(f"stopped after step {self.step}{self._saved_where()}{go_on}")
        elif self.best_factors and self.best_step != self.step:
            with torch.no_grad():
                for parameter, name in self.names.items():
                    parameter.copy_(self.best_factors[name])
        for parameter in self.names:
            parameter.grad = None
        return FitResult(
            self.step,
            stopped,
            self.elapsed / 60,
            self.tokens,
            self.skipped,
            self.before,
            self.best,
            self.best_step,
            losses,
        )

    def _resume(self) -> None:
        if self.out is None:
            raise ValueError("resume=True needs out, the folder of the run to continue")
        tensors, facts = load_state(self.out)
        check_same_run(self.out, tensors, facts, self.config, self.dtype, self.names)
        self.batches.load_state_dict(facts["data"])
        with torch.no_grad():
            for parameter, name in self.names.items():
                parameter.copy_(tensors[f"parameter.{name}"])
        restore_optimizer(self.optimizer, self.names, tensors)  # type: ignore[arg-type]
        prefix = "best."
        self.best_factors = {
            key[len(prefix) :]: value.to(self.device)
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
        for key in ("step", "tokens", "skipped", "bad", "elapsed", "best_step"):
            setattr(self, key, facts[key])
        self.before = None if facts["before"] is None else Evaluation(**facts["before"])
        self.best = None if facts["best"] is None else Evaluation(**facts["best"])

    def _announce(self) -> None:
        trained = sum(p.numel() for p in self.names)
        dtype = next(iter(self.layers.values())).base.weight.dtype
        how = f"autocast {self.dtype}" if self.dtype is not None else "no autocast"
        limit = f"{self.total} steps" if self.total else f"{self.config.max_minutes:g} minutes"
        plain = [str(text).replace("torch.", "") for text in (dtype, how)]
        self.monitor.say(
            f"training {trained:,} parameters of adapter '{self.adapter}' for {limit}; base "
            f"{plain[0]}, {plain[1]}; {len(self.batches.examples)} examples, "
            f"{100 * self.batches.padding_share():.1f} % padding"
        )
