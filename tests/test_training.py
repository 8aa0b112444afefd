"""The loop: exact accumulation, health, resume, limits, bad steps; judged by plain torch."""

import copy
import json
import math

import pytest
import torch
from torch import nn

import minilora
from minilora.lora_layer import lora_layers
from minilora.models import Llama, LlamaConfig
from minilora.training import FitResult, TrainConfig, learning_rate
from minilora.training.state import check_same_run, load_state

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)


def plain(seed=0):
    torch.manual_seed(seed)
    model = Llama(CONFIG)
    model.lm_head.weight.data.mul_(20)  # as drawn, no adapter could move the loss much
    return model


def tiny(seed=0, **options):
    model = plain(seed)
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
    valid, out = options.pop("valid", None), options.pop("out", None)
    resume = options.pop("resume", False)
    config = TrainConfig(**{"batch_size": 4, "dtype": "float32", **options})
    rows = examples() if data is None else data
    return minilora.fit(model, rows, valid, config=config, out=out, resume=resume, quiet=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_fit_accumulation_equals_one_big_batch():
    """Ragged masks: a mean of means would be off by far more than rounding."""
    one, many = tiny().double(), tiny().double()
    options = {"max_steps": 1, "shuffle": False, "group_by_length": False, "dtype": "auto"}
    a = fit(one, examples(12), batch_size=12, **options)
    b = fit(many, examples(12), batch_size=2, accumulate=6, **options)
    assert a.tokens == b.tokens
    assert a.losses[0] == pytest.approx(b.losses[0], rel=1e-12)
    left, right = factors(one), factors(many)
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-9, atol=1e-12)


def test_fit_step_equals_plain_torch_adamw():
    """One clipped AdamW step against torch's own optimizer on an independently formed loss."""
    model, judge = tiny().double(), tiny().double()
    rows = examples(6)
    result = fit(model, rows, max_steps=1, batch_size=6, lr=3e-3, warmup=0.0, weight_decay=0.1,
                 clip=0.05, dtype="auto", shuffle=False, group_by_length=False)  # fmt: skip
    trained = [p for p in judge.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.1)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        logits = judge(torch.tensor([row["input_ids"]]))[0].log_softmax(-1)
        for t, label in enumerate(row["labels"][1:]):
            if label != -100:
                total, count = total - logits[t, label], count + 1
    (total / count).backward()
    torch.nn.utils.clip_grad_norm_(trained, 0.05)
    optimizer.step()
    assert result.losses[0] == pytest.approx(float(total.detach()) / count, rel=1e-10)
    left, right = factors(model), factors(judge)
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-4, atol=1e-9)


def test_fit_lowers_loss_and_touches_only_the_adapter():
    model = tiny()
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    result = fit(model, examples(4), epochs=60, lr=1e-1)
    assert isinstance(result, FitResult)
    assert result.losses[-1] < 0.8 * result.losses[0]
    for name, parameter in model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]) and parameter.grad is None


@pytest.mark.parametrize("stop", [1, 3, 7, 8])
def test_fit_resume_is_bit_equal(tmp_path, stop):
    """Dropout, accumulation, several epochs, evaluations: stop anywhere, go on, same bits."""
    options = {"accumulate": 2, "epochs": 5, "eval_every": 4, "lr": 1e-2, "schedule": "constant",
               "warmup": 0.0}  # fmt: skip
    whole = tiny(dropout=0.2)
    expected = fit(whole, valid=examples(5, seed=1), **options)
    half = tiny(dropout=0.2)
    fit(half, valid=examples(5, seed=1), out=tmp_path, **{**options, "max_steps": stop})
    again = tiny(seed=9, dropout=0.2)  # other factors: the state must bring them back
    again.load_state_dict(
        {n: v for n, v in whole.state_dict().items() if "adapters" not in n}, strict=False
    )
    torch.manual_seed(1234)  # whatever ran before must not matter
    got = fit(again, valid=examples(5, seed=1), out=tmp_path, resume=True, **options)
    assert got.steps == expected.steps and got.best_step == expected.best_step
    assert same(factors(whole), factors(again))


def test_fit_leaves_global_random_state_alone():
    model = tiny(dropout=0.3)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(model, max_steps=2)
    assert torch.equal(torch.rand(3), expected)


