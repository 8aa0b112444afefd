"""Bring batches to the device while it works on others, and measure how long it waits for them."""

import queue
import threading
import time
from collections.abc import Generator
from typing import Any

import torch

from minilora.data import Batch

DEPTH = 4  # batches prepared at most
_POLL = 0.05  # seconds after which a worker looks whether it is still wanted
_LEAVE = 5.0  # seconds a worker has to end; one that a source holds up is left behind


class Feed:
    """Iterate over a loader's epochs in a thread, a few batches ahead.

    Reading, tokenizing, padding and, for CUDA, pinning happen in the thread: tokenizers and torch
    let other threads run meanwhile. Order and position are the loader's own: an iteration is an
    epoch, and `state_dict` says where it is.

    Attributes:
        waited: seconds spent waiting for batches.
    """

    def __init__(self, batches: Any, device: torch.device):
        self.batches, self.device = batches, device
        self.waited = 0.0

    def epoch(self) -> Generator[tuple[Batch, dict], None, None]:
        """Yield the rest of the epoch: each batch, and the position after it."""
        ready: queue.Queue = queue.Queue(DEPTH)
        over = threading.Event()
        worker = threading.Thread(
            target=self._work, args=(ready, over), name="minilora-feed", daemon=True
        )
        worker.start()
        try:
            while True:
                begin = time.perf_counter()
                item = ready.get()
                self.waited += time.perf_counter() - begin
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    return
                batch, position = item
                yield batch.to(self.device), position
        finally:
            over.set()
            worker.join(_LEAVE)

    def _work(self, ready: queue.Queue, over: threading.Event) -> None:
        end: Any = None
        try:
            if self.device.type == "cuda":  # a thread begins on the first GPU, and pins for it
                torch.cuda.set_device(self.device)
            for batch in self.batches:
                pinned = batch.pinned() if self.device.type == "cuda" else batch
                if not _put(ready, (pinned, self.batches.state_dict()), over):
                    return
        except BaseException as error:  # raised where the batches are used
            end = error
        _put(ready, end, over)


def _put(ready: queue.Queue, item: Any, over: threading.Event) -> bool:
    """Put an item as soon as there is room; False when nobody wants it any more."""
    while not over.is_set():
        try:
            ready.put(item, timeout=_POLL)
            return True
        except queue.Full:
            continue
    return False
