"""Bytes that the LoRA linear moves: what it must, what our grids issue, what separate ops move.

    python benchmarks/traffic.py        # → results/traffic.csv

Two numbers for a kernel. *Compulsory*: each operand of a launch once, partial buffers counted as
written and as read again. *Issued*: what the programs of the grid load and store, before any cache;
`counted` measures it in Triton's interpreter and `issued` predicts it (a test holds them equal).
"""

import collections
import contextlib


@contextlib.contextmanager
def _watched(ranges, loads, stores):
    """Record the bytes that interpreted loads and stores touch, by argument."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def record(into, pointers, mask):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        touched = pointers.data[mask.data]
        for name, start, stop in ranges:
            into[name] += size * int(((touched >= start) & (touched < stop)).sum())

    def watched_load(self, ptrs, mask, *rest):
        record(loads, ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def watched_store(self, ptrs, value, mask, *rest):
        record(stores, ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


def counted(launch):
    """Run a launch in the interpreter; return bytes loaded and stored by argument name."""
    import torch

    ranges = []
    for name, value in zip(launch.kernel.arg_names, launch.args, strict=False):
        if isinstance(value, torch.Tensor):
            extent = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1
            start = value.data_ptr()
            ranges.append((name, start, start + extent * value.element_size()))
    loads, stores = collections.Counter(), collections.Counter()
    with _watched(ranges, loads, stores):
        launch.run()
    return +loads, +stores