def test_fit_checkpointing_gives_the_same_numbers():
    plain, recomputed = tiny(), tiny()
    a = fit(plain, max_steps=4)
    b = fit(recomputed, max_steps=4, checkpointing=True)
    assert a.losses == b.losses and same(factors(plain), factors(recomputed))
    assert recomputed.gradient_checkpointing is False


def test_fit_keeps_the_best_adapter_and_its_files(tmp_path):
    model, valid = tiny(), examples(6, seed=3)
    result = fit(model, examples(4), valid=valid, epochs=30, eval_every=5, lr=5e-2, out=tmp_path)
    assert result.best.loss == minilora.evaluate(model, valid, batch_size=4).loss
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    evals = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert result.best.loss == min(evals.values()) and evals[result.best_step] == result.best.loss
    assert result.before.loss == evals[0]
    again = plain()
    minilora.load(again, tmp_path if result.best_step else tmp_path / "last")
    if result.best_step:
        assert minilora.evaluate(again, valid, batch_size=4).loss == result.best.loss
    assert (tmp_path / "last" / "adapter_config.json").exists()


def test_fit_skips_bad_steps_and_stops_with_the_last_good_state(tmp_path):
    model = tiny()
    calls = []

    def loss(model, batch):
        calls.append(1)
        total = model.loss(batch.input_ids, batch.labels) * batch.tokens
        return (total * float("nan") if len(calls) in (2, 5, 6, 7) else total), batch.tokens

    config = TrainConfig(batch_size=4, dtype="float32", max_steps=20, max_bad_steps=3)
    states = []
    with pytest.raises(RuntimeError, match=r"3 steps in a row had a non-finite loss"):
        minilora.fit(model, examples(), config=config, out=tmp_path, loss=loss, quiet=True)
    states = factors(model)
    assert all(torch.isfinite(value).all() for value in states.values())
    assert (tmp_path / "state.safetensors").exists()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert math.isnan(rows[1]["loss"]) and not math.isnan(rows[2]["loss"])


