"""State on the disk: resuming bit for bit, refusing another run, saving what an error ends."""

import dataclasses
import json
import os
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from training_models import examples, factors, fit, plain, same, tiny

import minilora
from minilora.files.tensors import tensor_content, write
from minilora.quantization.linear import QuantizedLinear
from minilora.running.loss import token_loss
from minilora.training.config import TrainConfig
from minilora.training.monitor import read_metrics
from minilora.training.same_run import check_same_run
from minilora.training.state import STATE_FILE, load_state


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def counting(action):
    """A loss that calls `action(n)` before the n-th training batch."""
    calls = []

    def loss(model, batch):
        if torch.is_grad_enabled():
            calls.append(1)
            action(len(calls))
        return token_loss(model, batch)

    return loss


def failing(at, error=MemoryError):
    def action(n):
        if n == at:
            raise error("out of memory")

    return counting(action)


def test_a_run_out_of_memory_may_go_on_with_checkpointing(tmp_path):
    """Which is what the error of a row that does not fit advises."""
    whole, model = tiny(dropout=0.2), tiny(dropout=0.2)
    expected = fit(whole, examples(5), max_steps=6, schedule="constant")
    fit(model, examples(5), out=tmp_path, max_steps=3, schedule="constant")
    options = {"max_steps": 6, "schedule": "constant", "checkpointing": True}
    got = fit(model, examples(5), out=tmp_path, resume=True, **options)
    assert got.losses == pytest.approx(expected.losses[-len(got.losses) :], rel=1e-6)


def test_evaluations_without_held_out_examples_are_refused():
    with pytest.raises(ValueError, match=r"--eval-every evaluates on --valid, found none .*; pass"):
        fit(tiny(), examples(5), eval_every=2, max_steps=2)


def test_a_curve_that_cannot_be_drawn_does_not_fail_the_run(tmp_path, capsys):
    (tmp_path / "loss.png").mkdir()
    fit(tiny(), examples(5), out=tmp_path, max_steps=2, quiet=False)
    assert "loss.png could not be drawn" in capsys.readouterr().err
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "row",
    [{"loss": {"a": 1}}, {"loss": 10**400}, {"eval_loss": "x"}, {"loss": True}, {"loss": [1]}],
)
def test_odd_numbers_in_the_metrics_do_not_fail_a_finished_run(tmp_path, row, capsys):
    fit(tiny(), examples(5), out=tmp_path, max_steps=2)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 2, **row}) + "\n" + "[" * 10**5 + "\n")
    (tmp_path / "loss.png").unlink()
    options = {"max_steps": 2, "resume": True, "quiet": False}
    assert fit(tiny(), examples(5), out=tmp_path, **options).stopped == "finished"
    assert (tmp_path / "loss.png").exists()
    assert "could not be drawn" not in capsys.readouterr().err


@pytest.mark.parametrize("make", [os.mkfifo, lambda file: file.symlink_to("/dev/zero")])
def test_metrics_without_an_end_are_no_metrics(tmp_path, make):
    make(tmp_path / "metrics.jsonl")
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("stop", [1, 3, 7, 8])
def test_fit_resume_is_bit_equal(tmp_path, stop):
    """Dropout, accumulation, several epochs, evaluations: stop anywhere, go on, same bits."""
    options = {"accumulate": 2, "epochs": 5, "eval_every": 4, "lr": 1e-2, "schedule": "constant",
               "warmup": 0.0, "lora_plus_ratio": 4}  # fmt: skip
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
    assert got.before == expected.before
    assert same(factors(whole), factors(again))


def test_fit_saves_the_last_complete_step_when_an_error_ends_the_run(tmp_path):
    """The batches in hand count as not done: what follows is bit-equal to an unbroken run."""
    options = {"accumulate": 2, "max_steps": 9, "eval_every": 4, "valid": examples(4, seed=1)}
    whole, broken, again = (tiny(dropout=0.2) for _ in range(3))
    fit(whole, **options)
    with pytest.raises(MemoryError):
        fit(broken, out=tmp_path, loss=failing(12), **options)
    assert load_state(tmp_path)[1]["step"] == 5
    assert (tmp_path / "last" / "adapter_model.safetensors").exists()
    fit(again, out=tmp_path, resume=True, **options)
    assert same(factors(whole), factors(again))


