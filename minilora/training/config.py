"""What a run is told: one checked dataclass, and the learning rate it implies."""

import dataclasses
import math
import sys
from dataclasses import dataclass

from minilora.files import short

SCHEDULES = ("cosine", "linear", "constant")
PARALLEL = ("ddp", "fsdp")
MOST = 2**31 - 1  # of what is counted: rows, steps, epochs
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `minilora.fit`.

    Attributes:
        lr: peak learning rate of AdamW. May differ when a run is resumed.
        lora_plus_ratio: `lora_B` learns at lr · lora_plus_ratio (LoRA+, Hayou et al. 2024,
            arXiv:2402.12354, which finds about 16 good, with a lower lr); 1 is plain LoRA.
        schedule: `"cosine"` or `"linear"` fall from lr to `final_lr_ratio · lr`; `"constant"`.
        warmup: share of the run, in [0, 1), over which the rate rises linearly to lr.
        final_lr_ratio: where a falling schedule ends, as a share of lr.
        weight_decay: AdamW's (decoupled: Loshchilov & Hutter 2019, arXiv:1711.05101), on every
            trained parameter.
        betas: AdamW's.
        eps: AdamW's.
        clip: largest global gradient norm; None never clips.
        batch_size: rows in a micro-batch, over all ranks. What does not fit in memory is computed
            in smaller passes with the same gradient.
        accumulate: micro-batches in an optimizer step. The gradient is that of the mean over all
            tokens of the step, however they are spread over the micro-batches.
        epochs: passes over the data; may be a fraction. None: 1, unless another limit is set.
        max_steps: optimizer steps at most.
        max_minutes: time in training steps after which no further step begins; evaluations and
            saving are not counted. The schedule then follows whichever limit is nearer, so rates
            depend on the machine's speed; for a run that repeats exactly, set max_steps or epochs.
        eval_every: steps between evaluations; there is one before the first step and one after
            the last in any case. None: only these.
        eval_batch_size: rows per evaluation batch; None is batch_size.
        save_every: steps between saves of the run's state; None saves every ten minutes. It is
            also saved at the end, on Ctrl-C or SIGTERM, and when an error ends the run.
        dtype: what to compute in. `"auto"`: a base that is not f32 is used as it is; an f32 base
            runs under autocast in what `minilora.hardware()` found fastest. `"bfloat16"` and
            `"float16"` put an f32 base under autocast; `"float32"` computes in f32 and needs an
            f32 base. With a float16 base or autocast the loss is scaled, see `LossScale` in
            `minilora.training.scaling`; the adapter must be float32.
        checkpointing: recompute activations in the backward pass instead of keeping them.
        max_memory: 10⁹ bytes that this process may take on a CPU, everything in it counted; None
            sets no limit. A micro-batch whose planned peak (see `minilora.plan`) is higher is
            computed in smaller passes with the same gradient. For Llama and GPT2 of
            minilora.models with their own loss; not with `"fsdp"`.
        compile: True runs each block of the model through `torch.compile`, which takes a C++
            compiler and about half a minute once (its result is cached on disk); `"auto"` does
            where that works and says so where not. Rounding differs from uncompiled steps, and
            dropout draws other masks. Of several ranks all compile, or none.
        shuffle: a new order each epoch.
        group_by_length: batches of similar lengths (less padding).
        seed: decides order and dropout, nothing else; the global random state is left alone.
        patience: evaluations in a row without a better one after which the run ends; None never
            ends it early. Needs `eval_every` and `valid`.
        parallel: `"ddp"` (each rank holds the model) or `"fsdp"` (each holds a part of every
            weight) under torchrun; None is one process. A step has the same rows on any number
            of ranks: each takes a part of every micro-batch.
        max_bad_steps: a run stops after that many steps in a row with a non-finite loss or
            gradient, which are skipped.
        log_every: steps between plain log lines.
    """

    lr: float = 5e-4
    lora_plus_ratio: float = 1.0
    schedule: str = "cosine"
    warmup: float = 0.05
    final_lr_ratio: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = 1.0
    batch_size: int = 8
    accumulate: int = 1
    epochs: float | None = None
    max_steps: int | None = None
    max_minutes: float | None = None
    eval_every: int | None = None
    eval_batch_size: int | None = None
    save_every: int | None = None
    dtype: str = "auto"
    checkpointing: bool = False
    max_memory: float | None = None
    compile: bool | str = False
    shuffle: bool = True
    group_by_length: bool = True
    seed: int = 0
    patience: int | None = None
    parallel: str | None = None
    max_bad_steps: int = 5
    log_every: int = 10

    def __post_init__(self) -> None:
        most = f"at most {MOST:,}"
        for key in ("batch_size", "accumulate", "max_bad_steps", "log_every"):
            self._require(
                key, _whole(getattr(self, key)), f"a whole number of at least 1, at most {MOST:,}"
            )
        for key in ("max_steps", "eval_every", "eval_batch_size", "save_every", "patience"):
            value = getattr(self, key)
            self._require(
                key,
                value is None or _whole(value),
                f"a whole number ≥ 1, at most {MOST:,}, or None",
            )
        for key in ("epochs", "max_minutes", "clip", "max_memory"):
            value = getattr(self, key)
            good = value is None or (_number(value) and value > 0)
            self._require(key, good, "a finite number above 0, or None")
        self._require("epochs", self.epochs is None or self.epochs <= MOST, most)
        for key in ("lr", "lora_plus_ratio", "eps"):
            value = getattr(self, key)
            self._require(key, _number(value) and value > 0, "a finite number above 0")
        good = _number(self.weight_decay) and self.weight_decay >= 0
        self._require("weight_decay", good, "a finite number of at least 0")
        good = _number(self.warmup) and 0 <= self.warmup < 1
        self._require("warmup", good, "a share in [0, 1)")
        good = _number(self.final_lr_ratio) and 0 <= self.final_lr_ratio <= 1
        self._require("final_lr_ratio", good, "a share in [0, 1]")
        good = isinstance(self.betas, (tuple, list)) and len(self.betas) == 2
        good = good and all(_number(b) and 0 <= b < 1 for b in self.betas)
        self._require("betas", good, "two numbers in [0, 1)")
        for key in ("checkpointing", "shuffle", "group_by_length"):
            self._require(key, isinstance(getattr(self, key), bool), "True or False")
        self._require("compile", self.compile in (True, False, "auto"), "True, False or 'auto'")
        self._require("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        self._require("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        good = self.parallel in (None, *PARALLEL)
        self._require("parallel", good, f"None, or one of {', '.join(PARALLEL)}")
        if self.patience is not None and self.eval_every is None:
            raise ValueError(
                f"patience counts evaluations, so it needs eval_every, found patience="
                f"{self.patience} and eval_every=None; set both"
            )
        if self.max_memory is not None and self.parallel == "fsdp":
            raise ValueError(
                f"max_memory splits the passes of each rank alone, but under parallel='fsdp' all "
                f"compute in step, found max_memory={self.max_memory}; use 'ddp', or a smaller "
                f"batch_size"
            )
        good = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        good = good and 0 <= self.seed < 2**63
        self._require("seed", good, "a whole number of at least 0, below 2⁶³")

    def _require(self, key: str, good: bool, must: str) -> None:
        if not good:
            raise ValueError(f"{key} must be {must}, found {short(getattr(self, key))}")

    def to_dict(self) -> dict:
        """Return the settings as JSON-able values."""
        return dataclasses.asdict(self)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST


def _number(value: object) -> bool:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    return ok and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def learning_rate(config: TrainConfig, progress: float, step_share: float = 0.0) -> float:
    """Return the rate of the step that starts at `progress`.

    Args:
        config: the settings.
        progress: share of the run that is done, in [0, 1].
        step_share: the share that one step is, so that a warmup's first step is above 0 and its
            last one reaches lr.

    Returns:
        The learning rate.
    """
    if progress < config.warmup:
        return config.lr * min(1.0, (progress + step_share) / config.warmup)
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (progress - config.warmup) / (1 - config.warmup))
    falling = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * falling)
