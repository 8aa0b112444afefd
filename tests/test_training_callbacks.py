"""Callbacks, early stopping, norms per layer and sample text."""

import json
import math

import pytest
import torch
from training_models import examples, factors, fit, same, tiny

from minilora.running.loss import token_loss
from minilora.training.callbacks import Callbacks
from minilora.training.state import load_state


class Told:
    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda told: self.calls.append((name, told))

    def of(self, name):
        return [told for called, told in self.calls if called == name]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_callbacks_are_told_what_the_files_get(tmp_path):
    told = Told()
    options = {"valid": examples(4, seed=1), "max_steps": 5, "eval_every": 2, "save_every": 2}
    minimal = type("Steps", (), {"on_step": lambda self, row: None})()
    fit(tiny(), out=tmp_path, callbacks=[told, minimal], **options)
    rows = metrics(tmp_path)
    assert told.of("on_step") == [row for row in rows if "loss" in row]
    assert told.of("on_eval") == [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in told.of("on_eval")] == [0, 2, 4, 5]
    assert told.of("on_save") == [tmp_path] * 3
    assert any("held-out loss" in line for line in told.of("on_log"))  # though quiet


def test_callbacks_refuse_an_object_that_is_none():
    with pytest.raises(TypeError, match="must have a method on_step, on_eval, on_save or on_log"):
        Callbacks([print])


def test_callbacks_and_samples_are_refused_before_anything_is_done(tmp_path):
    class Mine:
        def on_step(self, row):
            raise AssertionError

    out = tmp_path / "run"
    with pytest.raises(TypeError, match="callbacks must be a list of objects, found one Mine; put"):
        fit(tiny(), callbacks=Mine(), out=out)
    with pytest.raises(TypeError, match=r"must be an object, found the class Mine; pass Mine\(\)"):
        fit(tiny(), callbacks=[Mine], out=out)
    with pytest.raises(ValueError, match="at each evaluation, which needs valid, found no valid"):
        fit(tiny(), sample=lambda model: "text", out=out)
    with pytest.raises(ValueError, match="which needs valid, found str"):
        fit(tiny(), valid=examples(3), sample="a b", out=out)
    for name in ("train", "valid"):
        with pytest.raises(ValueError, match=f"{name} must hold at least one example, found none"):
            fit(tiny(), [] if name == "train" else None, valid=[], out=out)
    with pytest.raises(ValueError, match="out must name a folder, found ''"):
        fit(tiny(), out="")
    assert not out.exists()


@pytest.mark.parametrize("name", ["on_step", "on_eval", "on_save"])
def test_an_exception_in_a_callback_ends_the_run_with_the_state_saved(tmp_path, name):
    def stop(self, told):
        step = told["step"] if isinstance(told, dict) else 4
        if step >= 4:
            raise KeyError("mine")

    options = {"valid": examples(4, seed=1), "max_steps": 7, "eval_every": 2, "save_every": 4}
    whole, broken, again = (tiny(dropout=0.2) for _ in range(3))
    fit(whole, **options)
    with pytest.raises(KeyError, match="mine"):
        fit(broken, out=tmp_path, callbacks=[type("C", (), {name: stop})()], **options)
    assert load_state(tmp_path)[1]["step"] == 4
    fit(again, out=tmp_path, resume=True, **options)
    assert same(factors(whole), factors(again))


def worse_from(step):
    """Held-out losses that fall until a step and rise after it."""
    evaluations = []

    def loss(model, batch):
        total, tokens = token_loss(model, batch)
        if torch.is_grad_enabled():
            return total, tokens
        evaluations.append(1)
        return total.detach() * 0 + tokens * (10 + abs(len(evaluations) - step)), tokens

    return loss


