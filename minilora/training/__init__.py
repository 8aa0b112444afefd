"""Training: configuration, schedule, the loop, and the state that makes a run resumable."""

from minilora.training.boards import check_board
from minilora.training.callbacks import Callbacks
from minilora.training.config import TrainConfig, chosen_lr
from minilora.training.lock import RUN_FILE, check_free
from minilora.training.loop import fit
from minilora.training.progress import chosen_epochs
from minilora.training.ranks import Ranks, common_dtype, leave, torchrun_number
from minilora.training.result import FitResult
from minilora.training.sharding import sharded
from minilora.training.state import LAST, check_out
from minilora.training.trials import RATES, Trial, Tuning
from minilora.training.tuning import tune
from minilora.training.tuning_chart import CHART_FILE
from minilora.training.tuning_record import check_tuning

__all__ = [
    "CHART_FILE",
    "LAST",
    "RATES",
    "RUN_FILE",
    "Callbacks",
    "FitResult",
    "Ranks",
    "TrainConfig",
    "Trial",
    "Tuning",
    "check_board",
    "check_free",
    "check_out",
    "check_tuning",
    "chosen_epochs",
    "chosen_lr",
    "common_dtype",
    "fit",
    "leave",
    "sharded",
    "torchrun_number",
    "tune",
]
