"""Losses on the boards of other programs, read back with these programs' own readers."""

import importlib.util
import json
import math
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import training_models as models
from preference_pairs import pairs

import minilora
from minilora.training import TrainConfig

BOARDS = ("tensorboard", "wandb", "trackio")


def has(package):
    return importlib.util.find_spec(package) is not None


def test_the_option_names_the_boards_there_are():
    for name in BOARDS:
        assert TrainConfig(log=name).log == name
    with pytest.raises(ValueError, match="log must be 'tensorboard', 'wandb', 'trackio' or None"):
        TrainConfig(log="mlflow")


@pytest.mark.parametrize("name", BOARDS)
def test_a_missing_package_is_said_before_anything_else(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeError, match=rf"--log {name} \(in Python: log='{name}'\) "
                       rf"needs {name} .*: pip install {name}$"):  # fmt: skip
        models.fit(models.tiny(), log=name, max_steps=1, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def fitted(out, **options):
    told = []

    class Told:
        def on_step(self, row):
            told.append((row["step"], row["loss"]))

    data = models.examples()
    models.fit(models.tiny(), data, valid=data[:5], out=out, max_steps=3, callbacks=[Told()],
               **options)  # fmt: skip
    return told


@pytest.mark.skipif(not has("tensorboard"), reason="no tensorboard")
def test_tensorboard_reads_every_step_and_evaluation(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = fitted(tmp_path / "out", log="tensorboard")
    found = EventAccumulator(str(tmp_path / "out"))
    found.Reload()
    steps = [(each.step, each.value) for each in found.Scalars("train/loss")]
    assert [step for step, _ in steps] == [1, 2, 3]
    assert [value for _, value in steps] == pytest.approx([loss for _, loss in told])
    evaluated = {each.step: each.value for each in found.Scalars("eval/loss")}
    assert list(evaluated) == [0, 3] and all(map(math.isfinite, evaluated.values()))
    assert {"train/lr", "train/tokens_per_s", "eval/perplexity"} <= set(found.Tags()["scalars"])


def test_tensorboard_needs_a_folder():
    pytest.importorskip("tensorboard")
    with pytest.raises(ValueError, match=r"log='tensorboard' writes into out \(--out\)"):
        models.fit(models.tiny(), log="tensorboard", max_steps=1)


@pytest.mark.skipif(not has("wandb"), reason="no wandb")
def test_wandb_keeps_every_step_offline(tmp_path, monkeypatch):
    """Over 5 s: wandb starts a service of its own. It has no reader of its files in Python."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert len(fitted(tmp_path / "out", log="wandb")) == 3
    (file,) = (tmp_path / "out").rglob("*.wandb")
    written = file.read_bytes()
    assert written.count(b"train/loss") >= 3 and written.count(b"eval/perplexity") >= 2


@pytest.mark.skipif(not has("trackio"), reason="no trackio")
def test_trackio_keeps_every_step(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import trackio.utils

    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
    told = fitted(tmp_path / "out", log="trackio")
    losses = []
    for file in Path(tmp_path / "trackio").rglob("*.db"):
        rows = sqlite3.connect(file).execute("SELECT metrics FROM metrics").fetchall()
        losses += [json.loads(m).get("train/loss") for (m,) in rows]
    assert [x for x in losses if x is not None] == pytest.approx([loss for _, loss in told])


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_board_gets_what_runs_over_pairs_measure(kind, monkeypatch):
    """A stand-in for wandb: what matters is what it is handed."""
    found = {}

    def log(row, step):
        found.setdefault(step, {}).update(row)

    board = SimpleNamespace(init=lambda **_: None, finish=lambda: None, log=log)
    monkeypatch.setitem(sys.modules, "wandb", board)
    data = pairs(7, kto=kind == "kto")
    config = TrainConfig(loss=kind, log="wandb", max_steps=1, batch_size=4)
    minilora.fit(models.tiny(), data, valid=data[:5], config=config, quiet=True)
    rewards = ("reward", "reward_elsewhere") if kind == "kto" else (
        "reward_chosen", "reward_rejected")  # fmt: skip
    assert found[0].keys() == {"eval/loss", "eval/accuracy", "eval/margin"}
    assert found[1].keys() >= {"eval/margin", "train/loss", "train/lr", "train/accuracy",
                               "train/margin", *(f"train/{name}" for name in rewards)}  # fmt: skip
    assert all(math.isfinite(value) for value in found[1].values())