def test_fit_keeps_the_last_steps_state_when_it_fails_with_the_best_in_the_model(
    tmp_path, monkeypatch
):
    """A second Ctrl-C as the curve is drawn: a raised limit must still go on from the last step."""
    options = {"valid": examples(5, seed=1), "lr": 5e-2, "warmup": 0.0, "schedule": "constant",
               "eval_every": 1}  # fmt: skip
    whole = fit(tiny(), examples(5), **options, max_steps=10)
    with monkeypatch.context() as patch:

        def drop(out):
            raise KeyboardInterrupt

        patch.setattr("minilora.training.loop.draw_curve", drop)
        with pytest.raises(KeyboardInterrupt):
            fit(tiny(), examples(5), out=tmp_path, **options, max_steps=8)
    _, facts = load_state(tmp_path)
    assert 0 < facts["best_step"] < facts["step"] == 8, "or best and last were the same"
    on = fit(tiny(), examples(5), out=tmp_path, resume=True, **options, max_steps=10)
    assert on.losses == whole.losses[8:]


def test_fit_says_when_an_error_ends_the_run_and_nothing_can_be_saved(tmp_path, capsys):
    def action(n):
        if n == 3:
            (tmp_path / "state.safetensors").mkdir()
            raise MemoryError

    with pytest.raises(MemoryError):
        fit(tiny(), max_steps=9, out=tmp_path, loss=counting(action), quiet=False)
    assert "the state could not be saved" in capsys.readouterr().err


