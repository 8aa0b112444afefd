"""One kernel launch as a value: it can be run, compiled ahead of time, or counted."""

import functools
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..versions import cuda_takes_tf32
from .tiles import Tile


class Launch(NamedTuple):
    """A kernel, its grid and its arguments; `kernel` is a `triton.jit` function."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    tile: Tile

    def run(self) -> None:
        """Launch on the arguments' device (or in Triton's interpreter)."""
        run_all([self])

    def _run(self, device: torch.device) -> None:
        """Launch on the current device."""
        constants = self.constants.values()
        kinds = [
            v if type(v) in _COMPILED_IN else float if isinstance(v, float)
            else (v.dtype, v.data_ptr() % 16) for v in self.args
        ]  # fmt: skip
        key = (self.kernel.fn, device, self.tile, *kinds, *constants)
        found = _compiled.get(key)
        if found is not None:
            found[(*self.grid, 1, 1)](*self.args, *constants)
            return
        if len(_compiled) >= _MOST:
            _compiled.clear()
        _compiled[key] = self.kernel[self.grid](
            *self.args, **self.constants, enable_fp_fusion=True, **self.options()
        )

    def _traced(self) -> bool:
        """Record the launch if torch is tracing; Inductor knows its device and other options."""
        kernel = torch.library.wrap_triton(self.kernel)
        if kernel is self.kernel:
            return False
        kernel[self.grid](*self.args, **self.constants, **self.options())
        return True

    def options(self) -> dict[str, int]:
        """Return what Triton compiles with."""
        return {"num_warps": self.tile.warps, "num_stages": self.tile.stages}


# Compiled kernels, by all that Triton might compile another one for. Its own search takes several
# times as long as a launch.
_compiled: dict[tuple[Any, ...], Any] = {}
_MOST = 10_000  # in case the sizes never end
_COMPILED_IN = {int, type(None)}


def run_all(launches: list[Launch], traceable: bool = False) -> None:
    """Launch in order.

    Args:
        launches: on tensors of one device.
        traceable: whether torch may be tracing; what it needs for that takes several times a
            launch, on the host.
    """
    launches = [launch for launch in launches if 0 not in launch.grid]
    # Up to 2.12 torch takes no interpreted kernel for one of Triton's, and none is ever traced.
    if traceable and not is_interpreted():
        launches = [launch for launch in launches if not launch._traced()]
    if not launches:
        return
    device = next(arg.device for arg in launches[0].args if isinstance(arg, Tensor))
    # Triton launches on the current device, which need not be where the tensors are.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for launch in launches:
            launch._run(device)


def cdiv(a: int, b: int) -> int:
    """Return ⌈a / b⌉."""
    return (a + b - 1) // b


def span_of(seed: Tensor | None, M: int) -> int:
    """Return how many of M rows share a seed of `[S]`, as the kernels take it."""
    return max(1, M // len(seed)) if seed is not None else 1


@functools.cache
def is_interpreted() -> bool:
    """Return whether this process runs kernels in Triton's interpreter (TRITON_INTERPRET=1)."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def architecture(device: torch.device) -> int:
    """Return 80, 90 and the like; devices that are no CUDA device take sm_80's tiles."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def precision(x: Tensor) -> str:
    """Return the precision to pass to `multiply`. f32 follows torch's switch for CUDA's matmuls.

    The switch also knows what `torch.set_float32_matmul_precision` and `allow_tf32` set.
    """
    if x.dtype == torch.float32:
        return "tf32" if cuda_takes_tf32() else "ieee"
    return "widened" if x.dtype == torch.bfloat16 and is_interpreted() else "ieee"
