"""Tuning: its runs are true beginnings of whole ones, and what leaves does so for a reason."""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from fork_train import Forks
from hypothesis import given
from hypothesis import strategies as st
from sweeps import wide
from test_cli import tiny_folder
from training_models import examples, factors, plain, same

import minilora
from minilora.cli.command import main
from minilora.training import loop
from minilora.training.trials import FIRST_STEPS, cost, fewest_steps, rungs, trials_of
from minilora.training.tuning_runs import InterruptedTuningError, Runs

CONFIG = minilora.TrainConfig(batch_size=4, dtype="float32", epochs=5, eval_every=10)
ROWS, HELD = examples(23), examples(12, seed=5)
RATES = (1e-4, 1e-3, 1e-2, 3e-2)
ADAPTER = {"r": 4, "alpha": 6, "dropout": 0.2}


def tune(out, rates=RATES, held=HELD, model=None, **options):
    given = {"config": CONFIG, "quiet": True, "adapters": [ADAPTER]} | options
    return minilora.tune(model or plain(), ROWS, held, out, rates=rates, **given)


def whole(lr, **options):
    """A run of its own, as `minilora train` makes it."""
    model = plain()
    torch.manual_seed(CONFIG.seed)
    minilora.inject(model, **ADAPTER)
    config = dataclasses.replace(CONFIG, lr=lr)
    return model, minilora.fit(model, ROWS, HELD, config=config, quiet=True, **options)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    model, out = plain(), tmp_path_factory.mktemp("tune")
    return tune(out, model=model), model, out


def test_the_chosen_run_has_the_bits_of_one_that_was_never_paused(tuned, tmp_path):
    found, model, out = tuned
    alone, result = whole(found.chosen.lr, out=tmp_path / "alone")
    assert same(factors(model), factors(alone))
    for where in (".", "last"):
        one, two = (folder / where / "adapter_model.safetensors"
                    for folder in (out / found.chosen.name, tmp_path / "alone"))  # fmt: skip
        assert one.read_bytes() == two.read_bytes()
    assert (found.result.best, found.result.best_step) == (result.best, result.best_step)
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (out / found.chosen.name, tmp_path / "alone")
    ]
    for one, two in zip(*rows, strict=True):
        kept = one.keys() - {"tokens_per_s", "elapsed_s", "data_wait"}
        assert {key: one[key] for key in kept} == {key: two[key] for key in kept}


def test_what_is_compared_is_the_beginning_of_each_whole_run(tuned):
    """Losses at each comparison are those of a run at that rate, stopped there."""
    found, _, _ = tuned
    first, second = rungs(found.steps, len(RATES))
    assert sum(second in trial.losses for trial in found.trials) in (1, 2)
    for trial in found.trials:
        model, result = whole(trial.lr, until=first)
        assert (result.stopped, result.steps) == ("paused", first)
        held = minilora.evaluate(model, HELD)
        assert trial.losses[first] == pytest.approx(held.loss, rel=1e-6)
        assert found.tokens == held.tokens
    assert found.before == pytest.approx(minilora.evaluate(plain(), HELD).loss, rel=1e-6)


def test_what_leaves_is_clearly_worse_or_cannot_be_told_and_halved(tuned):
    found, _, _ = tuned
    assert found.chosen.left is None
    left = [trial for trial in found.trials if trial is not found.chosen]
    for trial in left:
        gap = trial.against[max(trial.losses)]
        assert gap.change >= 0
        reason = "worse than" if gap.clear else "halved, can't tell"
        assert trial.left.startswith(f"left at step {max(trial.losses)}: {reason}")
        assert f"{gap.low:+.4f} to {gap.high:+.4f}" in trial.left
    text = str(found)
    assert text.startswith(f"held-out loss over {found.tokens} tokens of 12 examples, ")
    assert all(trial.name in text for trial in found.trials)
    best = f"{found.result.best.loss:.4f} after step {found.result.best_step}"
    assert text.endswith(f"chosen: {found.chosen.name}, {best}, in {found.out / found.chosen.name}")


