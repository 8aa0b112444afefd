"""NF4: QLoRA's 16 normal quantiles, with the codes that bitsandbytes writes."""

import math

import torch
from torch import Tensor

from minilora.kernels import DYNAMIC_CODE, NF4_TABLE, nf4_decode, nf4_products, quotient
from minilora.quantization.format import Format, bits_of, panels

_SECOND_BLOCK = 256  # scales that share a scale under double quantization


class NF4(Format):
    """0.5 + 1/block + 1/(64·block) bytes a weight with double quantization, else 0.5 + 4/block.

    See `kernels/nf4.py`.
    """

    block_sizes = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # what bitsandbytes has
    reads = ("block_size", "double_quant")

    def layout(self, spec, N, K):
        """Two codes a byte, and a scale for each block of the line that the matrix is."""
        block = spec.block_size
        blocks = -(-N * K // block)
        scales = (blocks,) if K % block else (N, K // block)
        codes = (-(-N * K // 2),) if K % 2 else (N, K // 2)
        if not spec.double_quant:
            return {"codes": (codes, torch.uint8), "absmax_bits": (scales, torch.int32)}
        return {
            "codes": (codes, torch.uint8),
            "absmax": (scales, torch.uint8),
            "absmax2_bits": ((-(-blocks // _SECOND_BLOCK),), torch.int32),
            "offset_bits": ((1,), torch.int32),
        }

    def encode(self, weight, spec):
        """Take the nearest quantile of each weight over its block's largest magnitude."""
        table = torch.tensor(NF4_TABLE, dtype=torch.float32, device=weight.device)
        block = spec.block_size
        # Panels have to end where a block and a byte do, the last one apart.
        aligned = 2 * block // math.gcd(2 * block, weight.shape[1])
        packed, scales = [], []
        for panel in panels(weight, aligned):
            codes, absmax = _blockwise(panel.to(torch.float32).reshape(-1), table, block)
            if len(codes) % 2:  # bitsandbytes fills the last nibble with the code of 0
                codes = torch.cat([codes, codes.new_full((1,), 7)])
            packed.append(codes[::2] << 4 | codes[1::2])
            scales.append(absmax)
        absmax = torch.cat(scales)
        if not spec.double_quant:
            return {"codes": torch.cat(packed), "absmax_bits": bits_of(absmax)}
        # A GPU adds up in another order than this CPU.
        here = absmax.cpu() if absmax.is_cuda else absmax
        offset = here.mean().to(absmax.device)
        second, absmax2 = _second(absmax - offset)
        return {
            "codes": torch.cat(packed),
            "absmax": second,
            "absmax2_bits": bits_of(absmax2),
            "offset_bits": bits_of(offset[None]),
        }

    def decode(self, parts, spec, shape, dtype):
        """Look up the codes and multiply by scales."""
        out = torch.empty(shape, dtype=dtype, device=parts[0].device)
        return nf4_decode(parts, spec.block_size, out)

    def products(self, spec, N, K, forward, backward, few):
        """Decode in x's dtype, then multiply."""
        return nf4_products(N, K, spec.block_size)

    def workspace_bytes(self, spec, weights):
        """Scales in f32, twice, and what they are made from."""
        return 3 * 4 * weights // spec.block_size


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
    blocks = torch.nn.functional.pad(scales, (0, -len(scales) % _SECOND_BLOCK))
    blocks = blocks.view(-1, _SECOND_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax)[:, None]).clamp(-1, 1)
    step = ((scaled + 1) * 0.5 * 65535 + 0.5).floor()
    value = -1 + quotient(2 * step, 65535)
    codes = torch.bucketize(value, (table[:-1] + table[1:]) * 0.5, out_int32=True)
    codes = codes.masked_fill_((absmax == 0)[:, None], 0)
    return codes.to(torch.uint8).view(-1)[: len(scales)], absmax
