"""A run: what it trains and with what, how far it is, and how that gets to the disk and back."""

import json
import math
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.data import Batches, Example, Stream
from minilora.files import UnwritableError
from minilora.lora import Survey, describe, frozen_values, summary
from minilora.peft import config_of, fingerprint, save_adapter
from minilora.quantization import quantized_layers
from minilora.running import Evaluation, Loss, Preference, device_of, settle_compile
from minilora.training.adamw import AdamW
from minilora.training.config import TrainConfig, chosen_lr
from minilora.training.loss import chosen_loss, require_next_token_loss
from minilora.training.memory_limit import MemoryLimit
from minilora.training.prepare import (
    HeldOut,
    check_model,
    compute_dtype,
    example_check,
    make_batches,
    slow_dtype,
    trained,
    trained_adapter,
)
from minilora.training.progress import Counters, Progress, planned_steps
from minilora.training.ranks import Ranks
from minilora.training.same_run import check_same_run, check_tensors, digest
from minilora.training.scaling import LossScale, loss_scale
from minilora.training.sharding import is_sharded, shard, whole_factors
from minilora.training.state import (
    LAST,
    STATE_FILE,
    damaged,
    has_state,
    load_state,
    resumable,
    save_state,
    settle_state,
    sweep,
)

_ANY_BASE = ("base_model_name_or_path", "peft_version", "revision", "task_type")  # may differ


