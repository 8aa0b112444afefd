"""LoRA on any nn.Module, with your own loop: a frozen network learns a new target."""

import torch
from torch import nn

import minilora

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
print(minilora.targets(model))
minilora.inject(model, r=4, alpha=8)

x = torch.randn(512, 16)
y = torch.sin(2 * x[:, :1]) + x[:, 1:2]
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-2)
for step in range(201):
    loss = nn.functional.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step:>3}  loss {loss.item():.4f}")

with minilora.disabled(model):
    print(f"without the adapter: {nn.functional.mse_loss(model(x), y).item():.4f}")
minilora.merge(model)
print(f"merged: {nn.functional.mse_loss(model.eval()(x), y).item():.4f}")
minilora.unmerge(model)
print(minilora.summary(model))