def test_a_best_loss_in_the_middle_of_a_run_is_told_with_its_step(tmp_path):
    """Where a run's best evaluation is not its last, no loss is filed under a later step."""
    config = dataclasses.replace(
        CONFIG, epochs=None, max_steps=60, eval_every=5, schedule="constant", warmup=0.0
    )
    found = minilora.tune(
        plain(), ROWS[:16], HELD, tmp_path, rates=(3e-2, 5e-2), adapters=[{"r": 4}],
        config=config, quiet=True,
    )  # fmt: skip
    rows = map(json.loads, (tmp_path / found.chosen.name / "metrics.jsonl").open())
    evaluated = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    best = min(evaluated, key=evaluated.get)
    assert 12 < best < 60 and evaluated[best] < evaluated[60] - 0.1
    assert [set(trial.losses) for trial in found.trials] == [{12}, {12}]
    head, *_, last = str(found).splitlines()[1:]
    assert head.split() == ["step", "12"]
    assert f"{found.chosen.name}, {evaluated[best]:.4f} after step {best}, in" in last


def test_a_run_that_went_on_by_itself_is_not_compared_as_of_an_earlier_step(tmp_path, monkeypatch):
    """As with `minilora resume` on a trial of a tuning that was stopped."""
    short = dataclasses.replace(CONFIG, epochs=None, max_steps=15)
    stop = SimpleNamespace(times=0)
    real = Runs.losses

    def losses(self):
        stop.times += 1
        if stop.times == 2:
            raise InterruptedTuningError
        return real(self)

    monkeypatch.setattr(Runs, "losses", losses)
    found = tune(tmp_path, RATES[:2], config=short)
    assert found.stopped == "interrupted" and RATES[1] == found.trials[1].lr
    config = dataclasses.replace(short, lr=RATES[1])
    model = minilora.inject(plain(), **ADAPTER)
    where = tmp_path / found.trials[1].name
    minilora.fit(model, ROWS, HELD, config=config, out=where, resume=True, quiet=True)
    with pytest.raises(ValueError, match=r"lr-0.001 must be compared after step 3, but .* step 15"):
        tune(tmp_path, RATES[:2], config=short, resume=True)
    shutil.rmtree(where)
    again, fresh = (
        tune(tmp_path, RATES[:2], config=short, resume=True),
        tune(tmp_path / "b", RATES[:2], config=short),
    )
    assert (again.trials, again.result.best) == (fresh.trials, fresh.result.best)


def test_the_folder_holds_runs_a_chart_and_what_was_measured(tuned, tmp_path):
    found, _, out = tuned
    assert {file.name for file in out.iterdir()} == {
        "tune.json", "tune.png", *(trial.name for trial in found.trials)}  # fmt: skip
    stored = json.loads(found.to_json(tmp_path / "t.json").read_text())
    assert stored["chosen"]["name"] == found.chosen.name and stored["stopped"] == "finished"
    again = tune(out, resume=True)
    assert (again.chosen, again.trials) == (found.chosen, found.trials)


def test_a_rate_that_diverges_leaves_with_a_word(tmp_path, capfd):
    found = tune(tmp_path, rates=(1e-3, 1e-2, 1e38), quiet=False)
    assert found.trials[2].left.startswith("diverged: ")
    assert found.chosen in found.trials[:2]
    assert "lr-1e+38 diverged: " in capfd.readouterr().err
    assert tune(tmp_path, rates=(1e-3, 1e-2, 1e38), resume=True).trials == found.trials


def test_all_rates_that_diverge_are_an_error(tmp_path):
    model = plain()
    with pytest.raises(RuntimeError, match=r"all 2 trials diverged by step 6 .* than 1e\+37"):
        tune(tmp_path, rates=(1e37, 1e38), model=model)
    assert model.state_dict().keys() == plain().state_dict().keys()


def test_what_is_the_same_is_halved_in_the_order_given(tmp_path):
    found = tune(tmp_path, rates=(2e-30, 1e-30))
    assert found.chosen is found.trials[0]
    assert "halved, can't tell (+0.0000" in found.trials[1].left


def test_few_held_out_examples_are_said(tmp_path):
    found = tune(tmp_path, held=HELD[:3])
    assert "with fewer than 10 held-out examples no interval means anything" in str(found)
    assert all("worse than" not in (trial.left or "") for trial in found.trials)