class Run(Progress):
    """The parts of a run and its counters; everything is checked when it is made.

    Attributes:
        loss: what a step minimises and an evaluation reports.
        preference: the loss where it compares answers, else None.
        factors: the adapter's in each layer that has it.
        names: the trained parameters and their dotted names.
        scale: what the loss is multiplied with before the backward pass.
        rows: rows in a pass, once a micro-batch did not fit; 0 until then.
        rows_of_all: every rank's `rows` after the last step.
        process_of_all: the bytes that each rank's limit counts for its process.
        limit: what passes are held to before they run, None without `max_memory`.
        ranks: the processes of the run.
        position: in the data, after the last complete step.
        others: a hash of each other active adapter, by name.
        lr_is_chosen: whether nobody gave a learning rate.
        remarks: what the run should say before it begins.
        held_out: what meets a stream's examples, None without a stream or held-out ones.
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
        ranks: Ranks,
    ):
        super().__init__()
        self.model, self.config, self.out, self.ranks = model, config, out, ranks
        self.loss = chosen_loss(config, loss)
        self.own_loss = loss is not None
        self.preference = self.loss if isinstance(self.loss, Preference) else None
        self.fallen_back = False
        self.before: Evaluation | None = None
        self.best: Evaluation | None = None
        self.best_values: dict[str, Tensor] = {}
        self._take_model()
        self._take_data(train, valid, pad_id)
        self._spread()
        self.optimizer = AdamW(self.names, config)
        known = len(self.batches.examples) if isinstance(self.batches, Batches) else None
        self.total = planned_steps(config, known)
        if resume:
            self._find_state()
        if self.valid is None and self.step == 0:
            self.remarks.append(
                "nothing is held out, so nothing will say whether the adapter is better on other "
                "data; --valid FILE or --hold-out 5% does (in Python: valid=…)"
            )
        self.position = self.batches.state_dict()

    def _take_model(self) -> None:
        """Settle what is trained and in which dtype."""
        model, config = self.model, self.config
        survey = Survey(model)
        self.layers = survey.require_layers("fit")
        check_model(survey)
        self.lr_is_chosen = config.lr is None
        self.config = replace(config, lr=chosen_lr(config, summary(model).base))
        if not self.own_loss:
            require_next_token_loss(model)
        self.adapter = trained_adapter(survey)
        if self.preference is not None:  # without this one the model is the reference
            self.preference.adapter = self.adapter
        self.factors = survey.factors(self.adapter)
        self.names = trained(survey, self.adapter)
        self.others = {  # they are frozen, so once is enough
            name: digest(survey, name, self.ranks.full)
            for name in survey.active
            if name != self.adapter
        }
        self.device = device_of(model)
        self.compile, reason = settle_compile(config.compile, self.device)
        self.compile = not self.ranks.any(not self.compile)  # all, or none
        self.dtype = self.ranks.broadcast(compute_dtype(self.layers, config.dtype, self.device))
        self.scale = loss_scale(self.layers, self.dtype)
        remarks = (reason, slow_dtype(self.layers, self.dtype, self.device))
        self.remarks = [remark for remark in remarks if remark is not None]

    def _take_data(self, train: Iterable[Any], valid: Iterable[Any] | None, pad_id: int) -> None:
        """Make the batches."""
        config, ranks = self.config, self.ranks
        self.held_out: HeldOut | None = None
        check = example_check(self.model, pad_id, self.own_loss, self.preference)

        def check_train(example: Example, name: str) -> None:
            check(example, name)
            if self.held_out is not None:
                self.held_out.meet(example, name)

        self.batches: Any = make_batches(
            train,
            "train",
            check_train,
            batch_size=config.batch_size,
            shuffle=config.shuffle,
            group_by_length=config.group_by_length,
            seed=config.seed,
            pad_id=pad_id,
            part=(ranks.rank, ranks.world_size),
        )
        self.valid: Any = None
        if valid is not None:
            size = config.eval_batch_size or config.batch_size
            if isinstance(valid, Stream):
                raise TypeError("valid must be a list of examples, found a Stream; read it first")
            self.valid = make_batches(valid, "valid", check, batch_size=size, pad_id=pad_id)
            held_out = HeldOut(self.valid.examples)
            if isinstance(self.batches, Batches):
                self.remarks += held_out.found(self.batches.examples)
            else:
                self.held_out = held_out
        elif config.patience is not None:
            raise ValueError("patience counts evaluations, so it needs valid, found none; pass it")
        elif config.eval_every is not None:
            raise ValueError(
                "--eval-every evaluates on --valid, found none (in Python: eval_every, valid); "
                "pass it, or leave --eval-every out"
            )

    def _spread(self) -> None:
        """Give all ranks the same parameters, in shards under FSDP2, and settle their limits."""
        ranks = self.ranks
        # Ranks may have drawn other factors; those that are frozen, and all that FSDP2 shards,
        # nothing else makes equal.
        ranks.broadcast_tensors([*self.names, *self._buffers().values()])
        if ranks.parallel == "fsdp" and not is_sharded(self.model):
            shard(self.model, self.device)
            self.names = trained(Survey(self.model), self.adapter)
        self.limit = self._limit()
        self.rows, self.rows_of_all = 0, [0] * ranks.world_size
        self.process_of_all = [0] * ranks.world_size
        if self.limit is not None:
            self.process_of_all = ranks.all_gather(self.limit.process)
        ranks.wrap(self.names)

    def _limit(self) -> MemoryLimit | None:
        """Return the limit on passes, if there is one, once the longest row is known to keep it."""
        config = self.config
        if config.max_memory is None:
            return None
        limit = MemoryLimit(
            self.model, config.max_memory, self.dtype, config.checkpointing, self.ranks.world_size
        )
        if isinstance(self.batches, Batches):
            examples = self.batches.examples
            longest = max(len(example.input_ids) for example in examples)
            limit.check_row(longest, any(example.lengths for example in examples))
        return limit

    # --- the best adapter

    def keep(self, evaluation: Evaluation) -> bool:
        """Note an evaluation after the current step; return whether it is the best so far."""
        self.evaluated = self.step
        if self.step == 0:
            self.before = evaluation
        loss = evaluation.loss
        if not math.isfinite(loss) or (self.best and loss >= self.best.loss):
            self.stale += self.step > 0
            return False
        self.best, self.best_step, self.stale = evaluation, self.step, 0
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
        tensors = {f"parameter.{name}": p for p, name in self.names.items()}
        tensors |= {f"buffer.{name}": b for name, b in self._buffers().items()}
        tensors |= {f"best.{name}": value for name, value in self.best_values.items()}
        tensors |= self.optimizer.tensors()
        if self.preference is not None:
            tensors |= self.preference.tensors()
        tensors = {key: self.ranks.full(tensor) for key, tensor in tensors.items()}
        facts: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Counters)}
        facts |= {"data": self.position, "identity": self._identity(), "total": self.total}
        facts |= {"scale": vars(self.scale), "rows": self.rows_of_all}
        facts |= {"process": self.process_of_all}
        for key, one in (("before", self.before), ("best", self.best)):
            facts[key] = None if one is None else vars(one)
        if self.ranks.rank == 0:
            save_state(self.out, tensors, facts)
        self._save_adapter(self.out / LAST)

    def save_adapter(self) -> None:
        """Write the adapter as it is in the model into the run's folder."""
        if self.out is not None:
            self._save_adapter(self.out)

    def _save_adapter(self, folder: Path) -> None:
        try:
            with whole_factors(self.factors.values()):
                if self.ranks.rank == 0:
                    save_adapter(self.model, folder, self.adapter, self.config.base_name)
        except UnwritableError as error:
            raise resumable(folder, error) from error

    def sweep(self) -> None:
        """Remove what a killed run left."""
        self.ranks.all_reduce(0)  # waits until all have read the state
        if self.out is not None and self.ranks.rank == 0:
            if self.fallen_back:
                settle_state(self.out)
            sweep(self.out)

    def _buffers(self) -> dict[str, Tensor]:
        """Return what is frozen of the adapter by dotted name.

        These are PiSSA's offset, and factors that require no gradient: those too are drawn anew
        in the next process.
        """
        frozen: dict[str, Tensor] = {}
        for fqn, factors in self.factors.items():
            held = [*factors.named_buffers(), *factors.named_parameters()]
            frozen |= {f"{fqn}.{name}": one for name, one in held if one not in self.names}
        return frozen

    def _identity(self) -> dict[str, Any]:
        """Return what makes it this run: a resumed one must have the same."""
        mine = {n: layer for n, layer in self.layers.items() if self.adapter in layer.adapters}
        with whole_factors(self.factors.values()):  # PiSSA's are put together with its offset
            adapter = config_of(self.model, self.adapter)
        survey = Survey(self.model)
        rest = frozen_values(survey, mine, survey.copies_of(self.adapter))
        quantized = quantized_layers(self.model).values()
        loss = getattr(self.loss, "func", self.loss)  # what a partial calls
        return {
            "config": self.config.to_dict() | {"compile": self.compile},  # what "auto" came to
            "compute": [str(self.dtype), *sorted({str(v.compute_dtype) for v in mine.values()})],
            "adapter": {k: v for k, v in adapter.items() if k not in _ANY_BASE}
            | {"active adapters": list(survey.active)},
            "others": self.others,
            "base": json.loads(fingerprint(self.layers)),
            "rest": json.loads(describe(rest)),
            "valid": None if self.valid is None else self.valid.digest,
            "loss": getattr(loss, "__qualname__", type(loss).__qualname__),
            "products": sorted({" and ".join(m.ways) for m in quantized}),
        }

    def _find_state(self) -> None:
        """Resume from the state in `out`, if a run got as far as to save one."""
        if self.out is None:
            raise ValueError("resume=True needs out, the folder of the run to continue")
        saved = has_state(self.out)
        if self.ranks.any(saved != self.ranks.broadcast(saved)):  # they would wait for ever
            raise RuntimeError(
                f"all processes must resume from one folder, but the state in {self.out} is seen "
                f"by some of them alone; give an out that all machines share"
            )
        if saved:
            self._resume(self.out)
        else:
            self.remarks.append(
                "the run was killed before its first save, so it begins from the start"
            )

    def _resume(self, out: Path) -> None:
        """Take up the run whose state is in `out`; nothing changes before all is checked."""
        file, ranks = out / STATE_FILE, self.ranks
        tensors, facts = ranks.rank0_first(lambda: load_state(out))
        parameters, buffers = {name: p for p, name in self.names.items()}, self._buffers()
        try:
            self.fallen_back = facts["fallback"] is not None
            fallback = [facts["fallback"]] if self.fallen_back else []
            self.remarks += fallback + check_same_run(out, facts["identity"], self._identity())
            reference = [tensors.pop(f"reference.{key}", None) for key in ("keys", "values")]
            if self.preference is not None:
                self.preference.restore(*reference)
            check_tensors(file, tensors, parameters, buffers)  # type: ignore[arg-type]
            self.batches.load_state_dict(facts["data"])
            for key in (f.name for f in fields(Counters)):
                if not isinstance(facts[key], (int, float)):
                    raise TypeError(f"{key} is {facts[key]!r}")
                setattr(self, key, facts[key])
            self.scale = LossScale(**facts["scale"])
            self._resume_passes(*([int(n) for n in facts[key]] for key in ("rows", "process")))
            old_total = facts["total"]
            old_minutes = facts["identity"]["config"].get("max_minutes")
            self.check_limits(old_total, old_minutes)
            self.before = None if facts["before"] is None else Evaluation(**facts["before"])
            self.best = None if facts["best"] is None else Evaluation(**facts["best"])
        except (KeyError, TypeError, AttributeError) as error:
            raise damaged(file, error) from None
        for name, parameter in parameters.items():
            ranks.put(parameter, tensors[f"parameter.{name}"])
            if f"best.{name}" in tensors:
                best = ranks.shard_like(parameter, tensors[f"best.{name}"])
                self.best_values[name] = best
        for name, buffer in buffers.items():
            ranks.put(buffer, tensors[f"buffer.{name}"])
        self.optimizer.restore(tensors, ranks.shard_like)
        moved = (old_total, old_minutes) != (self.total, self.config.max_minutes)
        if moved and self.config.schedule != "constant" and self.step and self.progress() < 1:
            self.remarks.append(
                f"the limits are not those of the first run, and the schedule follows them: the "
                f"learning rate goes on at {self.rate():.2e}, the last step had {self.lr:.2e}"
            )

    def _resume_passes(self, rows: list[int], process: list[int]) -> None:
        """Split as each rank did; with another number of ranks, as the one that split most did."""
        world_size, rank = self.ranks.world_size, self.ranks.rank
        if len(rows) != world_size:
            rows = [min((n for n in rows if n), default=0)] * world_size
        self.rows, self.rows_of_all = rows[rank], rows
        if self.limit is not None and len(process) == world_size and process[rank]:
            self.limit.process = process[rank]  # or it might decide otherwise
            self.limit.planned.cache_clear()
            self.process_of_all = process
