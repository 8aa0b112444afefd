"""How far a piece of work is: nothing is silent for long."""

import io
import re
import sys
import time

import pytest

from minilora.files import every_so_often, ticking


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def quick(monkeypatch):
    module = sys.modules["minilora.files.silence"]
    monkeypatch.setattr(module, "SILENCE", 0.05)
    monkeypatch.setattr(module, "_REFRESH", 0.01)


def wait_for(said, count):
    stop = time.monotonic() + 20
    while len(said) < count and time.monotonic() < stop:
        time.sleep(0.01)


def test_lines_say_how_far_it_is_at_which_speed_and_what_is_left(quick):
    said = []
    with ticking("counting", 1000, "beans", say=said.append) as tick:
        wait_for(said, 1)
        tick(250)
        wait_for(said, 3)
    assert re.fullmatch(r"counting: \d+ s so far", said[0])
    assert re.fullmatch(
        r"counting: 250 of 1,000 beans, [\d,]+ a second, \d+ s left", said[-1]
    ), said  # fmt: skip
    count = len(said)
    time.sleep(0.1)
    assert len(said) == count  # it ended with the block


def test_work_of_unknown_size_shows_its_time_and_short_work_nothing(quick, capsys):
    said = []
    with ticking("loading", say=said.append):
        wait_for(said, 2)
    assert all(re.fullmatch(r"loading: \d+ s so far", line) for line in said)
    with ticking("loading", shown=False) as tick:
        time.sleep(0.1)
        tick(3)
    assert capsys.readouterr().err == ""


def test_short_work_says_nothing(capsys):
    with ticking("loading"):
        pass
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar_that_is_taken_away(quick, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with ticking("counting", 4, "beans") as tick:
        tick(1)
        stop = time.monotonic() + 20
        while "1 of 4 beans" not in sys.stderr.getvalue() and time.monotonic() < stop:
            time.sleep(0.01)
    said = sys.stderr.getvalue()
    assert "counting: 1 of 4 beans" in said and said.endswith("\r")
    assert "\n" not in said


def test_the_clock_stops_where_the_work_fails(quick):
    calls = []
    with pytest.raises(ValueError, match="no beans"), every_so_often(lambda: calls.append(1)):
        wait_for(calls, 1)
        raise ValueError("no beans")
    count = len(calls)
    time.sleep(0.05)
    assert len(calls) == count > 0