def test_adapters_are_tried_with_each_rate(tmp_path):
    model = plain()
    adapters = [{"r": 2, "targets": ["q_proj", "v_proj"]}, {"r": 4, "targets": "all-linear"}]
    found = tune(tmp_path, rates=(1e-3, 1e-2), adapters=adapters, model=model)
    assert [trial.name for trial in found.trials] == [
        "lr-0.001-r-2-targets-q_proj+v_proj", "lr-0.01-r-2-targets-q_proj+v_proj",
        "lr-0.001-r-4-targets-all-linear", "lr-0.01-r-4-targets-all-linear"]  # fmt: skip
    alone = plain()
    torch.manual_seed(0)
    minilora.inject(alone, **found.chosen.adapter)
    config = dataclasses.replace(CONFIG, lr=found.chosen.lr)
    minilora.fit(alone, ROWS, HELD, config=config, quiet=True)
    assert same(factors(model), factors(alone))


@pytest.mark.parametrize("every", [None, 3, 7, wide(1), wide(6)])
def test_what_a_budget_counts_is_what_is_done(every, tmp_path, monkeypatch):
    """Trials that can't be told apart, so that none leaves before it must."""
    done = []
    real, losses = loop.evaluate, Runs.losses
    monkeypatch.setattr(loop, "evaluate", lambda *a: done.append("fit") or real(*a))
    monkeypatch.setattr(Runs, "losses", lambda self: done.append("tune") or losses(self))
    config = dataclasses.replace(CONFIG, eval_every=every)
    tune(tmp_path, rates=(1e-30, 2e-30), adapters=[{"r": 2}, {"r": 4}], config=config)
    assert len(done) == cost(30, 4, 2, every)[1]


def test_a_budget_counts_evaluations_within_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(Runs, "_timed", lambda *_: 0.0)
    monkeypatch.setattr(Runs, "losses", lambda _: [])
    clock = itertools.count()
    counted = SimpleNamespace(perf_counter=lambda: next(clock) / 10)  # 0.1 s an evaluation
    monkeypatch.setattr("minilora.training.tuning_runs.time", counted)
    trials = trials_of(RATES[:2], [ADAPTER], CONFIG)
    found = []
    for every in (None, 1):
        config = dataclasses.replace(CONFIG, eval_every=every)
        runs = Runs(plain(), ROWS, minilora.data.as_examples(HELD), tmp_path, config, 0, True)
        found.append(runs.affordable(4.55 / 0.9 / 60, trials, 60))
    # 1 + 1 at the ends, 2 at step n / 5, and 2 (n / 5) + (n - 1) - n / 5 within: 45 at n = 35.
    assert found == [60, 35]


def test_only_the_trials_go_to_a_board(tmp_path, monkeypatch):
    opened = []
    board = SimpleNamespace(init=lambda **settings: opened.append(settings["name"]),
                            log=lambda *_, **__: None, finish=lambda: None)  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", board)
    config = dataclasses.replace(CONFIG, log="wandb")
    found = tune(tmp_path, rates=RATES[:2], budget=1000, config=config)
    assert set(opened) == {trial.name for trial in found.trials}


def test_a_budget_limits_the_steps(tmp_path):
    found = tune(tmp_path / "much", rates=RATES[:2], budget=1000)
    assert found.steps == 30
    with pytest.raises(ValueError, match=r"budget must be .* minutes or more for 2 trials \(15 st"):
        tune(tmp_path / "little", rates=RATES[:2], budget=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held": []}, "compares by held-out examples, found 23 to train on and 0 held out"),
        ({"rates": [1e-3]}, "needs two or more rates to choose from, found"),
        ({"rates": [1e-3, 0.001]}, "what tune.. tries must differ, found lr-0.001 twice"),
        ({"rates": [1e-3, -1]}, "lr must be a finite number above 0, or None, found -1"),
        ({"adapters": [{"r": 0}, {"r": 2}]}, "r must be a whole number of at least 1, found 0"),
        ({"adapters": [{"r": 2**17}]}, "r must be at most 65,536, found 131072"),
        ({"adapters": [{"r": 2, "targets": ["nope"]}]}, "nope"),
        ({"config": minilora.TrainConfig(max_steps=11)}, "found 11 steps in all; train for 30 or"),
        ({"config": minilora.TrainConfig(max_minutes=1)}, "found max_minutes=1; leave it out"),
        ({"config": minilora.TrainConfig(patience=1, eval_every=1)}, "found patience=1"),
        (
            {"held": minilora.data.pack(minilora.data.as_examples(HELD), 40)},
            "packed into example 0; do not pack them",
        ),
        (
            {"config": minilora.TrainConfig(loss="dpo")},
            "compares the loss of the next token, found",
        ),
        ({"budget": 0}, "budget must be a number of minutes above 0, or None, found 0"),
        ({"resume": True}, "resume needs .*tune.json, and there is none"),
        ({"model": minilora.inject(plain(), r=2)}, "found a model with adapters"),
    ],
)
def test_what_cannot_be_tuned_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tune(tmp_path / "out", **options)
    assert not list(tmp_path.glob("out/lr-*"))


