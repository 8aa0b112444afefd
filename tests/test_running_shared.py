"""First tokens that all rows of a batch share: found, computed once, planned; or left alone."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running_models import BY_LENGTH, llama
from torch import nn
from training_models import CONFIG, factors, fit, plain, tiny

import minilora
from minilora.data import IGNORE, Batches, Example, common_start, pad, worth_sharing
from minilora.lora import mixed
from minilora.models import Llama
from minilora.planning.passes import pass_rows
from minilora.planning.saved import SavedBytes, saved_bytes
from minilora.planning.shapes import Settings
from minilora.running import evaluate, shares_prefix, token_loss

START = list(range(1, 9))


def alike(count=11, start=START, longest=9):
    """Rows that begin with `start` and learn of what follows but its first token."""
    draw = torch.Generator().manual_seed(4)
    rows = []
    for _ in range(count):
        length = int(torch.randint(2, longest, (), generator=draw))
        rest = torch.randint(10, 61, (length,), generator=draw).tolist()
        ids = [*start, *rest]
        rows.append(Example(ids, [IGNORE] * (len(start) + 1) + rest[1:]))
    return rows


def apart(monkeypatch):
    monkeypatch.setattr("minilora.data.batch.worth_sharing", lambda *_: 0)


@pytest.fixture
def passes(monkeypatch):
    """Collect what passes through the blocks: batch, tokens, and how many are shared."""
    seen, hidden = [], Llama.hidden

    def watched(self, ids, *, shared=0, **others):
        seen.append((*ids.shape, shared))
        return hidden(self, ids, shared=shared, **others)

    monkeypatch.setattr(Llama, "hidden", watched)
    return seen


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 1), min_size=2, max_size=7), st.integers(1, 6)),
        min_size=1,
        max_size=5,
    )
)
def test_the_common_start_is_the_longest_that_may_be_shared(rows):
    cut = [(ids, min(n, len(ids) - 1)) for ids, n in rows]
    examples = [Example(ids, [IGNORE] * n + ids[n:]) for ids, n in cut]

    def may(n):
        """Whether n tokens are everywhere the same, and neither they nor the next are learned."""
        starts = {tuple(e.input_ids[:n]) for e in examples}
        long = all(len(e.input_ids) >= n for e in examples)
        return long and len(starts) == 1 and not any(
            label != IGNORE for e in examples for label in e.labels[1 : n + 1]
        )  # fmt: skip

    assert common_start(examples) == max(n for n in range(9) if may(n))


def test_nothing_is_shared_by_packed_rows_or_by_none():
    packed = Example([1, 2, 3, 4], [IGNORE, IGNORE, IGNORE, 4], (2, 2))
    assert common_start([packed, packed]) == common_start([]) == 0


def test_a_batch_says_what_its_rows_share():
    batch = pad(alike())
    assert batch.shared == 8
    assert batch.rows(2, 5).shared == 8
    assert batch.rows(2, 3).shared == 0  # of one row nothing can be spared
    assert batch.to("cpu").shared == 8
    other = alike()[:3] + alike(2, start=[1, 2, 50])
    assert pad(other).shared == 2
    assert pad(alike()[:1]).shared == 0
    long = [Example([1, *[n] * 60], [IGNORE] * 3 + [n] * 58) for n in (3, 4, 5)]
    assert common_start(long) == 1
    assert pad(long).shared == 0  # it would spare 2 of 183 tokens
    assert worth_sharing(3, 32, 3) == 3 > worth_sharing(3, 33, 3) == 0


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}, {"accumulate": 2}])
def test_training_is_the_same_with_what_rows_share_computed_once(monkeypatch, passes, options):
    once = tiny().double()
    fit(once, alike(), epochs=2, lr=3e-2, dtype="auto", **options)
    assert {shared for *_, shared in passes} == {8}
    passes.clear()
    apart(monkeypatch)
    wanted = tiny().double()
    fit(wanted, alike(), epochs=2, lr=3e-2, dtype="auto", **options)
    assert {shared for *_, shared in passes} == {0}
    for name, value in factors(wanted).items():
        assert torch.allclose(factors(once)[name], value, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize(("format", "rounding"), [("nf4", 1e-5), ("int8", 2 / 127)])
def test_quantized_bases_share_too(format, rounding):
    """INT8 rounds gradients to 8 bits: here their sum over the rows, there each."""
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, hidden_size=64, intermediate_size=64, head_dim=16)
    model = minilora.inject(minilora.quantize(Llama(config), format), r=4, alpha=6)
    batch = pad(alike())
    for shared in (8, 0):
        loss, _ = token_loss(model, dataclasses.replace(batch, shared=shared))
        loss.backward()
        found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        if shared:
            once, first = found, loss
    assert torch.allclose(loss, first, rtol=1e-5)
    for one, other in zip(once, found, strict=True):
        assert (one - other).abs().max() <= rounding * other.abs().max()


def test_evaluation_shares_too(passes):
    model = tiny().double()
    found = evaluate(model, alike(), batch_size=4)
    assert {shared for *_, shared in passes} == {8}
    one_by_one = evaluate(model, alike(), batch_size=1)
    assert abs(found.loss - one_by_one.loss) < 1e-12


def test_compiled_blocks_share_too(monkeypatch):
    found = tiny()
    fit(found, alike(), epochs=1, compile=True)
    apart(monkeypatch)
    wanted = tiny()
    fit(wanted, alike(), epochs=1)
    for name, value in factors(wanted).items():
        assert (factors(found)[name] - value).abs().max() <= 1e-4 * value.abs().max(), name


def test_rows_that_something_tells_apart_are_computed_apart(passes):
    hooked = tiny()
    hooked.model.layers[0].register_forward_hook(lambda *_: None)
    watched = tiny()
    watched.model.embed_tokens.register_forward_pre_hook(lambda *_: None)
    dropped = plain()
    dropped.model.layers[1].mlp.dropout = nn.Dropout(0.1)
    for model in (tiny(dropout=0.1), hooked, watched, minilora.inject(dropped, r=2)):
        assert not shares_prefix(model)
        fit(model, alike(), max_steps=1)
    assert {shared for *_, shared in passes} == {0}
    assert shares_prefix(tiny())


def test_adapters_row_by_row_are_not_mixed_up(passes):
    model = tiny().double()
    minilora.inject(model, r=2, alpha=3, adapter="b")
    batch = pad(alike(4))
    with mixed(model, ["default", "b", "default", "b"]):
        evaluate(model, [batch])
    assert {shared for *_, shared in passes} == {0}


@pytest.mark.parametrize("rope", BY_LENGTH)
def test_rotary_embeddings_by_length_see_whole_rows(rope):
    assert not shares_prefix(llama(torch.float32, **BY_LENGTH[rope]))
    assert shares_prefix(llama(torch.float32))


class Narrow(Llama):
    """A user's, whose `hidden` knows nothing of it."""

    def hidden(self, input_ids, *, positions=None, mask=None, cache=None):
        return super().hidden(input_ids, positions=positions, mask=mask, cache=cache)


