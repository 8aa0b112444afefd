"""The three storage formats as functions: a weight `[N, K]` to named tensors, and how many bytes.

What the tensors mean, and how they are multiplied, stands in `minilora.kernels`. Scales are stored
as the int32 bit patterns of f32 (names ending in `_bits`), so that no cast of a module's floating
parameters touches them. `out` is dimension 0 wherever the layout has one, and nothing is 0-dim.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from minilora.files import short
from minilora.kernels import DYNAMIC_CODE, NF4_TABLE, quantize_rows

FORMATS = ("int8", "nf4", "int4")
NF4_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # what bitsandbytes has
INT4_GROUPS = (32, 64, 128)
SECOND_BLOCK = 256  # scales that share a scale under double quantization
_PANEL = 2**18  # weights quantized at a time
_LARGEST_STEP = 18  # 7 · 18 = 126 fits an int8 code


class Spec(NamedTuple):
    """A format and its parameters; int8 uses neither, int4 not `double_quant`."""

    format: str
    block_size: int = 64
    double_quant: bool = True


Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype by name


def problem(spec: Spec, N: int, K: int) -> str | None:
    """Say why a weight `[N, K]` can't be stored so, or None."""
    if N == 0 or K == 0:
        return f"has no weights: its shape is [{N}, {K}]"
    if spec.format == "int4" and K % spec.block_size:
        fits = [g for g in INT4_GROUPS if K % g == 0]
        advice = f"pass block_size={fits[-1]}" if fits else "use 'nf4' or 'int8' for it"
        return f"has {K} inputs, which groups of {spec.block_size} do not divide; {advice}"
    return None


def check_spec(format: object, block_size: object, double_quant: object) -> Spec:
    """Return the format asked for, or raise.

    Raises:
        ValueError: an unknown format or a block size it does not have.
        TypeError: `double_quant` is no bool.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, found {short(format)}")
    sizes = {"nf4": NF4_BLOCKS, "int4": INT4_GROUPS}.get(str(format))
    if sizes and (isinstance(block_size, bool) or block_size not in sizes):
        raise ValueError(
            f"block_size of {format} must be one of {', '.join(map(str, sizes))}, found "
            f"{short(block_size)}"
        )
    if not isinstance(double_quant, bool):
        raise TypeError(f"double_quant must be True or False, found {short(double_quant)}")
    size = block_size if isinstance(block_size, int) else 64
    return Spec(str(format), size, double_quant)


def layout(spec: Spec, N: int, K: int) -> Layout:
    """Return shape and dtype of what stores a weight `[N, K]`, by name."""
    if spec.format == "int8":
        return {"codes": ((N, K), torch.int8), "scale_bits": ((N,), torch.int32)}
    block = spec.block_size
    if spec.format == "int4":
        return {
            "codes": ((N, K // 2), torch.uint8),
            "steps": ((N, K // block), torch.uint8),
            "scale_bits": ((N,), torch.int32),
        }
    blocks = -(-N * K // block)
    scales = (blocks,) if K % block else (N, K // block)
    codes = (-(-N * K // 2),) if K % 2 else (N, K // 2)
    if not spec.double_quant:
        return {"codes": (codes, torch.uint8), "absmax_bits": (scales, torch.int32)}
    return {
        "codes": (codes, torch.uint8),
        "absmax": (scales, torch.uint8),
        "absmax2_bits": ((-(-blocks // SECOND_BLOCK),), torch.int32),
        "offset_bits": ((1,), torch.int32),
    }


def stored_bytes(spec: Spec, N: int, K: int) -> int:
    """Return the bytes that store a weight `[N, K]`, scales included and bias not."""
    total = 0
    for shape, dtype in layout(spec, N, K).values():
        total += torch.Size(shape).numel() * dtype.itemsize
    return total


def quantize_weight(weight: Tensor, spec: Spec) -> dict[str, Tensor]:
    """Quantize `[N, K]` of any floating dtype and strides to the tensors of `layout`."""
    shapes = layout(spec, *weight.shape)
    if weight.is_meta:
        return {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (shape, dtype) in shapes.items()
        }
    parts = _ENCODERS[spec.format](weight.detach(), spec)
    return {name: tensor.reshape(shapes[name][0]) for name, tensor in parts.items()}


def _bits(scales: Tensor) -> Tensor:
    return scales.to(torch.float32).contiguous().view(torch.int32)


def _panels(weight: Tensor, rows: int = 1):
    """Split by rows, about `_PANEL` weights each, so that f32 copies stay small."""
    step = max(1, _PANEL // max(1, weight.shape[1]) // rows) * rows
    return weight.split(step)


def _encode_int8(weight: Tensor, spec: Spec) -> dict[str, Tensor]:
    parts = [quantize_rows(panel.to(torch.float32)) for panel in _panels(weight)]
    return {
        "codes": torch.cat([codes for codes, _ in parts]),
        "scale_bits": _bits(torch.cat([scales for _, scales in parts])),
    }


def _blockwise(line: Tensor, table: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Map each value over its block's largest magnitude to the nearest entry of a sorted table.

    The arithmetic (a product with the reciprocal in whole blocks, a quotient in the last short
    one, ties to the lower entry) is bitsandbytes', so that the codes are its too.
    """
    middle = (table[:-1] + table[1:]) / 2
    whole = len(line) // block * block
    blocks = line[:whole].view(-1, block)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).view(-1)
    if whole < len(line):
        last = line[whole:].abs().max().clamp(min=1e-38)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, line[whole:] / last])
    codes = torch.bucketize(scaled.clamp_(-1, 1), middle, out_int32=True)
    return codes.to(torch.uint8), absmax


