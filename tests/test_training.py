"""The loop: exact accumulation, LoRA+, limits, refusals; judged by plain torch.

`test_training_health.py` and `test_training_resume.py` hold the rest.
"""

import copy
import dataclasses
import json
import math
import stat
import threading

import pytest
import torch
import transformers
from torch import nn
from training_models import CONFIG, Tiny, examples, factors, fit, plain, same, tiny

import minilora
from minilora.data.batches import Batches
from minilora.kernels import hardware
from minilora.models import Llama
from minilora.running.loss import token_loss
from minilora.training.config import TrainConfig, learning_rate
from minilora.training.result import FitResult


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


@pytest.mark.parametrize("clip", [None, 0.05])
def test_fit_lora_plus_equals_plain_torch_adamw(clip):
    """Three steps in which torch's own optimizer gives B another rate."""
    model, judge = tiny().double(), tiny().double()
    rows = examples(6)
    fit(model, rows, max_steps=3, batch_size=6, lr=3e-3, lora_plus_ratio=16, warmup=0.0,
        schedule="constant", weight_decay=0.1, clip=clip, dtype="auto", shuffle=False,
        group_by_length=False)  # fmt: skip
    named = {n: p for n, p in judge.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [{"params": [p for n, p in named.items() if n.endswith("lora_A")], "lr": 3e-3},
         {"params": [p for n, p in named.items() if n.endswith("lora_B")], "lr": 16 * 3e-3}],
        weight_decay=0.1,
    )  # fmt: skip
    for _ in range(3):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for row in rows:
            logits = judge(torch.tensor([row["input_ids"]]))[0].log_softmax(-1)
            for t, label in enumerate(row["labels"][1:]):
                if label != -100:
                    total, count = total - logits[t, label], count + 1
        optimizer.zero_grad()
        (total / count).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(list(named.values()), clip)
        optimizer.step()
    left, right = factors(model), factors(judge)
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-4, atol=1e-9)


def half_loss(model, batch):
    """Learn every other label only: other tokens than the batch counts."""
    labels = batch.labels.clone()
    labels[:, ::2] = -100
    logits = model(batch.input_ids)[:, :-1].flatten(0, 1)
    total = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return total, (labels[:, 1:] != -100).sum()


def test_fit_scales_by_the_tokens_a_custom_loss_counts():
    rows = [{"input_ids": list(range(1, 5 + 2 * i))} for i in range(4)]
    expected = fit(tiny(), rows, valid=rows, loss=half_loss, max_steps=1).before
    options = {"max_steps": 1, "shuffle": False, "group_by_length": False, "loss": half_loss}
    one, many = tiny().double(), tiny().double()
    a = fit(one, rows, batch_size=4, dtype="auto", **options)
    b = fit(many, rows, batch_size=1, accumulate=4, dtype="auto", **options)
    assert a.losses[0] == pytest.approx(expected.loss, rel=1e-5)
    assert b.losses[0] == pytest.approx(a.losses[0], rel=1e-12)
    assert a.tokens == b.tokens == expected.tokens
    left, right = factors(one), factors(many)
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-9, atol=1e-12)


def test_fit_skips_a_step_whose_loss_counts_no_token(capsys):
    def loss(model, batch):
        return model(batch.input_ids).sum() * 0, 0

    with pytest.raises(RuntimeError, match="2 steps in a row"):
        fit(tiny(), loss=loss, max_bad_steps=2, quiet=False)
    assert "over 0 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [1.0, (torch.zeros(2), 3), (torch.zeros(()), 1.5)])
def test_fit_refuses_a_loss_that_returns_something_else(wrong):
    with pytest.raises(TypeError, match="loss must return"):
        fit(tiny(), loss=lambda model, batch: wrong)


def test_fit_refuses_a_loss_without_gradient():
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"requires none; is.*no_grad"):
        fit(tiny())
    unused = Tiny()
    unused.extra = nn.Linear(8, 8)
    with pytest.raises(RuntimeError, match="does no input reach an adapted layer"):
        fit(minilora.inject(unused, r=2, alpha=3, targets=["extra"]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": list(range(21))}, "context of 20 tokens, but example 1 of NAME has 21.*20"),
        ({"input_ids": [1, 2, 999]}, r"lie in \[0, 61\), but example 1 of NAME holds 999"),
        ({"input_ids": [1, 2], "labels": [1, 61]}, "example 1 of NAME holds 61"),
    ],
)
def test_fit_refuses_data_that_does_not_fit_the_model_before_any_step(tmp_path, row, message):
    small = dataclasses.replace(CONFIG, max_position_embeddings=20)
    model = minilora.inject(Llama(small), r=2, alpha=3)
    rows = [{"input_ids": [1, 2, 3]}, row]
    for data, valid, name in ((rows, None, "train"), (rows[:1], rows, "valid")):
        with pytest.raises(ValueError, match=message.replace("NAME", name)):
            fit(model, data, valid=valid, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"pad_id must lie in \[0, 61\), found 61"):
        fit(model, rows[:1], pad_id=61)


