"""Blocks that change a model for a while, and threads that use it meanwhile."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

_LOCK = threading.Lock()
# Per model: the open blocks, and each module's flag before the first of them.
_EVALUATING: WeakKeyDictionary[nn.Module, tuple[int, list[tuple[nn.Module, bool]]]]
_EVALUATING = WeakKeyDictionary()


@contextmanager
def claimed(layers: Iterable[Any]) -> Iterator[None]:
    """Within the block the LoRA layers serve this thread alone; blocks of one thread nest."""
    layers, me = list(layers), threading.get_ident()
    with _LOCK:
        if any(layer.thread not in (None, me) for layer in layers):
            raise RuntimeError(
                "disabled(), mixed() and verbs that switch adapters for a while change the model "
                "for one thread, found another one within such a block; give each thread a copy "
                "(copy.deepcopy), or let them take turns"
            )
        before = [layer.thread for layer in layers]
        for layer in layers:
            layer.thread = me
    try:
        yield
    finally:
        for layer, thread in zip(layers, before, strict=True):
            layer.thread = thread


def require_free(layers: Iterable[Any], what: str) -> None:
    """Raise RuntimeError within a block that puts back afterwards which adapters are active."""
    if any(layer.thread is not None for layer in layers):
        raise RuntimeError(
            f"{what} must be called outside of disabled() and mixed(), which would no longer find "
            f"the adapters as they were; end the block first"
        )


def refuse_others(*threads: int | None) -> None:
    """Raise RuntimeError where one of these threads, which claim a layer, is not this one.

    A backward pass that recomputes a checkpoint does so in a thread of autograd's.
    """
    others = any(thread not in (None, threading.get_ident()) for thread in threads)
    if others and torch._C._current_graph_task_id() < 0:  # no backward pass is at work here
        raise RuntimeError(
            "the model must be used by one thread while disabled(), mixed() or another verb "
            "switches its adapters for a while, found a call from another one; give each thread "
            "a copy (copy.deepcopy), or let them take turns"
        )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off inside the block and give every module its own training flag back.

    Of several such blocks at once, in one thread or many, the last to end gives the flags back.
    """
    with _LOCK:
        blocks, flags = _EVALUATING.get(model, (0, []))
        flags = flags or [(module, module.training) for module in model.modules()]
        _EVALUATING[model] = blocks + 1, flags
        model.eval()
    try:
        yield
    finally:
        with _LOCK:
            blocks, flags = _EVALUATING.pop(model)
            if blocks > 1:
                _EVALUATING[model] = blocks - 1, flags
            else:
                for module, training in flags:
                    module.training = training


FLAGS = ("training", "gradient_checkpointing", "use_cache")
_LARGEST = 2**20  # elements of a buffer that is copied; larger ones are weights, as GPTQ keeps them


@contextmanager
def as_found(model: nn.Module, buffers: bool = True) -> Iterator[None]:
    """After the block the model's flags and torch's random streams are as before it.

    Flags are `FLAGS` of modules and configs, and `requires_grad`. `buffers` puts back values that
    were changed in place too, of up to 2²⁰ elements a buffer.
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