def _second(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize scales to 8 bits as bitsandbytes 0.50 does on a CPU.

    It rounds to one of 65536 even steps first and then to the nearest value of the code, so a few
    codes in a thousand are the second nearest (its other backends have the nearest).
    """
    table = DYNAMIC_CODE.to(scales.device)
    blocks = torch.nn.functional.pad(scales, (0, -len(scales) % SECOND_BLOCK))
    blocks = blocks.view(-1, SECOND_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax)[:, None]).clamp(-1, 1)
    step = ((scaled + 1) * 0.5 * 65535 + 0.5).floor()
    value = -1 + 2 * step / 65535
    codes = torch.bucketize(value, (table[:-1] + table[1:]) * 0.5, out_int32=True)
    codes = codes.masked_fill_((absmax == 0)[:, None], 0)
    return codes.to(torch.uint8).view(-1)[: len(scales)], absmax


def _encode_nf4(weight: Tensor, spec: Spec) -> dict[str, Tensor]:
    table = torch.tensor(NF4_TABLE, device=weight.device)
    block = spec.block_size
    # Panels have to end where a block and a byte do, the last one apart.
    aligned = 2 * block // math.gcd(2 * block, weight.shape[1])
    codes, scales = [], []
    for panel in _panels(weight, aligned):
        found, absmax = _blockwise(panel.to(torch.float32).reshape(-1), table, block)
        if len(found) % 2:  # bitsandbytes fills the last nibble with the code of 0
            found = torch.cat([found, found.new_full((1,), 7)])
        codes.append(found[::2] << 4 | found[1::2])
        scales.append(absmax)
    absmax = torch.cat(scales)
    if not spec.double_quant:
        return {"codes": torch.cat(codes), "absmax_bits": _bits(absmax)}
    offset = absmax.mean()
    second, absmax2 = _second(absmax - offset)
    return {
        "codes": torch.cat(codes),
        "absmax": second,
        "absmax2_bits": _bits(absmax2),
        "offset_bits": _bits(offset[None]),
    }


def _encode_int4(weight: Tensor, spec: Spec) -> dict[str, Tensor]:
    parts = [_int4_panel(panel.to(torch.float32), spec.block_size) for panel in _panels(weight)]
    codes, steps, channel = (torch.cat(column) for column in zip(*parts, strict=True))
    return {"codes": codes, "steps": steps, "scale_bits": _bits(channel)}


def _int4_panel(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose per group, of the step that just reaches its maximum and some below, the best one."""
    N, K = weight.shape
    groups = weight.reshape(N, -1, group)
    reach = groups.abs().amax(dim=2) / 7
    channel = reach.amax(dim=1) / _LARGEST_STEP
    channel = channel.clamp(min=1e-37).masked_fill(channel == 0, 1.0)
    ratio = groups / channel[:, None, None]
    best = torch.full_like(reach, float("inf"))
    steps = torch.ones_like(reach)
    covering = (reach / channel[:, None]).ceil_()
    for less in range(4):
        step = (covering - less).clamp_(1, _LARGEST_STEP)
        q = (ratio / step[..., None]).round_().clamp_(-7, 7)
        error = (q * step[..., None] - ratio).square_().sum(dim=2)
        steps = torch.where(error < best, step, steps)
        best = torch.minimum(error, best)
    q = (ratio / steps[..., None]).round_().clamp_(-7, 7).reshape(N, K).to(torch.int8) + 8
    q = q.view(torch.uint8)
    half = K // 2
    return q[:, :half] | q[:, half:] << 4, steps.to(torch.uint8), channel


_ENCODERS: dict[str, Callable[[Tensor, Spec], dict[str, Tensor]]] = {
    "int8": _encode_int8,
    "nf4": _encode_nf4,
    "int4": _encode_int4,
}