def test_a_folder_in_use_is_refused(tuned, tmp_path):
    _, _, out = tuned
    with pytest.raises(ValueError, match="holds an earlier tuning; continue it with --resume"):
        tune(out)
    with pytest.raises(ValueError, match="must have its rates, adapters and settings as before"):
        tune(out, resume=True, rates=(1e-4, 1e-3, 1e-2, 2e-2))
    (tmp_path / "lr-0.01").mkdir()
    with pytest.raises(ValueError, match="lr-0.01 must not be there yet; name another folder"):
        tune(tmp_path)
    (tmp_path / "tune.json").write_text("[]")
    with pytest.raises(ValueError, match="must be what a tuning wrote, but reading it failed"):
        tune(tmp_path, resume=True)


def test_a_stream_is_refused(tmp_path):
    stream = minilora.data.Stream(ROWS, lambda row: row)
    with pytest.raises(TypeError, match="needs a list of examples, found a Stream"):
        minilora.tune(plain(), stream, HELD, tmp_path)


@given(st.integers(2, 40), st.integers(0, 3000))
def test_comparisons_halve_the_trials_and_end_at_a_fifth(trials, more):
    steps = fewest_steps(trials) + more
    found = rungs(steps, trials)
    assert found[0] >= FIRST_STEPS and found[-1] == steps // 5
    assert all(2 * a <= b <= 2 * a + 1 for a, b in itertools.pairwise(found))
    left, done, evaluated, before = trials, 0, 2, 0
    for rung in found:
        done, evaluated = done + left * (rung - before), evaluated + left
        left, before = left // 2, rung
    assert left == 1
    assert cost(steps, trials) == (done + steps - before, evaluated)
    with pytest.raises(ValueError, match="that must be 3 at least"):
        rungs(fewest_steps(trials) - 1, trials)


def test_until_is_a_step():
    with pytest.raises(ValueError, match="until must be a step of the run, from 0 on, or None"):
        whole(1e-3, until=-1)


def test_a_name_says_what_differs():
    found = trials_of([1e-3], [{"r": 4, "alpha": 8}, {"r": 8, "alpha": 8}], CONFIG)
    assert [trial.name for trial in found] == ["lr-0.001-r-4", "lr-0.001-r-8"]


# --- the command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    tiny_folder(folder / "model")
    chance = random.Random(5)
    for name, rows in (("train", 23), ("valid", 12)):
        lines = [
            json.dumps({"text": " ".join(chance.choices("abcdefgh", k=chance.randint(3, 11)))})
            for _ in range(rows)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def words(place, out, *more, steps="20"):
    given = ["tune", place / "model", "--data", place / "train.jsonl", "--valid"]
    given += [place / "valid.jsonl", "--out", out, "--max-st", steps, "--batch-size", "3"]
    given += ["--dropout", "0.2", "--max-length", "12", "--dtype", "float32", "--save-every", "1"]
    given += ["--rates", "0.001", "0.01", "0.03", "--seed", "3", *more]
    return [str(word) for word in given]


def kept(out):
    """What must be the same in the end: measurements, and every run's adapter and state."""
    found = {"tune.json": (out / "tune.json").read_bytes()}
    for file in sorted(out.glob("lr-*/adapter_model.safetensors")):
        found[file.parent.name] = file.read_bytes()
        found[f"{file.parent.name}/last"] = (file.parent / "last" / file.name).read_bytes()
    return found


def test_a_tuning_killed_at_random_moments_ends_with_the_same_bits(place):
    """Real processes, killed with SIGKILL anywhere; some 10 s."""
    forks = Forks(place / "log.txt", words(place, place / "warm"))
    try:
        begin = time.monotonic()
        assert forks.run(words(place, place / "whole")) == 0, forks.said()
        took, chance, kills = time.monotonic() - begin, random.Random(2), 0
        for run in range(2):
            out = place / f"killed-{run}"
            for _ in range(3):
                more = ["--resume"] if out.exists() and any(out.iterdir()) else []
                pid = forks.start(words(place, out, *more))
                time.sleep(chance.uniform(0.0, 0.6 * took))
                with contextlib.suppress(ProcessLookupError):  # it has ended already
                    os.kill(pid, signal.SIGKILL)
                kills += forks.code() == -signal.SIGKILL
            more = ["--resume"] if out.exists() and any(out.iterdir()) else []
            assert forks.run(words(place, out, *more)) == 0, forks.said()
            assert kept(out) == kept(place / "whole")
        assert kills >= 3
    finally:
        forks.close()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="run.toml is read with Python 3.11")
