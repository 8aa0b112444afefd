"""Models small enough to write down, and the oracle's forward of one of them."""

import numpy as np
import torch
from torch import nn

from minilora.models import GPT2, SCALINGS, GPT2Config, Llama, LlamaConfig

VOCAB, CONTEXT = 24, 32
BY_LENGTH = {  # rotary embeddings that are others in rows of over 5 or 4 tokens
    "longrope": {"rope_scaling": SCALINGS["longrope"]((1.0, 2.0), (3.0, 5.0), 5)},
    "dynamic": {"rope_scaling": SCALINGS["dynamic"](4.0), "max_position_embeddings": 4},
}


class Plain(nn.Module):
    """Causal: logits = W (tanh(Σ E[ids]) ⊙ dropout) + b."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, VOCAB)

    def forward(self, input_ids):
        return self.head(self.drop(torch.tanh(self.embed(input_ids).cumsum(1))))


def plain(dtype=torch.float64):
    torch.manual_seed(0)
    model = Plain().eval()
    nn.init.normal_(model.head.weight)
    return model.to(dtype)


def plain_logits(model, ids):
    """The oracle's forward of `Plain`, in numpy."""
    weights = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    hidden = np.tanh(np.cumsum(weights["embed.weight"][ids], axis=0))
    return hidden @ weights["head.weight"].T + weights["head.bias"]


def model_logits(model, ids):
    """A model's own logits of one unpadded row."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0].double().numpy()


def _drawn(model, dtype):
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.5)
    return model.eval().to(dtype)


def llama(dtype=torch.float64, **options):
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": CONTEXT,
    }
    return _drawn(Llama(LlamaConfig(**shape | options)), dtype)


def gpt2(dtype=torch.float64):
    """Learned positions: unlike rotary ones they show a row that is shifted."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=16, n_layer=2, n_head=4)
    return _drawn(GPT2(config), dtype)


class Bare(nn.Module):
    """A model without its `loss` and its cache: only forward(input_ids) → logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids)


def bare_llama(dtype=torch.float64):
    return Bare(llama(dtype))


class Masked(nn.Module):
    """Averages over all it may see: only a mask tells it what is padding."""

    def __init__(self, device=None):
        super().__init__()
        table = torch.randn(VOCAB, VOCAB, dtype=torch.float64, device=device)
        self.register_buffer("table", table)

    def forward(self, input_ids, attention_mask=None):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        assert attention_mask.dtype == torch.int64
        weight = attention_mask / attention_mask.sum(1, keepdim=True)
        mean = (self.table[input_ids] * weight[..., None]).sum(1, keepdim=True)
        return mean + self.table[input_ids] / 2
