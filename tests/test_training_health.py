"""What a run notices by itself: adapters that learn nothing, steps that are not finite."""

import json

import pytest
import torch
from torch import nn
from training_models import Tiny, examples, factors, fit, tiny

import minilora
from minilora.lora.layer import lora_layers
from minilora.training.config import TrainConfig


def adapted(kind, **options):
    return minilora.inject(kind(), r=2, alpha=3, **options)


class Detached(Tiny):
    """A model that cuts the graph of its first layer, as a careless wrapper would."""

    def forward(self, input_ids):
        with torch.no_grad():
            x = self.first(self.embed(input_ids))
        return self.lm_head(self.second(x))


def test_fit_health_names_a_layer_without_gradient():
    with pytest.raises(RuntimeError, match=r"must get a gradient, but first \(lora_A.*none at all"):
        fit(adapted(Detached), max_steps=3)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_fit_health_names_a_layer_frozen_by_reentrant_checkpointing():
    class Reentrant(Tiny):
        def forward(self, input_ids):
            x = self.embed(input_ids)
            x = torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=True)
            return self.lm_head(self.second(x))

    with pytest.raises(RuntimeError, match=r"but first \(lora_A.*use_reentrant=True"):
        fit(adapted(Reentrant), max_steps=3)


def test_fit_health_refuses_zeros_that_last():
    class Muted(Tiny):
        def forward(self, input_ids):
            x = self.embed(input_ids)
            return self.lm_head(self.second(x) + 0 * self.first(x))

    with pytest.raises(
        RuntimeError, match=r"first \(lora_B of default\) got only zeros in 5 steps"
    ):
        fit(adapted(Muted), max_steps=9)
    fit(adapted(Muted), max_steps=4)


def test_fit_health_refuses_zeros_everywhere_at_once():
    def loss(model, batch):
        return model(batch.input_ids).sum() * 0, batch.tokens

    with pytest.raises(RuntimeError, match="got only zeros, as all others did"):
        fit(adapted(Tiny), max_steps=9, loss=loss)


def test_fit_health_reports_a_layer_without_tokens(capsys):
    class Idle(Tiny):
        def forward(self, input_ids):
            return self.lm_head(self.second(self.embed(input_ids)))

    fit(adapted(Idle), max_steps=3, quiet=False)
    assert "1 adapted layers saw no token (first: first)" in capsys.readouterr().err


def test_fit_health_reports_trained_copies_without_gradient(capsys):
    class Unused(Tiny):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(3)

    fit(adapted(Unused, modules_to_save=["norm"]), max_steps=2, quiet=False)
    assert "2 trained copies had no gradient (first: norm.weight)" in capsys.readouterr().err


def test_fit_health_knows_the_layers_of_a_compiled_model(capsys):
    model = tiny()
    model.compile(backend="eager")
    fit(model, max_steps=2, quiet=False)
    assert "saw no token" not in capsys.readouterr().err


def test_fit_health_catches_an_adapter_that_does_not_move():
    with pytest.raises(RuntimeError, match=r"\(lora_B of default\) must move as it is trained"):
        fit(tiny(), max_steps=8, lr=1e-60)


@pytest.mark.parametrize("order", [[0, 1], [0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1]])
def test_fit_health_allows_layers_that_rest(order):
    """Two experts of which a token picks one, evaluations between the steps."""

    class Routed(Tiny):
        def forward(self, input_ids):
            expert = (self.first, self.second)[int(input_ids[0, 0]) % 2]
            x = self.embed(input_ids)
            return self.lm_head(x + expert(x))

    rows = [{"input_ids": [pick, 5, 7, 9, 11]} for pick in order * 8]
    model = adapted(Routed)
    result = fit(model, rows, valid=rows[:8], eval_every=1, batch_size=1, max_steps=16,
                 shuffle=False, group_by_length=False)  # fmt: skip
    assert result.steps == 16
    assert all(layer.adapters["default"].lora_B.any() for layer in lora_layers(model).values())


def test_fit_health_allows_a_layer_that_is_dropped_at_random():
    class Drop(Tiny):
        calls = 0

        def forward(self, input_ids):
            x = self.embed(input_ids)
            self.calls += 1
            return self.lm_head(self.second(x) + (x if self.calls == 2 else self.first(x)))

    assert fit(adapted(Drop), max_steps=8).steps == 8


def test_fit_health_allows_steps_that_teach_attention_nothing():
    """Softmax over one key: the gradients of q and k are exactly 0."""
    short = [{"input_ids": [i, i + 1]} for i in range(4)]
    rows = short[:3] + examples(12)
    options = {"batch_size": 1, "shuffle": False, "group_by_length": False, "max_steps": 9}
    assert fit(tiny(), rows, **options).steps == 9


def test_fit_health_allows_a_resumed_run_that_has_nothing_left_to_learn(tmp_path):
    def loss(model, batch):
        total = model.loss(batch.input_ids, batch.labels) * batch.tokens
        return (total * 0 if learned else total), batch.tokens

    learned, options = False, {"loss": loss, "out": tmp_path}
    fit(tiny(), max_steps=3, **options)
    learned = True
    assert fit(tiny(), max_steps=12, resume=True, **options).steps == 12


