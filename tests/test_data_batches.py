"""Batches: every example once, an order of seed and epoch alone, exact resumption, padding."""

import itertools
import json
import random
import struct
import types
import warnings
from hashlib import sha256

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minilora.data import IGNORE, Batch, Batches, Example, as_examples, learned_labels, pad

BATCHES_PER_POOL = 50  # as the docstring of Batches states

sizes = st.lists(st.integers(2, 9), min_size=1, max_size=140)
options = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 7),
        "shuffle": st.booleans(),
        "group_by_length": st.booleans(),
        "drop_last": st.booleans(),
        "seed": st.integers(0, 2**70),
    }
)


def rows(lengths):
    """Examples told apart by their first token."""
    return [{"input_ids": [i] + [7] * (n - 1)} for i, n in enumerate(lengths)]


def loader(lengths, **chosen):
    """A loader, where the options leave it a batch."""
    assume(len(lengths) >= chosen["batch_size"] or not chosen["drop_last"])
    return Batches(rows(lengths), **chosen)


def plain(batch):
    """A batch as lists, so that batches can be compared."""
    mask = batch.attention_mask
    return batch.input_ids.tolist(), batch.labels.tolist(), mask if mask is None else mask.tolist()


def epoch_of(batches):
    return [plain(batch) for batch in batches]


def indices(batches):
    """What an epoch holds, by the first tokens of its rows."""
    return [[row[0] for row in ids] for ids, _, _ in batches]


# --- examples -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "item",
    [
        Example([1, 2, 3], [-100, 2, 3]),
        {"input_ids": [1, 2, 3], "labels": (-100, 2, 3)},
        {"input_ids": torch.tensor([1, 2, 3]), "labels": np.array([-100, 2, 3])},
        {"input_ids": (1, 2, 3), "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]},
        types.SimpleNamespace(input_ids=[1, 2, 3], labels=[-100, 2, 3]),
    ],
)
def test_as_examples_takes_each_shape(item):
    (example,) = as_examples(iter([item]))
    assert example == Example((1, 2, 3), (-100, 2, 3))


def test_as_examples_learns_the_ids_without_labels():
    found = as_examples([{"input_ids": [4, 5]}, {"input_ids": [6, 7], "labels": None}])
    assert found == [Example((4, 5), (4, 5)), Example((6, 7), (6, 7))]


@pytest.mark.parametrize("data", ["text", b"text", {"input_ids": [1, 2]}])
def test_as_examples_refuses_what_is_no_sequence_of_examples(data):
    kind = type(data).__name__
    with pytest.raises(TypeError, match=f"data must be a sequence of examples, found {kind}"):
        as_examples(data)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ([1, 2], "example 1 must have input_ids, found list without them"),
        ({"labels": [1, 2]}, "example 1 must have input_ids, found dict without them"),
        ({"input_ids": "ab"}, "example 1: input_ids must be a list or a 1-D tensor, found str"),
        ({"input_ids": torch.tensor(3)}, "input_ids must be a list or a 1-D tensor, found int"),
        ({"input_ids": [1, 2.0]}, r"input_ids must hold integers in one dimension, found 2\.0"),
        ({"input_ids": [1, True]}, "must hold integers in one dimension, found True"),
        ({"input_ids": torch.ones(1, 2).long()}, r"integers in one dimension, found \[1, 1\]"),
        ({"input_ids": [1, 2], "labels": [1, None]}, "example 1: labels must hold integers"),
        ({"input_ids": [1, 2], "attention_mask": "11"}, "attention_mask must be a list or a 1-D"),
    ],
)
def test_as_examples_refuses_other_types_by_index(item, message):
    with pytest.raises(TypeError, match=message):
        as_examples([{"input_ids": [1, 2]}, item])


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"input_ids": []}, "example 1: input_ids must not be empty"),
        (
            {"input_ids": [1, 2], "labels": [1, 2, 3]},
            "example 1: 2 input_ids must have as many labels, not 3",
        ),
        ({"input_ids": [1, -2]}, "example 1: input_ids must not be negative, found -2"),
        ({"input_ids": [1, 10**30]}, "example 1: input_ids must be below 2³¹, found 1000"),
        ({"input_ids": [1, 2], "labels": [1, -(10**30)]}, "example 1: labels must be below 2³¹"),
        (
            {"input_ids": [1, 2], "labels": [1, -1]},
            "example 1: labels must be token ids or -100, found -1",
        ),
        (
            {"input_ids": [1, 2], "labels": [1, -100]},
            "example 1: nothing to learn, every label after the first is -100",
        ),
        ({"input_ids": [1]}, "example 1: nothing to learn"),
        (
            {"input_ids": [1, 2], "attention_mask": [0, 1]},
            "example 1 must be unpadded, found zeros in its attention_mask",
        ),
    ],
)
def test_as_examples_refuses_bad_values_by_index(item, message):
    with pytest.raises(ValueError, match=message):
        as_examples([{"input_ids": [1, 2]}, item])


