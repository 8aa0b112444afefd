"""Print what models weigh in each format, counted on shapes; nothing is loaded.

    python benchmarks/sizes.py

The linears are quantized, embeddings, head and norms stand in bfloat16. The saying "7B in 3.5 GB"
is 7e9 weights of 4 bits: it leaves out the scales, and that embeddings and head stay as they are.
Writes benchmarks/results/sizes.csv.
"""

import csv
from pathlib import Path

import torch

from minilora.lora import sizes
from minilora.models import Llama, LlamaConfig

ROOT = Path(__file__).resolve().parents[1]
SAID = {"llama-2-7b": "3.5"}
SHAPES = {  # hidden, ffn, layers, heads, key heads, vocabulary, tied
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True),
    "tinyllama-1.1b": (2048, 5632, 22, 32, 4, 32000, False),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000, False),
}


def main() -> None:
    rows = []
    for name, (hidden, wide, layers, heads, key_heads, vocabulary, tied) in SHAPES.items():
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=wide,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
            head_dim=hidden // heads, max_position_embeddings=2048, tie_word_embeddings=tied,
        )  # fmt: skip
        model = Llama(config, device="meta")
        for format in (None, "int8", "nf4", "int4"):
            found = sizes(model, format, dtype=torch.bfloat16)
            linears = found.codes + found.scales if format else found.linears
            if format is None and not tied:
                linears -= vocabulary * hidden * 2  # the head counts as a linear, and stays
            rows.append({
                "model": name, "format": format or "bfloat16", "linears_gb": f"{linears / 1e9:.3f}",
                "total_gb": f"{found.total / 1e9:.3f}",
                "said_gb": SAID.get(name, "") if format == "nf4" else "",
            })  # fmt: skip
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    with open(ROOT / "benchmarks/results/sizes.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
