"""Run a model's blocks through `torch.compile`, for the time of a run or of a text."""

import functools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from minilora.lora_layer import lora_layers


@functools.cache
def compile_problem() -> str | None:
    """Say why `torch.compile` cannot work here, by trying it, or return None."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8))
    except Exception as error:  # whatever a missing compiler makes of itself
        return str(error).strip().splitlines()[0][:200] or type(error).__name__
    return None


def settle_compile(choice: bool | str) -> tuple[bool, str | None]:
    """Return whether to compile, and what to say where `"auto"` cannot.

    Raises:
        RuntimeError: True where torch.compile does not work.
    """
    if not choice:
        return False, None
    problem = compile_problem()
    if problem is None:
        return True, None
    if choice == "auto":
        return False, f"not compiled, since torch.compile does not work here: {problem}"
    raise RuntimeError(
        f"compile=True (--compile) needs torch.compile to work, found: {problem}; install a C++ "
        f"compiler (g++), or set compile=False"
    )


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks that hold adapters: entries of the outermost such ModuleLists."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and lora_layers(module):
            found[name] = module
    blocks = [block for blocks in found.values() for block in blocks.children()]
    return [block for block in blocks if lora_layers(block)]


def _casts_run_again() -> AbstractContextManager[None]:
    """Let the backward pass form again what a pass over kept tensors gives.

    By default torch keeps whatever a product of the backward pass reads: inputs widened to f32,
    gate times up. That is a third to a half of all that is kept, and saves no time
    (`benchmarks/NOTES.md`). Holds for all that this thread compiles meanwhile.
    """
    from torch._functorch import config

    name = "ban_recompute_materialized_backward"  # private, so it may be gone one day
    return config.patch({name: False}) if hasattr(config, name) else nullcontext()


@contextmanager
def compiled(
    model: nn.Module, wanted: bool, blocks: Iterable[nn.Module] | None = None
) -> Iterator[None]:
    """Compile each block (the whole model where it has none), and the loss of our own models.

    The blocks are those with adapters, or the ones given.

    Shapes are left open: batches differ in length, and each length would else be compiled. What
    is replaced is `forward` alone, so every name and the hooks around a block stay as they are:
    FSDP2's gather its weights before the compiled part and let go of them after.
    """
    if not wanted:
        yield
        return
    # A block whose input needs no gradient, evaluation and training are variants of one function.
    places = [
        (block, block.__dict__.get("forward")) for block in blocks or blocks_of(model) or [model]
    ]
    flag = getattr(model, "compiled_loss", None)
    try:
        for block, _ in places:
            block.forward = torch.compile(block.forward, dynamic=True)
        if flag is not None:
            model.compiled_loss = True  # type: ignore[assignment]
        with _casts_run_again():  # compilation happens at the first call
            yield
    finally:
        for block, before in places:
            if before is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = before
        if flag is not None:
            model.compiled_loss = flag
