"""What holds while a run is at work: signals, training mode, checkpointing, random numbers."""

import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from minilora.kernels import keep_freed_memory
from minilora.lora import as_found, widened
from minilora.training.run import Run

_AT_WORK = threading.RLock()
# Where modules keep whether, and transformers' how, they recompute.
_CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")


@contextmanager
def alone() -> Iterator[None]:
    """Keep other threads' runs out: dropout is drawn from random numbers that all threads share."""
    if not _AT_WORK.acquire(blocking=False):
        raise RuntimeError(
            "fit() needs torch's random numbers, which all threads share, for itself, found "
            "another run in a thread of this process; train one after the other, or in processes"
        )
    try:
        yield
    finally:
        _AT_WORK.release()


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a flag to be read between steps; a second Ctrl-C raises.

    SIGTERM never raises: torchrun sends it to its processes after the terminal's Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked: list[int] = []

    def on_signal(number: int, frame: Any) -> None:
        again = number == signal.SIGINT and number in asked
        asked.append(number)
        if again:
            raise KeyboardInterrupt
        if len(asked) == 1:
            print("\nfinishing the step in hand; Ctrl-C again to drop it", file=sys.stderr)

    before = {one: signal.signal(one, on_signal) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for one, handler in before.items():
            signal.signal(one, signal.SIG_DFL if handler is None else handler)


@contextmanager
def training(run: Run) -> Iterator[None]:
    """Training mode, checkpointing and the run's own random numbers, all put back after."""
    if run.ranks.parallel != "fsdp":  # which needs what is given back
        keep_freed_memory()
    with (
        as_found(run.model, buffers=False),
        _checkpointing(run.model, run.config.checkpointing),
        widened(run.model),
        _in_one_order(run.device, run.config.deterministic),
    ):
        try:
            run.model.train()
            for module in run.model.modules():  # the base is frozen, and so are its statistics
                if getattr(module, "running_mean", None) is not None:
                    module.eval()
            yield
        finally:
            run.optimizer.zero_grad(set_to_none=True)  # else a loop that follows would add to it


@contextmanager
def _in_one_order(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """Let a GPU add up in one order, so that a run repeats bit for bit, as it does on a CPU."""
    if not wanted or device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        yield
        return
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        # Of what has no such order. cuBLAS has one: torch gives it a workspace, on one stream.
        for text in ("Deterministic behavior was enabled", ".* a deterministic implementation",
                     ".* a non-deterministic algorithm"):  # fmt: skip
            warnings.filterwarnings("ignore", text, UserWarning)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@contextmanager
def _checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Switch activation checkpointing on for the block; afterwards all is as it was before."""
    if not wanted:
        yield
        return
    enable: Any = getattr(model, "gradient_checkpointing_enable", None)
    if not callable(enable) and not isinstance(getattr(model, _CHECKPOINTING[0], None), bool):
        raise ValueError(
            f"checkpointing=True needs a model with a gradient_checkpointing flag or Hugging "
            f"Face's gradient_checkpointing_enable(), {type(model).__name__} has neither; wrap "
            f"its blocks in torch.utils.checkpoint yourself and set checkpointing=False"
        )
    before = [
        (module, key, module.__dict__.get(key), key in module.__dict__)
        for module in model.modules()
        for key in _CHECKPOINTING
    ]
    try:
        # First the method: some of transformers' models have a flag too, which alone does nothing.
        if callable(enable):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # transformers is renaming it
                # The reentrant way drops gradients of a frozen base's adapters silently.
                enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing = True  # type: ignore[assignment]
        yield
    finally:
        for module, key, value, present in before:
            if present:
                module.__dict__[key] = value
            else:
                module.__dict__.pop(key, None)
