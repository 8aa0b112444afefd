"""Batches ahead of time: the loader's own order and place, bounded, errors where they belong."""

import threading
import time

import pytest
import torch
from training_models import examples, fit, tiny

from minilora.data.batches import Batches
from minilora.training import feed
from minilora.training.feed import DEPTH, Feed

CPU = torch.device("cpu")


def test_feed_gives_the_loaders_batches_and_places():
    plain, ahead = (Batches(examples(30), batch_size=4, seed=1) for _ in range(2))
    fed = Feed(ahead, CPU)
    for _ in range(2):
        expected = []
        for batch in plain:
            expected.append((batch.input_ids.tolist(), plain.state_dict()))
        assert [(b.input_ids.tolist(), place) for b, place in fed.epoch()] == expected


class Slow:
    def __init__(self, count=50):
        self.made, self.count = 0, count

    def __iter__(self):
        for _ in range(self.count):
            self.made += 1
            yield next(iter(Batches(examples(2), batch_size=2)))

    def state_dict(self):
        return {"made": self.made}


def feeding():
    return [thread for thread in threading.enumerate() if thread.name == "minilora-feed"]


def test_feed_is_bounded_and_its_thread_ends_with_the_epoch():
    slow = Slow()
    epoch = Feed(slow, CPU).epoch()
    _, place = next(epoch)
    assert place == {"made": 1}
    deadline = time.monotonic() + 10
    while slow.made < 2 + DEPTH and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    assert slow.made == 2 + DEPTH  # one in hand, DEPTH waiting, one that found no room
    assert feeding()
    epoch.close()
    assert not feeding()


def test_feed_raises_the_loaders_error_where_the_batches_are_used():
    class Bad(Slow):
        def __iter__(self):
            yield from super().__iter__()
            raise KeyError("bad item")

    seen = []
    with pytest.raises(KeyError, match="bad item"):
        for batch, _ in Feed(Bad(3), CPU).epoch():
            seen.append(batch)
    assert len(seen) == 3


def test_feed_leaves_a_worker_behind_that_its_source_holds_up(monkeypatch):
    """A source that never answers must not hold up the end of a run (a second Ctrl-C)."""
    monkeypatch.setattr(feed, "_LEAVE", 0.1)
    answer = threading.Event()

    class Hangs(Slow):
        def __iter__(self):
            yield from super().__iter__()
            answer.wait()

    epoch = Feed(Hangs(2), CPU).epoch()
    next(epoch)
    next(epoch)
    epoch.close()
    assert feeding()
    answer.set()
    deadline = time.monotonic() + 10
    while feeding() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not feeding()


def test_feed_measures_the_wait():
    class Late(Slow):
        def __iter__(self):
            time.sleep(0.2)
            yield from super().__iter__()

    fed = Feed(Late(3), CPU)
    assert len(list(fed.epoch())) == 3
    assert fed.waited > 0.15


def test_fit_logs_the_share_of_time_spent_waiting_for_data(tmp_path, capsys):
    import json

    result = fit(tiny(), max_steps=3, out=tmp_path, quiet=False)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(0 <= row["data_wait"] <= 1 for row in rows)
    assert 0 <= result.data_wait <= 1
    assert "% of the training time went into waiting for data" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_fit_leaves_no_thread_behind_when_it_fails(error):
    def loss(model, batch):
        raise error

    with pytest.raises(error):
        fit(tiny(), loss=loss, batch_size=2)
    assert not feeding()
