"""What a run shows: the curve's smoothed line, and the time that is left."""

import io
import sys

import pytest

from minilora.running import Evaluation
from minilora.training import monitor
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


def test_plain_lines_show_the_time_left(capsys, monkeypatch):
    monkeypatch.setattr(monitor.importlib.util, "find_spec", lambda name: None)
    row = {"step": 1, "loss": 1.5, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 10.0}
    Monitor(4, 0, None, 10).step(row, 90.0)
    assert "learned tokens/s  1.5 min left" in capsys.readouterr().err