def test_the_command_leaves_ordinary_runs(place, tmp_path, monkeypatch, capsys):
    """Whose words have a trial's rank and steps, not those that were given, cut short or not."""
    monkeypatch.chdir(tmp_path)
    assert main(words(place, "out", "--vary", "r=2,4", "--rank", "8", steps="30")) == 0
    said = capsys.readouterr().out
    name = said.partition("chosen: ")[2].partition(",")[0]
    assert name.startswith("lr-0.0") and "minutes; chart in out/tune.png" in said
    assert said.endswith(f"\ntalk to it: minilora chat out/{name}\n")
    assert (tmp_path / "out" / name / "README.md").exists()
    assert main(["repeat", f"out/{name}", "again"]) == 0
    assert "bit-equal: the adapter in" in capsys.readouterr().out
    other = next(f.name for f in (tmp_path / "out").glob("lr-*") if f.name != name)
    assert main(["resume", f"out/{other}"]) == 0  # what left can go on
    assert "30 steps; adapter in" in capsys.readouterr().out
    assert main(["resume", "out"]) == 0
    assert f"chosen: {name}," in capsys.readouterr().out
    assert main(["repeat", "out", "more"]) == 2
    assert "repeat takes the folder of one run, found a tuning's" in capsys.readouterr().err


@pytest.mark.skipif(sys.version_info < (3, 11), reason="run.toml is read with Python 3.11")
def test_a_rank_that_is_not_varied_is_each_trials(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words(place, "out", "--r", "2", "--vary", "alpha=3,5", steps="30")) == 0
    name = capsys.readouterr().out.partition("chosen: ")[2].partition(",")[0]
    assert json.loads((tmp_path / "out" / name / "adapter_config.json").read_text())["r"] == 2
    assert main(["repeat", f"out/{name}", "again"]) == 0
    assert "bit-equal: the adapter in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lr", "1e-3"], "tune tries --rates, found --lr"),
        (["--loss", "dpo"], "tune compares the loss of the next token, found --loss dpo; leave"),
        (["--stream"], "reads all data before the first step, found --stream"),
        (["--vary", "dropout=1"], "--vary takes r, alpha, targets with values"),
        (["--vary", "r=2", "r=4"], "--vary takes each name once, found r twice"),
        (["--vary", "r=two"], "--vary needs numbers for r, found 'two'"),
        (["--vary", "r=2,"], "--vary takes r, alpha, targets with values"),
        (["--resume"], "resume needs"),
    ],
)
def test_bad_words_are_told_before_the_model_is_loaded(place, tmp_path, more, message, capsys):
    assert main([*words(place, tmp_path / "out"), *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="config files are read with Python 3.11")
def test_a_rate_in_a_config_file_is_refused_as_the_flag_is(place, tmp_path, capsys):
    (tmp_path / "c.toml").write_text("[train]\nlr = 1e-3\n")
    assert main([*words(place, tmp_path / "out"), "--config", str(tmp_path / "c.toml")]) == 2
    assert (
        f"tune tries --rates, found lr in {tmp_path / 'c.toml'}; leave" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rates", "0"], "must be a finite number above 0, found '0'"),
        (["--rates", "high"], "must be a finite number above 0, found 'high'"),
        (["--budget", "nan"], "must be minutes, above 0, found 'nan'"),
    ],
)
def test_words_that_are_no_numbers_are_refused(place, tmp_path, more, message, capsys):
    with pytest.raises(SystemExit):
        main([*words(place, tmp_path / "out"), *more])
    assert message in capsys.readouterr().err
