"""LoRA fine-tuning in plain PyTorch: exact, strict, PEFT-compatible, fast without a GPU."""

import minilora.interrupt  # first: importing the rest takes seconds

# isort: split
import minilora.pretrained  # noqa: F401 - transformers models write by it
from minilora.adapters import activate, delete, disabled, eject, rename, summary
from minilora.bases import quantize
from minilora.checkpoint import load, save
from minilora.evaluation import evaluate
from minilora.generation import generate
from minilora.injection import inject
from minilora.kernels import hardware
from minilora.layers import LoRALinear
from minilora.merging import merge, unmerge
from minilora.planning import plan
from minilora.portable import export
from minilora.readers import check
from minilora.report import explain
from minilora.selection import targets
from minilora.training import TrainConfig, fit

__version__ = "0.1.0"

__all__ = [
    "LoRALinear",
    "TrainConfig",
    "activate",
    "check",
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
    "merge",
    "plan",
    "quantize",
    "rename",
    "save",
    "summary",
    "targets",
    "unmerge",
]
