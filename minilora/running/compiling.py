"""Run a model's blocks through `torch.compile`, for the time of a run or of a text."""

import functools
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.kernels import cache_folder, instruction_set, private_folder
from minilora.lora import Survey, lora_layers
from minilora.running.loss import only_watches

_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # torch sets these itself, too
_lock, _held = threading.Lock(), ExitStack()  # what is put back when nobody compiles any more
_compiling: list[int] = []  # threads that compile now


def _folder_is_set() -> bool:
    """Return whether a user, rather than torch itself, has said where torch's cache lies."""
    set_to = os.environ.get(_CACHES[0], "")
    default = Path(tempfile.gettempdir(), "torchinductor_")  # and the user's name
    return bool(set_to) and not os.path.abspath(set_to).startswith(str(default.absolute()))


def _into_private_folder(stack: ExitStack) -> None:
    """Point torch's caches to a folder that is ours alone, until the stack is closed."""
    from torch._inductor import config
    from torch._inductor.runtime.runtime_utils import default_cache_dir

    try:
        # By processor: torch's keys don't name it, and its code leaves half of its output unwritten
        # on one with other vectors, or writes behind it.
        folder = private_folder(cache_folder() / "compiled" / instruction_set())
    except (OSError, RuntimeError):  # it can't be written, is not ours, or there is no home
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
    before = {name: os.environ.get(name) for name in _CACHES}
    stack.callback(_restore, before)
    os.environ[_CACHES[0]] = str(folder)
    try:
        private_folder(default_cache_dir())  # headers are compiled into there, whatever is set
    except OSError:
        if hasattr(config, "cpp_cache_precompile_headers"):  # torch 2.6 precompiles none
            stack.enter_context(config.patch(cpp_cache_precompile_headers=False))


def _restore(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def private_cache() -> Iterator[None]:
    """Keep what torch compiles meanwhile in a folder that is ours alone, unless the user set one.

    Libraries and pickles are loaded from there, and torch's default is a folder of a known name in
    the shared temporary one, whoever made it.
    """
    with _lock:
        if not _compiling and not _folder_is_set():
            _into_private_folder(_held)
        _compiling.append(threading.get_ident())
    try:
        yield
    finally:
        with _lock:
            _compiling.pop()
            if not _compiling:
                _held.close()


@functools.cache
def compile_problem(device: str = "cpu") -> str | None:
    """Say why `torch.compile` cannot work on such a device, by trying it, or return None."""
    try:
        with private_cache():
            torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever a missing compiler makes of itself
        return str(error).strip().splitlines()[0][:200] or type(error).__name__
    return None


def settle_compile(choice: bool | str, device: torch.device) -> tuple[bool, str | None]:
    """Return whether to compile for a device, and what to say where `"auto"` cannot.

    Raises:
        RuntimeError: True where torch.compile does not work.
    """
    if not choice:
        return False, None
    problem = compile_problem(device.type)
    if problem is None:
        return True, None
    if choice == "auto":
        return False, f"not compiled, since torch.compile does not work here: {problem}"
    compiler = "a C++ compiler (g++)" if device.type == "cpu" else "Triton and a C compiler (gcc)"
    raise RuntimeError(
        f"--compile (in Python: compile=True) needs torch.compile to work, found: {problem}; "
        f"install {compiler}, or leave it out"
    )


@contextmanager
def _settings() -> Iterator[None]:
    """Let the backward pass form again what a pass over kept tensors gives, and allow variants.

    By default torch keeps whatever a product of the backward pass reads: inputs widened to f32,
    gate times up. That is a third to a half of all that is kept, and saves no time
    (`benchmarks/NOTES.md`). It also leaves a function uncompiled for good after eight variants,
    which a few models in one process reach, and takes floats such as a scaling for variables, finds
    after tracing both passes that no kernel can, and traces them again. Its cache keeps no function
    with an autograd step of one's own unless told to; what such a step computes is part of the key.
    Holds for all that this thread compiles meanwhile.
    """
    from torch._dynamo import config as tracing
    from torch._functorch import config as backward

    keep, most = "ban_recompute_materialized_backward", "recompile_limit"
    if not hasattr(tracing, most):
        most = "cache_size_limit"  # its name in torch 2.6
    variants = max(64, getattr(tracing, most, 0))
    with ExitStack() as stack:
        for config, name, value in (
            (backward, keep, False),
            (tracing, most, variants),
            (tracing, "specialize_float", True),
            (backward, "autograd_cache_allow_custom_autograd_functions", True),
        ):
            if hasattr(config, name):  # private, so it may be gone one day
                stack.enter_context(config.patch({name: value}))
        yield


def _as_any_other(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a block's input require gradients while others' do.

    Those of the first block, which come from a frozen embedding, do not. That would be a variant
    of its own, and compiling it takes as long as compiling the one that all other blocks share.
    """

    @only_watches
    def called(*inputs: Any, **named: Any) -> Any:
        x, *rest = inputs or (None,)
        if torch.is_grad_enabled() and isinstance(x, Tensor) and x.is_floating_point():
            inputs = (x if x.requires_grad else x.detach().requires_grad_(), *rest)
        return forward(*inputs, **named)

    return called


class CompileClock:
    """How long torch.compile works, within a `with` block.

    Attributes:
        seconds: that it took.
        began: when the compilation began that is under way, None without one.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.began: float | None = None

    def _start(self, *_: object) -> None:
        self.began = time.perf_counter()

    def _end(self, *_: object) -> None:
        if self.began is not None:
            self.seconds += time.perf_counter() - self.began
        self.began = None

    def __enter__(self) -> "CompileClock":
        from torch._dynamo.callback import callback_handler as told

        told.register_start_callback(self._start)
        told.register_end_callback(self._end)
        return self

    def __exit__(self, *_: object) -> None:
        from torch._dynamo.callback import callback_handler as told

        with suppress(ValueError):  # `torch._dynamo.reset` has removed them
            told.remove_start_callback(self._start)
            told.remove_end_callback(self._end)


@contextmanager
def compiled(
    model: nn.Module, wanted: bool, every: bool = False, backend: str | None = None
) -> Iterator[None]:
    """Compile the blocks with adapters, or every block, and the loss of our own models.

    Where there is no such block it is the whole model. Shapes are left open: batches differ in
    length, and each length would else be compiled. What is replaced is `forward` alone, so every
    name and the hooks around a block stay as they are: FSDP2's gather its weights before the
    compiled part and let go of them after.
    """
    if not wanted:
        yield
        return
    # Evaluation and training are variants of one function.
    blocks = [b for b in Survey(model).blocks.values() if every or lora_layers(b)] or [model]
    targets = [(block, block.__dict__.get("forward")) for block in blocks]
    flag = getattr(model, "compiled_loss", None)
    options: Any = {} if backend is None else {"backend": backend}
    try:
        for block, _ in targets:
            traced = torch.compile(block.forward, dynamic=True, **options)
            block.forward = _as_any_other(traced)
        if flag is not None:
            model.compiled_loss = True  # type: ignore[assignment]
        with private_cache(), _settings():  # compilation happens at the first call
            yield
    finally:
        for block, before in targets:
            if before is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = before
        if flag is not None:
            model.compiled_loss = flag
