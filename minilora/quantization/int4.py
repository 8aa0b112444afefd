"""INT4: groups with small integer steps, multiplied through INT8's codes."""

import torch
from torch import Tensor

from minilora.kernels import INT4_CODES, int4_codes, int8_decode, integer_products, quotient
from minilora.quantization.format import Format, bits_of, panels

_LARGEST_STEP = 18  # 7 · 18 = 126 fits an int8 code


class INT4(Format):
    """0.5 + 1/block + 4/K bytes a weight; see `kernels/int4.py`."""

    block_sizes = (32, 64, 128)
    reads = ("block_size", "compute", "grad_compute", "outliers")

    def problem(self, spec, N, K):
        """Groups must divide a row."""
        if K % spec.block_size == 0:
            return None
        fits = [group for group in self.block_sizes if K % group == 0]
        advice = f"pass block_size={fits[-1]}" if fits else "use 'nf4' or 'int8' for it"
        return f"has {K} inputs, which groups of {spec.block_size} do not divide; {advice}"

    def layout(self, spec, N, K):
        """Two codes a byte, a step for each group, a scale for each row."""
        return {
            "codes": ((N, K // 2), torch.uint8),
            "steps": ((N, K // spec.block_size), torch.uint8),
            "scale_bits": ((N,), torch.int32),
        }

    def encode(self, weight, spec):
        """Search the best step of each group."""
        parts = [_encode(panel.to(torch.float32), spec.block_size) for panel in panels(weight)]
        codes, steps, channel = (torch.cat(column) for column in zip(*parts, strict=True))
        return {"codes": codes, "steps": steps, "scale_bits": bits_of(channel)}

    def decode(self, parts, spec, shape, dtype):
        """Widen to INT8's codes, then multiply by scales."""
        packed, steps, bits = parts
        return int8_decode(int4_codes(packed, steps), bits, dtype)

    def products(self, spec, N, K, forward, backward, few):
        """Multiply as INT8 does, once widened to its codes."""
        return integer_products(INT4_CODES, forward, backward, spec.outliers, few)

    def damage(self, name, part):
        """Find steps that are never written."""
        if name == "steps" and not bool(((part >= 1) & (part <= _LARGEST_STEP)).all()):
            return f"must have steps of 1 to 18, found {int(part.min())} to {int(part.max())}"
        return None

    def workspace_bytes(self, spec, weights):
        """INT8's codes."""
        return weights


def _encode(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose for each group the best of the step that just reaches its maximum and some below."""
    N, K = weight.shape
    groups = weight.reshape(N, -1, group)
    reach = quotient(groups.abs().amax(dim=2), 7)
    channel = quotient(reach.amax(dim=1), _LARGEST_STEP)
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
