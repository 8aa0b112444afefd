"""Models, examples and a short `fit` that the tests of training share; quick to import."""

import dataclasses

import torch
from torch import nn

import minilora
from minilora.lora.layer import lora_layers
from minilora.models import Llama, LlamaConfig
from minilora.training.config import TrainConfig

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)


def plain(seed=0, depth=2):
    torch.manual_seed(seed)
    model = Llama(dataclasses.replace(CONFIG, num_hidden_layers=depth))
    model.lm_head.weight.data.mul_(20)  # as drawn, no adapter could move the loss much
    return model


def tiny(seed=0, depth=2, **options):
    model = plain(seed, depth)
    return minilora.inject(model, r=4, alpha=6, **options)


def examples(count=23, seed=0, longest=17):
    """Ragged rows whose prompts are masked; every row learns something."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(3, longest, (), generator=generator))
        ids = torch.randint(0, 61, (length,), generator=generator).tolist()
        masked = int(torch.randint(0, length - 1, (), generator=generator))
        rows.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return rows


def factors(model):
    return {
        f"{name}.{key}": p.detach().clone()
        for name, layer in lora_layers(model).items()
        for key, p in layer.adapters.named_parameters()
    }


def fit(model, data=None, **options):
    names = ("valid", "out", "resume", "loss", "pad_id", "callbacks", "sample")
    given = {"quiet": True} | {n: options.pop(n) for n in (*names, "quiet", "plan") if n in options}
    config = TrainConfig(**{"batch_size": 4, "dtype": "float32", **options})
    return minilora.fit(model, examples() if data is None else data, config=config, **given)


class Tiny(nn.Module):
    """Two layers by ids alone; tests change how they are called."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(61, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 61)

    def forward(self, input_ids):
        return self.lm_head(self.second(self.first(self.embed(input_ids))))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
