"""What the kernel tests share: where they run, hostile surroundings, one tolerance."""

import pytest
import torch
from hypothesis import strategies as st

from minilora.kernels.triton import OLDEST, version

INSTALLED = (version() or (0,)) >= OLDEST
REASON = "triton 3.4 or newer is not installed"
INTERPRETED = False
if INSTALLED:
    import triton

    INTERPRETED = bool(triton.knobs.runtime.interpret)
    REASON = "kernels run on CUDA or, in a process of its own, in Triton's interpreter"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if CUDA else "cpu"

# Triton's interpreter multiplies bfloat16's bit patterns, so there `multiply` widens the operands
# to f32 first: bf16 loads and stores are covered, the bf16 product and its rounding (the
# interpreter cuts bits off where a GPU rounds to nearest) are not.
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = st.sampled_from([1, 2, 3, 7, 13, 16, 17, 31, 32, 33, 47])
SEED = 0x1234_5678_9ABC_DEF
FACTOR = 1.5  # how many times plain torch's own error, in the same dtype, a kernel may make


def needs_kernels():
    """Skip a whole test file where kernels can't run."""
    if not (INTERPRETED or CUDA):
        pytest.skip(REASON, allow_module_level=True)


def operand(*shape, dtype=torch.float32, layout="plain", scale=1.0):
    """Random values; "strided" lies in a larger matrix of NaN, "transposed" has close columns."""
    values = (torch.randn(shape) * scale).to(dtype).to(DEVICE)
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "strided":
        around = torch.full([2 * n + 3 for n in shape], float("nan"), dtype=dtype, device=DEVICE)
        inner = around[tuple(slice(1, 2 * n + 1, 2) for n in shape)]
        return inner.copy_(values)
    return values


class Output:
    """A contiguous tensor of NaN (int8: −128, no code) between guard bands that must stay."""

    def __init__(self, *shape, dtype=torch.float32):
        self.guard, self.shape = 64, shape
        size = torch.Size(shape).numel()
        empty = -128 if dtype == torch.int8 else float("nan")
        self.memory = torch.full((size + 128,), empty, dtype=dtype, device=DEVICE)
        self.memory[: self.guard] = self.memory[self.guard + size :] = 77.0
        self.tensor = self.memory[self.guard : self.guard + size].view(shape)

    def checked(self):
        """Return the values; nothing may be missing and nothing written beside them."""
        after = self.memory[self.guard + self.tensor.numel() :]
        assert (self.memory[: self.guard] == 77).all()
        assert (after == 77).all()
        assert not self.tensor.isnan().any()
        assert self.tensor.dtype != torch.int8 or not (self.tensor == -128).any()
        return self.tensor


def seed_tensor(value=SEED, m=1):
    """One seed; for m tokens several where rows of a batch divide them."""
    count = next(c for c in (13, 9, 7, 1) if m % c == 0)
    return torch.arange(count, device=DEVICE) * 0x1357_9BDF_0246 + value


def assert_as_exact(found, exact, plain, name="", size=None):
    """Hold max and RMS error against float64 to `FACTOR` × plain torch's in the same dtype.

    A result of a few elements can be exact by luck or cancel by chance, so nothing is asked beyond
    one eps of the largest (the mean) magnitude: of the result, or of `size`, the same sums over
    absolute values.
    """
    assert found.shape == exact.shape, (name, found.shape, exact.shape)
    assert plain.shape == exact.shape, name
    if not exact.numel():
        return
    eps = torch.finfo(plain.dtype).eps
    exact = exact.double().to(found.device)
    size = exact.abs() if size is None else size.double()
    ours, theirs = (found.double() - exact).abs(), (plain.double() - exact).abs()
    assert ours.max() <= FACTOR * max(theirs.max(), eps * size.max()), (name, "max")
    rms, other, mean = (t.square().mean().sqrt() for t in (ours, theirs, size))
    assert rms <= FACTOR * max(other, eps * mean), (name, "rms")
