"""Adapters on the disk: PEFT's names and files, and nowhere else."""

import minilora.peft.pretrained  # noqa: F401 - transformers models write by it
from minilora.peft.checking import check
from minilora.peft.checkpoint import load, save, save_adapter
from minilora.peft.config import config_of, read_config
from minilora.peft.files import CONFIG_FILE, WEIGHTS_FILE, find_pair, fingerprint, settle_pair
from minilora.peft.portable import export, to_lora

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "check",
    "config_of",
    "export",
    "find_pair",
    "fingerprint",
    "load",
    "read_config",
    "save",
    "save_adapter",
    "settle_pair",
    "to_lora",
]
