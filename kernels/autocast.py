"""Computing in the dtypes given, under autocast too."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Return a context in which autocast casts nothing.

    Where autocast is off already it does nothing at all: torch's cache of compiled functions takes
    none that switches autocast, and a step of decoding feels the switch.
    """
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