class Detached(nn.Module):
    """A model that cuts the graph of its first layer, as a careless wrapper would."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(61, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 61)

    def forward(self, input_ids):
        with torch.no_grad():
            x = self.first(self.embed(input_ids))
        return self.lm_head(self.second(x))


def test_fit_health_names_a_layer_without_gradient():
    model = minilora.inject(Detached(), r=2, alpha=3)
    with pytest.raises(
        RuntimeError, match=r"every adapted layer must get a gradient.*first \(lora"
    ):
        fit(model, max_steps=3)


def test_fit_health_reports_a_layer_without_tokens(capsys):
    class Idle(Detached):
        def forward(self, input_ids):
            return self.lm_head(self.second(self.embed(input_ids)))

    model = minilora.inject(Idle(), r=2, alpha=3)
    config = TrainConfig(batch_size=4, max_steps=3, dtype="float32")
    minilora.fit(model, examples(), config=config)
    assert "1 adapted layers saw no token (first: first)" in capsys.readouterr().err


def test_fit_health_catches_an_adapter_that_does_not_move():
    model = tiny()
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.adapters["default"].lora_B)  # else step 2 already complains of A
    with pytest.raises(RuntimeError, match="must move as it is trained"):
        fit(model, max_steps=8, lr=1e-60)


def test_fit_refuses_what_it_cannot_train(tmp_path):
    with pytest.raises(ValueError, match=r"fit\(\) needs a model with adapters"):
        fit(Llama(CONFIG))
    frozen = tiny()
    minilora.activate(frozen, "default", trainable=[])
    with pytest.raises(ValueError, match="active adapter that requires gradients"):
        fit(frozen)
    merged = tiny()
    minilora.merge(merged)
    with pytest.raises(RuntimeError, match="unmerged weights"):
        fit(merged)
    loose = tiny()
    loose.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight requires gradients too"):
        fit(loose)
    two = minilora.inject(tiny(), r=2, alpha=3, adapter="b")
    minilora.activate(two, ["default", "b"])
    with pytest.raises(ValueError, match="one adapter at a time"):
        fit(two)
    with pytest.raises(ValueError, match="every label after the first is -100"):
        fit(tiny(), [{"input_ids": [1, 2, 3], "labels": [-100] * 3}])
    with pytest.raises(ValueError, match="needs a float32 base"):
        fit(tiny().bfloat16(), dtype="float32")
    no_flag = minilora.inject(Detached(), r=2, alpha=3)
    with pytest.raises(ValueError, match="gradient_checkpointing flag"):
        fit(no_flag, checkpointing=True)
    with pytest.raises(ValueError, match="resume=True needs out"):
        fit(tiny(), resume=True)
    with pytest.raises(ValueError, match="and there is none; start without resume"):
        fit(tiny(), resume=True, out=tmp_path / "none")


def test_fit_resume_refuses_another_run(tmp_path):
    fit(tiny(), max_steps=2, out=tmp_path)
    with pytest.raises(ValueError, match="holds the state of an earlier run"):
        fit(tiny(), max_steps=2, out=tmp_path)
    with pytest.raises(ValueError, match=r"keep its settings, but lr was 0\.0005 and is 0\.1"):
        fit(tiny(), max_steps=4, lr=0.1, out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="same data and options"):
        fit(tiny(), examples(9), max_steps=4, out=tmp_path, resume=True)
    other = minilora.inject(Llama(CONFIG), r=2, alpha=3)
    with pytest.raises(ValueError, match="state of another adapter"):
        fit(other, max_steps=4, out=tmp_path, resume=True)
    tensors, facts = load_state(tmp_path)
    config = TrainConfig(**facts["config"])
    with pytest.raises(ValueError, match="must compute in the same dtype"):
        check_same_run(tmp_path, tensors, facts, config, torch.bfloat16, {})
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:200])
    with pytest.raises(ValueError, match="reading it failed"):
        fit(tiny(), max_steps=4, out=tmp_path, resume=True)


def test_fit_trains_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.lm_head.weight.data.mul_(20)
    minilora.inject(model, r=4, alpha=6)
    result = fit(model, examples(6), epochs=40, lr=1e-1, checkpointing=True)
    assert result.losses[-1] < 0.85 * result.losses[0]


def test_fit_bf16_autocast_learns_what_float32_learns():
    wide, narrow = tiny(), tiny()
    a = fit(wide, examples(6), epochs=20, lr=1e-2)
    b = fit(narrow, examples(6), epochs=20, lr=1e-2, dtype="bfloat16")
    assert b.losses[0] == pytest.approx(a.losses[0], rel=0.01)
    assert b.losses[-1] == pytest.approx(a.losses[-1], rel=0.1)
    assert all(p.dtype == torch.float32 for p in narrow.parameters())


def test_fit_stops_on_time_and_finishes_the_schedule():
    result = fit(tiny(), max_minutes=0.005)
    assert result.stopped == "time" and result.steps >= 1


def test_fit_deepcopied_model_trains_alike():
    model = tiny()
    twin = copy.deepcopy(model)
    fit(model, max_steps=3)
    fit(twin, max_steps=3)
    assert same(factors(model), factors(twin))


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("lr", 0, "above 0"), ("lr", math.inf, "above 0"), ("batch_size", 0, "at least 1"),
        ("batch_size", True, "at least 1"), ("accumulate", 1.5, "at least 1"),
        ("max_steps", 0, "or None"), ("epochs", -1, "or None"), ("clip", 0, "or None"),
        ("warmup", 1, r"\[0, 1\)"), ("final_lr_ratio", 2, r"\[0, 1\]"), ("betas", (1, 2), "two"),
        ("schedule", "step", "cosine, linear, constant"), ("dtype", "float16", "auto, float32"),
        ("seed", -1, "at least 0"), ("weight_decay", -1, "at least 0"), ("eps", 0, "above 0"),
    ],
)  # fmt: skip
def test_train_config_refuses(key, value, text):
    with pytest.raises(ValueError, match=f"{key} must be .*{text}"):
        TrainConfig(**{key: value})


def test_learning_rate_schedules():
    config = TrainConfig(lr=2.0, warmup=0.1, final_lr_ratio=0.1)
    assert learning_rate(config, 0.0, 0.01) == pytest.approx(0.2)
    assert learning_rate(config, 0.1) == pytest.approx(2.0)
    assert learning_rate(config, 0.55) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert learning_rate(config, 1.0) == pytest.approx(0.2)
    linear = TrainConfig(lr=2.0, warmup=0.0, schedule="linear")
    assert learning_rate(linear, 0.25) == pytest.approx(1.5)
    constant = TrainConfig(lr=2.0, warmup=0.0, schedule="constant")
    assert learning_rate(constant, 0.99) == 2.0
