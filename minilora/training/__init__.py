"""Training: configuration, schedule, the loop, and the state that makes a run resumable."""

from minilora.training.config import TrainConfig, learning_rate
from minilora.training.loop import FitResult, fit

__all__ = ["FitResult", "TrainConfig", "fit", "learning_rate"]
