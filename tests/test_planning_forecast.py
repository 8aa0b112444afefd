"""`fit(plan=True)`: what is said before and after, of a run that is the same."""

import dataclasses
import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minilora
from minilora.data import IGNORE, Batches, Example, common_prefix, worth_sharing
from minilora.data.streaming import Stream
from minilora.models import Llama, LlamaConfig
from minilora.planning import forecast
from minilora.planning.batches import (
    BatchShape,
    coming_steps,
    epoch_steps,
    heaviest_batch,
    mean_batch,
)
from minilora.planning.memory import Counted, count_memory
from minilora.planning.shapes import Settings, read_shape
from minilora.planning.timing import Timing

CONFIG = LlamaConfig(97, 64, 128, 3, 4, 2, 16, 64)
ROWS = [Example(list(range(1, n)), list(range(1, n))) for n in (9, 17, 33, 17)]
HALF_A_SECOND = Timing(0.5, 0.49, 0.52, 5)


class Lines:
    def __init__(self):
        self.said = []

    def on_log(self, line):
        self.said.append(line)


def trained(plan, format=None, rows=ROWS, callbacks=(), config=None, **options):
    torch.manual_seed(0)
    model = Llama(CONFIG)
    if format:
        minilora.quantize(model, format)
    minilora.inject(model, r=4, alpha=6)
    lines = Lines()
    limits = {"batch_size": 2, "dtype": "float32", "max_steps": 3} | (config or {})
    minilora.fit(
        model, rows, config=minilora.TrainConfig(**limits), quiet=True,
        callbacks=[lines, *callbacks], plan=plan, **options,
    )  # fmt: skip
    return model, lines.said


@pytest.mark.parametrize("format", [None, "nf4"])
def test_planned_first_and_measured_after(monkeypatch, format):
    monkeypatch.setattr(forecast, "timed_step_apart", lambda *_: HALF_A_SECOND)
    plain, _ = trained(False, format)
    model, said = trained(True, format)
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other), "a plan changes nothing of the run"
    first = next(i for i, line in enumerate(said) if line.startswith("plan:"))
    last = next(i for i, line in enumerate(said) if line.startswith("measured:"))
    assert first < last
    text = "\n".join(said)
    assert re.search(r"plan:\s+peak\s+[\d,.]+", text)
    assert "0.5 s a step (0.49 to 0.52 in the middle half of 5 repeats)" in text
    assert re.search(r"measured: .* s a step over 3 steps, planned", text)
    assert "disagree" not in text


def test_compiling_is_no_part_of_a_steps_time(monkeypatch):
    """Steps that compile for a minute each take what they would without it."""
    on_step = forecast.Forecast.on_step

    def compiling(self, row):
        self.clock.seconds += 60
        on_step(self, row | {"elapsed_s": row["elapsed_s"] + self.clock.seconds})

    monkeypatch.setattr(forecast.Forecast, "on_step", compiling)
    monkeypatch.setattr(forecast, "timed_step_apart", lambda *_: HALF_A_SECOND)
    text = "\n".join(trained(True)[1])
    found = re.search(r"measured: (.*) s a step over 3 steps beside 180 s of compiling", text)
    assert float(found.group(1)) < 10