def test_fit_lowers_loss_and_touches_only_the_adapter():
    model = tiny()
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    result = fit(model, examples(4), epochs=60, lr=1e-1)
    assert isinstance(result, FitResult)
    assert result.losses[-1] < 0.8 * result.losses[0]
    for name, parameter in model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]) and parameter.grad is None


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


def test_fit_trains_biases_and_whole_modules_beside_the_factors():
    model = minilora.inject(Tiny(), r=2, alpha=3, bias="all", modules_to_save=["lm_head"])
    before = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
    fit(model, max_steps=4, lr=1e-2)
    moved = {
        n
        for n, p in model.named_parameters(remove_duplicate=False)
        if not torch.equal(p, before[n])
    }
    assert moved == {
        n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    assert "lm_head.weight" in moved and "first.base.bias" in moved


def test_fit_when_no_evaluation_is_better_keeps_the_first_adapter_everywhere(tmp_path, capsys):
    model, valid = tiny(), examples(6, seed=3)
    kept = factors(model)

    def loss(model, batch):  # training makes it worse
        total, tokens = token_loss(model, batch)
        return (-total if torch.is_grad_enabled() else total), tokens

    result = fit(model, examples(4), valid=valid, max_steps=8, lr=0.1, eval_every=4, loss=loss,
                 out=tmp_path, quiet=False)  # fmt: skip
    assert result.best_step == 0 and same(factors(model), kept)
    again, last = plain(), plain()
    minilora.load(again, tmp_path)
    minilora.load(last, tmp_path / "last")
    assert minilora.evaluate(again, valid, batch_size=4).loss == result.best.loss
    assert minilora.evaluate(last, valid, batch_size=4).loss > result.best.loss
    assert "no evaluation was better than the one before the first step" in capsys.readouterr().err


def test_fit_does_not_take_a_nan_evaluation_for_the_best(capsys):
    calls = []

    def loss(model, batch):
        calls.append(1)
        total, tokens = token_loss(model, batch)
        bad = not torch.is_grad_enabled() and (len(calls) == 1 or always)
        return (total * float("nan") if bad else total), tokens

    always, model = False, tiny()
    result = fit(model, valid=examples(4), loss=loss, max_steps=4, lr=1e-2)
    assert math.isnan(result.before.loss) and result.best_step == 4
    always, model = True, tiny()
    start = factors(model)
    result = fit(model, valid=examples(4), loss=loss, max_steps=4, quiet=False)
    assert result.best is None and not same(factors(model), start)
    assert "no evaluation was finite" in capsys.readouterr().err


def test_fit_files_are_readable_by_others(tmp_path):
    fit(tiny(), max_steps=1, out=tmp_path)
    (tmp_path / "plain").touch()
    modes = {f.name: stat.S_IMODE(f.stat().st_mode) for f in tmp_path.iterdir() if f.is_file()}
    assert set(modes.values()) == {modes["plain"]}, modes


def test_fit_announces_every_limit(capsys):
    fit(tiny(), max_steps=1, max_minutes=5, quiet=False)
    assert "for 1 step or 5 minutes, whichever ends first" in capsys.readouterr().err


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
    no_flag = minilora.inject(Tiny(), r=2, alpha=3)
    with pytest.raises(ValueError, match="gradient_checkpointing flag"):
        fit(no_flag, checkpointing=True)
    with pytest.raises(ValueError, match=r"found model.*lora_A in float16, in which small updates"):
        fit(tiny(dtype="float16"))
    with pytest.raises(ValueError, match="found OptimizedModule around it; pass the model"):
        fit(torch.compile(tiny(), backend="eager"))
    with pytest.raises(TypeError, match=r"found Batches as train; pass its \.examples"):
        fit(tiny(), Batches(examples(), batch_size=4))
    with pytest.raises(TypeError, match="found a Batch in valid"):
        fit(tiny(), valid=list(Batches(examples(), batch_size=4)))
    with pytest.raises(ValueError, match="resume=True needs out"):
        fit(tiny(), resume=True)
    with pytest.raises(ValueError, match="and there is none; start without resume"):
        fit(tiny(), resume=True, out=tmp_path / "none")


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


@pytest.mark.parametrize("rates", [(160.0, 2.0), (400.0, 2700.0)])
def test_fit_says_where_bf16_is_slow(monkeypatch, capsys, rates):
    found = dataclasses.replace(hardware(), float32=rates[0], bfloat16=rates[1])
    for place in ("training.prepare", "kernels.probe"):
        monkeypatch.setattr(f"minilora.{place}.hardware", lambda *_: found)
    model = plain()
    minilora.inject(model.to(torch.bfloat16), r=2, alpha=3)
    fit(model, max_steps=1, quiet=False, dtype="auto")
    said = "2 GFLOP/s and float32 at 160, so linears widen it; load the base in float32 to spare"
    assert (said in capsys.readouterr().err) == (rates[1] < rates[0])
    fit(tiny(), max_steps=1, quiet=False, dtype="float32")
    assert "multiplies bfloat16" not in capsys.readouterr().err
    fit(tiny(), max_steps=1, quiet=False, dtype="bfloat16")
    assert ("widen it; leave dtype at 'auto' to" in capsys.readouterr().err) == (
        rates[1] < rates[0]
    )


def test_fit_bf16_autocast_learns_what_float32_learns():
    wide, narrow = tiny(), tiny()
    a = fit(wide, examples(6), epochs=20, lr=1e-2)
    b = fit(narrow, examples(6), epochs=20, lr=1e-2, dtype="bfloat16")
    assert b.losses[0] == pytest.approx(a.losses[0], rel=0.01)
    assert b.losses[-1] == pytest.approx(a.losses[-1], rel=0.1)
    assert all(p.dtype == torch.float32 for p in narrow.parameters())


def test_fit_stops_on_time_and_finishes_the_schedule():
    result = fit(tiny(), max_minutes=0.005, epochs=10_000)
    assert result.stopped == "time" and result.steps >= 1


def test_fit_deepcopied_model_trains_alike():
    model = tiny()
    twin = copy.deepcopy(model)
    fit(model, max_steps=3)
    fit(twin, max_steps=3)
    assert same(factors(model), factors(twin))


def test_train_config_refuses_what_it_would_ignore():
    with pytest.raises(ValueError, match="a share .warmup. or steps .*, found warmup=0.2 and warm"):
        TrainConfig(warmup=0.2, warmup_steps=5)
    with pytest.raises(
        ValueError, match="'constant' does not fall, found final_lr_ratio=0.1; leave"
    ):
        TrainConfig(schedule="constant", final_lr_ratio=0.1)
    TrainConfig(warmup=0.0, warmup_steps=5)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("lr", 0, "above 0"), ("lr", math.inf, "above 0"), ("batch_size", 0, "at least 1"),
        ("batch_size", True, "at least 1"), ("accumulate", 1.5, "at least 1"),
        ("max_steps", 0, "or None"), ("epochs", -1, "or None"), ("clip", 0, "or None"),
        ("warmup", 1, r"\[0, 1\)"), ("final_lr_ratio", 2, r"\[0, 1\]"), ("betas", (1, 2), "two"),
        ("schedule", "step", "'cosine', 'linear' or"), ("dtype", "float8", "'auto', 'float32', "),
        ("seed", -1, "at least 0"), ("weight_decay", -1, "at least 0"), ("eps", 0, "above 0"),
        ("betas", 0.9, "two"), ("shuffle", "no", "True or False"), ("seed", True, "at least 0"),
        ("checkpointing", "false", "True or False"), ("group_by_length", None, "True or False"),
        ("lr", 10**400, "above 0, or None, found 1000"), ("max_minutes", 10**400, "or None"),
        ("weight_decay", 10**400, "at least 0"), ("seed", 10**400, "854,775,807, found 1"),
        ("batch_size", 10**30, "at most 2,147,483,647"), ("epochs", 1e300, "at most 2,147"),
        ("max_steps", 10**400, "or None, found 1000"),
        ("lora_plus_ratio", 0, "above 0"), ("lora_plus_ratio", -2.0, "above 0"),
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


@pytest.mark.parametrize("limit", [{"max_steps": 8}, {"max_minutes": 60.0, "max_steps": 8}])
def test_warmup_steps_are_counted_whatever_limits_the_run(tmp_path, limit):
    fit(tiny(), out=tmp_path, lr=2.0e-3, warmup=0.0, warmup_steps=4, schedule="linear", **limit)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows]
    assert rates[:5] == pytest.approx([0.5e-3, 1e-3, 1.5e-3, 2e-3, 2e-3])
    assert rates[5:] == pytest.approx([1.5e-3, 1e-3, 0.5e-3])


