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
    """Within the block the LoRA layers serve this thread alone; blocks of one thread nest.

    Raises:
        RuntimeError: another thread has such a block open.
    """
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
