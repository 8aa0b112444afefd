"""How GGUF files store weights: each type's blocks and what they mean.

A weight is d·q + m, of a small code q, and a scale d and an offset m that a group of weights has in
common. A block holds some codes; its scales are f16, and a K-quant's block of 256 weights has
smaller scales for groups of 16 or 32 beside. The blocks (`block_q4_K` and so on):
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# q [blocks, weights], and d and m [blocks, groups], where the type has them.
Parts = tuple[Tensor, Tensor | None, Tensor | None]


class StoredType(NamedTuple):
    """A tensor's type: weights and bytes of a block, and what its bytes `[blocks, size]` mean."""

    name: str
    weights: int
    size: int
    parts: Callable[[Tensor], Parts]

    def decode(self, blocks: Tensor, weights: Tensor) -> None:
        """Write the weights of blocks `[blocks, size]` of bytes into f32 `[blocks, weights]`."""
        q, d, m = self.parts(blocks)
        groups = weights if d is None else weights.view(*d.shape, -1)
        groups.copy_(q.view(groups.shape))
        if d is not None:
            groups.mul_(d[..., None])
        if m is not None:
            groups.add_(m[..., None])


def _half(blocks: Tensor, at: int) -> Tensor:
    """The f16 at a byte of each block, `[blocks, 1]` in f32."""
    return blocks[:, at : at + 2].view(torch.float16).float()


def _split(codes: Tensor, rows: int, bits: int) -> Tensor:
    """The parts of that many bits of each row's bytes, the lowest of a whole row first."""
    row = codes.contiguous().view(len(codes), rows, -1)  # fast only in one stretch
    mask = 2**bits - 1
    return torch.stack([(row >> at).bitwise_and_(mask) for at in range(0, 8, bits)], 2).flatten(1)


# --- 32 weights a block


def _q4_0(blocks: Tensor) -> Parts:
    """q − 8: d, 16 bytes of q."""
    return _split(blocks[:, 2:], 1, 4).view(torch.int8).sub_(8), _half(blocks, 0), None


def _q4_1(blocks: Tensor) -> Parts:
    """d, m, 16 bytes of q."""
    return _split(blocks[:, 4:], 1, 4), _half(blocks, 0), _half(blocks, 2)


def _five_bits(blocks: Tensor, at: int) -> Tensor:
    """q, from 32 fifth bits in the order of the weights, and 16 bytes of the other four."""
    high = blocks[:, at : at + 4].contiguous()
    high = torch.stack([(high >> i).bitwise_and_(1) for i in range(8)], dim=2).flatten(1)
    return _split(blocks[:, at + 4 :], 1, 4) | high << 4


def _q5_0(blocks: Tensor) -> Parts:
    """q − 16: d, 20 bytes of q."""
    return _five_bits(blocks, 2).view(torch.int8).sub_(16), _half(blocks, 0), None


def _q5_1(blocks: Tensor) -> Parts:
    """d, m, 20 bytes of q."""
    return _five_bits(blocks, 4), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Parts:
    """d, 32 signed bytes."""
    return blocks[:, 2:].view(torch.int8), _half(blocks, 0), None


def _iq4(codes: Tensor) -> Tensor:
    """The values that codes of 4 bits stand for in IQ4 types, `[blocks, weights]`."""
    values = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    table = torch.tensor(values, dtype=torch.int8)
    return table.index_select(0, codes.int().flatten()).view(codes.shape)


def _iq4_nl(blocks: Tensor) -> Parts:
    """The values of q: d, 16 bytes of q."""
    return _iq4(_split(blocks[:, 2:], 1, 4)), _half(blocks, 0), None


# --- 256 weights a block: groups have d·s and −m·z


def _q2_k(blocks: Tensor) -> Parts:
    """16 bytes of s and z, 64 bytes of q, d, m."""
    s, z = blocks[:, :16] & 15, blocks[:, :16] >> 4
    return _split(blocks[:, 16:80], 2, 2), _half(blocks, 80) * s, _half(blocks, 82) * z * -1


def _q3_k(blocks: Tensor) -> Parts:
    """q − 4 and s − 32: 32 bytes of third bits, 64 of the other two, 12 of s, d."""
    q = _split(blocks[:, 32:96], 2, 2) | _split(blocks[:, :32], 1, 1) << 2
    s = _split(blocks[:, 96:104], 1, 4) | _split(blocks[:, 104:108], 1, 2) << 4
    return q.view(torch.int8).sub_(4), _half(blocks, 108) * s.view(torch.int8).sub_(32), None


def _d_and_m(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of eight groups: d, m, 12 bytes of s and z, which have 6 bits.

    Bytes 0 to 3 hold the first four s, 4 to 7 the first four z, 8 to 11 four bits of the last four
    of each, whose other two are the high ones of bytes 0 to 7.
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    s = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=1)
    z = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=1)
    return _half(blocks, 0) * s, _half(blocks, 2) * z * -1


def _q4_k(blocks: Tensor) -> Parts:
    """d, m, 12 bytes of s and z, 128 bytes of q."""
    return _split(blocks[:, 16:], 4, 4), *_d_and_m(blocks)


def _q5_k(blocks: Tensor) -> Parts:
    """d, m, 12 bytes of s and z, 32 of fifth bits, 128 of the other four."""
    q = _split(blocks[:, 48:], 4, 4) | _split(blocks[:, 16:48], 1, 1) << 4
    return q, *_d_and_m(blocks)


def _q6_k(blocks: Tensor) -> Parts:
    """q − 32: 128 bytes of low bits, 64 of the two high ones, 16 of s, d."""
    q = _split(blocks[:, :128], 2, 4) | _split(blocks[:, 128:192], 2, 2) << 4
    s = blocks[:, 192:208].view(torch.int8)
    return q.view(torch.int8).sub_(32), _half(blocks, 208) * s, None


def _iq4_xs(blocks: Tensor) -> Parts:
    """The values of q, and s − 32: d, 2 bytes of high bits of s, 4 of low ones, 128 of q."""
    s = _split(blocks[:, 4:8], 4, 4) | _split(blocks[:, 2:4], 2, 2) << 4
    d = _half(blocks, 0) * s.view(torch.int8).sub_(32)
    return _iq4(_split(blocks[:, 8:], 8, 4)), d, None


def _plain(dtype: torch.dtype) -> Callable[[Tensor], Parts]:
    return lambda blocks: (blocks.view(dtype), None, None)


TYPES = {
    0: StoredType("F32", 1, 4, _plain(torch.float32)),
    1: StoredType("F16", 1, 2, _plain(torch.float16)),
    2: StoredType("Q4_0", 32, 18, _q4_0),
    3: StoredType("Q4_1", 32, 20, _q4_1),
    6: StoredType("Q5_0", 32, 22, _q5_0),
    7: StoredType("Q5_1", 32, 24, _q5_1),
    8: StoredType("Q8_0", 32, 34, _q8_0),
    10: StoredType("Q2_K", 256, 84, _q2_k),
    11: StoredType("Q3_K", 256, 110, _q3_k),
    12: StoredType("Q4_K", 256, 144, _q4_k),
    13: StoredType("Q5_K", 256, 176, _q5_k),
    14: StoredType("Q6_K", 256, 210, _q6_k),
    20: StoredType("IQ4_NL", 32, 18, _iq4_nl),
    23: StoredType("IQ4_XS", 256, 136, _iq4_xs),
    30: StoredType("BF16", 1, 2, _plain(torch.bfloat16)),
}
OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
