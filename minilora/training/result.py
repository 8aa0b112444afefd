"""What a run came to."""

from dataclasses import dataclass, field

from minilora.running import Evaluation


@dataclass(frozen=True)
class FitResult:
    """What a run came to.

    Attributes:
        steps: optimizer steps done, over all resumptions, skipped ones included.
        stopped: `"finished"`, `"time"` (max_minutes), `"early"` (patience), `"interrupted"`
            (Ctrl-C, SIGTERM) or `"paused"` (until).
        minutes: time spent in training steps; evaluations and saving not counted.
        tokens: learned tokens processed.
        skipped: steps skipped for a non-finite loss or gradient.
        before: evaluation before the first step, None without `valid`.
        best: the best evaluation, None without `valid` or when none was finite.
        best_step: the step after which it was made; the model holds that step's adapter. 0: no
            evaluation was better than the one before the first step.
        losses: training loss of each step of this call, without the skipped ones.
        data_wait: share of this call's training time spent waiting for batches, in [0, 1].
        trained: minutes of training in this call alone.
        evaluating: minutes that this call's evaluations took.
        compiling: minutes that torch.compile took in this call, in steps and evaluations.
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
    trained: float = 0.0
    evaluating: float = 0.0
    compiling: float = 0.0