def test_fit_skips_bad_steps_and_stops_with_the_last_good_state(tmp_path):
    model = tiny()
    calls = []

    def loss(model, batch):
        calls.append(1)
        total = model.loss(batch.input_ids, batch.labels) * batch.tokens
        return (total * float("nan") if len(calls) in (2, 5, 6, 7) else total), batch.tokens

    config = TrainConfig(batch_size=4, dtype="float32", max_steps=20, max_bad_steps=3)
    with pytest.raises(RuntimeError, match=r"3 steps in a row had a non-finite loss.*lower lr and"):
        minilora.fit(model, examples(), config=config, out=tmp_path, loss=loss, quiet=True)
    states = factors(model)
    assert all(torch.isfinite(value).all() for value in states.values())
    again = minilora.load(tiny_base(), tmp_path / "last")
    assert all(torch.equal(v, states[k]) for k, v in factors(again).items())

    rows = metrics(tmp_path)
    assert rows[1]["loss"] is None and rows[2]["loss"] > 0
    assert (tmp_path / "loss.png").exists() is False
    result = fit(tiny(), max_steps=9, lr=1e-4, out=tmp_path, resume=True, max_bad_steps=3)
    assert result.steps == 9 and result.skipped == 4
    assert (tmp_path / "loss.png").exists()


def metrics(folder):
    """Return what metrics.jsonl holds, read as strictly as JSON is defined."""

    def strict(name):
        raise AssertionError(f"JSON has no {name}")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=strict) for line in lines]


def test_norms_that_overflow_are_written_as_json(tmp_path):
    fit(tiny(), out=tmp_path, lr=1e25, warmup=0.0, max_steps=2, log_every=1, clip=None)
    assert any(None in row["b_norm"].values() for row in metrics(tmp_path) if "b_norm" in row)


def tiny_base():
    return minilora.eject(tiny())


class Stack(nn.Module):
    """transformers' way to switch checkpointing on, and a flag that alone does nothing."""

    gradient_checkpointing = False

    def __init__(self):
        super().__init__()
        self.body, self.kwargs = Tiny(), []
        self.body.gradient_checkpointing = False

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
        self.kwargs.append(gradient_checkpointing_kwargs)
        self.body.gradient_checkpointing = True

    def forward(self, input_ids):
        assert self.body.gradient_checkpointing is self.expected
        return self.body(input_ids)


@pytest.mark.parametrize("before", [False, True])
def test_fit_checkpointing_prefers_the_method_and_restores_the_users_own(before):
    model = adapted(Stack, exclude=["lm_head"])
    model.body.gradient_checkpointing, model.expected = before, True
    fit(model, max_steps=2, checkpointing=True)
    assert model.kwargs == [{"use_reentrant": False}]
    assert model.body.gradient_checkpointing is before
    assert "gradient_checkpointing" not in model.__dict__


def test_fit_checkpointing_recomputes_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip

    class Own(transformers.LlamaModel):
        def __init__(self, config):
            super().__init__(config)
            self.lm_head = nn.Linear(24, 61)

        def forward(self, input_ids, attention_mask=None):
            states = super().forward(input_ids, attention_mask=attention_mask)
            return self.lm_head(states.last_hidden_state)

    model = minilora.inject(Own(config), r=2, alpha=3, exclude=["lm_head"])
    calls = []  # in training; fit looks at a new model once without gradients
    model.layers[0].input_layernorm.register_forward_hook(
        lambda *a: calls.append(1) if torch.is_grad_enabled() else None
    )
    fit(model, max_steps=2)
    plain, calls[:] = len(calls), []
    fit(model, max_steps=2, checkpointing=True)
    assert len(calls) == 2 * plain
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_a_run_whose_every_step_was_skipped_has_not_finished(tmp_path):
    model = tiny()
    model.lm_head.weight.data.view(-1)[1] = float("nan")
    message = r"at least one step, found all 3 skipped .*; nothing was trained"
    with pytest.raises(RuntimeError, match=message):
        fit(model, max_steps=3, out=tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    with pytest.raises(RuntimeError, match=message):  # and to resume it is no way around
        fit(model, max_steps=3, out=tmp_path, resume=True)


def test_an_adapter_that_is_not_finite_is_refused_before_the_first_step(tmp_path):
    """Attention may swallow NaN: a loss and a text over it can be finite."""
    model = tiny()
    model.model.layers[1].self_attn.q_proj.adapters["default"].lora_B.data[3, 1] = float("nan")
    message = r"adapter 'default' must be finite, found NaN or Inf in lora_B of model.layers.1.self"
    for verb in (
        lambda: fit(model, max_steps=3, out=tmp_path / "run"),
        lambda: minilora.generate(model, [[1, 2, 3]]),
        lambda: minilora.evaluate(model, examples()),
    ):
        with pytest.raises(ValueError, match=message):
            verb()
    assert not (tmp_path / "run").exists()
    minilora.activate(model, None)
    assert minilora.generate(model, [[1, 2, 3]], max_new_tokens=1)