def test_patience_ends_the_run_and_keeps_the_best(tmp_path, capsys):
    options = {"valid": examples(3, seed=1), "eval_every": 2, "patience": 2, "max_steps": 40}
    model = tiny()
    result = fit(model, out=tmp_path, loss=worse_from(4), quiet=False, **options)
    assert (result.stopped, result.steps, result.best_step) == ("early", 10, 6)
    assert "2 evaluations in a row were not better than the one after step 6" in (
        capsys.readouterr().err
    )
    again = tiny()
    result = fit(again, out=tmp_path, resume=True, **options)
    assert (result.stopped, result.steps, result.losses) == ("early", 10, [])
    assert same(factors(model), factors(again))


@pytest.mark.parametrize(("patience", "steps"), [(1, 2), (3, 6)])
def test_losses_that_are_not_finite_end_a_run_that_has_begun(patience, steps, capsys):
    """The one before the first step counts for nothing, and no adapter is said to be the best."""

    def overflowing(model, batch):
        total, tokens = token_loss(model, batch)
        return (total if torch.is_grad_enabled() else total + math.inf), tokens

    options = {"valid": examples(3, seed=1), "eval_every": 2, "max_steps": 40}
    result = fit(tiny(), loss=overflowing, quiet=False, patience=patience, **options)
    assert (result.stopped, result.steps, result.best) == ("early", steps, None)
    said = capsys.readouterr().err
    assert "no evaluation was finite: the adapter is that of the last step" in said
    assert "is kept" not in said


def test_patience_counts_on_over_a_stop(tmp_path):
    options = {"valid": examples(3, seed=1), "eval_every": 2, "patience": 3}
    fit(tiny(), out=tmp_path, loss=worse_from(3), max_steps=9, **options)
    assert load_state(tmp_path)[1]["stale"] == 3  # after 6, 8, and the last step

    def worse(model, batch):
        total, tokens = token_loss(model, batch)
        return (total if torch.is_grad_enabled() else total + 1e6), tokens

    options["patience"] = 5
    result = fit(tiny(), out=tmp_path, resume=True, loss=worse, max_steps=40, **options)
    assert (result.stopped, result.steps) == ("early", 12)


def test_patience_needs_evaluations():
    with pytest.raises(ValueError, match="patience counts evaluations, so it needs eval_every"):
        fit(tiny(), patience=2, max_steps=2)
    with pytest.raises(ValueError, match="so it needs valid, found none"):
        fit(tiny(), patience=2, eval_every=1, max_steps=2)
    with pytest.raises(ValueError, match="patience must be a whole number"):
        fit(tiny(), patience=0, eval_every=1, max_steps=2)


def test_fit_logs_norms_of_gradient_and_of_each_layers_b(tmp_path):
    model = tiny()
    fit(model, max_steps=4, log_every=2, lr=1e-2, out=tmp_path)
    rows = metrics(tmp_path)
    assert all(row["grad_norm"] > 0 for row in rows)
    assert [row["step"] for row in rows if "b_norm" in row] == [2, 4]
    for name, norm in rows[-1]["b_norm"].items():
        B = factors(model)[f"{name}.default.lora_B"]
        assert norm == pytest.approx(math.sqrt(float(B.double().square().sum())), rel=1e-5) and norm


def test_fit_writes_a_sample_at_each_evaluation(tmp_path, capsys):
    seen = []

    def sample(model):
        seen.append((model.training, torch.is_grad_enabled()))
        return f"text {len(seen)}"

    model = tiny(dropout=0.3)
    options = {"valid": examples(3, seed=1), "eval_every": 2, "max_steps": 4}
    fit(model, sample=sample, out=tmp_path, quiet=False, **options)
    assert seen == [(False, False)] * 3
    said = [(row["step"], row["sample"]) for row in metrics(tmp_path) if "sample" in row]
    assert said == [(0, "text 1"), (2, "text 2"), (4, "text 3")]
    assert "step    2  sample: text 2" in capsys.readouterr().err
    other = tiny(dropout=0.3)
    fit(other, **options)
    assert same(factors(model), factors(other))  # a sample changes nothing
