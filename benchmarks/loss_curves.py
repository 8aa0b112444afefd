"""Losses of 100 steps on real text, per provider, beside what another start of A changes.

    PYTHONPATH=benchmarks python benchmarks/loss_curves.py [--steps 100] [--rows 1]
        [--tokens 64] [--only NAME ...]

The text is `train_providers.text_rows`', no batch twice. The noise is the mean |difference| between
two runs of the reference whose lora_A start from other random numbers; a provider's distance from
the reference is the same mean. Both are relative to the reference, over the second half of the
steps. Adds to benchmarks/results/loss_curves.csv (one row a provider) and writes every loss to
loss_curves_steps.csv.
"""

import argparse
import csv
from contextlib import ExitStack
from pathlib import Path

import torch
from train_providers import LR, build, providers, text_rows

import minilora

RESULTS = Path(__file__).parent / "results"
MODEL = "smollm2-135m"


def losses(name: str, seed: int, batches: list[torch.Tensor]) -> list[float]:
    with ExitStack() as stack:
        model, loss_of = build(MODEL, providers()[name], stack)
        torch.manual_seed(seed)
        for key, parameter in model.named_parameters():
            if key.endswith(".lora_A"):
                torch.nn.init.kaiming_uniform_(parameter, a=5**0.5)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR, fused=True)
        found = []
        for ids in batches:
            loss = loss_of(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
    return found


def distance(found: list[float], reference: list[float]) -> float:
    """Mean |difference| over the second half, relative to the reference."""
    half = len(reference) // 2
    pairs = list(zip(found[half:], reference[half:], strict=True))
    return sum(abs(a - b) for a, b in pairs) / sum(b for _, b in pairs)


def main() -> None:
    fast = "bf16" if minilora.hardware().dtype == torch.bfloat16 else "f32"
    names = [f"minilora {fast} compiled"]
    names += [f"minilora {format} {fast}" for format in ("int8", "nf4", "int4")]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--reference", default=f"minilora {fast}")
    parser.add_argument("--only", nargs="+", default=names)
    options = parser.parse_args()
    batches = text_rows(MODEL, options.rows, options.tokens, options.steps)
    curves = {options.reference: losses(options.reference, 0, batches)}
    reference = curves[options.reference]
    curves["another start"] = losses(options.reference, 1, batches)
    for name in options.only:
        curves[name] = losses(name, 0, batches)
    noise = distance(curves["another start"], reference)
    rows = []
    for name, found in curves.items():
        half = len(found) // 2
        rows.append(
            {
                "provider": name, "reference": options.reference, "steps": options.steps,
                "rows": options.rows, "tokens": options.tokens, "first_loss": f"{found[0]:.4f}",
                "mean_loss_second_half": f"{sum(found[half:]) / len(found[half:]):.4f}",
                "distance": f"{distance(found, reference):.5f}", "noise": f"{noise:.5f}",
                "processor": minilora.hardware().name, "torch": torch.__version__,
            }
        )  # fmt: skip
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    file = RESULTS / "loss_curves.csv"
    new = not file.exists()
    with open(file, "a", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)
    with open(RESULTS / "loss_curves_steps.csv", "w", newline="", encoding="utf-8") as opened:
        lines = csv.writer(opened)
        lines.writerow(["step", *curves])
        lines.writerows([i + 1, *(f"{x:.5f}" for x in row)] for i, row in
                        enumerate(zip(*curves.values(), strict=True)))  # fmt: skip


if __name__ == "__main__":
    main()
