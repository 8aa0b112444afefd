"""What a run settles before its first step: what is trained, in which dtype, for how long."""

import math
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from minilora.adapters import require_layers
from minilora.kernels import hardware
from minilora.lora_layer import LoRALayer
from minilora.training.config import TrainConfig


def trained(model: nn.Module, layers: dict[str, LoRALayer]) -> set[Tensor]:
    """Return the parameters to train; refuse others that require gradients."""
    mine: set[Tensor] = {
        p
        for layer in layers.values()
        for name in layer.active
        for p in layer.adapters[name].parameters()
        if p.requires_grad
    }
    if not mine:
        raise ValueError(
            "fit() needs an active adapter that requires gradients, found none; use "
            "minilora.load(..., trainable=True) or minilora.activate(model, name, trainable=name)"
        )
    adapters = {p for layer in layers.values() for p in layer.adapters.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in adapters:
            raise ValueError(
                f"fit() trains adapters only, but {name} requires gradients too; freeze it, or "
                f"write your own loop"
            )
    return mine


def trained_adapter(layers: dict[str, LoRALayer]) -> str:
    """Return the one adapter that is active and trainable."""
    names = {
        name
        for layer in layers.values()
        for name in layer.active
        if any(p.requires_grad for p in layer.adapters[name].parameters())
    }
    if len(names) > 1:
        raise ValueError(
            f"fit() trains one adapter at a time, found {', '.join(sorted(names))} active and "
            f"trainable; say which with minilora.activate(model, ..., trainable=name)"
        )
    return names.pop()


def compute_dtype(model: nn.Module, choice: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype to autocast to, or None to compute in the base's own."""
    base = next(iter(require_layers(model, "fit").values())).base.weight.dtype
    if choice == "auto":
        if base != torch.float32 or device.type not in ("cpu", "cuda"):
            return None
        wanted = hardware(device.type).dtype
    else:
        wanted = getattr(torch, choice)
    if wanted == base:
        return None
    if wanted == torch.float32:
        raise ValueError(
            f"dtype='float32' needs a float32 base, found {base}; load the model with dtype=float32"
        )
    return wanted


def planned_steps(config: TrainConfig, batches: int) -> int | None:
    """Return the number of optimizer steps, or None when only the clock limits the run."""
    epochs = config.epochs
    if epochs is None and config.max_steps is None and config.max_minutes is None:
        epochs = 1
    limits = [] if config.max_steps is None else [config.max_steps]
    if epochs is not None:
        per_epoch = math.ceil(batches / config.accumulate)
        limits.append(max(1, round(per_epoch * epochs)))
    return min(limits) if limits else None


@contextmanager
def checkpointing(model: nn.Module, config: TrainConfig) -> Iterator[None]:
    """Switch activation checkpointing on for the block, where the config asks for it."""
    if not config.checkpointing:
        yield
        return
    if isinstance(getattr(model, "gradient_checkpointing", None), bool):
        before = model.gradient_checkpointing
        model.gradient_checkpointing = True  # type: ignore[assignment]
        try:
            yield
        finally:
            model.gradient_checkpointing = before
    elif callable(getattr(model, "gradient_checkpointing_enable", None)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers is renaming the pair
            # The reentrant kind drops gradients of a frozen base's adapters silently.
            kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
            model.gradient_checkpointing_enable(**kwargs)  # type: ignore[operator]
        try:
            yield
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_disable()  # type: ignore[operator]
    else:
        raise ValueError(
            f"checkpointing=True needs a model with a gradient_checkpointing flag or Hugging "
            f"Face's gradient_checkpointing_enable(), {type(model).__name__} has neither; wrap "
            f"its blocks in torch.utils.checkpoint yourself and set checkpointing=False"
        )


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag that is read between steps; the second one raises."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked: list[bool] = []

    def on_interrupt(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        print("\nfinishing the step in hand; Ctrl-C again to drop it", file=sys.stderr)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def mix_seed(seed: int, step: int, index: int) -> int:
    """Spread (seed, step, micro-batch) over 63 bits, so that neighbours share no stream."""
    value = seed
    for part in (step, index):
        value = (value * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return value
