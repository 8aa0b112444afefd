"""What a run will need, before it begins: memory, time, cost, and which settings fit."""

from minilora.planning.devices import DEVICES
from minilora.planning.presets import PRESETS
from minilora.planning.verb import Plan, plan

__all__ = ["DEVICES", "PRESETS", "Plan", "plan"]
