"""A machine with round figures, so that plans in tests don't depend on the one at hand."""

from minilora.planning.machines import Calibration

MACHINE = Calibration(
    memory=16_000_000_000,
    rates={"float32": 100e9, "bfloat16": 400e9, "float16": 400e9, "int8": 800e9},
    bandwidth=20e9,
    integer="int8",
    process=400_000_000,
)
