"""What a run shows: the curve's smoothed line, and the time that is left."""

import io
import re
import sys
import time

import pytest
import torch

from minilora.running import CompileClock, Evaluation
from minilora.running.compiling import compile_problem, private_cache
from minilora.training import Callbacks, monitor
from minilora.training.monitor import Monitor, smoothed


def test_the_smoothed_line_begins_among_the_points():
    """A falling loss: an average that starts at the first value would lie above all others."""
    values = [8.0 * 0.9**step for step in range(60)]
    line = smoothed(values)
    assert line[0] == pytest.approx(values[0])
    assert line[1] == pytest.approx((0.9 * values[0] + values[1]) / 1.9)
    for step in (5, 20, 40):
        weights = [0.9 ** (step - i) for i in range(step + 1)]
        mean = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert line[step] == pytest.approx(mean)
    assert smoothed([2.5] * 9) == pytest.approx([2.5] * 9)
    assert smoothed([]) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("total", "count"), [(4, "1/4"), (None, "1 steps")])
def test_the_bar_shows_the_runs_own_time_left(monkeypatch, total, count):
    """tqdm's estimate takes an evaluation between two steps for part of a step."""
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    shown = Monitor(total, 0, None, 10)
    shown.bar.mininterval = 0  # each step is shown
    row = {"step": 1, "loss": 1.5, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 10.0}
    shown.step(row, 90.0)
    shown.evaluation(1, Evaluation(1.25, 3.5, 8))
    shown.close()
    said = sys.stderr.getvalue()
    assert "1.5 min left" in said and f"{count} [" in said and "held-out loss 1.2500" in said
    assert "<" not in said and "it/s" not in said and "s/it" not in said


ROW = {"step": 1, "loss": 1.5, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 10.0}


def test_plain_lines_show_the_time_left(capsys):
    shown = Monitor(4, 0, None, 10)
    shown.step(ROW, 90.0)
    shown.close()
    assert "learned tokens/s  1.5 min left" in capsys.readouterr().err


@pytest.fixture
def quick(monkeypatch):
    """Silence that is broken after a twentieth of a second."""
    silence = sys.modules["minilora.files.silence"]
    for module, name, value in (
        (monitor, "SILENCE", 0.05), (silence, "SILENCE", 0.05), (silence, "_REFRESH", 0.01),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)


def said_soon(capsys, pattern):
    said, stop = "", time.monotonic() + 20
    while not re.search(pattern, said) and time.monotonic() < stop:
        time.sleep(0.01)
        said += capsys.readouterr().err
    assert re.search(pattern, said), said
    return said


def test_a_long_step_says_that_it_is_under_way(capsys, quick):
    """The user's own code does not hear of it: it would be called by another thread."""
    heard = []

    class Heard:
        def on_log(self, line):
            heard.append(line)

    clock = CompileClock()
    shown = Monitor(None, 0, None, 10, callbacks=Callbacks([Heard()]), clock=clock)
    shown.begin("step 3")
    said_soon(capsys, r"^step 3: \d+ s so far$|\nstep 3: \d+ s so far\n")
    clock._start()
    said_soon(capsys, r"step 3: \d+ s so far, compiling\n")
    shown.close()
    time.sleep(0.1)
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == "" and heard == []


def test_a_step_that_takes_no_longer_than_the_last_one_is_not_under_way(capsys, monkeypatch):
    shown = Monitor(None, 0, None, 1000)
    shown.close()
    now = 0.0
    monkeypatch.setattr(monitor, "seconds", lambda: now)
    shown.since = shown.said = 0.0
    now = 8.0
    shown.step(ROW, None)
    shown.begin("step 2")
    capsys.readouterr()
    for now in (14.0, 23.0, 24.5):
        shown._look()
        assert bool(capsys.readouterr().err) == (now == 24.5), now


def test_steps_that_would_be_silent_too_long_have_a_line(capsys, monkeypatch):
    shown = Monitor(None, 0, None, 1000)
    monkeypatch.setattr(shown, "_look", lambda: None)
    shown.said, said = 0.0, []
    for step, now in ((2, 2.0), (3, 4.0), (4, 6.0), (5, 8.0)):
        shown.since = now - 2.0
        monkeypatch.setattr(monitor, "seconds", lambda now=now: now)
        shown.step(ROW | {"step": step}, None)
        said.append(capsys.readouterr().err.count("\n"))
    assert said == [0, 1, 0, 1]  # at 4 s, as the next would come at 6
    shown.close()


def test_an_evaluation_shows_its_speed_and_the_time_left(capsys, quick):
    shown = Monitor(None, 0, None, 10)
    with shown.evaluating(1000) as tick:
        tick(250)
        said_soon(capsys, r"evaluating: 250 of 1,000 tokens, [\d,]+ a second, \d+ s left\n")
    shown.close()


def test_a_quiet_run_shows_nothing(capsys, quick):
    shown = Monitor(None, 0, None, 10, quiet=True)
    with shown.evaluating(1000):
        time.sleep(0.1)
    shown.close()
    assert capsys.readouterr().err == ""


def test_the_time_that_torch_compiles_is_measured():
    """Over 5 s: two functions are compiled."""
    if compile_problem():
        pytest.skip(compile_problem())
    with private_cache(), CompileClock() as clock:
        begin = time.perf_counter()
        x = torch.ones(3, requires_grad=True)
        torch.compile(lambda x: (x.sin() * 2).sum())(x).backward()
        took = time.perf_counter() - begin
        first = clock.seconds
        assert 0 < first <= took and clock.began is None
    torch.compile(lambda x: x.cos() * 3)(torch.ones(3))
    assert clock.seconds == first  # outside of the block nothing is counted
