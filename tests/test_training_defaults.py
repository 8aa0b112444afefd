"""What a run chooses where nobody says it, and what it says of that."""

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_models import examples, factors, fit, plain, same, tiny

import minilora
from minilora.planning import ENOUGH_STEPS, MOST_EPOCHS
from minilora.training import FitResult, TrainConfig, chosen_epochs, chosen_lr, run
from minilora.training.messages import times
from minilora.training.progress import planned_steps


@pytest.mark.parametrize(
    ("rows", "epochs"), [(1, 20), (40, 20), (80, 10), (88, 10), (280, 3), (793, 1), (4000, 1)]
)
def test_small_data_is_passed_over_more_often(rows, epochs):
    assert chosen_epochs(TrainConfig(batch_size=8), rows) == epochs


@given(st.integers(1, 10**6), st.integers(1, 64), st.integers(1, 8))
def test_enough_steps_are_made_where_twenty_passes_can(rows, batch_size, accumulate):
    config = TrainConfig(batch_size=batch_size, accumulate=accumulate)
    epochs, steps = chosen_epochs(config, rows), planned_steps(config, rows)
    assert 1 <= epochs <= MOST_EPOCHS and epochs == int(epochs)
    assert steps == epochs * math.ceil(math.ceil(rows / batch_size) / accumulate)
    assert steps >= ENOUGH_STEPS or epochs == MOST_EPOCHS
    assert epochs == 1 or (epochs - 1) * steps / epochs < ENOUGH_STEPS  # and no pass too many


def test_larger_models_and_preferences_take_lower_rates():
    config = TrainConfig()
    assert [chosen_lr(config, n) for n in (1, 135_000_000, 540_000_000)] == [2e-3, 2e-3, 1e-3]
    assert chosen_lr(config, 8_000_000_000) == 2.6e-4
    assert chosen_lr(TrainConfig(loss="dpo"), 1) == 5e-4
    assert chosen_lr(TrainConfig(lr=0.1), 8_000_000_000) == 0.1


def test_a_run_learns_at_the_rate_that_is_chosen(tmp_path, capsys):
    """Its bits are those of a run that is given the rate, and its state holds the rate."""
    model, other = tiny(), tiny()
    fit(model, max_steps=3, out=tmp_path / "chosen", quiet=False)
    assert "learning rate 0.002, chosen by the model's size (--lr), after" in (
        capsys.readouterr().err
    )
    fit(other, max_steps=3, lr=2e-3, quiet=False)
    assert "learning rate 0.002 after" in capsys.readouterr().err
    assert same(factors(model), factors(other))
    options = {"max_steps": 4, "out": tmp_path / "chosen", "resume": True, "quiet": False}
    fit(tiny(), lr=2e-3, **options)
    assert "lr was" not in capsys.readouterr().err


def test_what_is_said_goes_before_what_is_chosen():
    assert chosen_epochs(TrainConfig(epochs=0.5), 40) == 0.5
    assert chosen_epochs(TrainConfig(max_steps=7), 40) is None
    assert planned_steps(TrainConfig(max_steps=7), 40) == 7
    assert planned_steps(TrainConfig(max_steps=7, epochs=1), 40) == 5
    assert planned_steps(TrainConfig(max_minutes=1), 40) == 100
    assert planned_steps(TrainConfig(max_minutes=1), None) is None  # a stream


def test_a_run_says_what_it_chose_and_why(capsys):
    fit(tiny(), examples(8), quiet=False, epochs=None, max_minutes=60, lr=1e-2)
    said = capsys.readouterr().err
    assert "learning rate 0.01 after 5% of warmup, cosine; scaling 1.5; 4 rows a step; " in said
    assert "20 epochs of 8 rows, chosen from 1 to 20 by their number (--epochs)" in said
    assert "for 40 steps or 60 minutes, whichever ends first" in said
    fit(tiny(), examples(100), quiet=False, epochs=None)
    why = "4 epochs of 100 rows, as a first result takes about 100 steps (--epochs)"
    assert why in capsys.readouterr().err
    fit(tiny(), quiet=False, epochs=1, warmup_steps=2)
    said = capsys.readouterr().err
    assert "after 2 steps of warmup" in said and said.count("1 epoch of 23 rows\n") == 1
    fit(tiny(), quiet=False, max_steps=1)
    assert re.search(r"4 rows a step\n", capsys.readouterr().err)