def test_fit_leaves_no_run_behind_when_the_first_step_fails(tmp_path):
    with pytest.raises(MemoryError):
        fit(tiny(), valid=examples(3), max_steps=9, out=tmp_path, loss=failing(1))
    assert fit(tiny(), valid=examples(3), max_steps=2, out=tmp_path).steps == 2
    assert [row["step"] for row in metrics(tmp_path)] == [0, 1, 2, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_fit_stops_on_a_signal_and_goes_on_bit_equal(tmp_path, number, capsys):
    def action(n):
        if n == 7:
            os.kill(os.getpid(), number)

    options = {"accumulate": 2, "max_steps": 9}
    whole, half, again = (tiny(dropout=0.2) for _ in range(3))
    fit(whole, **options)
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    result = fit(half, out=tmp_path, loss=counting(action), quiet=False, **options)
    assert (result.stopped, result.steps) == ("interrupted", 4)
    assert "go on with --resume (in Python: resume=True)" in capsys.readouterr().err
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert fit(again, out=tmp_path, resume=True, **options).stopped == "finished"
    assert same(factors(whole), factors(again))


def test_fit_takes_torchruns_sigterm_after_ctrl_c_for_the_same_wish(tmp_path, capsys):
    """A second Ctrl-C drops the step in hand; the last complete one is saved."""

    def first(n):
        if n == 3:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
                os.kill(os.getpid(), number)

    result = fit(tiny(), out=tmp_path, loss=counting(first), max_steps=9, quiet=False)
    assert (result.stopped, result.steps) == ("interrupted", 3)
    assert capsys.readouterr().err.count("finishing the step in hand") == 1

    def second(n):
        if n == 3:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(tiny(), out=tmp_path, resume=True, loss=counting(second), max_steps=9)
    assert load_state(tmp_path)[1]["step"] == 5


def test_fit_stops_within_an_evaluation(tmp_path, capsys):
    """Ctrl-C in the first one: no step is done. In a later one: it is made after resuming."""
    calls = []

    def loss(model, batch):
        if not torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == stop:
                os.kill(os.getpid(), signal.SIGINT)
        return token_loss(model, batch)

    stop, options = 2, {"valid": examples(12, seed=1), "max_steps": 6, "eval_every": 3}
    model = tiny()
    start = factors(model)
    result = fit(model, loss=loss, out=tmp_path, quiet=False, **options)
    assert (result.stopped, result.steps, len(calls)) == ("interrupted", 0, 2)
    assert "stopped before the first step" in capsys.readouterr().err
    assert same(factors(model), start) and not list(tmp_path.glob("*.safetensors"))
    calls, stop = [], 4  # the first batch of the evaluation after step 3
    result = fit(tiny(), loss=loss, out=tmp_path, **options)
    assert (result.stopped, result.steps) == ("interrupted", 3)
    expected = fit(tiny(), **options)
    got = fit(tiny(), out=tmp_path, resume=True, **options)
    assert (got.best, got.best_step) == (expected.best, expected.best_step)
    assert [row["step"] for row in metrics(tmp_path) if "eval_loss" in row] == [0, 3, 6]


def test_fit_interrupted_leaves_the_best_so_far_in_out(tmp_path):
    rows = examples(4)

    def loss(model, batch):  # from the third step on training makes it worse
        total, tokens = token_loss(model, batch)
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == 6:
                os.kill(os.getpid(), signal.SIGINT)
        return (-total if torch.is_grad_enabled() and len(calls) > 2 else total), tokens

    calls, model = [], tiny()
    result = fit(model, rows, valid=rows, loss=loss, max_steps=9, eval_every=2, lr=1e-2,
                 warmup=0.0, out=tmp_path)  # fmt: skip
    assert (result.stopped, result.steps, result.best_step) == ("interrupted", 6, 2)
    best, last = (minilora.load(plain(), folder) for folder in (tmp_path, tmp_path / "last"))
    assert minilora.evaluate(best, rows, batch_size=4).loss == result.best.loss
    assert same(factors(last), factors(model))


def test_fit_resume_of_a_finished_run_changes_nothing(tmp_path):
    options = {"valid": examples(4, seed=1), "max_steps": 3, "out": tmp_path}
    first = fit(tiny(), **options)
    again = fit(tiny(), resume=True, **options)
    assert (again.steps, again.best, again.losses) == (3, first.best, [])
    assert [row["step"] for row in metrics(tmp_path)] == [0, 1, 2, 3, 3]


def test_fit_resume_does_no_step_when_the_time_is_spent(tmp_path):
    limits = {"max_minutes": 1e-4, "epochs": 10_000}
    first = fit(tiny(), out=tmp_path, **limits)
    again = fit(tiny(), out=tmp_path, resume=True, **limits)
    assert again.steps == first.steps >= 1 and again.stopped == "time"


def test_fit_resume_says_what_the_new_limits_and_rate_do(tmp_path, capsys):
    fit(tiny(), max_steps=4, out=tmp_path)
    options = {"save_every": 2, "out": tmp_path, "resume": True, "quiet": False}
    fit(tiny(), max_steps=8, lr=1e-3, **options)
    said = capsys.readouterr().err
    assert "note: lr was 0.002 and is 0.001 from here on" in said
    assert "the learning rate goes on at" in said
    fit(tiny(), max_steps=8, lr=1e-3, **options)
    assert "note:" not in capsys.readouterr().err


BASE = {"max_steps": 3}


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (tiny, {"weight_decay": 0.1}, r"settings, but weight_decay was 0\.0 and is 0\.1"),
        (tiny, {"lora_plus_ratio": 2.0}, "lora_plus_ratio was 1.0 and is 2.0"),
        (tiny, {"data": examples(9)}, "same data and options"),
        (tiny, {"dtype": "bfloat16"}, "keep its settings, but dtype"),
        (lambda: minilora.inject(plain(), r=4, alpha=60), {}, "lora_alpha was 6 and is 60"),
        (lambda: minilora.inject(plain(), r=2, alpha=3), {},
         r"another adapter: lora_alpha was 6 and is 3, r was 4 and is 2; use the first run's sett"),
        (lambda: tiny(dropout=0.5), {}, r"lora_dropout was 0\.0 and is 0\.5"),
        (lambda: tiny(rslora=True), {}, "use_rslora was False and is True"),
        (lambda: tiny(targets=["q_proj"]), {}, "target_modules was"),
        (lambda: tiny(adapter="b"), {}, "active adapters was"),
        (lambda: tiny(dtype="bfloat16"), {}, r"must be .* in torch\.bfloat16, found"),
        (lambda: tiny(compute_dtype="bfloat16"), {}, "autocast and compute_dtype were"),
        (lambda: tiny(seed=5), {}, r"another base: the weights of model\.layers\.0"),
        (tiny, {"valid": examples(3, seed=8)}, "keep its held-out examples"),
        (tiny, {"valid": None}, "and is None; pass the same valid"),
    ],
)  # fmt: skip
def test_fit_resume_refuses_another_run(tmp_path, make, options, message):
    fit(tiny(), valid=examples(3, seed=7), max_steps=2, out=tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    model = make()
    start = factors(model)
    given = {"valid": examples(3, seed=7), "max_steps": 4, **options}
    with pytest.raises(ValueError, match=message):
        fit(model, out=tmp_path, resume=True, **given)
    assert same(factors(model), start)
    assert before == {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}


def beside(seed=1, alpha=6, copies=()):
    """A model that trains an adapter on top of a frozen one."""
    model = plain()
    torch.manual_seed(seed)
    minilora.inject(model, r=4, alpha=alpha, adapter="first", modules_to_save=copies)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B") or (parameter.requires_grad and "lora" not in name):
                parameter.add_(0.3 * torch.randn_like(parameter))
    torch.manual_seed(7)
    minilora.inject(model, r=4, alpha=6, adapter="new")
    minilora.activate(model, ["first", "new"], trainable="new")
    return model


@pytest.mark.parametrize("copies", [(), ["lm_head"]], ids=["factors", "copies"])
def test_fit_resume_refuses_another_adapter_beside_its_own(tmp_path, copies):
    whole, again = beside(copies=copies), beside(copies=copies)
    fit(whole, max_steps=4, schedule="constant")
    fit(beside(copies=copies), max_steps=2, schedule="constant", out=tmp_path)
    for other in (beside(2, copies=copies), beside(alpha=8, copies=copies)):
        with pytest.raises(ValueError, match="run beside another adapter 'first': its factors or"):
            fit(other, max_steps=4, schedule="constant", out=tmp_path, resume=True)
    fit(again, max_steps=4, schedule="constant", out=tmp_path, resume=True)
    assert same(whole.state_dict(), again.state_dict())
    here = load_state(tmp_path)[1]["identity"]
    old = {key: value for key, value in here.items() if key != "others"}
    assert check_same_run(tmp_path, old, here) == []


def test_fit_resume_refuses_held_out_examples_where_there_were_none(tmp_path):
    fit(tiny(), max_steps=2, out=tmp_path)
    with pytest.raises(ValueError, match="valid was None and is"):
        fit(tiny(), valid=examples(3), max_steps=4, out=tmp_path, resume=True)


def test_fit_resume_says_that_integers_are_multiplied_otherwise(tmp_path, capsys):
    """Another processor, or a compiler that is gone: the same codes, other digits."""

    def model(way):
        made = minilora.inject(minilora.quantize(plain(), "int8"), r=2, alpha=3)
        for module in made.modules():
            if isinstance(module, QuantizedLinear):
                module._integer = way
        return made

    fit(model(None), max_steps=2, out=tmp_path)
    fit(model("blocks"), max_steps=4, out=tmp_path, resume=True, quiet=False)
    said = capsys.readouterr().err
    assert "by dequantize and dequantize and are by blocks and blocks from here on" in said
    fit(model("blocks"), max_steps=6, out=tmp_path, resume=True, quiet=False)
    assert "were multiplied" not in capsys.readouterr().err


def test_fit_resume_says_that_the_loss_has_another_name(tmp_path, capsys):
    def half(model, batch):
        loss, count = token_loss(model, batch)
        return loss / 2, count

    fit(tiny(), max_steps=2, out=tmp_path)
    fit(tiny(), max_steps=4, out=tmp_path, resume=True, quiet=False, loss=half)
    said = capsys.readouterr().err
    assert "the loss was token_loss and is " in said and ".half from here on" in said
    fit(tiny(), max_steps=6, out=tmp_path, resume=True, quiet=False, loss=half)
    assert "the loss was" not in capsys.readouterr().err


def test_fit_resume_restores_what_is_frozen_of_an_adapter(tmp_path):
    """PiSSA's offset is drawn anew by inject; the state has the one the factors belong to."""

    def pissa(seed):
        model = plain()
        torch.manual_seed(seed)
        return minilora.inject(model, r=2, alpha=3, init="pissa_niter_1")

    whole, half, again = pissa(1), pissa(1), pissa(2)
    fit(whole, max_steps=6, schedule="constant")
    fit(half, max_steps=3, schedule="constant", out=tmp_path)
    fit(again, max_steps=6, schedule="constant", out=tmp_path, resume=True)
    assert same(whole.state_dict(), again.state_dict())
    other = minilora.inject(plain(), r=4, alpha=4)  # what PiSSA's would be saved as
    with pytest.raises(ValueError, match="must hold the tensors of this adapter"):
        fit(other, max_steps=6, schedule="constant", out=tmp_path, resume=True)


def test_fit_resume_restores_a_frozen_factor(tmp_path):
    """Where B alone is trained (LoRA-FA), the next process draws an A on which B means nothing."""

    def half_frozen(seed):
        model = plain()
        torch.manual_seed(seed)
        minilora.inject(model, r=4, alpha=6)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("lora_B"))
        return model

    options = {"lr": 1e-2, "schedule": "constant", "warmup": 0.0}
    whole, again = half_frozen(1), half_frozen(2)
    fit(whole, max_steps=6, **options)
    fit(half_frozen(1), max_steps=3, out=tmp_path, **options)
    fit(again, max_steps=6, out=tmp_path, resume=True, **options)
    assert same(whole.state_dict(), again.state_dict())


