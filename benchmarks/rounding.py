"""What rounding the rows that meet INT8 codes does to losses and gradients, on real text.

    PYTHONPATH=benchmarks python benchmarks/rounding.py [--texts 4] [--tokens 512]

SmolLM2-135M in f32 with adapters of r=8 on every linear (B drawn with a standard deviation of
0.02), over `train_providers.text_rows`. Each way of multiplying the INT8 base is held against the
plain one: how much the mean loss rises, and the norm of the difference of all factors' gradients
over theirs. Whole rows of 8 bits are multiplied in f32 here, which gives the integers of
`torch._int_mm` up to the rounding of sums and needs no VNNI. Adds to results/rounding.csv.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from train_providers import plain_model, text_rows
from train_step import commit, processor, save

import minilora
from minilora.quantization.linear import QuantizedLinear

MODEL, RESULTS = "smollm2-135m", Path(__file__).parent / "results" / "rounding.csv"
WAYS = {"plain": None, "dequantize": "dequantize", "rows of 8 bits": "int8",
        "blocks of 7 bits": "blocks"}  # fmt: skip


def product(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() @ b.float()).to(torch.int32)


def losses_and_gradients(way: str | None, texts: Sequence[Tensor]) -> tuple[list[float], Tensor]:
    model = plain_model(MODEL, torch.float32)
    if way is not None:
        asked = "dequantize" if way == "dequantize" else "int8"
        minilora.quantize(model, "int8", compute=asked, grad_compute=asked)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module._integer = way
    minilora.inject(model, r=8, alpha=16)
    generator = torch.Generator().manual_seed(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data.normal_(0, 0.02, generator=generator)
    losses, gradients = [], []
    for ids in texts:
        loss = model.loss(ids, ids)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([p.grad.flatten() for p in trained]))
        model.zero_grad()
    return losses, torch.stack(gradients)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    texts = text_rows(MODEL, 1, options.tokens, options.texts)
    torch._int_mm = product
    found = {name: losses_and_gradients(way, texts) for name, way in WAYS.items()}
    plain, exact = found["plain"]
    rows = []
    for name, (losses, gradients) in found.items():
        rises = [a / b - 1 for a, b in zip(losses, plain, strict=True)]
        rows.append({
            "base": name, "texts": options.texts, "tokens": options.tokens,
            "loss": f"{sum(losses) / len(losses):.4f}",
            "loss_rise": f"{sum(losses) / sum(plain) - 1:.4f}",
            "least": f"{min(rises):.4f}", "most": f"{max(rises):.4f}",
            "gradient_error": f"{float((gradients - exact).norm() / exact.norm()):.4f}",
            "processor": processor(), "torch": torch.__version__, "commit": commit(),
        })  # fmt: skip
        print(" ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    save(rows, RESULTS, tuple(rows[0]))


if __name__ == "__main__":
    main()
