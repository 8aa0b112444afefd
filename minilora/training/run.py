"""A run: what it trains and with what, how far it is, and how that gets to the disk and back."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.data import Batches, Stream
from minilora.files import UnwritableError
from minilora.lora import active_adapters, copies_of, describe, frozen_values, require_layers
from minilora.peft import config_of, fingerprint, save_adapter
from minilora.quantization import QuantizedLinear
from minilora.running import Evaluation, Loss, device_of, settle_compile, token_loss
from minilora.training.config import TrainConfig, learning_rate
from minilora.training.memory_limit import MemoryLimit
from minilora.training.prepare import (
    check_model,
    compute_dtype,
    example_check,
    make_batches,
    make_optimizer,
    planned_steps,
    require_next_token_loss,
    slow_dtype,
    trained,
    trained_adapter,
)
from minilora.training.ranks import Ranks, is_sharded, shard, whole_factors
from minilora.training.same_run import check_same_run, check_tensors
from minilora.training.scaling import LossScale, loss_scale
from minilora.training.state import (
    LAST,
    STATE_FILE,
    damaged,
    has_state,
    load_state,
    optimizer_tensors,
    restore_optimizer,
    resumable,
    save_state,
    settle_state,
    sweep,
)

_COUNTERS = (
    *("step", "tokens", "skipped", "bad", "elapsed", "evaluated", "best_step", "lr"),
    "stale",
)
_ANY_BASE = ("base_model_name_or_path", "peft_version", "task_type")  # a path may differ


class Run:
    """The parts of a run and its counters; everything is checked when it is made.

    Attributes:
        names: the trained parameters and their dotted names.
        total: optimizer steps planned, None under a time limit alone.
        step: optimizer steps done; skipped ones count.
        tokens: learned tokens processed.
        scale: what the loss is multiplied with before the backward pass.
        skipped: steps skipped for a loss or gradient that was not finite; `bad` in a row.
        elapsed: seconds spent in steps.
        evaluated: the step after which the last evaluation was made, -1 before the first.
        stale: evaluations since the best one.
        rows: rows in a pass, once a micro-batch did not fit; 0 until then.
        rows_of_all: every rank's, after the last step; `process_of_all` likewise what each limit
            counts of its process.
        limit: what passes are held to before they run, None without `max_memory`.
        lr: the rate of the last step.
        ranks: the processes of the run.
        place: where in the data the last complete step ended.
        remarks: what the run should say before it begins.
        fallen_back: whether it goes on from the state before the newest one.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Iterable[Any],
        valid: Iterable[Any] | None,
        config: TrainConfig,
        out: Path | None,
        resume: bool,
        loss: Loss | None,
        pad_id: int,
        ranks: Ranks | None = None,
    ):
        self.model, self.config, self.out = model, config, out
        self.ranks = ranks or Ranks()
        self.loss: Loss = loss or token_loss
        self.own_loss = loss is not None
        self.layers = require_layers(model, "fit")
        check_model(model, self.layers)
        if loss is None:
            require_next_token_loss(model)
        self.adapter = trained_adapter(model, self.layers)
        self.names = trained(model, self.layers, self.adapter)
        self.compile, reason = settle_compile(config.compile)
        self.compile = not self.ranks.any(not self.compile)  # all, or none
        self.device = device_of(model)
        chosen = compute_dtype(self.layers, config.dtype, self.device)
        self.dtype = self.ranks.agree(chosen)
        self.scale = loss_scale(self.layers, self.dtype)
        check = example_check(model, pad_id, self.own_loss)
        self.batches: Any = make_batches(
            train,
            "train",
            check,
            batch_size=config.batch_size,
            shuffle=config.shuffle,
            group_by_length=config.group_by_length,
            seed=config.seed,
            pad_id=pad_id,
            part=(self.ranks.rank, self.ranks.world),
        )
        self.valid: Batches | None = None
        if valid is not None:
            size = config.eval_batch_size or config.batch_size
            if isinstance(valid, Stream):
                raise TypeError("valid must be a list of examples, found a Stream; read it first")
            held_out: Any = make_batches(valid, "valid", check, batch_size=size, pad_id=pad_id)
            self.valid = held_out
        if config.patience is not None and valid is None:
            raise ValueError("patience counts evaluations, so it needs valid, found none; pass it")
        if config.eval_every is not None and valid is None:
            raise ValueError(
                "eval_every (--eval-every) evaluates on valid (--valid), found none; pass it, or "
                "leave eval_every out"
            )
        # Ranks may have drawn other factors; those that are frozen, and all that FSDP2 takes parts
        # of, nobody else makes equal.
        self.ranks.take_first([*self.names, *self._buffers().values()])
        if self.ranks.kind == "fsdp" and not is_sharded(model):
            shard(model)
            self.names = trained(model, self.layers, self.adapter)
        self.limit = self._limit()
        self.rows_of_all = self.process_of_all = [0] * self.ranks.world
        if self.limit is not None:
            sums = self.ranks.sums(*self.ranks.apart(self.limit.process))
            self.process_of_all = [int(n) for n in sums]
        self.ranks.look_after(self.names)
        self.optimizer = make_optimizer(self.names, config)
        self.total = planned_steps(
            config, len(self.batches) if isinstance(self.batches, Batches) else None
        )
        self.step = self.tokens = self.skipped = self.bad = self.best_step = 0
        self.stale = self.rows = 0
        self.elapsed = self.lr = 0.0
        self.evaluated = -1
        self.fallen_back = False
        self.before: Evaluation | None = None
        self.best: Evaluation | None = None
        self.best_values: dict[str, Tensor] = {}
        slow = slow_dtype(self.layers, self.dtype, self.device)
        found_twice = self._seen_in_training()
        self.remarks: list[str] = [said for said in (reason, slow, found_twice) if said is not None]
        if resume and out is None:
            raise ValueError("resume=True needs out, the folder of the run to continue")
        if resume and out is not None:
            found = has_state(out)
            if self.ranks.any(found != self.ranks.of_first(found)):  # they would wait for ever
                raise RuntimeError(
                    f"all processes must resume from one folder, but the state in {out} is seen by "
                    f"some of them alone; give an out that all machines share"
                )
            if found:
                self._resume(out)
            else:
                self.remarks.append(
                    "the run was killed before its first save, so it begins from the start"
                )
        self.place = self.batches.state_dict()

    def _seen_in_training(self) -> str | None:
        """Say how many held-out examples are not held out."""
        if self.valid is None or not isinstance(self.batches, Batches):
            return None
        learned = {tuple(example.input_ids) for example in self.batches.examples}
        held_out = self.valid.examples
        seen = [i for i, example in enumerate(held_out) if tuple(example.input_ids) in learned]
        if not seen:
            return None
        return (
            f"{len(seen)} of {len(held_out)} held-out examples are trained on too (first: example "
            f"{seen[0]} of valid); their loss says nothing of other data"
        )

    def _limit(self) -> MemoryLimit | None:
        """Return the limit on passes, if there is one that the longest row keeps."""
        config = self.config
        if config.max_memory is None:
            return None
        if self.own_loss:
            raise ValueError(
                "max_memory plans what the model's own loss takes, found a loss of your own; leave "
                "one of them out"
            )
        limit = MemoryLimit(
            self.model, config.max_memory, self.dtype, config.checkpointing, self.ranks.world
        )
        if isinstance(self.batches, Batches):
            examples = self.batches.examples
            longest = max(len(example.input_ids) for example in examples)
            limit.check_row(longest, any(example.lengths for example in examples))
        return limit

    # --- how far it is

    def progress(self) -> float:
        """Return the share of the run that is done, by the limit that is nearest; 1 or above."""
        steps = self.step / self.total if self.total else 0.0
        minutes = self.config.max_minutes
        return max(steps, self.elapsed / 60 / minutes if minutes else 0.0)

    def rate(self) -> float:
        """Return the learning rate of the next step."""
        share = 1 / self.total if self.total else self.progress() / max(1, self.step)
        if self.step == 0 and not self.total:
            share = 0.1 * self.config.warmup
        return learning_rate(self.config, min(1.0, self.progress()), share)

    def out_of_time(self) -> bool:
        """Tell whether no further step may begin."""
        minutes = self.config.max_minutes
        return minutes is not None and self.elapsed >= 60 * minutes

    def time_left(self) -> float | None:
        """Return the seconds left, None before the first step."""
        progress = self.progress()
        return self.elapsed * max(0.0, 1 - progress) / progress if progress else None

    # --- the best adapter

    def keep(self, found: Evaluation) -> bool:
        """Note an evaluation after the current step; tell whether it is the best so far."""
        self.evaluated = self.step
        if self.step == 0:
            self.before = found
        if not math.isfinite(found.loss) or (self.best and found.loss >= self.best.loss):
            self.stale += 1
            return False
        self.best, self.best_step, self.stale = found, self.step, 0
        self.best_values = {name: p.detach().clone() for p, name in self.names.items()}
        return True

    def restore_best(self) -> None:
        """Put the best adapter into the model, where there is one."""
        with torch.no_grad():
            for parameter, name in self.names.items():
                if name in self.best_values:
                    parameter.copy_(self.best_values[name])

    # --- to the disk and back

    def save(self) -> None:
        """Write what `resume` needs, and the current adapter into `last/`."""
        if self.out is None:
            return
        full = self.ranks.full
        tensors = {f"parameter.{name}": p for p, name in self.names.items()}
        tensors |= {f"buffer.{name}": b for name, b in self._buffers().items()}
        tensors |= {f"best.{name}": value for name, value in self.best_values.items()}
        tensors |= optimizer_tensors(self.optimizer, self.names)  # type: ignore[arg-type]
        facts = {key: getattr(self, key) for key in _COUNTERS}
        facts |= {"data": self.place, "identity": self._identity(), "total": self.total}
        facts["scale"] = vars(self.scale)
        facts["rows"], facts["process"] = self.rows_of_all, self.process_of_all
        for key, found in (("before", self.before), ("best", self.best)):
            facts[key] = None if found is None else vars(found)
        tensors = {key: full(tensor) for key, tensor in tensors.items()}
        if self.ranks.rank == 0:
            save_state(self.out, tensors, facts)
        self._save_adapter(self.out / LAST)

    def save_adapter(self) -> None:
        """Write the adapter as it is in the model into the run's folder."""
        if self.out is not None:
            self._save_adapter(self.out)

    def _save_adapter(self, folder: Path) -> None:
        try:
            with whole_factors(self.model, self.adapter):
                if self.ranks.rank == 0:
                    save_adapter(self.model, folder, self.adapter)
        except UnwritableError as error:
            raise resumable(error) from error

    def sweep(self) -> None:
        """Make good what a killed run left."""
        self.ranks.sums(0)  # waits until all have read the state
        if self.out is not None and self.ranks.rank == 0:
            if self.fallen_back:
                settle_state(self.out)
            sweep(self.out)

    def _buffers(self) -> dict[str, Tensor]:
        """Return what is frozen of the adapter by dotted name.

        PiSSA's offset, a slice's mask, and factors that require no gradient: those too are drawn
        anew in the next process.
        """
        found: dict[str, Tensor] = {}
        for fqn, layer in self.layers.items():
            if self.adapter in layer.adapters:
                factors = layer.adapters[self.adapter]
                held = [*factors.named_buffers(), *factors.named_parameters()]
                found |= {f"{fqn}.{name}": one for name, one in held if one not in self.names}
        return found

    def _identity(self) -> dict[str, Any]:
        """Return what makes it this run: a resumed one must have the same."""
        mine = {n: layer for n, layer in self.layers.items() if self.adapter in layer.adapters}
        with whole_factors(self.model, self.adapter):  # PiSSA's are put together with its offset
            adapter = config_of(self.model, self.adapter)
        return {
            "config": self.config.to_dict() | {"compile": self.compile},  # what "auto" came to
            "compute": [str(self.dtype), *sorted({str(v.compute_dtype) for v in mine.values()})],
            "adapter": {k: v for k, v in adapter.items() if k not in _ANY_BASE}
            | {"active adapters": list(active_adapters(self.model))},
            "base": json.loads(fingerprint(self.layers)),
            "rest": json.loads(describe(
                frozen_values(self.model, mine, copies_of(self.model, self.adapter))
            )),
            "valid": None if self.valid is None else self.valid.digest,
            "loss": _name_of(self.loss),
            "products": sorted({" and ".join(m.ways) for m in self.model.modules()
                                if isinstance(m, QuantizedLinear)}),
        }  # fmt: skip

    def _resume(self, out: Path) -> None:
        """Take up the run whose state lies in `out`; nothing changes before all is checked."""
        file = out / STATE_FILE
        tensors, facts = self.ranks.one_after_the_first(lambda: load_state(out))
        trained, buffers = {name: p for p, name in self.names.items()}, self._buffers()
        try:
            self.fallen_back = facts["fallback"] is not None
            fallback = [facts["fallback"]] if self.fallen_back else []
            self.remarks += fallback + check_same_run(out, facts["identity"], self._identity())
            check_tensors(file, tensors, trained, buffers)  # type: ignore[arg-type]
            self.batches.load_state_dict(facts["data"])
            for key in _COUNTERS:
                if not isinstance(facts[key], (int, float)):
                    raise TypeError(f"{key} is {facts[key]!r}")
                setattr(self, key, facts[key])
            self.scale = LossScale(**facts["scale"])
            self._resume_passes(*([int(n) for n in facts[key]] for key in ("rows", "process")))
            old_total = facts["total"]
            self.before = None if facts["before"] is None else Evaluation(**facts["before"])
            self.best = None if facts["best"] is None else Evaluation(**facts["best"])
        except (KeyError, TypeError, AttributeError) as error:
            raise damaged(file, error) from None
        for name, parameter in trained.items():
            self.ranks.put(parameter, tensors[f"parameter.{name}"])
        for name, buffer in buffers.items():
            self.ranks.put(buffer, tensors[f"buffer.{name}"])
        restore_optimizer(self.optimizer, self.names, tensors, self.ranks.like)
        self.best_values = {
            name: self.ranks.like(p, tensors[f"best.{name}"])
            for name, p in trained.items()
            if f"best.{name}" in tensors
        }
        old_minutes = facts["identity"]["config"].get("max_minutes")
        moved = (old_total, old_minutes) != (self.total, self.config.max_minutes)
        if moved and self.config.schedule != "constant" and self.step and self.progress() < 1:
            self.remarks.append(
                f"the limits are not those of the first run, and the schedule follows them: the "
                f"learning rate goes on at {self.rate():.2e}, the last step had {self.lr:.2e}"
            )

    def _resume_passes(self, rows: list[int], process: list[int]) -> None:
        """Split as each rank did; with another number of ranks, as the one that split most did."""
        world, rank = self.ranks.world, self.ranks.rank
        if len(rows) != world:
            rows = [min((n for n in rows if n), default=0)] * world
        self.rows, self.rows_of_all = rows[rank], rows
        if self.limit is not None and len(process) == world and process[rank]:
            self.limit.process = process[rank]  # or it might decide otherwise
            self.limit.planned.cache_clear()
            self.process_of_all = process


def _name_of(function: Any) -> str:
    """Return a function's name, that of what a partial calls, or an object's class."""
    function = getattr(function, "func", function)
    return getattr(function, "__qualname__", type(function).__qualname__)
