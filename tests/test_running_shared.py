"""First tokens that all rows of a batch share: found, computed once, planned; or left alone."""

import dataclasses
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running_models import BY_LENGTH, llama
from torch import nn
from training_models import CONFIG, factors, fit, plain, tiny

import minilora
from minilora.data import IGNORE, Batches, Example, common_prefix, pad, worth_sharing
from minilora.kernels import causal_attention, integer_way
from minilora.lora import mixed
from minilora.models import Llama
from minilora.planning import plan
from minilora.planning.batches import pass_rows
from minilora.planning.saved import SavedBytes, saved_bytes
from minilora.planning.shapes import Settings, read_shape
from minilora.planning.timing import timed_step
from minilora.running import compiled, evaluate, shares_prefix, token_loss

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
    monkeypatch.setattr("minilora.data.batch.common_prefix", lambda _: 0)


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
def test_the_common_prefix_is_the_longest_that_may_be_shared(rows):
    cut = [(ids, min(n, len(ids) - 1)) for ids, n in rows]
    examples = [Example(ids, [IGNORE] * n + ids[n:]) for ids, n in cut]

    def may(n):
        """Whether n tokens are everywhere the same, and neither they nor the next are learned."""
        starts = {tuple(e.input_ids[:n]) for e in examples}
        long = all(len(e.input_ids) >= n for e in examples)
        return long and len(starts) == 1 and not any(
            label != IGNORE for e in examples for label in e.labels[1 : n + 1]
        )  # fmt: skip

    assert common_prefix(examples) == max(n for n in range(9) if may(n))


def test_nothing_is_shared_by_packed_rows_or_by_none():
    packed = Example([1, 2, 3, 4], [IGNORE, IGNORE, IGNORE, 4], (2, 2))
    assert common_prefix([packed, packed]) == common_prefix([]) == 0


def test_a_batch_says_what_its_rows_share():
    batch = pad(alike())
    assert batch.shared == 8
    assert batch.rows(2, 5).shared == 8
    assert batch.rows(2, 3).shared == 0  # of one row nothing can be saved
    assert batch.to("cpu").shared == 8
    other = alike()[:3] + alike(2, start=[1, 2, 3, 4, 50])
    assert pad(other).shared == 4
    assert pad(alike()[:1]).shared == 0
    long = [Example([1, *[n] * 60], [IGNORE] * 3 + [n] * 58) for n in (3, 4, 5)]
    assert common_prefix(long) == 1
    assert pad(long).shared == 0  # it would save 2 of 183 tokens
    assert worth_sharing(5, 32, 6) == 6 > worth_sharing(5, 32, 5) == 0
    assert worth_sharing(2, 1024, 512) == 512 > worth_sharing(2, 1024, 511) == 0


@pytest.mark.parametrize("name", ["input_ids", "labels"])
def test_a_batch_that_was_changed_shares_nothing(name):
    """What was counted holds of the tensors as they were."""
    batch, model = pad(alike()), plain().double()
    assert dataclasses.replace(batch, labels=batch.labels.clone()).shared == 0
    assert batch.shared == 8
    getattr(batch, name)[3, 2] = 5
    assert batch.shared == 0
    found, tokens = token_loss(model, batch)
    wanted = model.loss(batch.input_ids, batch.labels) * tokens
    assert abs(found - wanted) < 1e-4
    with torch.inference_mode():
        assert pad(alike()).shared == 0  # such tensors don't tell whether they were changed


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


