"""Run a model and leave it as it was found."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from minilora.lora.threads import eval_mode

FLAGS = ("training", "gradient_checkpointing", "use_cache")
_LARGEST = 2**20  # elements of a buffer that is copied; larger ones are weights, as GPTQ keeps them


@contextmanager
def as_found(model: nn.Module, buffers: bool = True) -> Iterator[None]:
    """After the block the model's flags and buffers and torch's random streams are as before it.

    Args:
        model: each module's flags (`FLAGS`, its config's too) and each parameter's
            `requires_grad` are put back.
        buffers: put back values that were changed in place too, of up to 2²⁰ elements a buffer.
    """
    modules = list(model.modules())
    holders: list[Any] = [*modules, *(m.config for m in modules if hasattr(m, "config"))]
    flags = [
        (held, name, held[name])
        for held in (getattr(one, "__dict__", {}) for one in holders)
        for name in FLAGS
        if name in held
    ]
    parameters = list(model.parameters())
    trained = [parameter.requires_grad for parameter in parameters]
    small = (b for b in model.buffers() if b.numel() <= _LARGEST and not b.is_inference())
    values = [(b, b._version, b.clone()) for b in small] if buffers else []
    # Of all GPUs, since torch.manual_seed() seeds them all.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices), _mps_stream():
        try:
            yield
        finally:
            for held, name, value in flags:
                held[name] = value
            for parameter, wanted in zip(parameters, trained, strict=True):
                if parameter.requires_grad != wanted:
                    parameter.requires_grad_(wanted)
            with torch.no_grad():
                for buffer, version, value in values:
                    if buffer._version != version:
                        buffer.copy_(value)


@contextmanager
def _mps_stream() -> Iterator[None]:
    """Put back the random numbers of Apple's GPU, where there is one (untested)."""
    if not torch.backends.mps.is_available():
        yield
        return
    state = torch.mps.get_rng_state()
    try:
        yield
    finally:
        torch.mps.set_rng_state(state)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Within the block the model runs without dropout and gradients; see `as_found`."""
    with eval_mode(model), as_found(model), torch.no_grad():
        yield
