"""The options of a run as one checked dataclass, and the learning rate that they imply."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from minilora.files import MOST, check_options, described, is_number, must_be, number, option, whole
from minilora.planning import PASS_TOKENS

_POSITIVE = number("a finite number above 0", lambda x: x > 0)
_POSITIVE_OR_NONE = number("a finite number above 0", lambda x: x > 0, none=True)
_COUNT_OR_NONE = whole(none=True)


def _two(value: Any) -> bool:
    listed = isinstance(value, (tuple, list)) and len(value) == 2
    return listed and all(is_number(beta) and 0 <= beta < 1 for beta in value)


def _two_above_0(value: Any) -> bool:
    listed = isinstance(value, (tuple, list)) and len(value) == 2
    return listed and all(is_number(x) and math.isfinite(x) and x > 0 for x in value)


_BEST_LR, _MEASURED = 2e-3, 135_000_000  # the rate, and the parameters of the model it is of

_WARMUP = 0.05
_ACTS_ON = {  # options of some losses alone
    "beta": ("dpo", "ipo", "orpo", "kto", "simpo"),
    "gamma": ("simpo",),
    "kto_weights": ("kto",),
}


@described
@dataclass(frozen=True)
class TrainConfig:
    """Settings of `minilora.fit`."""

    lr: float | None = option(
        None,
        "Peak learning rate of AdamW. None: chosen by the model's size, 2e-3 up to 135 million "
        "parameters and less for more of them; a quarter of that for losses over preferences "
        "(docs/training.md).",
        _POSITIVE_OR_NONE,
        may_differ=True,
    )
    lora_plus_ratio: float = option(
        1.0,
        "`lora_B` learns at this multiple of lr (LoRA+). 1 is plain LoRA; Hayou et al. 2024, "
        "arXiv:2402.12354, find about 16 good, with a lower lr.",
        _POSITIVE,
    )
    schedule: Literal["cosine", "linear", "constant"] = option(
        "cosine",
        "How the rate falls after the warmup. `cosine` and `linear` fall from lr to "
        "final_lr_ratio · lr; `constant` stays at lr.",
    )
    warmup: float = option(
        _WARMUP,
        "Share of the run over which the rate rises linearly to lr.",
        number("a number in [0, 1)", lambda x: 0 <= x < 1),
    )
    warmup_steps: int | None = option(
        None,
        "Steps over which the rate rises to lr. None: the share that warmup is.",
        _COUNT_OR_NONE,
    )
    final_lr_ratio: float = option(
        0.0,
        "Where a falling schedule ends, as a share of lr.",
        number("a number in [0, 1]", lambda x: 0 <= x <= 1),
    )
    weight_decay: float = option(
        0.0,
        "AdamW's decoupled weight decay, on every trained parameter. Loshchilov & Hutter 2019, "
        "arXiv:1711.05101.",
        number("a finite number of at least 0", lambda x: x >= 0),
    )
    betas: tuple[float, float] = option(
        (0.9, 0.999), "AdamW's betas.", must_be("two numbers in [0, 1)", _two), metavar="BETA"
    )
    eps: float = option(1e-8, "AdamW's eps.", _POSITIVE)
    loss: Literal["ce", "dpo", "ipo", "orpo", "kto", "simpo"] = option(
        "ce",
        "What is minimised: `ce` is the cross-entropy of the next token; the others compare "
        "answers (docs/preference.md) and need rows that say which is better: prompt, chosen and "
        "rejected, or for `kto` prompt, completion and label.",
    )
    beta: float | None = option(
        None,
        "How strongly a loss over preferences tells answers apart: β of `dpo`, `ipo`, `kto` and "
        "`simpo`, the weight λ of the odds in `orpo`. None: 2 for `simpo`, 0.1 for the others.",
        _POSITIVE_OR_NONE,
    )
    gamma: float | None = option(
        None,
        "Margin γ that `simpo` asks for. None: 1.",
        number("a finite number of at least 0", lambda x: x >= 0, none=True),
    )
    kto_weights: tuple[float, float] = option(
        (1.0, 1.0),
        "Weights of wanted and of unwanted answers in `kto`, for data with more of one.",
        must_be("two finite numbers above 0", _two_above_0),
        metavar="WEIGHT",
    )
    clip: float | None = option(
        1.0, "Largest global gradient norm. None never clips.", _POSITIVE_OR_NONE
    )
    batch_size: int = option(
        8,
        "Rows in a micro-batch, over all ranks. What does not fit in memory is computed in smaller "
        "passes with the same gradient.",
        whole(),
    )
    accumulate: int = option(
        1,
        "Micro-batches in an optimizer step. The gradient is that of the mean over all tokens of "
        "the step, however they are spread over the micro-batches.",
        whole(),
    )
    epochs: float | None = option(
        None,
        "Passes over the data; may be a fraction. None: as many as make about 100 steps, from 1 to "
        "20, unless max_steps is set.",
        number(f"a finite number above 0, at most {MOST:,}", lambda x: 0 < x <= MOST, none=True),
        may_differ=True,
    )
    max_steps: int | None = option(
        None, "Optimizer steps at most.", _COUNT_OR_NONE, may_differ=True
    )
    max_minutes: float | None = option(
        None,
        "Minutes of training after which no further step begins. Evaluations and saving are not "
        "counted. The schedule follows whichever limit is nearer, so rates depend on the machine's "
        "speed; for a run that repeats exactly, set max_steps or epochs.",
        _POSITIVE_OR_NONE,
        flags=("--minutes", "--max-minutes"),
        may_differ=True,
    )
    eval_every: int | None = option(
        None,
        "Steps between evaluations. There is one before the first step and one after the last in "
        "any case. None: only these.",
        _COUNT_OR_NONE,
        metavar="STEPS",
        may_differ=True,
    )
    eval_batch_size: int | None = option(
        None, "Rows in an evaluation batch. None is batch_size.", _COUNT_OR_NONE, may_differ=True
    )
    save_every: int | None = option(
        None,
        "Steps between saves of the run's state. None saves every ten minutes. It is also saved at "
        "the end, on Ctrl-C or SIGTERM, and when an error ends the run.",
        _COUNT_OR_NONE,
        metavar="STEPS",
        may_differ=True,
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "What to compute in over a float32 base. `auto` autocasts to what `minilora.hardware()` "
        "found fastest, `bfloat16` and `float16` to that dtype; `float32` computes in float32 and "
        "needs a float32 base. A base of another dtype is used as it is. With a float16 base or "
        "autocast the loss is scaled; the adapter must be float32.",
        flags=("--autocast",),
    )
    checkpointing: bool = option(
        False,
        "Recompute activations in the backward pass instead of keeping them: less memory, more "
        "time.",
        may_differ=True,
    )
    max_memory: float | None = option(
        None,
        "10⁹ bytes that this process may take on a CPU, everything in it counted. A micro-batch "
        "whose planned peak (see `minilora.plan`) is higher is computed in smaller passes with the "
        "same gradient. None sets no limit. For models of minilora.models with their own "
        "loss; not with `fsdp`.",
        _POSITIVE_OR_NONE,
        metavar="GB",
        may_differ=True,
    )
    pass_tokens: int | None = option(
        None,
        "Tokens, padding included, that one pass computes at most, but one row at least: a "
        "micro-batch of more is computed in several passes, whose rows differ by one at most, with "
        "the same gradient. None: "
        f"{PASS_TOKENS:,} for models of minilora.models with their own loss on a CPU, where more "
        "take memory and hardly less time, and any number elsewhere. Not with `fsdp`.",
        _COUNT_OR_NONE,
        may_differ=True,
    )
    compile: bool | Literal["auto"] = option(
        False,
        "Run each block of the model through `torch.compile`: faster steps after half a minute. It "
        "needs a C++ compiler (on a GPU Triton and a C compiler), and its result is cached on "
        "disk; `auto` compiles where that works and says so where not. Rounding differs from "
        "uncompiled steps, and dropout draws other masks. Either all ranks compile or none.",
    )
    shuffle: bool = option(True, "Draw a new order each epoch.")
    group_by_length: bool = option(
        True, "Make batches of rows of similar length, which saves padding."
    )
    seed: int = option(
        0, "Decides order and dropout. The global random state is left alone.", whole(0, 2**63 - 1)
    )
    deterministic: bool = option(
        True,
        "Let a GPU add up in one order, so that a run repeats bit for bit and resumes so, as it "
        "always does on a CPU. Without it attention may take faster kernels (cuDNN's, on an H100 "
        "nearly twice as fast in long rows).",
    )
    patience: int | None = option(
        None,
        "Evaluations in a row without a better one after which the run ends. None never ends it "
        "early. Needs eval_every and held-out data.",
        _COUNT_OR_NONE,
        may_differ=True,
    )
    parallel: Literal["ddp", "fsdp"] | None = option(
        None,
        "How the processes that torchrun started share the run: each holds the model (`ddp`), or a "
        "part of every weight (`fsdp`). None is one process. A step has the same rows on any "
        "number of ranks: each takes a part of every micro-batch.",
        may_differ=True,
    )
    max_bad_steps: int = option(
        5,
        "Steps in a row with a non-finite loss or gradient after which the run ends. Such steps "
        "are skipped.",
        whole(),
        may_differ=True,
    )
    base_name: str | None = option(
        None,
        "What the adapter's config names as its base. None: where the model came from, of a model "
        "of the hub its name there.",
        must_be("a name or None", lambda v: v is None or (isinstance(v, str) and v.strip() != "")),
        may_differ=True,
    )
    log_every: int = option(
        10,
        "Steps between plain log lines. After five seconds of silence the next step has one too.",
        whole(),
        metavar="STEPS",
        may_differ=True,
    )
    log: Literal["tensorboard", "wandb", "trackio"] | None = option(
        None,
        "Board that losses, rates and speed go to as well. `tensorboard` writes into out; `wandb` "
        "and `trackio` into their project `minilora`, the run named as out is. Their packages are "
        "installed apart.",
        may_differ=True,
    )

    def __post_init__(self) -> None:
        check_options(self)
        for name, losses in _ACTS_ON.items():
            value = getattr(self, name)
            given = tuple(value) if isinstance(value, list) else value
            if self.loss not in losses and given != getattr(TrainConfig, name):
                raise ValueError(
                    f"{name} acts on loss={' or '.join(map(repr, losses))} alone, found "
                    f"{name}={value} with loss={self.loss!r}; leave it out, or set loss "
                    f"(--loss)"
                )
        if self.warmup_steps is not None and self.warmup not in (0, _WARMUP):
            raise ValueError(
                f"the warmup is a share (warmup) or steps (warmup_steps), found warmup="
                f"{self.warmup} and warmup_steps={self.warmup_steps}; leave one of them out"
            )
        if self.schedule == "constant" and self.final_lr_ratio:
            raise ValueError(
                f"schedule='constant' does not fall, found final_lr_ratio={self.final_lr_ratio}; "
                f"leave it out, or take 'linear' or 'cosine'"
            )
        if self.patience is not None and self.eval_every is None:
            raise ValueError(
                f"patience counts evaluations, so it needs eval_every, found patience="
                f"{self.patience} and eval_every=None; set both"
            )
        if self.loss != "ce" and (self.max_memory is not None or self.parallel == "fsdp"):
            name = "parallel" if self.parallel == "fsdp" else "max_memory"
            raise ValueError(
                f"{name}={getattr(self, name)!r} knows no loss over pairs of answers, found "
                f"loss={self.loss!r}; leave {name} out{', or use ddp' * (name == 'parallel')}"
            )
        for name in ("max_memory", "pass_tokens"):
            if getattr(self, name) is not None and self.parallel == "fsdp":
                raise ValueError(
                    f"{name} splits the passes of each rank alone, but under parallel='fsdp' all "
                    f"compute in step, found {name}={getattr(self, name)}; use 'ddp', or a smaller "
                    f"batch_size"
                )

    def to_dict(self) -> dict:
        """Return the settings as JSON-able values."""
        return dataclasses.asdict(self)


def chosen_lr(config: TrainConfig, parameters: int) -> float:
    """Return the peak rate of a run on a model of so many parameters.

    Where the config does not say, it is a rate that learned small tasks with SmolLM2-135M whole
    (twice that did better in short runs: benchmarks/NOTES.md). Larger models take less, by the root
    of their parameters, which is published and was not measured here (docs/training.md).
    """
    if config.lr is not None:
        return config.lr
    best = _BEST_LR if config.loss == "ce" else _BEST_LR / 4
    return float(f"{best * min(1.0, math.sqrt(_MEASURED / max(1, parameters))):.1e}")


def learning_rate(config: TrainConfig, progress: float, step_share: float = 0.0) -> float:
    """Return the rate of the step that starts at `progress`, a share of the run in [0, 1].

    `step_share` is the share that one step is, so that a warmup's first step is above 0 and its
    last one reaches lr.
    """
    warmup = config.warmup if config.warmup_steps is None else config.warmup_steps * step_share
    peak = chosen_lr(config, 0)
    if progress < warmup:
        return peak * min(1.0, (progress + step_share) / warmup)
    if config.schedule == "constant":
        return peak
    done = min(1.0, (progress - warmup) / (1 - warmup))
    falling = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return peak * (config.final_lr_ratio + (1 - config.final_lr_ratio) * falling)
