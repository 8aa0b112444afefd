"""`fit(plan=True)`: what is said before and after, of a run that is the same."""

import re

import pytest
import torch

import minilora
from minilora.data import Example
from minilora.models import Llama, LlamaConfig
from minilora.planning import foretold
from minilora.planning.memory import Settings, count_memory
from minilora.planning.shapes import read_shape
from minilora.streaming import Stream

CONFIG = LlamaConfig(97, 64, 128, 3, 4, 2, 16, 64)
ROWS = [Example(list(range(1, n)), list(range(1, n))) for n in (9, 17, 33, 17)]


class Lines:
    def __init__(self):
        self.said = []

    def on_log(self, line):
        self.said.append(line)


def trained(plan, format=None, **options):
    torch.manual_seed(0)
    model = Llama(CONFIG)
    if format:
        minilora.quantize(model, format)
    minilora.inject(model, r=4, alpha=6)
    lines, config = Lines(), minilora.TrainConfig(batch_size=2, dtype="float32", max_steps=3)
    minilora.fit(model, ROWS, config=config, quiet=True, callbacks=[lines], plan=plan, **options)
    return model, lines.said


@pytest.mark.parametrize("format", [None, "nf4"])
def test_planned_first_and_measured_after(monkeypatch, format):
    monkeypatch.setattr(foretold, "timed_step_apart", lambda *_: 0.5)
    plain, _ = trained(False, format)
    model, said = trained(True, format)
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other), "a plan changes nothing of the run"
    first = next(i for i, line in enumerate(said) if line.startswith("plan:"))
    last = next(i for i, line in enumerate(said) if line.startswith("measured:"))
    assert first < last
    text = "\n".join(said)
    assert re.search(r"plan:\s+peak\s+[\d,.]+", text)
    assert "0.5 s a step" in text
    assert re.search(r"measured: .* s a step over 3 steps, planned 0.5", text)


def test_the_plan_of_a_model_at_hand_is_that_of_its_settings(monkeypatch):
    monkeypatch.setattr(foretold, "timed_step_apart", lambda *_: None)
    model = minilora.inject(minilora.quantize(Llama(CONFIG, dtype=torch.bfloat16), "nf4"), r=4)
    said = []
    found = foretold.Foretold(model, [8, 32], None, 2, 1, False, 1, None, said.append)
    settings = Settings("nf4", torch.bfloat16, 4, batch_size=2, length=32)
    wanted = count_memory(read_shape(CONFIG), settings, process=found.memory.process)
    assert found.memory == wanted
    assert found.after(1.0, 2)["planned_bytes"] == wanted.peak


def test_streams_and_other_models_cannot_be_planned():
    model = minilora.inject(Llama(CONFIG), r=4)
    config = minilora.TrainConfig(max_steps=1, batch_size=2, dtype="float32")
    stream = Stream(ROWS, lambda item: item)
    with pytest.raises(ValueError, match="plan=True needs a list of examples, found a stream"):
        minilora.fit(model, stream, config=config, quiet=True, plan=True)


def test_ranks_autocast_and_dropout_are_read_from_the_model(monkeypatch):
    monkeypatch.setattr(foretold, "timed_step_apart", lambda *_: None)
    model = minilora.inject(Llama(CONFIG), r=4, dropout=0.1, rank_pattern={"q_proj": 2})
    linears, settings = foretold.Foretold.read_model(model, torch.bfloat16)
    assert {one.r for name, one in linears.items() if name.endswith("q_proj")} == {2}
    assert {one.r for name, one in linears.items() if name.endswith("v_proj")} == {4}
    assert linears["lm_head"].r == 0
    assert settings["autocast"]
    assert settings["dropout"] == 0.1
