"""A model with one layer of each kind that takes an adapter, and a small causal one."""

import torch
import torch.nn.functional as F
from small_models import Conv1D
from torch import nn

import minilora
from minilora.data.batches import Example
from minilora.lora.layer import lora_layers


class Kinds(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.linear = nn.Linear(width, 9)
        self.turned = Conv1D(8, 9)
        self.conv = nn.Conv2d(2, 5, (3, 1), padding=(1, 0))
        self.out = nn.Linear(20, 3)

    def forward(self, ids):
        x = self.turned(torch.tanh(self.linear(self.embed(ids))))
        return self.out(self.conv(x.reshape(-1, 2, 4, 1)).flatten(1))


ALL = ["embed", "linear", "turned", "conv", "out"]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        q, k = (p(x).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj))
        v = x.unflatten(-1, (2, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.mlp(out.transpose(1, 2).flatten(2))


class Causal(nn.Module):
    """Two blocks, an embedding and a head; logits `[B, T, vocab]`."""

    def __init__(self, vocab=13, width=8, blocks=2):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))
        self.lm_head = nn.Linear(width, vocab)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


class Letters:
    """A tokenizer whose token i is the i-th letter; 0 is a space."""

    def encode(self, text, special=True):
        return [0 if c == " " else ord(c) - 96 for c in text]

    def decode(self, ids, skip_special=True):
        return "".join(" " if i == 0 else chr(96 + i) for i in ids)


def filled(model, adapter="default", scale=0.5, seed=1):
    """Give both factors of an adapter random values."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        if adapter in layer.adapters:
            for factor in (layer.adapters[adapter].lora_A, layer.adapters[adapter].lora_B):
                factor.data.copy_(torch.randn(factor.shape, generator=generator) * scale)
    return model


def kinds(seed=0, dtype=torch.float64, r=3, alpha=5, **options):
    torch.manual_seed(seed)
    model = Kinds().to(dtype)
    options = {"targets": ALL, "dtype": dtype} | options
    return filled(minilora.inject(model, r=r, alpha=alpha, **options))


def causal(seed=0, dtype=torch.float64, r=3, alpha=5, **options):
    torch.manual_seed(seed)
    model = Causal().to(dtype)
    return filled(minilora.inject(model, r=r, alpha=alpha, dtype=dtype, **options), scale=0.2)


def sentences(count=5, seed=0, vocab=13):
    """Examples of different lengths; the first labels of some are not learned."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        ids = torch.randint(vocab, (4 + i % 4,), generator=generator).tolist()
        made.append(Example(tuple(ids), tuple([-100] * (i % 3) + ids[i % 3 :])))
    return made
