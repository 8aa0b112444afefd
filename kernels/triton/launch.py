"""One kernel launch as a value: it can be run, compiled ahead of time, or counted."""

import functools
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

    def run(self, traceable: bool = False) -> None:
        """Launch on the arguments' device (or in Triton's interpreter).

        Args:
            traceable: whether the caller is a `torch.library.triton_op`, which may be traced; what
                torch needs for that takes several times a launch, on the host.
        """
        if 0 in self.grid:
            return
        kernel = self.kernel
        # Up to 2.12 torch takes no interpreted kernel for one of Triton's, and none is ever traced.
        if traceable and not is_interpreted():
            kernel = torch.library.wrap_triton(kernel)
        options: dict[str, Any] = {"num_warps": self.tile.warps, "num_stages": self.tile.stages}
        if kernel is not self.kernel:  # traced: with Inductor's options, on the right device
            kernel[self.grid](*self.args, **self.constants, **options)
            return
        options["enable_fp_fusion"] = True
        device = next(arg.device for arg in self.args if isinstance(arg, Tensor))
        # Triton launches on the current device, which need not be where the tensors are.
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            kernel[self.grid](*self.args, **self.constants, **options)
            return
        with torch.cuda.device(device):
            kernel[self.grid](*self.args, **self.constants, **options)


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
