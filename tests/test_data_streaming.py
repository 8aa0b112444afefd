"""Streams: order and place are repeated exactly, what is wrong is said by its place."""

import pytest
import torch
from training_models import Tiny, examples, factors, fit, same, tiny

import minilora
from minilora.data.streaming import Stream, StreamBatches

DATA = examples(60)


class Source:
    """Items that begin anew each time; counts how many were read."""

    def __init__(self, items=DATA):
        self.items, self.read = items, 0

    def __iter__(self):
        for item in self.items:
            self.read += 1
            yield item


def rows(batches):
    return [batch.input_ids.tolist() for batch in batches]


def loader(items=DATA, encode=None, window=13, **options):
    options = {"batch_size": 4, "seed": 3, **options}
    return StreamBatches(Stream(Source(items), encode, window=window), **options)


def tokens(batches):
    found = []
    for batch in batches:
        lengths = (
            [batch.input_ids.shape[1]] * len(batch)
            if batch.attention_mask is None
            else batch.attention_mask.sum(1).tolist()
        )
        found += [tuple(r[:n]) for r, n in zip(batch.input_ids.tolist(), lengths, strict=True)]
    return sorted(found)


def test_stream_yields_each_example_once_an_epoch_in_an_order_of_its_own():
    batches = loader()
    first, second = list(batches), list(batches)
    assert tokens(first) == tokens(second) == sorted(tuple(r["input_ids"]) for r in DATA)
    assert rows(first) != rows(second)
    assert rows(loader()) == rows(first) != rows(loader(seed=4))
    plain = loader(shuffle=False, group_by_length=False)
    assert rows(plain)[0][0][: len(DATA[0]["input_ids"])] == DATA[0]["input_ids"]


def test_stream_goes_on_at_every_place():
    batches, places, all_rows = loader(), [], []
    for _ in range(2):
        for batch in batches:
            all_rows.append(batch.input_ids.tolist())
            places.append(batches.state_dict())
    for done, place in enumerate(places, 1):
        again = loader()
        again.load_state_dict(place)
        rest = []
        while again.epoch < 2:
            rest += rows(again)
        assert rest == all_rows[done:]


def test_stream_passes_over_without_encoding():
    encoded = []

    def encode(item):
        encoded.append(item)
        return None if len(item["input_ids"]) < 5 else item

    batches = loader(encode=encode)
    iterator = iter(batches)
    for _ in range(9):
        next(iterator)
    place = batches.state_dict()
    whole = rows(iterator)
    assert place["read"] > 13
    encoded.clear()
    again = loader(encode=encode)
    again.load_state_dict(place)
    assert rows(again) == whole and len(encoded) == 60 - place["read"]


def test_stream_takes_several_examples_of_an_item():
    found = list(loader(encode=lambda item: [item, item] if len(item["input_ids"]) > 4 else []))
    long = [tuple(item["input_ids"]) for item in DATA if len(item["input_ids"]) > 4]
    assert 0 < len(long) < len(DATA) and tokens(found) == sorted(long * 2)


def test_stream_parts_are_the_rows_of_one_order():
    whole = list(loader())
    parts = [list(loader(part=(rank, 3))) for rank in range(3)]
    for i, batch in enumerate(whole):
        got = [None] * len(batch)
        for rank in range(3):
            for k, row in enumerate(parts[rank][i].input_ids.tolist()):
                got[rank + 3 * k] = row
        for a, b in zip(batch.input_ids.tolist(), got, strict=True):
            assert a[: len(b)] == b or b[: len(a)] == a


def packed_loader(items=DATA, **options):
    options = {"batch_size": 2, "seed": 3, **options}
    return StreamBatches(Stream(Source(items), window=13, pack=40), **options)


def documents(batches):
    """Every document of packed rows, by what says where it is."""
    found = []
    for batch in batches:
        of = batch.documents
        if of is None:  # a row of one document
            found += tokens([batch])
            continue
        for ids, row in zip(batch.input_ids, of, strict=True):
            found += [tuple(ids[row == one].tolist()) for one in range(int(row.max()) + 1)]
    return sorted(found)


def test_stream_packs_each_window_and_keeps_every_document():
    batches = packed_loader()
    first = list(batches)
    assert documents(first) == sorted(tuple(row["input_ids"]) for row in DATA)
    assert max(batch.input_ids.shape[1] for batch in first) <= 40
    assert len(first) < len(list(loader(batch_size=2))) / 2
    places, seen = [], []
    batches = packed_loader()
    for batch in batches:
        seen.append(batch.input_ids.tolist())
        places.append(batches.state_dict())
    for done, place in enumerate(places, 1):
        again = packed_loader()
        again.load_state_dict(place)
        assert rows(again) == seen[done:]
    with pytest.raises(ValueError, match="found pack = 40 where this stream has None"):
        loader(batch_size=2).load_state_dict(places[0])
    with pytest.raises(ValueError, match="pack must be at least 2 tokens, found 1"):
        Stream(DATA, pack=1)
    long = [*DATA[:15], {"input_ids": [1] * 41}]
    with pytest.raises(ValueError, match="items 13 to 15 of the stream: documents must fit a row"):
        list(packed_loader(long))


