"""Dropout's masks: every row of a batch has its own, whatever lies beside it.

Within `row_masks` a row's mask follows from its seed, the call and the position. Where untraced
torch has no Triton kernels, it draws it from a generator of that seed. Traced torch and the kernels
hash

    (seed of the row, token in the row, column)

so that nothing is drawn one after another: `hashed_mask` says how. A kernel that hashes needs no
mask: `dropout_mask` then gives the seeds alone, and `drop` takes either.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn import Parameter

from .decoding import runs_on
from .devices import counts_for_gpu
from .workspace import is_plain, is_transformed

# Seeds of the rows in hand, and spread over 64 bits as a tensor. Not per thread: a backward pass
# that recomputes may run in another one than the forward pass.
_row_seeds: Sequence[int] = ()
_spread_seeds: Tensor | None = None


def _spread(seed: int) -> int:
    """Mix 64 bits, so that neighbouring seeds share neither half: SplitMix64's finalizer.

    Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators", figure 14.
    """
    word = 2**64 - 1
    z = (seed + 0x9E3779B97F4A7C15) & word
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
    return (z ^ (z >> 31)) - 2**63


@contextmanager
def row_masks(seeds: Sequence[int], device: torch.device | str = "cpu") -> Iterator[None]:
    """Within the block draw dropout's masks row by row, so that they don't depend on the batch.

    A row's mask follows from its seed, the call (one number of torch's global random stream each)
    and the position, not from the rows beside it.

    Args:
        seeds: one per row of the batch, in [0, 2⁶³).
        device: of the batch, to which the seeds are copied at once; on another one, each call
            copies them.
    """
    global _row_seeds, _spread_seeds  # noqa: PLW0603 (one for all threads, see above)
    before = _row_seeds, _spread_seeds
    _row_seeds = tuple(seeds)
    spread = torch.tensor([_spread(seed) for seed in seeds], device="cpu")
    cuda = torch.device(device).type == "cuda"
    if cuda:  # from other memory a copy waits for the GPU
        spread = spread.pin_memory()
    _spread_seeds = spread.to(device, non_blocking=cuda)
    try:
        yield
    finally:
        _row_seeds, _spread_seeds = before


def row_seeds(x: Tensor) -> Tensor:
    """Draw one call's seeds for hashed masks, int64 `[S]` on x's device; S divides x's rows.

    Inside `row_masks` there is one for each of its rows, if their number divides x's leading
    dimension, which is taken to hold them one after another; else one for all of x.
    """
    call = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    seeds = _spread_seeds
    if seeds is None or not len(seeds) or x.dim() < 2 or len(x) % len(seeds):
        return call
    return seeds.to(x.device) ^ call


def threshold_of(p: float) -> int:
    """Return the integer that a hash of 31 bits is compared with: below it, it is dropped."""
    return min(round(p * 2**31), 2**31 - 1)


def hashed_mask(seeds: Tensor, M: int, N: int, p: float) -> Tensor:
    """Return the bool mask `[M, N]` that the Triton kernels apply: True = keep.

    Args:
        seeds: int64 `[S]`, one for each M / S rows.
        M: rows.
        N: columns.
        p: the probability to drop.
    """
    return _hashes(seeds, M, N) >= threshold_of(p)


def _hashes(seeds: Tensor, M: int, N: int) -> Tensor:
    """Return int32 `[M, N]` in [0, 2³¹), as evenly spread as if drawn.

    In 32 bits, which a GPU multiplies several times as fast as 64: products wrap around.
    """

    def signed(constant: int) -> int:  # the int32 of the same bits
        return constant - 2**32

    def shifted(h: Tensor, bits: int) -> Tensor:  # without copies of the sign
        return (h >> bits) & (2 ** (32 - bits) - 1)

    def finalize(h: Tensor) -> Tensor:  # of MurmurHash3's 32-bit hash
        h = (h ^ shifted(h, 16)) * signed(0x85EBCA6B)
        h = (h ^ shifted(h, 13)) * signed(0xC2B2AE35)
        return h ^ shifted(h, 16)

    span = max(1, M // len(seeds))
    rows = torch.arange(M, device=seeds.device)[:, None]
    columns = torch.arange(N, dtype=torch.int32, device=seeds.device)[None, :]
    seed = seeds[rows // span]
    low, high = seed.to(torch.int32), (seed >> 32).to(torch.int32)
    key = finalize((rows % span).to(torch.int32) ^ low)
    other = finalize(key + high)
    h = (columns * signed(0x9E3779B9)) ^ key
    h = ((h ^ shifted(h, 16)) * signed(0x85EBCA6B)) ^ other
    h = (h ^ shifted(h, 13)) * signed(0xC2B2AE35)
    return shifted(h ^ shifted(h, 16), 1)


def _takes_seeds(x: Tensor) -> bool:
    """Return whether `drop` can launch a kernel on x; a traced graph fuses operations of torch."""
    if torch.compiler.is_compiling():
        return False
    if isinstance(x, FakeTensor):
        return counts_for_gpu()
    return runs_on(x.device) and type(x) in (Tensor, Parameter) and not is_transformed(x)


def dropout_mask(x: Tensor, p: float | Tensor) -> Tensor:
    """Draw a mask that keeps each element of x with probability 1 − p.

    Args:
        x: `[..., K]`; inside `row_masks` its leading dimension is taken to hold the rows one
            after another, if their number divides it.
        p: in [0, 1), or a tensor of such that broadcasts to x's shape.

    Returns:
        A bool tensor of x's shape, True = keep; where Triton's kernels run, for a number p, the
        int64 seeds `[S]` that `drop` hashes it from.
    """
    if not isinstance(p, Tensor) and _takes_seeds(x):
        return row_seeds(x)
    if torch.compiler.is_compiling():
        columns = x.shape[-1]
        rows = x.numel() // max(1, columns)
        drawn = _hashes(row_seeds(x), rows, columns).view(x.shape)
        return drawn >= (p * 2**31 if isinstance(p, Tensor) else threshold_of(p))
    # Drawn straight into bool it is written once, but a CPU would have other bits than so far.
    drawn = torch.empty_like(x, dtype=torch.bool if x.device.type == "cuda" else torch.float32)
    seeds = _row_seeds
    if not seeds or x.dim() == 0 or len(x) % len(seeds):
        return drawn.bernoulli_(1 - p).to(torch.bool)
    call = int(torch.randint(2**62, ()))
    generator = torch.Generator(x.device)
    drawn = drawn.contiguous().view(len(seeds), -1)
    keep = [1 - p] * len(seeds)
    if isinstance(p, Tensor):
        keep = list((1 - p).expand(x.shape).reshape(len(seeds), -1))
    for row, chance, seed in zip(drawn, keep, seeds, strict=True):
        row.bernoulli_(chance, generator=generator.manual_seed(seed ^ call))
    return drawn.view(x.shape).to(torch.bool)


def drop(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """Return x with 0 where a mask says so; the rest is not divided by 1 − p.

    By seeds, in the kernel, what is dropped is 0 even where x is not finite.

    Args:
        x: `[..., K]`.
        mask: what `dropout_mask` gave for x's shape, bool or seeds.
        p: the probability that it was drawn with.
    """
    if mask.dtype == torch.bool:
        return x * mask
    if torch.is_grad_enabled() and x.requires_grad:
        return _Drop.apply(x, mask, p)
    return _hashed_drop(x, mask, p)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seeds: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(seeds)
        ctx.p = p
        return _hashed_drop(x, seeds, p)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
        (seeds,) = ctx.saved_tensors
        return drop(grad_out, seeds, ctx.p), None, None


def _hashed_drop(x: Tensor, seeds: Tensor, p: float) -> Tensor:
    if not (runs_on(x.device) and is_plain(x)):  # this may be another tensor than the mask's
        columns = x.shape[-1]
        rows = x.numel() // max(1, columns)
        return x * hashed_mask(seeds, rows, columns, p).view(x.shape)
    from .triton.dropout import hashed_drop

    return hashed_drop(x, seeds, p)
