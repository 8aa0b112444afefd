"""What a run will need, before it begins: memory, time, cost, and which settings fit."""

from minilora.planning.arguments import add_arguments, from_arguments
from minilora.planning.calibration import resident
from minilora.planning.devices import DEVICES
from minilora.planning.forecast import Foretold
from minilora.planning.memory import Memory, Settings, count_memory
from minilora.planning.plans import Plan, plan
from minilora.planning.presets import PRESETS
from minilora.planning.shapes import read_shape

__all__ = [
    "DEVICES",
    "PRESETS",
    "Foretold",
    "Memory",
    "Plan",
    "Settings",
    "add_arguments",
    "count_memory",
    "from_arguments",
    "plan",
    "read_shape",
    "resident",
]
