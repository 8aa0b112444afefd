"""Models, and what tests do to them, small enough to run everywhere."""

import torch
from torch import nn

import minilora
from minilora.lora.layer import lora_layers
from minilora.quantization import FORMATS


class Conv1D(nn.Module):
    """GPT-2's linear, weight `[in, out]`, by the name and attribute that it is recognised by."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Net(nn.Module):
    def __init__(self, k=12, n=20):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(k, n), nn.Linear(k, n, bias=False)
        self.mlp = nn.Sequential(nn.Linear(n, n), nn.GELU(), nn.Linear(n, k))
        self.lm_head = nn.Linear(k, 9)

    def forward(self, x):
        return self.lm_head(self.mlp(self.q_proj(x) * self.v_proj(x)))


def net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Net().to(dtype)


def shake(model, adapter="default", scale=0.3):
    for layer in lora_layers(model).values():
        if adapter in layer.adapters:
            nn.init.normal_(layer.adapters[adapter].lora_B, std=scale)
    return model


def two_adapters():
    model = shake(minilora.inject(net(), r=4, alpha=6))
    return shake(minilora.inject(model, r=2, alpha=5, adapter="b", targets=["q_proj"]), "b")


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before, flags):
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [p.requires_grad for p in model.parameters()] == flags


def read_by(format, **options):
    """Return those of the options of `quantize` that a format reads."""
    return {name: value for name, value in options.items() if name in FORMATS[format].reads}