def test_models_with_methods_of_their_own_are_left_alone():
    model = Narrow(CONFIG)
    assert not shares_prefix(model)
    assert not shares_prefix(nn.Linear(2, 2))
    loss, tokens = token_loss(model, pad(alike()))
    wanted, _ = token_loss(plain(), pad(alike()))
    assert tokens
    assert loss.isfinite() and wanted.isfinite()


@pytest.mark.parametrize(
    ("change", "shared", "text"),
    [
        ((0, 3, 60), 8, "rows must begin with the same shared=8 tokens, found other ones"),
        (None, 16, "shared must leave at least two of the 17 tokens to each row, found 16"),
        (None, -1, "shared must leave at least two of the 17 tokens to each row, found -1"),
        (None, 9, "rows must begin with the same shared=9 tokens"),
    ],
)
def test_what_rows_do_not_share_is_refused(change, shared, text):
    batch = pad(alike(12, longest=10))
    assert batch.input_ids.shape[1] == 17
    if change is not None:
        batch.input_ids[change[:2]] = change[2]
    with pytest.raises(ValueError, match=text):
        plain().loss(batch.input_ids, batch.labels, shared=shared)


def test_what_is_learned_is_not_shared():
    batch = pad(alike())
    batch.labels[3, 8] = 5
    with pytest.raises(ValueError, match=r"first shared=8 tokens, and the next one, must not be"):
        plain().loss(batch.input_ids, batch.labels, shared=8)


@pytest.mark.parametrize("size", [(5, 20, 7), (2, 31, 12), (9, 16, 3)])
def test_planned_bytes_are_those_that_autograd_keeps(size):
    rows, tokens, shared = size
    model = tiny(depth=3)
    model.train()
    ids = torch.randint(0, 61, (1, tokens)).repeat(rows, 1)
    with saved_bytes() as bytes_of:
        out = model.hidden(ids, shared=shared)
    found = bytes_of(*model.parameters(), *model.buffers())
    assert out.shape[:2] == (1, shared + rows * (tokens - shared))
    planned = SavedBytes(model)(rows, tokens, shared).total
    assert 0 <= found - planned <= 8 * CONFIG.head_dim * len(out[0])  # a rotation for each token


@given(st.integers(1, 40), st.integers(4, 90), st.integers(0, 80), st.integers(1, 4000))
def test_passes_hold_as_many_rows_as_their_tokens_allow(rows, length, shared, tokens):
    shared = min(shared, length - 2)
    size = pass_rows(rows, length, tokens, shared)
    assert 1 <= size <= rows
    assert size >= pass_rows(rows, length, tokens)
    settings = Settings(batch_size=rows, length=length, pass_tokens=tokens, shared=shared)
    assert settings.rows == size
    assert settings.tokens == shared + size * (length - shared)
    assert settings.tokens <= tokens or size == 1
    assert pass_rows(rows, length, None, shared) == rows


def test_a_long_start_does_not_cut_a_batch(passes):
    start = list(range(1, 41))
    data = alike(8, start)
    assert Batches(data, batch_size=8).examples
    fit(tiny(), data, batch_size=8, max_steps=1, pass_tokens=160)
    assert {batch for batch, *_ in passes} == {8}
    passes.clear()
    fit(tiny(dropout=0.1), data, batch_size=8, max_steps=1, pass_tokens=160)
    assert {batch for batch, *_ in passes} < {2, 3, 4}