def test_check_same_run_refuses_another_autocast(tmp_path):
    fit(tiny(), max_steps=1, out=tmp_path)
    saved = load_state(tmp_path)[1]["identity"]
    with pytest.raises(ValueError, match="must compute in the same dtype"):
        check_same_run(tmp_path, saved, {**saved, "compute": ["torch.bfloat16", "None"]})


def test_check_same_run_takes_a_missing_setting_for_its_default(tmp_path):
    """States written before a setting existed."""
    fit(tiny(), max_steps=1, out=tmp_path)
    here = load_state(tmp_path)[1]["identity"]
    old = {k: v for k, v in here["config"].items() if k != "compile"}
    assert check_same_run(tmp_path, {**here, "config": old}, here) == []
    compiled = {**here, "config": here["config"] | {"compile": True}}
    with pytest.raises(ValueError, match="compile was False and is True"):
        check_same_run(tmp_path, {**here, "config": old}, compiled)


def rewrite(folder, change):
    """Write the state again, changed."""
    file = folder / STATE_FILE
    with safe_open(file, "pt") as opened:
        facts = json.loads(opened.metadata()["minilora_run"])
    tensors, facts = change(load_file(file), facts)
    write(file, tensor_content(tensors, {"minilora_run": json.dumps(facts)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, f: (t, []), "reading it failed"),
        (lambda t, f: (t, {**f, "version": 1}), "state version 1, this minilora reads 5"),
        (lambda t, f: (t, {"version": 5}), r"reading it failed \(KeyError\('identity'\)"),
        (lambda t, f: (t, {**f, "step": "3"}), "reading it failed.*step is '3'"),
        (lambda t, f: (t, {**f, "best": [1]}), "reading it failed"),
        (lambda t, f: (t, {**f, "rows": 3}), "reading it failed"),
        (lambda t, f: (t, {**f, "data": None}), "reading it failed"),
        (lambda t, f: ({k: v for k, v in t.items() if "exp_avg_sq" not in k}, f),
         r"under optimizer\.exp_avg_sq.* there must be \[.*, found nothing"),
        (lambda t, f: ({k: v for k, v in t.items() if not k.startswith("parameter")}, f),
         "under parameter.*found nothing"),
        (lambda t, f: (t | {"other": torch.zeros(2)}, f), r"under other there must be nothing"),
    ],
)  # fmt: skip
def test_fit_resume_refuses_a_damaged_state(tmp_path, change, message):
    fit(tiny(), max_steps=2, out=tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        fit(tiny(), max_steps=4, out=tmp_path, resume=True)


def test_fit_resume_refuses_half_a_state(tmp_path):
    fit(tiny(), max_steps=2, out=tmp_path)
    state = tmp_path / STATE_FILE
    state.write_bytes(state.read_bytes()[:200])
    with pytest.raises(ValueError, match="reading it failed"):
        fit(tiny(), max_steps=4, out=tmp_path, resume=True)


def test_fit_refuses_an_out_that_holds_something(tmp_path):
    fit(tiny(), max_steps=2, out=tmp_path / "run")
    with pytest.raises(ValueError, match="holds the state of an earlier run"):
        fit(tiny(), max_steps=2, out=tmp_path / "run")
    (tmp_path / "run" / STATE_FILE).unlink()
    logged = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"another adapter or run, found metrics\.jsonl"):
        fit(tiny(), max_steps=2, out=tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == logged
    minilora.save(tiny(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"another adapter or run, found adapter_config\.json"):
        fit(tiny(), max_steps=2, out=tmp_path / "adapter")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="out must be a folder, found a file"):
        fit(tiny(), max_steps=2, out=tmp_path / "file")


def test_train_config_keeps_its_defaults_in_the_state(tmp_path):
    config = TrainConfig(betas=[0.9, 0.99], batch_size=4, dtype="float32", max_steps=2)
    minilora.fit(tiny(), examples(), config=config, out=tmp_path, quiet=True)
    more = dataclasses.replace(config, max_steps=3, max_bad_steps=9)
    result = minilora.fit(tiny(), examples(), config=more, out=tmp_path, resume=True, quiet=True)
    assert result.steps == 3
