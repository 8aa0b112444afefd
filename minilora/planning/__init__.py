"""What a run will need, before it begins: memory, time, cost, and which settings fit."""