@given(
    lengths=st.lists(st.integers(2, 20), min_size=1, max_size=12),
    batch_size=st.integers(1, 5),
    accumulate=st.integers(1, 3),
    done=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_steps_are_the_batches_that_the_loader_gives(lengths, batch_size, accumulate, done, seed):
    rows = [Example([1] * n, [IGNORE] * (n // 3) + [1] * (n - n // 3)) for n in lengths]
    planned, given = (Batches(rows, batch_size=batch_size, seed=seed) for _ in range(2))
    done = min(done, len(given))
    for each in (planned, given):
        each.load_state_dict(each.state_dict() | {"index": done})
    ahead = coming_steps(planned, accumulate, shared := common_prefix(rows))
    for _ in range(3):  # the rest of an epoch, and two more
        met = [
            BatchShape(*size, batch.tokens, worth_sharing(*size, shared))
            for batch in given
            for size in [batch.input_ids.shape]
        ]  # fmt: skip
        for start in range(0, len(met), accumulate):
            assert next(ahead) == met[start : start + accumulate]
    whole = epoch_steps(planned, accumulate, shared)
    assert sum(batch.rows for step in whole for batch in step) == len(rows)
    usual, most = mean_batch(whole), heaviest_batch(whole, None, 1)
    assert most.tokens == max(batch.tokens for step in whole for batch in step) >= usual.rows
    assert 0 < usual.share <= 1


LONG = [Example([1] * n, [1] * n) for n in [8] * 30 + [64] * 2]


def short_run(monkeypatch, timing=HALF_A_SECOND, **config):
    monkeypatch.setattr(forecast, "timed_step_apart", lambda *_: timing)
    return "\n".join(trained(True, rows=LONG, config=config)[1])


def test_a_short_run_is_planned_by_what_it_meets(monkeypatch):
    seed = next(s for s in range(99) if Batches(LONG, batch_size=2, seed=s).order(0)[0][0] < 30)
    said = short_run(monkeypatch, max_steps=1, seed=seed)
    assert "plan: the batch that needs most memory in this run's 1 steps is 2 × 8 tokens" in said
    epoch = re.search(r"a full epoch of 16 steps meets 2 × 64 tokens: peak ([\d,.]+) MB", said)
    peak = re.search(r"plan:\s+peak\s+([\d,.]+)", said)
    assert float(epoch[1].replace(",", "")) > float(peak[1].replace(",", ""))
    assert "0.0 minutes for this run's 1 steps, 0.2 minutes an epoch of 16 steps" in said
    said = short_run(monkeypatch, max_steps=None, epochs=1)
    assert "the batch that needs most memory in this run's 16 steps is 2 × 64 tokens" in said
    assert "a full epoch" not in said


def test_the_pass_that_takes_most_is_planned(monkeypatch):
    """Two rows of 64 tokens are computed apart, so a batch of two of 40 takes more."""
    assert heaviest_batch([[BatchShape(2, 64, 9)], [BatchShape(2, 40, 9)]], 100, 1).length == 40
    assert heaviest_batch([[BatchShape(2, 64, 9)], [BatchShape(2, 40, 9)]], 100, 2).length == 64
    ragged = Settings(batch_size=16, length=256, pass_tokens=3072)
    assert ragged.rows == 8 and (ragged.fullest.rows, ragged.fullest.length) == (16, 192)
    assert dataclasses.replace(ragged, length=100).fullest.length == 100
    assert dataclasses.replace(ragged, pass_tokens=None).fullest.length == 256
    with pytest.raises(ValueError, match="pass_tokens must be a whole number"):
        dataclasses.replace(ragged, pass_tokens=0)
    monkeypatch.setattr("minilora.planning.batches.PASS_TOKENS", 100)
    said = short_run(monkeypatch, max_steps=None, epochs=1)
    assert "in this run's 16 steps is 2 × 64 tokens, in passes of 1 × 64\n" in said
    monkeypatch.setattr("minilora.planning.batches.PASS_TOKENS", 128)
    more = short_run(monkeypatch, max_steps=None, epochs=1)
    assert "in this run's 16 steps is 2 × 64 tokens\n" in more
    kept = [float(re.search(r"activations +([\d.]+)", text)[1]) for text in (said, more)]
    assert kept[0] == pytest.approx(kept[1] / 2, rel=0.1)


def test_a_time_limit_is_planned_by_the_steps_within_it(monkeypatch):
    seed = next(s for s in range(99) if Batches(LONG, batch_size=2, seed=s).order(0)[0][0] < 30)
    slow = Timing(6.0, 6.0, 6.0, 5)  # of 2 × 12 tokens, the mean
    said = short_run(monkeypatch, slow, max_steps=None, max_minutes=0.001, seed=seed, epochs=1000)
    assert "the batch that needs most memory in this run's 1 steps is 2 × 8 tokens" in said
    assert "a full epoch of 16 steps meets 2 × 64" in said
    quick = Timing(1e-4, 1e-4, 1e-4, 5)
    said = short_run(monkeypatch, quick, max_steps=None, max_minutes=0.001, epochs=1000)
    found = re.search(r"this run's (\d+) steps is 2 × 64", said)
    assert int(found[1]) == pytest.approx(0.06 / 1e-4, rel=0.1), "epochs after the first count"


def test_memory_that_the_timed_blocks_took_beyond_the_plan_is_added(monkeypatch):
    peaks = []
    for beyond in (0, 50_000_000, -(10**12)):
        said = short_run(monkeypatch, Timing(0.5, 0.5, 0.5, 5, beyond), max_steps=1)
        heap = re.search(r"heap.*?([\d,.]+)$", said, re.MULTILINE)
        peaks.append(0.0 if heap is None else float(heap[1].replace(",", "")))
    assert peaks[1] == pytest.approx(peaks[0] + 50)
    assert peaks[2] == 0, "never below nothing"


def test_batches_that_differ_in_size_take_more_of_the_heap(monkeypatch):
    """The largest of these is as large as all of those."""
    monkeypatch.setattr(forecast, "timed_step_apart", lambda *_: HALF_A_SECOND)
    alike = [Example([1] * 64, [1] * 64)] * 32
    found = []
    for rows in (LONG, alike):
        said = "\n".join(trained(True, rows=rows, config={"epochs": 1, "max_steps": None})[1])
        assert "the batch that needs most memory in this run's 16 steps is 2 × 64 tokens" in said
        names = ("activations", "heap")
        lines = [re.search(rf"{name}.*?([\d,.]+)$", said, re.MULTILINE) for name in names]
        found.append([float(line[1].replace(",", "")) for line in lines])
    (kept, mixed), (same, plain) = found
    assert kept == same and mixed - plain == pytest.approx(0.2 * kept, abs=0.2)


def test_a_time_that_cannot_be_measured_is_told(monkeypatch):
    said = short_run(monkeypatch, None, max_steps=1)
    assert "plan: no time, as real blocks could not be run in a process of their own" in said


def test_planned_seconds_are_those_of_the_very_steps(monkeypatch):
    """The loader reads ahead, so the place counts at which the run began."""
    monkeypatch.setattr(forecast, "timed_step_apart", lambda *_: HALF_A_SECOND)
    planned = []
    after = forecast.Forecast.after
    monkeypatch.setattr(
        forecast.Forecast, "after", lambda self: planned.extend(self.pairs) or after(self)
    )
    trained(True, rows=LONG, config={"max_steps": 9})
    met = [batch.tokens for [batch] in itertools.islice(
        coming_steps(Batches(LONG, batch_size=2), 1, 0), 9)]  # fmt: skip
    seconds = [one / met[0] * planned[0][1] for one in met]
    assert [one for _, one in planned] == pytest.approx(seconds)


def test_a_plan_that_is_far_off_is_noticed_early(monkeypatch):
    monkeypatch.setattr(forecast, "timed_step_apart", lambda *_: Timing(1e4, 1e4, 1e4, 5))
    rows = [Example([1] * 8, [1] * 8)] * 20
    _, said = trained(True, rows=rows, config={"max_steps": 6})
    notes = [line for line in said if line.startswith("note: steps 2 to 6 took")]
    assert len(notes) == 1
    assert re.search(r"times what was planned; at this pace an epoch takes \d\.\d min", notes[0])
    assert "disagree" not in "".join(said)


def test_timings_that_disagree_are_told(monkeypatch):
    said = short_run(monkeypatch, Timing(2.0, 1.0, 3.0, 15), max_steps=1)
    assert "plan: timings disagree by a factor of 3 (above 1.25) after 15 repeats" in said


def test_the_plan_of_a_model_at_hand_is_that_of_its_settings(monkeypatch):
    monkeypatch.setattr(forecast, "timed_step_apart", lambda *_: None)
    model = minilora.inject(minilora.quantize(Llama(CONFIG, dtype=torch.bfloat16), "nf4"), r=4)
    said = []
    batches = Batches([Example([1] * n, [1] * n) for n in (8, 32)], batch_size=2)
    found = forecast.Forecast(model, batches, None, 1, False, 1, None, said.append)
    settings = Settings("nf4", torch.bfloat16, 4, batch_size=2, length=32, learned=38 / 62)
    wanted = count_memory(read_shape(CONFIG), settings, process=found.memory.process)
    assert found.memory == wanted
    assert found.after()["planned_bytes"] == wanted.peak


def test_streams_and_other_models_cannot_be_planned():
    model = minilora.inject(Llama(CONFIG), r=4)
    config = minilora.TrainConfig(max_steps=1, batch_size=2, dtype="float32")
    stream = Stream(ROWS, lambda item: item)
    with pytest.raises(
        ValueError, match=r"--plan .in Python: plan=True. needs a list of examples, found a stream"
    ):
        minilora.fit(model, stream, config=config, quiet=True, plan=True)


def test_ranks_autocast_and_dropout_are_read_from_the_model():
    model = minilora.inject(Llama(CONFIG), r=4, dropout=0.1, rank_pattern={"q_proj": 2})
    settings = forecast.settings_of(model, torch.bfloat16)
    assert (settings["r"], settings["dropout"], settings["autocast"]) == (4, 0.1, True)
    assert "format" not in settings
    counted = Counted(model, torch.bfloat16)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    assert (counted.trained, counted.trained_bytes) == (sum(trained), 4 * sum(trained))
    wide = minilora.quantize(Llama(CONFIG), "nf4", block_size=128, double_quant=False)
    nf4 = minilora.inject(wide, r=4)
    settings = forecast.settings_of(nf4, None)
    named = settings["format"], settings["block_size"], settings["double_quant"]
    assert named == ("nf4", 128, False)
    assert not settings["autocast"]
