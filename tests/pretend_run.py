"""Load, quantize, train, resume and generate on the CPU and on a pretended device.

Prints nothing and ends with 0 where all numbers agree: what is stored and decoded to the bit, what
is trained to rounding, as torch orders some sums otherwise there. Run by `test_devices.py`.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from pretend_gpu import NAME, switch_on
from small_models import read_by
from test_cli import tiny_folder
from torch.nn.attention import SDPBackend, sdpa_kernel
from training_models import CONFIG, examples, fit

import minilora
from minilora.loading import save_pretrained
from minilora.lora import lora_layers
from minilora.models import Llama
from minilora.training.state import load_state

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
VALID = examples(5, seed=1)


class PlainAdamW(torch.optim.AdamW):
    """As on a device without a fused kernel, whose steps round otherwise."""

    def __init__(self, groups, *, fused, **options):
        super().__init__(groups, fused=False, foreach=False, **options)


def made(device, format, **options):
    torch.manual_seed(0)
    model = Llama(dataclasses.replace(CONFIG, **SHAPE))
    model.lm_head.weight.data.mul_(20)
    model.to(device)
    if format is not None:  # as elsewhere than on a CPU
        how = {"block_size": 32, "compute": "dequantize", "grad_compute": "dequantize"}
        minilora.quantize(model, format, **read_by(format, **how))
    return minilora.inject(model, r=4, alpha=6, **options)


def values(model):
    """All of a model, on the CPU; it must lie on one device."""
    state = model.state_dict()
    assert len({tensor.device for tensor in state.values()}) == 1
    return {name: tensor.cpu() for name, tensor in state.items()}


def equal(one, other, what):
    assert one.keys() == other.keys(), what
    for name, value in one.items():
        assert torch.equal(value, other[name].cpu()), (what, name)


def close(one, other, what):
    """Compare tensors, numbers and texts, in dicts and lists."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), what
        for key, value in one.items():
            close(value, other[key], (what, key))
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), what
        for i, pair in enumerate(zip(one, other, strict=True)):
            close(*pair, (what, i))
    elif isinstance(one, torch.Tensor) and not one.is_floating_point():
        assert torch.equal(one, other.cpu()), what
    elif isinstance(one, (float, torch.Tensor)):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, equal_nan=True, msg=str(what))
    else:
        assert one == other, (what, one, other)


def train(out, device, format, **options):
    part = made(device, format, **options)
    limits = {"valid": VALID, "accumulate": 2, "batch_size": 8, "schedule": "constant"}
    limits["clip"] = None  # torch forms the norm otherwise on other devices
    fit(part, max_steps=2, out=out, **limits)
    again = made(device, format, **options)
    result = fit(again, max_steps=4, out=out, resume=True, **limits)
    assert all(p.grad is None for p in again.parameters())
    return again, result


def compare(out, format, **options):
    runs = {device: train(out / device, device, format, **options) for device in ("cpu", NAME)}
    (cpu, there), (other, here) = runs.values()
    close(there.losses, here.losses, format)
    close(vars(there.best), vars(here.best), format)
    close(values(cpu), values(other), format)
    paths = [{n: layer.last_path for n, layer in lora_layers(m).items()} for m in (cpu, other)]
    assert paths[0] == paths[1], paths
    states = [load_state(out / device)[0] for device in ("cpu", NAME)]
    close(states[0], states[1], "state")
    prompts = [[1, 2, 3], [4, 5]]
    for settings in ({}, {"temperature": 1.0, "seed": 3}):
        texts = [minilora.generate(m, prompts, max_new_tokens=5, **settings) for m in (cpu, other)]
        assert texts[0] == texts[1]


def main(out):
    folder = tiny_folder(out / "model")
    switch_on()
    torch.optim.AdamW = PlainAdamW
    loaded, _ = minilora.load_model(folder, "nf4", dtype=torch.float32, device=NAME, block_size=32)
    there, _ = minilora.load_model(folder, "nf4", dtype=torch.float32, device="cpu", block_size=32)
    equal(values(there), values(loaded), "loaded")
    save_pretrained(loaded, out / "saved")
    compare(out / "run", None, dropout=0.2)


if __name__ == "__main__":
    with sdpa_kernel(SDPBackend.MATH):  # what torch takes on a device without kernels of its own
        main(Path(sys.argv[1]))