@pytest.mark.parametrize(
    "options",
    [
        {"targets": ["embed_tokens", "q_proj", "lm_head"]},
        {"dora": True},
        {"lora_bias": True},
        {"init": "pissa"},
        {"modules_to_save": ["input_layernorm", "lm_head"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_whatever_is_adapted_gets_the_same_gradient(options):
    model = tiny(**options).double()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    assert shares_prefix(model)
    batch, found = pad(alike()), []
    for some in (batch, dataclasses.replace(batch)):
        token_loss(model, some)[0].backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    for once, apart in zip(*found, strict=True):
        assert torch.allclose(once, apart, rtol=1e-9, atol=1e-10)


INT8_STEP = 2 / 127 if integer_way() == "int8" else 2 / 63  # blocks have 7 bits


@pytest.mark.parametrize(("format", "rounding"), [("nf4", 1e-5), ("int8", INT8_STEP)])
def test_quantized_bases_share_too(format, rounding):
    """INT8 rounds gradients to 8 bits or 7: here their sum over the rows, there each."""
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, hidden_size=64, intermediate_size=64, head_dim=16)
    model = minilora.inject(minilora.quantize(Llama(config), format), r=4, alpha=6)
    batch = pad(alike())
    for shared in (8, 0):
        loss, _ = token_loss(model, batch if shared else dataclasses.replace(batch))
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
    """Traced as for Inductor, whose code other tests run: it takes long to make."""
    traced = functools.partial(compiled, backend="aot_eager")
    monkeypatch.setattr("minilora.training.loop.compiled", traced)
    found = tiny()
    fit(found, alike(), epochs=1, compile=True)
    apart(monkeypatch)
    wanted = tiny()
    fit(wanted, alike(), epochs=1)
    for name, value in factors(wanted).items():
        assert (factors(found)[name] - value).abs().max() <= 1e-4 * value.abs().max(), name


class Shifted(nn.Module):
    """Takes half of each token from the one before it in the row, as some models do."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp((x + x.roll(1, 1)) / 2)


def in_first_block(change):
    def changed(model):
        change(model.model.layers[0])

    return changed


WAYS = {  # to let rows be told apart elsewhere than in attention
    "hook": in_first_block(lambda block: block.register_forward_hook(lambda *_: None)),
    "hook before": lambda model: model.model.embed_tokens.register_forward_pre_hook(
        lambda *_: None
    ),
    "hook backward": in_first_block(
        lambda block: block.register_full_backward_hook(lambda *_: None)
    ),
    "dropout": in_first_block(lambda block: block.mlp.add_module("drop", nn.Dropout(0.1))),
    "BatchNorm": in_first_block(lambda block: block.add_module("norm", nn.BatchNorm1d(3))),
    "another module": in_first_block(lambda block: setattr(block, "mlp", Shifted(block.mlp))),
    "another forward": in_first_block(
        lambda block: setattr(block.mlp, "forward", lambda x: x.roll(1, 1))
    ),
    "another loss": lambda model: setattr(
        model, "loss", lambda ids, labels: Llama.loss(model, ids, labels)
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_something_may_tell_apart_are_computed_apart(way, passes):
    model = tiny().double()
    assert shares_prefix(model)
    WAYS[way](model)
    assert not shares_prefix(model)
    token_loss(model, pad(alike()))
    assert {shared for *_, shared in passes} == {0}


def test_dropout_and_hooks_of_every_module_keep_rows_apart(passes):
    assert not shares_prefix(tiny(dropout=0.1))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not shares_prefix(tiny())
    handle.remove()
    assert shares_prefix(tiny())


def test_under_autocast_attention_computes_in_its_dtype(monkeypatch):
    seen = []
    own = causal_attention
    monkeypatch.setattr(
        "minilora.models.blocks.causal_attention",
        lambda q, k, v, scale: seen.append(out := own(q, k, v, scale)) or out,
    )
    model, batch = tiny(), pad(alike())
    with torch.autocast("cpu", torch.bfloat16):
        once, _ = token_loss(model, batch)
        apart, _ = token_loss(model, dataclasses.replace(batch))
    assert {out.dtype for out in seen} == {torch.bfloat16}
    assert torch.allclose(once, apart, rtol=1e-2)


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
        ((0, 3, 60), 8, "rows must begin with the same shared=8 tokens, but they differ"),
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
    with pytest.raises(ValueError, match=r"none of the first shared=8 tokens, nor the next one, m"):
        plain().loss(batch.input_ids, batch.labels, shared=8)


@pytest.mark.parametrize("name", ["mask", "positions"])
def test_shared_tokens_know_the_causal_rule_alone(name):
    batch = pad(alike())
    T = batch.input_ids.shape[1]
    beside = {"mask": torch.ones(T, T, dtype=torch.bool).tril(), "positions": torch.arange(T)}
    with pytest.raises(ValueError, match=f"positions from 0, found {name} beside shared; leave"):
        plain().loss(batch.input_ids, batch.labels, shared=8, **{name: beside[name]})


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
    with pytest.raises(ValueError, match=rf"shared must lie in \[0, {length}\), as"):
        Settings(batch_size=rows, length=length, shared=length)


def test_timed_steps_share_too(passes):
    """Else the time of a plan would be that of rows apart."""
    shape = read_shape(plain())
    settings = Settings(dtype=torch.float32, r=4, batch_size=4, length=24, learned=0.2, shared=16)
    timed_step(shape, settings)
    assert {shared for _, tokens, shared in passes if tokens == 24} == {16}


def test_plans_know_where_rows_are_apart():
    data = alike(16)
    own = plan(plain(), data, batch_size=4, timed=False)
    assert (
        own.options[0].memory.activations
        < plan(plain(), data, batch_size=4, timed=False, dropout=0.1).options[0].memory.activations
    )


def test_a_long_start_does_not_cut_a_batch(passes):
    start = list(range(1, 41))
    data = alike(8, start)
    assert Batches(data, batch_size=8).examples
    fit(tiny(), data, batch_size=8, max_steps=1, pass_tokens=160)
    assert {batch for batch, *_ in passes} == {8}
    passes.clear()
    fit(tiny(dropout=0.1), data, batch_size=8, max_steps=1, pass_tokens=160)
    assert {batch for batch, *_ in passes} < {2, 3, 4}