def test_as_examples_refuses_nothing():
    with pytest.raises(ValueError, match="data must hold at least one example, found none"):
        as_examples([])


@given(st.lists(st.sampled_from([-100, 0, 5]), min_size=1, max_size=8))
def test_learned_labels_counts_all_but_the_first(labels):
    assert learned_labels(labels) == len([x for x in labels[1:] if x >= 0])


# --- padding ------------------------------------------------------------------------------------

ragged = st.lists(
    st.lists(st.tuples(st.integers(0, 99), st.integers(-1, 99)), min_size=1, max_size=6),
    min_size=1,
    max_size=5,
)


@given(ragged, st.integers(0, 99))
def test_pad_fills_on_the_right(pairs, pad_id):
    ids = [[token for token, _ in row] for row in pairs]
    labels = [[-100 if label < 0 else label for _, label in row] for row in pairs]
    batch = pad([Example(*both) for both in zip(ids, labels, strict=True)], pad_id)
    width = max(map(len, ids))
    gaps = [width - len(row) for row in ids]
    assert batch.input_ids.tolist() == [
        row + [pad_id] * gap for row, gap in zip(ids, gaps, strict=True)
    ]
    assert batch.labels.tolist() == [
        row + [-100] * gap for row, gap in zip(labels, gaps, strict=True)
    ]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    if any(gaps):
        assert batch.attention_mask.dtype == torch.bool
        assert batch.attention_mask.tolist() == [
            [True] * (width - gap) + [False] * gap for gap in gaps
        ]
    else:
        assert batch.attention_mask is None
    assert batch.tokens == sum(label != -100 for row in labels for label in row[1:])


@pytest.mark.parametrize("labels", [None, [1, 2, 3, 4, 5]])
def test_as_examples_learns_no_document_from_the_one_before_it(labels):
    """A packed row given as a mapping, with labels of its own or without."""
    row = {"input_ids": [1, 2, 3, 4, 5], "lengths": [2, 1, 2], "labels": labels}
    (found,) = as_examples([row])
    assert list(found.labels) == [1, 2, IGNORE, IGNORE, 5]
    assert as_examples([found]) == [found]
    with pytest.raises(ValueError, match="example 0: nothing to learn"):
        as_examples([{"input_ids": [1, 2, 3], "lengths": [1, 1, 1]}])


@pytest.mark.parametrize("lengths", [[3, 3], [3, 2]])
def test_batch_to_moves_every_tensor(lengths):
    batch = pad(as_examples(rows(lengths)))
    moved = batch.to("meta")
    assert isinstance(moved, Batch)
    assert {moved.input_ids.device.type, moved.labels.device.type} == {"meta"}
    if batch.attention_mask is None:
        assert moved.attention_mask is None
    else:
        assert moved.attention_mask.device.type == "meta"


# --- what an epoch holds ------------------------------------------------------------------------


