"""Triton kernels; nothing here imports triton until a kernel is asked for."""

import functools
import importlib.util
import os

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..decoding import runs_on
from ..dropout import row_seeds
from ..int8 import LONGEST
from ..low_rank import FrozenLinear, conv1d_forward, dense_forward
from ..nf4 import DYNAMIC_CODE, NF4_TABLE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = ("int8", "nf4", "int4")  # of stored weights; others have no kernels here
DENSE = (dense_forward, conv1d_forward)

OLDEST = (3, 4)  # of Triton: its `knobs`; what torch 2.8 brings

_TABLES = {"nf4": torch.tensor(NF4_TABLE, dtype=torch.float32), "dynamic": DYNAMIC_CODE}
_placed: dict[tuple[str, torch.device], Tensor] = {}


def _table_on(name: str, device: torch.device) -> Tensor:
    found = _placed.get((name, device))
    if found is None:
        with torch.inference_mode(False):  # else no training could use it later
            found = _TABLES[name].to(device)
        if type(found) is Tensor:  # no stand-in of somebody's tracing
            _placed[name, device] = found
    return found


def nf4_table_on(device: torch.device) -> Tensor:
    """Return NF4's 16 values on a device, copied there once.

    A copy in every forward would wait for the GPU each time, and CUDA graphs refuse it. As a
    constant of a compiled graph it is a tensor on the device too, known by the function's name
    alone: torch 2.11 takes two results of one function for the same tensor, and stops.
    """
    return _table_on("nf4", device)


def dynamic_table_on(device: torch.device) -> Tensor:
    """Return the 256 values of double-quantized scales, as `nf4_table_on` does."""
    return _table_on("dynamic", device)


def with_tables(parts: list[Tensor], format: str, device: torch.device) -> list[Tensor]:
    """Return what stores a weight with the tables that `stored.Weight` wants beside it."""
    if format != "nf4":
        return parts
    dynamic = [dynamic_table_on(device)] if len(parts) > 2 else []
    return [parts[0], nf4_table_on(device), *parts[1:], *dynamic]


@functools.cache
def version() -> tuple[int, ...] | None:
    """Return the first two numbers of Triton's version, or None where it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return tuple(int(number) for number in triton.__version__.split(".")[:2])


def problem(device: torch.device | None = None) -> str | None:
    """Return why no kernel can run in this process, on tensors of that device, or None."""
    found = version()
    if found is None:
        return "triton is not installed (torch's CUDA builds bring theirs)"
    if found < OLDEST:
        return f"the kernels need triton 3.4, which torch 2.8 brings, found {found[0]}.{found[1]}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels slowly on a CPU)"
    if device is not None and device.type != "cuda":
        return f"the input is on {device}, and kernels run on CUDA"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the kernels need compute capability 8.0, this device has {major}.{minor}"
    return None


# What torch.compiler.assume_constant_result sets, which would import all of Dynamo, and triton.
nf4_table_on._dynamo_marked_constant = True  # type: ignore[attr-defined]
dynamic_table_on._dynamo_marked_constant = True  # type: ignore[attr-defined]
problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def uncovered(base: FrozenLinear) -> str | None:
    """Return why there are no kernels for a frozen linear like this, or None."""
    stored = base.stored
    known = stored.format in FORMATS if stored else base.linear_forward in DENSE
    if not known:
        return "there are no kernels for a base stored like this"
    if stored and stored.outliers:
        return (
            f"its kernels multiply every input channel alike, and this base keeps "
            f"{stored.outliers} outliers in floating point (outliers=0 has none)"
        )
    return None


def lora_linear(
    x: Tensor, base: FrozenLinear, A: Tensor, B: Tensor, scaling: float, p: float = 0.0
) -> Tensor:
    """Compute `base(x) + scaling · D(x) Aᵀ Bᵀ` on Triton; as `kernels.lora_linear`, D drawn here.

    Args:
        x: `[..., K]` f32, f16 or bf16; kept for backward.
        base: a frozen linear, plain or quantized; gets no gradient. A quantized one is multiplied
            as its `compute` and `grad_compute` say; "auto" is "int8" for INT8, else "dequantize".
        A: `[R, K]`, kept for backward; any floating dtype, cast to x's for the products.
        B: `[N, R]`, as A.
        scaling: alpha / r, or alpha / sqrt(r) under rsLoRA.
        p: the probability to drop an element of x. The mask is a hash of a number drawn from
            torch's generator on x's device, so activation checkpointing repeats it, and of the
            row's seed, see `row_masks`.

    Returns:
        `[..., N]` in x's dtype.

    Raises:
        RuntimeError: x is not where kernels run, or of a dtype they lack, or the base has outliers.
    """
    _check(x, base)
    seed = row_seeds(x) if p else None
    flat = x.reshape(-1, x.shape[-1])
    with without_autocast(x.device.type):
        y = _product(flat, base, A, B, scaling, seed, p)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _product(
    x: Tensor, base: FrozenLinear, A: Tensor, B: Tensor, scaling: float, seed: Tensor | None,
    p: float,
) -> Tensor:  # fmt: skip
    from .lora import lora_dense
    from .stored import lora_stored

    *parts, bias = base.tensors
    if base.stored is None:
        w = parts[0].t() if base.linear_forward is dense_forward else parts[0]
        return lora_dense(x, w, bias, A, B, scaling, seed, p)
    ways = [
        "int8" if asked == "int8" or (asked == "auto" and base.stored.format == "int8")
        else "dequantize"
        for asked in (base.stored.compute, base.stored.grad_compute)
    ]  # fmt: skip
    if base.stored.format == "nf4":
        ways = ["dequantize", "dequantize"]
    parts = with_tables(parts, base.stored.format, x.device)
    if max(x.shape[1], len(B)) > LONGEST:  # their int32 sums could overflow
        ways = ["dequantize", "dequantize"]
    format, block = base.stored.format, base.stored.block
    return lora_stored(x, parts, bias, A, B, scaling, format, block, *ways, seed, p)


def _check(x: Tensor, base: FrozenLinear) -> None:
    why = uncovered(base)
    if why is not None:
        raise RuntimeError(f"backend='triton' cannot run: {why}; use backend='auto' or 'torch'")
    if x.dtype not in DTYPES:
        raise RuntimeError(
            f"backend='triton' cannot run: its kernels compute in float32, float16 or bfloat16, "
            f"found {x.dtype}; cast the input or use backend='torch'"
        )
    reason = None if runs_on(x.device) else problem(x.device)
    if reason is not None:
        raise RuntimeError(f"backend='triton' cannot run: {reason}; use backend='auto' or 'torch'")