def test_warmup_steps_under_a_time_limit_alone(tmp_path):
    fit(tiny(), out=tmp_path, lr=2.0e-3, warmup=0.0, warmup_steps=4, max_minutes=0.005,
        epochs=10_000)  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows][:4]
    assert rates == pytest.approx([0.5e-3, 1e-3, 1.5e-3, 2e-3][: len(rates)])


def a_t5():
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=60, d_model=24, d_kv=6, d_ff=32, num_layers=1, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0,
    ))  # fmt: skip


def a_whisper():
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(
        vocab_size=60, d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8,
        max_source_positions=20, max_target_positions=20, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    ))  # fmt: skip


def a_classifier():
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    ))  # fmt: skip


@pytest.mark.parametrize(("make", "message"), [
    (a_t5, r"learns the next token, which T5ForCond.*pass loss=, as in: def loss\(model, batch\)"),
    (a_classifier, "learns the next token, which BertForSequenceClassification does not predict"),
    (a_whisper, "passes input_ids, but WhisperForCond.* takes input_features.* loop of your own: "),
])  # fmt: skip
def test_models_that_predict_no_next_token_need_a_loss(tmp_path, make, message):
    model = minilora.inject(make(), r=2, targets=".*(q|q_proj|query)")
    rows = [{"input_ids": list(range(3, 15))}] * 2
    with pytest.raises(ValueError, match=message):
        minilora.fit(model, rows, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_loss_that_the_refusal_gives_trains():
    model = minilora.inject(a_t5(), r=4, alpha=8)
    rows = [{"input_ids": list(range(3, 15)), "labels": list(range(20, 32))}] * 2
    config = minilora.TrainConfig(max_steps=6, lr=1e-2, dtype="float32")
    with pytest.raises(ValueError) as refused:
        minilora.fit(model, rows, config=config, quiet=True)
    head, _, body = str(refused.value).partition("as in: ")[2].partition(": ")
    given = {}
    exec(f"{head}:\n " + body.replace("; ", "\n "), given)
    found = minilora.fit(model, rows, config=config, loss=given["loss"], quiet=True)
    assert found.losses[-1] < found.losses[0]


def test_fit_says_which_held_out_examples_are_trained_on(capsys):
    train = [{"input_ids": [i, 2, 3]} for i in range(4)]
    valid = [{"input_ids": [9, 2, 3]}, train[2]]
    fit(tiny(), train, valid=valid, max_steps=1, quiet=False)
    assert (
        "1 of 2 held-out examples are trained on too (first: example 1" in capsys.readouterr().err
    )
    fit(tiny(), train, valid=valid[:1], max_steps=1, quiet=False)
    assert "trained on too" not in capsys.readouterr().err


def test_fit_in_two_threads_is_refused():
    rows, errors = [{"input_ids": [1, 2, 3]}], []

    class Second:
        def on_step(self, *_):
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()

    def run():
        try:
            fit(tiny(), rows, max_steps=1)
        except RuntimeError as error:
            errors.append(str(error))

    fit(tiny(), rows, max_steps=1, callbacks=[Second()])
    assert len(errors) == 1 and "found another run in a thread of this process" in errors[0]
    run()
    assert len(errors) == 1


@pytest.mark.parametrize(
    ("kind", "decoder", "sees"),
    [
        ("BertForMaskedLM", False, True),
        ("BertLMHeadModel", False, True),
        ("BertLMHeadModel", True, False),
    ],
)
def test_fit_refuses_a_model_that_sees_the_next_token(kind, decoder, sees):
    config = transformers.BertConfig(
        vocab_size=61,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        is_decoder=decoder,
    )
    torch.manual_seed(0)
    model = minilora.inject(getattr(transformers, kind)(config), r=2)
    if not sees:
        fit(model, max_steps=1)
        return
    with pytest.raises(ValueError, match=f"{kind} sees it: its logits depend on later tokens"):
        fit(model, max_steps=1)