@settings(max_examples=60)
@given(sizes, options)
def test_batches_hold_each_example_once_an_epoch(lengths, chosen):
    batches, size = loader(lengths, **chosen), chosen["batch_size"]
    for epoch in range(2):
        assert batches.epoch == epoch
        found = epoch_of(batches)
        held = [i for batch in indices(found) for i in batch]
        assert len(found) == len(batches)
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(len(lengths)))
        counts = sorted(len(ids) for ids, _, _ in found)
        if chosen["drop_last"]:
            assert counts == [size] * (len(lengths) // size)
        else:
            assert len(held) == len(lengths)
            assert counts[1:] == [size] * (len(found) - 1)
        for ids, labels, mask in found:
            for row, own in zip(ids, labels, strict=True):
                n = lengths[row[0]]
                assert row == [row[0]] + [7] * (n - 1) + [0] * (len(row) - n)
                assert own == [row[0]] + [7] * (n - 1) + [-100] * (len(row) - n)
            ns = [lengths[row[0]] for row in ids]
            assert (mask is None) == (len(set(ns)) == 1)
            assert max(ns) == len(ids[0])


@given(sizes, st.integers(1, 7))
def test_batches_without_shuffle_keep_the_order(lengths, size):
    batches = Batches(rows(lengths), batch_size=size, shuffle=False, group_by_length=False)
    for _ in range(2):
        held = [i for batch in indices(epoch_of(batches)) for i in batch]
        assert held == list(range(len(lengths)))


@given(st.lists(st.integers(2, 9), min_size=99, max_size=230), st.integers(1, 3))
def test_batches_grouped_without_shuffle_sort_each_pool(lengths, size):
    batches = Batches(rows(lengths), batch_size=size, shuffle=False, group_by_length=True)
    pool = size * BATCHES_PER_POOL
    wanted = []
    for start in range(0, len(lengths), pool):
        pairs = [(lengths[i], i) for i in range(start, min(start + pool, len(lengths)))]
        wanted += [i for _, i in sorted(pairs)]
    held = [i for batch in batches.order(0) for i in batch]
    assert held == wanted


@given(st.lists(st.integers(2, 9), min_size=2, max_size=100), st.integers(2, 7), st.integers())
def test_batches_grouped_put_similar_lengths_together(lengths, size, seed):
    """Within one pool no two batches' ranges of lengths overlap by more than their ends."""
    assert len(lengths) <= size * BATCHES_PER_POOL
    batches = Batches(rows(lengths), batch_size=size, seed=seed)
    ranges = sorted(
        (min(lengths[i] for i in batch), max(lengths[i] for i in batch))
        for batch in batches.order(0)
    )
    for (_, high), (low, _) in itertools.pairwise(ranges):
        assert high <= low


def test_batches_grouped_are_shuffled_too():
    """Short batches must not always come first, nor the same rows always meet."""
    lengths = [2 + i % 40 for i in range(120)]
    batches = Batches(rows(lengths), batch_size=4)
    orders = [batches.order(epoch) for epoch in range(2)]
    for order in orders:
        longest = [max(lengths[i] for i in batch) for batch in order]
        assert longest != sorted(longest)
    together = [{frozenset(batch) for batch in order} for order in orders]
    assert together[0] != together[1]


@settings(max_examples=40)
@given(sizes, options)
def test_padding_share_equals_the_counted_share(lengths, chosen):
    batches = loader(lengths, **chosen)
    share = batches.padding_share()
    masks = [(ids, labels) for ids, labels, _ in epoch_of(batches)]
    positions = sum(len(row) for ids, _ in masks for row in ids)
    padded = sum(label == -100 for _, labels in masks for row in labels for label in row)
    assert share == pytest.approx(padded / positions, abs=1e-15)


def test_padding_share_is_less_with_grouping():
    lengths = [2 + (i * 37) % 90 for i in range(90)]
    grouped, mixed = (
        Batches(rows(lengths), batch_size=6, group_by_length=flag).padding_share()
        for flag in (True, False)
    )
    assert 0 < grouped < 0.1 < mixed


def test_batches_pad_with_the_given_id():
    (batch,) = Batches(rows([2, 3]), batch_size=2, pad_id=9, shuffle=False)
    assert batch.input_ids.tolist() == [[0, 7, 9], [1, 7, 7]]


def test_batches_by_default_are_shuffled_and_grouped_by_seed_0():
    lengths = [2 + i % 5 for i in range(20)]
    chosen = {"seed": 0, "shuffle": True, "group_by_length": True, "drop_last": False, "pad_id": 0}
    default = epoch_of(Batches(rows(lengths), batch_size=3))
    assert default == epoch_of(Batches(rows(lengths), batch_size=3, **chosen))
    assert plain(pad(as_examples(rows([2, 3])))) == plain(pad(as_examples(rows([2, 3])), 0))


@pytest.mark.parametrize("size", [0, -3])
def test_batches_refuse_a_bad_batch_size(size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, found {size}"):
        Batches(rows([2]), batch_size=size)


def test_batches_refuse_to_drop_everything():
    Batches(rows([2, 2]), batch_size=2, drop_last=True)
    message = "drop_last needs examples to fill one batch, found 2 for batches of 3"
    with pytest.raises(ValueError, match=message):
        Batches(rows([2, 2]), batch_size=3, drop_last=True)


def test_batches_check_their_examples():
    with pytest.raises(ValueError, match="example 0: nothing to learn"):
        Batches([{"input_ids": [3]}], batch_size=1)


# --- the order ----------------------------------------------------------------------------------


@settings(max_examples=40)
@given(sizes, options, st.integers(0, 3))
def test_batches_order_depends_on_seed_and_epoch_alone(lengths, chosen, epoch):
    """Not on what was iterated before, nor on the global random states."""
    one, other = loader(lengths, **chosen), loader(lengths, **chosen)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    for _ in range(epoch):
        assert sum(1 for _ in one) == len(one)
    first = epoch_of(one)
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    next(iter(other))
    other.set_epoch(epoch)
    assert epoch_of(other) == first


def test_batches_order_is_the_one_of_earlier_versions():
    """A run stopped under one version resumes under the next: this order may not change."""
    mixed = Batches(rows([2] * 8), batch_size=3, seed=5, group_by_length=False)
    assert mixed.order(2) == [[6, 7, 2], [5, 0, 1], [4, 3]]
    grouped = Batches(rows([2 + i % 4 for i in range(8)]), batch_size=3, seed=5)
    assert grouped.order(2) == [[7, 3], [1, 6, 2], [0, 4, 5]]


@pytest.mark.parametrize("group", [False, True])
def test_batches_order_changes_with_seed_and_epoch(group):
    makers = [
        Batches(rows([2 + i % 5 for i in range(30)]), batch_size=4, seed=s, group_by_length=group)
        for s in (0, 1)
    ]
    orders = [str(maker.order(epoch)) for maker in makers for epoch in range(3)]
    assert len(set(orders)) == 6


@pytest.mark.parametrize("group", [False, True])
def test_batches_leave_global_random_state_alone(group):
    batches = Batches(rows([2, 5, 3, 4, 9]), batch_size=2, group_by_length=group)
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    for _ in range(2):
        assert len(epoch_of(batches)) == 3
    batches.load_state_dict(batches.state_dict())
    assert random.getstate() == before[0]
    assert str(np.random.get_state()) == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_batches_break_and_iterate_again_starts_over():
    batches = Batches(rows([2, 3, 4, 5, 6]), batch_size=2)
    wanted = epoch_of(Batches(rows([2, 3, 4, 5, 6]), batch_size=2))
    next(iter(batches))
    assert epoch_of(batches) == wanted


def test_set_epoch_keeps_the_place_in_the_current_epoch():
    whole = Batches(rows([2, 3, 4, 5, 6]), batch_size=2)
    wanted = epoch_of(whole)
    iterator = iter(batches := Batches(rows([2, 3, 4, 5, 6]), batch_size=2))
    next(iterator)
    resumed = Batches(rows([2, 3, 4, 5, 6]), batch_size=2)
    resumed.load_state_dict(batches.state_dict())
    resumed.set_epoch(0)
    assert epoch_of(resumed) == wanted[1:]
    resumed.load_state_dict(batches.state_dict())
    resumed.set_epoch(1)
    assert resumed.state_dict()["index"] == 0
    assert epoch_of(resumed) == epoch_of(whole)


# --- resuming -----------------------------------------------------------------------------------


@settings(max_examples=60)
@given(sizes, options, st.integers(0, 2), st.data())
def test_load_state_dict_gives_exactly_the_rest(lengths, chosen, epoch, data):
    """Through JSON, in the middle of any epoch; the following epochs are the same too."""
    batches = loader(lengths, **chosen)
    stop = data.draw(st.integers(0, len(batches)), label="stop")
    wanted = []
    for number in range(epoch + 3):
        if (number, stop) == (epoch, 0):
            state = json.loads(json.dumps(batches.state_dict()))
        for done, batch in enumerate(batches, 1):
            wanted.append((number, done, plain(batch)))
            if (number, done) == (epoch, stop):
                state = json.loads(json.dumps(batches.state_dict()))
    resumed = loader(lengths, **chosen)
    next(iter(resumed))  # wherever it stood
    resumed.load_state_dict(state)
    assert resumed.epoch == epoch
    found = []
    for number in range(epoch, epoch + 3):
        begin = stop if number == epoch else 0
        found += [(number, i, plain(batch)) for i, batch in enumerate(resumed, begin + 1)]
    assert found == [each for each in wanted if each[:2] > (epoch, stop)]
    assert found


def test_state_dict_counts_the_batch_in_hand_as_done():
    batches = Batches(rows([2] * 5), batch_size=2)
    assert (batches.state_dict()["epoch"], batches.state_dict()["index"]) == (0, 0)
    seen = [(batches.state_dict()["epoch"], batches.state_dict()["index"]) for _ in batches]
    assert seen == [(0, 1), (0, 2), (0, 3)]
    assert (batches.state_dict()["epoch"], batches.state_dict()["index"]) == (1, 0)


@settings(max_examples=30)
@given(st.lists(st.integers(2, 9), min_size=14, max_size=60), options, st.data())
def test_load_state_dict_of_a_resumed_run_counts_from_the_epochs_start(lengths, chosen, data):
    whole = epoch_of(loader(lengths, **chosen))
    first = data.draw(st.integers(0, len(whole) - 1), label="first stop")
    more = data.draw(st.integers(1, len(whole) - first), label="batches until the second")
    place = {**loader(lengths, **chosen).state_dict(), "index": first}
    again = loader(lengths, **chosen)
    again.load_state_dict(place)
    for _, _ in zip(range(more), again, strict=False):
        place = again.state_dict()
    assert place["index"] == first + more
    last = loader(lengths, **chosen)
    last.load_state_dict(place)
    assert epoch_of(last) == whole[first + more :]


BASE = {"batch_size": 2, "seed": 3}


@pytest.mark.parametrize(
    ("lengths", "changes", "key"),
    [
        ([4, 3, 2], {"batch_size": 1}, "batch_size = 1 where this loader has 2"),
        ([4, 3, 2], {"shuffle": False}, "shuffle = False where this loader has True"),
        ([4, 3, 2], {"group_by_length": False}, "group_by_length = False where this"),
        ([4, 3, 2], {"seed": 4}, "seed = 4 where this loader has 3"),
        ([4, 3, 2], {"drop_last": True}, "drop_last = True where this loader has False"),
        ([4, 3], {}, "examples = 2 where this loader has 3"),
        ([4, 2, 3], {}, "digest = '[0-9a-f]{16}' where this loader has '[0-9a-f]{16}'"),
    ],
)
def test_load_state_dict_refuses_other_data_and_options(lengths, changes, key):
    other = Batches(rows(lengths), **{**BASE, **changes})
    batches = Batches(rows([4, 3, 2]), **BASE)
    wanted = epoch_of(Batches(rows([4, 3, 2]), **BASE))
    next(iter(batches))
    mine = batches.state_dict()
    state = json.loads(json.dumps(other.state_dict()))
    message = f"the state must come from the same data and options, found {key}"
    with pytest.raises(ValueError, match=message):
        batches.load_state_dict({**state, "epoch": 5, "index": 1})
    assert batches.state_dict() == mine
    assert epoch_of(batches) == wanted


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": None},
        {"epoch": "1"},
        {"index": None},
        {"index": 1.0},
        {"index": -1},
        {"index": 3},
    ],
)
def test_load_state_dict_refuses_a_place_that_is_none(changes):
    batches = Batches(rows([4, 3, 2]), **BASE)
    mine = batches.state_dict()
    wanted = {**mine, **changes}
    message = (
        "the state must hold an epoch and an index of 0 to 2, found "
        f"epoch = {wanted['epoch']!r}, index = {wanted['index']!r}"
    )
    with pytest.raises(ValueError, match=message):
        batches.load_state_dict(wanted)
    assert batches.state_dict() == mine


