"""Verbs that run a model leave its flags, buffers, hooks, adapters and the random state alone."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import minilora
from minilora.lora import as_found, inference
from minilora.lora.layer import lora_layers
from minilora.models import Llama, LlamaConfig

VOCAB = 23
ROWS = [{"input_ids": [1, 2, 3, 4, 5]}, {"input_ids": [7, 3, 9]}, {"input_ids": [4, 4, 8, 2]}]


class Restless(nn.Module):
    """A causal model that draws numbers and changes a buffer whenever it runs."""

    def __init__(self, quantize=None):
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(VOCAB, 16, 24, 2, 2, 1, 8, 32)
        self.inner = Llama(config)
        for parameter in self.inner.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.3)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(2))
        if quantize:
            minilora.quantize(self, quantize)
        minilora.inject(self, r=3, alpha=5, dropout=0.2)
        for layer in lora_layers(self).values():
            nn.init.normal_(layer.adapters["default"].lora_B, std=0.3)

    def forward(self, input_ids):
        self.calls += 1
        noise = torch.rand(())
        return self.dropout(self.inner(input_ids)) + 0 * noise


def restless(quantize=None):
    """Modes that no single call of train() or eval() makes, and gradients that are odd ones."""
    model = Restless(quantize).eval()
    for i, module in enumerate(model.modules()):
        module.training = i % 3 == 0
    next(iter(lora_layers(model).values())).adapters["default"].lora_A.requires_grad_(False)
    model.calls += 7
    model.config = SimpleNamespace(use_cache=True, vocab_size=VOCAB)
    model.register_forward_hook(lambda *_: None)
    return model


def picture(model):
    """What must stay, by name; hooks by their functions."""
    modules = dict(model.named_modules())
    return {
        "flags": {
            (name, key): value
            for name, module in modules.items()
            for key, value in vars(module).items()
            if isinstance(value, bool)
        },
        "config": dict(vars(model.config)),
        "trained": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": [name for name, p in model.named_parameters() if p.grad is not None],
        "values": {name: value.tolist() for name, value in model.state_dict().items()},
        "hooks": {
            (name, key): list(value.values())
            for name, module in modules.items()
            for key, value in vars(module).items()
            if key.endswith("_hooks")
        },
        "active": {name: layer.active for name, layer in lora_layers(model).items()},
        "random": torch.get_rng_state().tolist(),
    }


def fit(model):
    """Its values may change, buffers among them: the model was trained."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    config = minilora.TrainConfig(max_steps=2, batch_size=2, checkpointing=False, dtype="auto")
    minilora.fit(model, ROWS, ROWS, config=config, quiet=True, sample=lambda model: "text")
    model.load_state_dict(kept)


VERBS = {
    "evaluate": lambda model: minilora.evaluate(model, ROWS),
    "generate": lambda model: minilora.generate(model, [[1, 2], [3]], max_new_tokens=3),
    "sample": lambda model: minilora.generate(model, [[1]], max_new_tokens=3, temperature=1.0),
    "explain": lambda model: minilora.explain(model, data=ROWS, train=ROWS, ablate_examples=2),
    "explain weights": minilora.explain,
    "summary": minilora.summary,
    "fit": fit,
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_leaves_the_model_as_found(verb):
    model = restless()
    before = picture(model)
    VERBS[verb](model)
    assert picture(model) == before


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_merging_with_a_sample_leaves_the_model_as_found(keep):
    model = restless("int8")
    layers = lora_layers(model)
    next(iter(layers.values())).activate(())  # layers that differ stay so
    before = picture(model)
    report = minilora.merge(model, mode="requantize", sample=torch.tensor([[1, 2, 3]]), keep=keep)
    assert report.outputs > 0
    merged = picture(model)
    same = ("config", "gradients", "active", "random")
    assert {key: merged[key] for key in same} == {key: before[key] for key in same}
    assert {k: v for k, v in merged["flags"].items() if k in before["flags"]} == before["flags"]
    minilora.unmerge(model)
    assert picture(model) == before


def test_a_sample_that_fails_changes_nothing():
    model = restless("int8")
    minilora.inject(model, r=2, adapter="other")
    before = picture(model)
    with pytest.raises(ValueError, match="token ids must lie in"):
        minilora.merge(model, "other", mode="requantize", tolerance=None,
                       sample=torch.tensor([[VOCAB]]))  # fmt: skip
    assert picture(model) == before


def test_as_found_puts_everything_back_after_an_error():
    model = restless()
    before = picture(model)
    with pytest.raises(KeyError), as_found(model):
        model.train().requires_grad_(True)
        model.config.use_cache = False
        model.inner.gradient_checkpointing = True
        model.calls.fill_(float("nan"))
        torch.rand(3)
        raise KeyError
    assert picture(model) == before


def test_large_buffers_are_not_copied():
    """They are weights, as some quantized formats keep them."""
    model = nn.Module()
    model.register_buffer("codes", torch.zeros(2**20 + 1, dtype=torch.uint8))
    model.register_buffer("scales", torch.zeros(2**20))
    with as_found(model):
        model.codes += 1
        model.scales += 1
    assert model.codes.all()
    assert not model.scales.any()


def test_inference_records_nothing():
    model = restless()
    with inference(model):
        assert not any(module.training for module in model.modules())
        assert not model(torch.tensor([[1, 2]])).requires_grad
    assert torch.is_grad_enabled()
