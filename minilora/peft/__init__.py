"""Adapters on the disk: PEFT's names and files, and nowhere else."""

from minilora.peft.checking import check
from minilora.peft.config import config_of, read_config
from minilora.peft.files import CONFIG_FILE, WEIGHTS_FILE, adapter_folder, find_pair, settle_pair
from minilora.peft.fingerprints import base_formats, fingerprint
from minilora.peft.loading import load
from minilora.peft.portable import export, plain_factors, to_lora
from minilora.peft.saving import save, save_adapter

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "adapter_folder",
    "base_formats",
    "check",
    "config_of",
    "export",
    "find_pair",
    "fingerprint",
    "load",
    "plain_factors",
    "read_config",
    "save",
    "save_adapter",
    "settle_pair",
    "to_lora",
]