def test_load_state_dict_refuses_an_empty_state():
    with pytest.raises(ValueError, match="found examples = None where this loader has 1"):
        Batches(rows([4]), **BASE).load_state_dict({})


# --- the digest ---------------------------------------------------------------------------------


def test_digest_is_of_the_values_alone():
    """Not of the containers, the padding or the order of reading."""
    lists = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5], "labels": [-100, 5]}]
    tensors = [{k: torch.tensor(v) for k, v in row.items()} for row in lists]
    one, other = Batches(lists, batch_size=1), Batches(tensors, batch_size=2, pad_id=7)
    assert one.digest == other.digest


def test_digest_is_the_one_of_earlier_versions():
    """SHA-256 over int64 values: the length, the ids and the labels of each example."""
    raw = struct.pack("=7q", 3, 1, 2, 3, -100, 2, 3) + struct.pack("=5q", 2, 4, 5, 4, 5)
    data = [Example([1, 2, 3], [-100, 2, 3]), {"input_ids": [4, 5]}]
    assert Batches(data, batch_size=1).digest == sha256(raw).hexdigest()[:16]


few = st.lists(
    st.tuples(st.integers(2, 3), st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=3
)


@given(few, few)
def test_digest_differs_where_the_data_does(one, other):
    def made(shape):
        return [{"input_ids": [1] * n, "labels": [a] * (n - 1) + [b]} for n, a, b in shape]

    digests = [Batches(made(shape), batch_size=1).digest for shape in (one, other)]
    assert (digests[0] == digests[1]) == (one == other)


@pytest.mark.parametrize("key", ["loss_mask", "completion_mask", "assistant_masks"])
@pytest.mark.parametrize(
    "make", [list, torch.tensor, lambda mask: torch.tensor(mask) > 0, lambda m: [*map(bool, m)]]
)
def test_as_examples_uses_masks_of_what_is_learned(key, make):
    item = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, -100, 8], key: make([0, 1, 1, 0])}
    (found,) = as_examples([item])
    assert found.labels == (-100, 6, -100, -100)
    for bad in ([0, 1], [0, 1, 2, 0]):
        with pytest.raises(ValueError, match=f"example 0: {key} must hold a 0 or a 1 for each of"):
            as_examples([{**item, key: bad}])
    with pytest.raises(TypeError, match=f"example 0: {key} must be a list or a 1-D tensor, found"):
        as_examples([{**item, key: 1}])
    with pytest.raises(ValueError, match="nothing to learn"):
        as_examples([{**item, key: [1, 0, 1, 0]}])


