"""What a run will need, before it begins: memory, time, cost, and which settings fit."""

from minilora.planning.arguments import add_arguments, from_arguments
from minilora.planning.batches import PASS_TOKENS, pass_rows, usual_pass_tokens
from minilora.planning.forecast import Forecast, settings_of
from minilora.planning.machines import resident
from minilora.planning.memory import Counted, Memory, count_memory
from minilora.planning.plans import Plan, plan
from minilora.planning.shapes import PRESETS, Settings, read_shape
from minilora.planning.speed import ENOUGH_STEPS, MOST_EPOCHS, count_steps, usual_epochs

__all__ = [
    "ENOUGH_STEPS",
    "MOST_EPOCHS",
    "PASS_TOKENS",
    "PRESETS",
    "Counted",
    "Forecast",
    "Memory",
    "Plan",
    "Settings",
    "add_arguments",
    "count_memory",
    "count_steps",
    "from_arguments",
    "pass_rows",
    "plan",
    "read_shape",
    "resident",
    "settings_of",
    "usual_epochs",
    "usual_pass_tokens",
]