def test_a_run_without_held_out_data_says_so(capsys):
    fit(tiny(), quiet=False, max_steps=1)
    said = capsys.readouterr().err
    assert said.count("nothing is held out") == 1 and "--hold-out 5%" in said
    fit(tiny(), valid=examples(3, seed=9), quiet=False, max_steps=1)
    assert "nothing is held out" not in capsys.readouterr().err


def test_a_finished_run_says_that_there_is_nothing_left(tmp_path, capsys):
    fit(tiny(), max_steps=3, out=tmp_path)
    fit(tiny(), max_steps=3, out=tmp_path, resume=True, quiet=False)
    assert (
        "the run had already finished after step 3, and its limits (max_steps 3) allow no more"
        in (capsys.readouterr().err)
    )
    fit(tiny(), max_steps=4, out=tmp_path, resume=True, quiet=False)
    assert "already finished" not in capsys.readouterr().err


def test_a_limit_below_what_is_done_is_refused_and_changes_nothing(tmp_path):
    fit(tiny(), max_steps=3, out=tmp_path)
    before = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(ValueError, match="must not lie below .*, found 2 steps, with 3 done; give"):
        fit(tiny(), max_steps=2, out=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"found 1e-06 minutes, with .* spent; give higher ones"):
        fit(tiny(), max_steps=4, max_minutes=1e-6, out=tmp_path, resume=True)
    assert (tmp_path / "state.safetensors").read_bytes() == before
    assert fit(tiny(), max_steps=4, out=tmp_path, resume=True).steps == 4


def test_a_run_that_patience_ended_says_so_when_it_is_resumed(tmp_path, capsys):
    options = {"valid": examples(3, seed=9), "out": tmp_path, "lr": 1e-12, "clip": None}
    options |= {"eval_every": 1, "patience": 2}
    assert fit(tiny(), max_steps=9, **options).stopped == "early"
    fit(tiny(), max_steps=99, resume=True, quiet=False, **options)
    said = capsys.readouterr().err
    assert (
        "was better, so patience 2 ended it; to go on, give its command --resume and a higher"
        in said
    )
    assert "allow no more" not in said


def test_the_rate_is_chosen_by_the_base_alone(monkeypatch):
    """Whatever the rank, and whatever else is loaded."""
    sizes = []
    kept = run.chosen_lr
    monkeypatch.setattr(run, "chosen_lr", lambda config, n: sizes.append(n) or kept(config, n))
    model = plain()
    size = sum(p.numel() for p in model.parameters())
    for r in (2, 16):
        fit(minilora.inject(plain(), r=r, modules_to_save=["lm_head"]), max_steps=1)
    assert sizes == [size, size]


def test_a_run_says_where_its_time_went(tmp_path, capsys):
    result = fit(tiny(), valid=examples(3, seed=9), quiet=False, max_steps=2)
    said = capsys.readouterr().err
    assert re.search(r"time: training [\d.]+ s, evaluation [\d.]+ s; [\d.]+ s in all", said)
    assert result.evaluating > 0 and 0 < result.trained == pytest.approx(result.minutes)
    assert result.compiling == 0
    fit(tiny(), quiet=False, max_steps=1)
    assert re.search(r"time: training [\d.]+ s; [\d.]+ s in all\n", capsys.readouterr().err)
    for steps in (1, 2):
        fit(tiny(), out=tmp_path / "a", resume=steps == 2, quiet=False, max_steps=steps)
    assert re.search(
        r"time of this call: training [\d.]+ s; [\d.]+ s in all; training in the whole run: "
        r"[\d.]+ s\n",
        capsys.readouterr().err,
    )


def test_times_in_one_line_have_one_unit():
    result = FitResult(9, "finished", 30.0, 9, 0, None, None, 0, [], 0.0, 1.2, 0.05, 0.0)
    assert times(result, 1.5, True) == (
        "time of this call: training 1.2 min, evaluation 0.1 min; 1.5 min in all; training in the "
        "whole run: 30.0 min"
    )
    assert "training 0.1 s" in times(replace(result, minutes=0.001, trained=0.001), 0.01, False)