def test_as_examples_warns_of_weights():
    with pytest.warns(UserWarning, match="examples have loss_weights, which is ignored"):
        as_examples([{"input_ids": [1, 2], "loss_weights": [0.5, 1.0]}])


IDS = [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    "fields",
    [
        {"seq_lengths": [3, 2]},
        {"position_ids": [0, 1, 2, 0, 1]},
        {"attention_mask": [1, 1, 1, 2, 2]},
        {"position_ids": torch.tensor([0, 1, 2, 0, 1]), "lengths": [3, 2]},
    ],
)
def test_as_examples_keeps_documents_apart_that_others_packed(fields):
    (found,) = as_examples([{"input_ids": IDS, **fields}])
    assert found.lengths == (3, 2) and found.labels == (5, 6, 7, -100, 9)


@pytest.mark.parametrize("fields", [{"position_ids": range(5)}, {"attention_mask": [1] * 5}])
def test_as_examples_takes_positions_and_mask_of_a_single_document(fields):
    (found,) = as_examples([{"input_ids": IDS, **{k: list(v) for k, v in fields.items()}}])
    assert found == Example(tuple(IDS), tuple(IDS))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_ids": [0, 0, 1, 3, 4]}, "position_ids must count from 0, again in each"),
        ({"position_ids": [2, 3, 4, 5, 6]}, "position_ids must count from 0, again in each"),
        ({"position_ids": [0, 1]}, "position_ids must hold a number for each of the input_ids"),
        ({"seq_lengths": [3, 3]}, "seq_lengths must be those of its documents, 5 in all"),
        (
            {"seq_lengths": [3, 2], "attention_mask": [1, 1, 2, 2, 2]},
            "seq_lengths and attention_mask must tell of the same documents",
        ),
    ],
)
def test_as_examples_refuses_documents_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=f"example 0: {message}"):
        as_examples([{"input_ids": IDS, **fields}])


def test_as_examples_warns_of_labels_that_are_shifted_already():
    rows = [
        {"input_ids": IDS, "labels": labels}
        for labels in ([6, 7, 8, 9, -100], [-100, 7, 8, 9, -100])
    ]
    with pytest.warns(UserWarning, match="each label is the token after its own"):
        as_examples(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_examples([*rows, {"input_ids": IDS}][1:])
        as_examples([{"input_ids": [4, 4, 4], "labels": [4, 4, -100]}])
