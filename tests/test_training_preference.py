"""Runs over pairs of answers: the pair is the unit, whatever the batches, ranks and resumptions."""

import json
import os
import pathlib
import re

import pytest
import torch
from foreign_models import foreign
from fork_train import Forks
from preference_pairs import pair, pairs
from safetensors.torch import load_file
from sweeps import wide
from test_cli import tiny_folder
from training_models import examples, factors, same, tiny

import minilora
from minilora.cli.command import main
from minilora.data import Stream
from minilora.running import KINDS, Preference
from minilora.training.config import TrainConfig

OPTIONS = {"lr": 1e-2, "schedule": "constant", "warmup": 0.0, "batch_size": 4}


def fit(model, given, config_loss="ce", plan=False, **options):
    """A short run; `config_loss` is the config's, `loss` one of one's own."""
    names = ("valid", "out", "resume", "loss", "callbacks", "quiet")
    passed = {"quiet": True} | {n: options.pop(n) for n in names if n in options}
    config = TrainConfig(**{"batch_size": 4, "dtype": "float32", "loss": config_loss, **options})
    return minilora.fit(model, given, config=config, plan=plan, **passed)


def data(kind, count=11, seed=0):
    return pairs(count, seed, kto=kind == "kto")


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_step_is_the_mean_over_its_pairs_however_they_are_batched(kind):
    """Unequal micro-batches; kto's z is of the whole step, too."""
    found = []
    for batch_size, accumulate in ((6, 1), (2, 3), (5, 2)):
        model = tiny()
        options = OPTIONS | {"batch_size": batch_size, "accumulate": accumulate}
        given = data(kind, 6)
        result = fit(model, given, config_loss=kind, max_steps=3, epochs=None,
                     shuffle=False, group_by_length=False, **options)  # fmt: skip
        found.append((result.losses, factors(model)))
    for losses, values in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-5)
        for name, value in values.items():
            torch.testing.assert_close(value, found[0][1][name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_training_learns_what_it_is_shown(kind):
    model = tiny()
    held = data(kind, 8)  # learned by heart: the loss must fall on what is trained
    result = fit(model, held, valid=held, config_loss=kind, max_steps=12, eval_every=4, **OPTIONS)
    assert result.best.loss < result.before.loss
    assert result.best.accuracy >= max(0.75, result.before.accuracy)
    assert result.best.margin > result.before.margin
    assert result.best.tokens == 8


def test_tokens_are_those_of_the_answers_that_are_learned():
    """Not those of the answer to another prompt that KTO puts beside each."""
    given = data("kto", 8)
    learned = sum(
        sum(label >= 0 for label in one.labels[: one.lengths[0] + one.lengths[1]][1:])
        for one in given
    )
    result = fit(tiny(), given, config_loss="kto", max_steps=2, **OPTIONS)
    assert result.tokens == learned < sum(sum(n >= 0 for n in one.labels[1:]) for one in given)


def test_metrics_and_lines_tell_margin_and_accuracy(tmp_path, capsys):
    given = data("dpo")
    result = fit(tiny(), given, valid=given[:5], out=tmp_path / "run", config_loss="dpo",
                 max_steps=4, log_every=1, quiet=False, **OPTIONS)  # fmt: skip
    steps = [row for row in rows(tmp_path / "run") if "loss" in row]
    evaluations = [row for row in rows(tmp_path / "run") if "eval_loss" in row]
    assert sorted(row["pairs"] for row in steps[:3]) == [3, 4, 4]  # an epoch
    assert all(row["margin"] == pytest.approx(row["reward_chosen"] - row["reward_rejected"])
               for row in steps)  # fmt: skip
    assert all(0 <= row["accuracy"] <= 1 for row in steps)
    assert sum(row["tokens"] for row in steps) == result.tokens > 15
    assert "eval_perplexity" not in evaluations[0]
    assert evaluations[-1]["eval_margin"] > 0
    said = capsys.readouterr().err
    assert "loss dpo, beta 0.1, reference: the model without this adapter" in said
    assert "11 pairs of answers" in said
    assert re.search(r"step +1/4  loss 0\.693\d  accuracy 0\.\d\d  margin -?0\.000  lr", said)
    assert re.search(r"held-out loss 0\.693\d, accuracy 0\.\d{3}, margin -?0\.000", said)


@pytest.mark.parametrize("kind", ["dpo", "kto", "orpo"])
def test_a_resumed_run_has_the_same_bits(kind, tmp_path, monkeypatch):
    """Over two epochs: the reference is known from the first, in the state too."""
    given = data(kind)
    options = OPTIONS | {"config_loss": kind, "valid": data(kind, 5, seed=1), "eval_every": 2,
                         "dropout": 0.1}  # fmt: skip
    dropout = options.pop("dropout")
    whole = tiny(dropout=dropout)
    fit(whole, given, out=tmp_path / "whole", max_steps=6, **options)
    part = tiny(dropout=dropout)

    class Stop:
        def on_step(self, row):
            if row["step"] == 4:
                raise MemoryError

    with pytest.raises(MemoryError):
        fit(part, given, out=tmp_path / "part", max_steps=6, callbacks=[Stop()], **options)
    again = tiny(seed=0, dropout=dropout)
    asked = []
    real = Preference._reference
    monkeypatch.setattr(
        Preference, "_reference", lambda self, model, parts: asked.append(
            set(self.known)) or real(self, model, parts)
    )  # fmt: skip
    fit(again, given, out=tmp_path / "part", resume=True, max_steps=6, **options)
    assert same(factors(whole), factors(again))
    for row, other in zip(rows(tmp_path / "whole"), rows(tmp_path / "part"), strict=True):
        for key in ("loss", "accuracy", "margin", "eval_loss", "eval_accuracy", "grad_norm"):
            assert row.get(key) == other.get(key), key
    if kind != "orpo":
        assert len(asked[0]) == 16  # all of the first epoch, and what is held out
    for where in (".", "last"):
        one, two = (load_file(tmp_path / run / where / "adapter_model.safetensors")
                    for run in ("whole", "part"))  # fmt: skip
        assert same(one, two)


def answers_apart(dropout):
    """A model with a row for each answer."""
    model = foreign("llama")
    torch.manual_seed(1)
    return minilora.inject(model, r=4, alpha=6, dropout=dropout)


@pytest.mark.parametrize("make", [tiny, answers_apart], ids=["a row", "two rows"])
def test_a_split_for_lack_of_memory_has_the_same_gradient_and_counts_pairs_once(tmp_path, make):
    """Dropout's masks included, though a part's longest answer is not the batch's."""
    model, other = (make(dropout=0.3) for _ in range(2))

    class Limited(Preference):
        def __call__(self, model, batch):
            found = super().__call__(model, batch)
            if len(batch) > 2:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return found

    given, options = data("dpo", 8), OPTIONS | {"config_loss": "dpo", "max_steps": 3}
    options["group_by_length"] = False
    expected = fit(model, given, out=tmp_path / "a", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minilora.training.loss.Preference", Limited)
        found = fit(other, given, out=tmp_path / "b", **options)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert [row["pairs"] for row in rows(tmp_path / "b")] == [4, 4, 4]


def test_a_stream_of_pairs():
    stream = Stream(data("dpo"), window=8)
    result = fit(tiny(), stream, config_loss="dpo", max_steps=3, **OPTIONS)
    assert len(result.losses) == 3


def train(out, kind, parallel):
    """What every process does."""
    torch.set_num_threads(1)
    model = tiny(dropout=0.1)
    options = OPTIONS | {"batch_size": 3, "parallel": parallel, "max_steps": 6, "eval_every": 3}
    held_out = data(kind, 5, seed=1)
    result = fit(model, data(kind, 11), valid=held_out, out=out, config_loss=kind, **options)
    if os.environ.get("RANK", "0") == "0":
        told = [result.losses, result.before.loss, result.best.loss, result.best.accuracy,
                result.tokens]  # fmt: skip
        (pathlib.Path(out) / "told.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    made = Forks(tmp_path_factory.mktemp("ranks") / "log.txt")
    yield made
    made.close()


@pytest.mark.parametrize("kind", [wide("dpo"), "kto"])
def test_ranks_give_the_single_processs_numbers(kind, forks, tmp_path):
    """Two processes, batches of three: one has two pairs, the other one."""
    told = []
    for ranks, parallel in ((1, None), (2, "ddp")):
        out = tmp_path / f"{ranks}"
        options = {"out": str(out), "kind": kind, "parallel": parallel}
        forks.start_ranks("test_training_preference:train", ranks, **options)
        assert set(forks.codes()) == {0}, forks.said()
        told.append((json.loads((out / "told.json").read_text()), rows(out)))
    (alone, one), (both, two) = told
    assert both[0] == pytest.approx(alone[0], rel=1e-5)
    assert both[1:3] == pytest.approx(alone[1:3], rel=1e-5) and both[3:] == alone[3:]
    for row, other in zip(one, two, strict=True):
        assert row.keys() == other.keys()
        if row["step"] <= 1:  # equal rewards, and whose rounding is higher is chance
            continue
        for key in {"margin", "accuracy", "eval_margin", "eval_accuracy", "pairs"} & row.keys():
            assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key


def test_checkpointing_and_autocast():
    given = data("dpo", 8)
    plain = fit(tiny(), given, config_loss="dpo", max_steps=3, **OPTIONS)
    again = fit(tiny(), given, config_loss="dpo", max_steps=3, checkpointing=True, **OPTIONS)
    assert again.losses == pytest.approx(plain.losses, rel=1e-6)
    narrow = fit(tiny(), given, config_loss="dpo", max_steps=3, dtype="bfloat16", **OPTIONS)
    assert narrow.losses == pytest.approx(plain.losses, rel=0.05)


REFUSED = [
    ({"config_loss": "dpo"}, "text", r"loss='dpo' learns from rows with prompt, chosen and rejecte"
     r"d, but example 0 of train is a text; give such rows, or leave --loss at ce"),
    ({}, "dpo", r"loss='ce' learns texts, but example 0 of train is a preference pair; train on it "
     r"with --loss dpo "),
    ({"config_loss": "dpo"}, "kto", "example 0 of train is an answer with a label; use --loss kto"),
    ({"config_loss": "kto"}, "dpo", "example 0 of train is a pair of answers; use --loss dpo"),
    ({"config_loss": "dpo", "loss": lambda model, batch: None}, "dpo",
     "a run has one loss, found loss='dpo' in the config and a loss of your own"),
    ({"config_loss": "dpo", "plan": True}, "dpo", "--plan .* found loss 'dpo'; leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "message"), REFUSED)
def test_data_and_losses_that_do_not_go_together(options, kind, message):
    given = examples(4) if kind == "text" else data(kind, 4)
    with pytest.raises(ValueError, match=message):
        fit(tiny(), given, max_steps=1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.1}, r"beta acts on loss='dpo' or .* alone, found beta=0.1 with loss='ce'"),
        ({"loss": "dpo", "gamma": 1.0}, "gamma acts on loss='simpo' alone, found gamma=1.0 with"),
        ({"loss": "dpo", "kto_weights": [2, 1]}, "kto_weights acts on loss='kto' alone"),
        ({"loss": "kto", "kto_weights": (1, 0)}, "kto_weights must be two finite numbers above 0"),
        ({"loss": "dpo", "beta": 0.0}, "beta must be a finite number above 0"),
        ({"loss": "simpo", "gamma": -1}, "gamma must be a finite number of at least 0"),
        ({"loss": "ppo"}, "loss must be 'ce', 'dpo', 'ipo', 'orpo', 'kto' or 'simpo', found 'ppo'"),
        ({"loss": "dpo", "max_memory": 1.0}, "max_memory=1.0 knows no loss over pairs of answers"),
        ({"loss": "dpo", "parallel": "fsdp"}, "parallel='fsdp' knows no loss over .* or use ddp"),
    ],
)
def test_options_that_do_not_apply_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_pairs_longer_than_the_context(tmp_path):
    """Each text must fit; the two answers in a row need not."""
    model = minilora.load_model(tiny_folder(tmp_path / "model"), dtype=torch.float32)[0]
    minilora.inject(model, r=2, alpha=3)
    given = pairs(4, vocabulary=28, longest=17)
    assert max(len(one.input_ids) for one in given) > 32 >= max(one.longest for one in given)
    fit(model, given, config_loss="dpo", max_steps=1)
    with pytest.raises(ValueError, match="of 32 tokens, but example 0 of train has 33; cut them"):
        fit(model, [pair([2] * 20, [3] * 4, [4] * 13)], config_loss="dpo", max_steps=1)


def test_the_command_trains_on_pairs(tmp_path, capsys):
    """`train`, `resume`, the card; what can't be asked for is refused before the model is read."""
    folder, file = tiny_folder(tmp_path / "model"), tmp_path / "pairs.jsonl"
    file.write_text("".join(
        json.dumps({"prompt": "a b", "chosen": " c " + "d " * (i % 4), "rejected": " e f"}) + "\n"
        for i in range(9)
    ))  # fmt: skip
    held, out = tmp_path / "held.jsonl", tmp_path / "run"
    held.write_text(file.read_text().replace("e f", "f e"))
    given = ["train", folder, "--data", file, "--valid", held, "--out", out, "--dtype", "float32",
             "--loss", "dpo", "--beta", "0.5", "--batch-size", "4", "--max-steps", "3"]  # fmt: skip
    assert main([str(x) for x in given]) == 0
    said = capsys.readouterr()
    assert "9 of 9 documents kept" in said.err and "loss dpo, beta 0.5" in said.err
    assert re.search(r"held out after:  loss .*, accuracy .* over 9 pairs", said.out)
    assert "| loss | dpo |" in (out / "README.md").read_text()
    assert main(["resume", str(out)]) == 0
    for flag, message in (("--pack", "--pack knows texts"), ("--plan", "--plan knows texts")):
        assert main([str(x) for x in [*given[:7], tmp_path / "other", *given[8:], flag]]) == 2
        assert message in capsys.readouterr().err
    assert main(["data", str(file), "--model", str(folder), "--show", "1"]) == 0
    assert "chosen: " in capsys.readouterr().out
    plain = ["train", str(folder), "--data", str(file), "--out", str(tmp_path / "plain")]
    assert main(plain) == 2
    assert "loss='ce' learns texts" in capsys.readouterr().err