def test_fit_on_a_packed_stream_resumes_bit_equal_and_refuses_a_model_that_mixes_documents(
    tmp_path,
):
    options = {"max_steps": 20, "schedule": "constant", "batch_size": 2}
    stream = Stream(Source(), window=13, pack=30)
    whole, half, again = (tiny(dropout=0.2) for _ in range(3))
    fit(whole, stream, **options)
    fit(half, stream, out=tmp_path, **{**options, "max_steps": 9})
    fit(again, stream, out=tmp_path, resume=True, **options)
    assert same(factors(whole), factors(again))
    other = minilora.inject(Tiny(), r=2, alpha=3, exclude=["lm_head"])
    with pytest.raises(ValueError, match="Tiny does not, and a packed row of items 0 to 12 of the"):
        fit(other, stream, max_steps=1)


def test_stream_names_a_bad_item_and_another_stream():
    bad = [*DATA[:20], {"input_ids": []}]
    with pytest.raises(ValueError, match="item 20 of the stream: example 0: input_ids must not be"):
        list(loader(bad))
    batches = loader()
    iterator = iter(batches)
    for _ in range(6):
        next(iterator)
    place = batches.state_dict()
    other = loader([*DATA[:20], *examples(40, seed=5)])
    other.load_state_dict(place)
    with pytest.raises(ValueError, match="read the same stream, but the items from 13 on are oth"):
        list(other)
    short = loader(DATA[:5])
    short.load_state_dict(place)
    with pytest.raises(ValueError, match="it ended after 5 items, where 13 were read"):
        list(short)
    with pytest.raises(ValueError, match="window = 13 where this stream has 9"):
        loader(window=9).load_state_dict(place)
    with pytest.raises(ValueError, match="must hold an epoch, the items read and an index"):
        loader().load_state_dict({**place, "read": -1})


def test_stream_refuses_what_is_used_up_or_empty():
    with pytest.raises(TypeError, match="found generator, which is used up after one pass"):
        Stream(item for item in DATA)
    with pytest.raises(TypeError, match="source must be something to iterate, found function"):
        Stream(lambda: iter(DATA))
    with pytest.raises(ValueError, match="window must be at least 1"):
        Stream(DATA, window=0)
    with pytest.raises(ValueError, match="must yield at least one example"):
        list(loader([]))
    with pytest.raises(ValueError, match="must yield at least one example"):
        list(loader(encode=lambda item: None))
    with pytest.raises(ValueError, match="must yield at least one example"):
        loader([]).any_batch()


def test_fit_on_a_stream_resumes_bit_equal_over_epochs(tmp_path):
    options = {"max_steps": 40, "accumulate": 2, "schedule": "constant", "warmup": 0.0}
    stream = Stream(Source(), window=13)
    whole, half, again = (tiny(dropout=0.2) for _ in range(3))
    expected = fit(whole, stream, **options)
    assert expected.steps == 40 and 0 <= expected.data_wait < 1
    fit(half, stream, out=tmp_path, **{**options, "max_steps": 17})
    fit(again, stream, out=tmp_path, resume=True, **options)
    assert same(factors(whole), factors(again))


def test_fit_on_a_stream_says_which_held_out_examples_are_trained_on(capsys):
    valid, options = [{"input_ids": [9, 2, 3]}, DATA[2]], {"max_steps": 2, "quiet": False}
    with pytest.warns(
        UserWarning, match=r"are trained on too, the first is item 2 of the str"
    ) as a:
        fit(tiny(), Stream(Source(DATA[:5]), window=5), valid=valid, **options)
    assert len(a) == 1
    said = capsys.readouterr().err
    assert "note: 1 of 2 held-out examples are trained on too (first: example 1 of valid)" in said
    fit(tiny(), Stream(Source(DATA[:5]), window=5), valid=valid[:1], **options)
    assert "trained on too" not in capsys.readouterr().err


def test_fit_on_a_stream_refuses_what_it_can_not_do():
    with pytest.raises(ValueError, match="no known length, so a run on it needs --max-steps"):
        fit(tiny(), Stream(Source()))
    with pytest.raises(ValueError, match="so epochs can't be counted, found epochs=2"):
        fit(tiny(), Stream(Source()), epochs=2)
    with pytest.raises(TypeError, match="valid must be a list of examples, found a Stream"):
        fit(tiny(), DATA, valid=Stream(Source()))
    bad = Stream(Source([*DATA[:3], {"input_ids": [1, 99]}]))
    with pytest.raises(ValueError, match=r"in \[0, 61\), but item 3 of the stream holds 99"):
        fit(tiny(), bad, max_steps=2)
    assert torch.is_grad_enabled()
