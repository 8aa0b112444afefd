"""LoRA fine-tuning in plain PyTorch: exact, strict, PEFT-compatible, fast without a GPU."""

import minilora.cli.interrupt  # noqa: F401 - first: importing the rest takes seconds

# isort: split
from minilora.data import read_data
from minilora.kernels import hardware
from minilora.loading import load_model
from minilora.lora import (
    LoRALayer,
    activate,
    delete,
    disabled,
    eject,
    inject,
    merge,
    quantize,
    rename,
    summary,
    targets,
    unmerge,
)
from minilora.peft import check, export, load, save
from minilora.planning import plan
from minilora.quantization import Quantization
from minilora.report import compare, explain
from minilora.running import evaluate, generate
from minilora.training import TrainConfig, fit, tune

__version__ = "0.1.0"

__all__ = [
    "LoRALayer",
    "Quantization",
    "TrainConfig",
    "activate",
    "check",
    "compare",
    "delete",
    "disabled",
    "eject",
    "evaluate",
    "explain",
    "export",
    "fit",
    "generate",
    "hardware",
    "inject",
    "load",
    "load_model",
    "merge",
    "plan",
    "quantize",
    "read_data",
    "rename",
    "save",
    "summary",
    "targets",
    "tune",
    "unmerge",
]


def __dir__() -> list[str]:
    """List what is meant for use: the verbs, and the rooms that experts import."""
    return sorted([*__all__, "data", "lora", "models"])
