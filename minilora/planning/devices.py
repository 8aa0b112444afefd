"""Named machines: what their makers state, and how much of it training is taken to reach."""

from dataclasses import dataclass

import torch

from minilora.planning.presets import nearest

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A machine to plan for.

    Attributes:
        name: as the user calls it.
        what: in full.
        gpu: whether the memory is a GPU's.
        count: of GPUs, or 1.
        memory: usable bytes of each.
        tflops: dense peak by dtype name, of each, without sparsity.
        bandwidth: GB/s of each.
        efficiency: share of peak FLOPs that LoRA training is taken to reach (an assumption).
        moving: share of the bandwidth.
        link: GB/s at which one can fetch from the others, 0 where there are none.
        source: of the figures.
    """

    name: str
    what: str
    gpu: bool
    count: int
    memory: int
    tflops: dict[str, float]
    bandwidth: float
    efficiency: float
    moving: float
    source: str
    link: float = 0.0

    def rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of one, at the stated efficiency."""
        return self.tflops[str(dtype).removeprefix("torch.")] * 1e12 * self.efficiency


def _gpu(name, what, count, gib, half, full, bandwidth, source, link=0.0) -> Device:
    rates = {"bfloat16": half, "float16": half, "float32": full}
    memory = int(gib * GIB)
    return Device(name, what, True, count, memory, rates, bandwidth, 0.4, 0.7, source, link)


_A100 = (79.1, 312.0, 19.5, 2039.0)
DEVICES = {
    one.name: one
    for one in (
        _gpu(
            "rtx-4090", "NVIDIA GeForce RTX 4090, 24 GB", 1, 23.5, 165.2, 82.6, 1008.0,
            "NVIDIA Ada GPU architecture whitepaper, appendix A (bf16 with f32 accumulation)",
        ),
        _gpu(
            "a100-80gb", "NVIDIA A100 80 GB SXM", 1, *_A100,
            "NVIDIA A100 Tensor Core GPU datasheet",
        ),
        _gpu(
            "h100-80gb", "NVIDIA H100 80 GB SXM", 1, 79.1, 989.4, 66.9, 3350.0,
            "NVIDIA H100 Tensor Core GPU datasheet (dense: half of the figures with sparsity)",
        ),
        _gpu(
            "8xa100-80gb", "a node of 8 NVIDIA A100 80 GB SXM", 8, *_A100,
            "NVIDIA A100 Tensor Core GPU datasheet (NVLink: 300 GB/s each way)", 300.0,
        ),
        Device(
            "epyc-7763", "AMD EPYC 7763, 64 cores, 256 GB", False, 1, 240 * GIB,
            # 64 cores · 2.45 GHz · 32 f32 FLOPs a cycle (AVX2); bf16 is multiplied in f32.
            {"float32": 5.0, "bfloat16": 5.0, "float16": 1.25}, 204.8, 0.5, 0.6,
            "AMD EPYC 7003 series datasheet (base clock, 8 channels of DDR4-3200); bf16, which it "
            "has no instructions for, multiplied in f32",
        ),
    )
}  # fmt: skip


def device(name: str) -> Device:
    """Return a named device, or raise with the nearest names."""
    if not isinstance(name, str) or name.lower() not in DEVICES:
        raise ValueError(
            f"device must be 'here' or one of {', '.join(DEVICES)}, found {name!r}; "
            f"{nearest(str(name), DEVICES)}"
        )
    return DEVICES[name.lower()]
