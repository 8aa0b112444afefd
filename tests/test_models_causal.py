"""What every family's model shares: cache, masks, loss, checkpointing, compiling, bad input."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import FAMILIES, assert_close, check, some_ids, tiny
from torch import nn

from minilora.models.blocks import KVCache

pytestmark = pytest.mark.parametrize("family", FAMILIES)


def _head_mean(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_loss_is_summed_in_a_wide_dtype(family, dtype):
    model = tiny(family)
    ids = some_ids(model, 2, 7)
    wanted = model.loss(ids, ids)
    found = model.to(dtype).loss(ids, ids)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(found - wanted) <= (1e-5 if dtype == torch.float64 else 0.02) * wanted


def test_forward_accepts_int32_ids(family):
    model = tiny(family)
    ids = some_ids(model, 2, 5)
    assert torch.equal(model(ids.int()), model(ids))


# --- the cache ----------------------------------------------------------------------------------


@check("cache in any chunks")
@settings(max_examples=20, deadline=None)
@given(chunks=st.lists(st.integers(1, 5), min_size=1, max_size=6), batch=st.integers(1, 3))
def test_cache_in_any_chunks_equals_one_pass(family, chunks, batch):
    model = tiny(family)
    ids = some_ids(model, batch, sum(chunks))
    cache = KVCache(model, batch, sum(chunks))
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in ids.split(chunks, dim=1)]
        assert_close(torch.cat(parts, dim=1), model(ids))
    assert cache.length == sum(chunks)


def test_cache_forgets_when_length_is_lowered(family):
    model = tiny(family)
    ids = some_ids(model, 1, 6)
    cache = KVCache(model, 1, 8)
    with torch.no_grad():
        model(ids, cache=cache)
        cache.length = 2
        assert_close(model(ids[:, 2:5], cache=cache), model(ids[:, :5])[:, 2:])


def test_cache_takes_rows_in_any_order_and_number(family):
    model = tiny(family)
    ids = some_ids(model, 3, 7)
    cache = KVCache(model, 3, 7)
    with torch.no_grad():
        model(ids[:, :5], cache=cache)
        for rows in ([2, 0, 2, 1], [3, 0]):
            cache.take(rows)
            ids = ids[rows]
            assert cache.batch == len(rows)
            length = cache.length
            found = model(ids[:, length : length + 1], cache=cache)
            assert_close(found, model(ids[:, : length + 1])[:, -1:])


def test_cache_has_the_dtype_of_the_model(family):
    model = tiny(family).bfloat16()
    cache = KVCache(model, 2, 5)
    assert cache.keys[0].dtype == torch.bfloat16
    assert list(cache.values[1].shape) == [2, model.config.num_key_value_heads, 5, 4]


def test_cache_that_is_full_refuses_and_stays(family):
    model = tiny(family)
    cache = KVCache(model, 1, 4)
    model(some_ids(model, 1, 3), cache=cache)
    before = cache.keys[0].clone()
    with pytest.raises(ValueError, match="at most 4 tokens: 3 are in it and 2 more do not fit"):
        model(some_ids(model, 1, 2), cache=cache)
    assert cache.length == 3
    assert torch.equal(cache.keys[0][:, :, :3], before[:, :, :3])


def test_cache_refuses_another_batch_and_no_room(family):
    model = tiny(family)
    with pytest.raises(ValueError, match="made for 1 sequences, found a batch of 2"):
        model(some_ids(model, 2, 3), cache=KVCache(model, 1, 4))
    with pytest.raises(ValueError, match="batch and max_length of 1 or more, found 1 and 0"):
        KVCache(model, 1, 0)


# --- masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 5), (1, 5, 5), (4, 5, 5), (2, 1, 5, 5), (2, 4, 5, 5)])
def test_mask_that_is_causal_changes_nothing(family, shape):
    model = tiny(family)
    ids = some_ids(model, 2, 5)
    mask = torch.ones(shape, dtype=torch.bool).tril()
    assert_close(model(ids, mask=mask), model(ids))


@check("rows padded on the left")
def test_mask_for_left_padding_equals_the_unpadded_sequences(family):
    model = tiny(family)
    ids = some_ids(model, 2, 8)
    pads = torch.tensor([3, 0])
    real = torch.arange(8) >= pads[:, None]
    mask = real[:, None, None, :] & torch.ones(8, 8, dtype=torch.bool).tril()
    positions = (torch.arange(8) - pads[:, None]).clamp(min=0)
    with torch.no_grad():
        found = model(ids, mask=mask, positions=positions)
        assert found.isfinite().all()  # rows of padding may attend to nothing
        assert_close(found[0, 3:], model(ids[:1, 3:])[0])
        assert_close(found[1], model(ids[1:])[0])
        cache = KVCache(model, 2, 8)
        model(ids[:, :6], mask=mask[:, :, :6, :6], positions=positions[:, :6], cache=cache)
        rest = model(ids[:, 6:], mask=mask[:, :, 6:], positions=positions[:, 6:], cache=cache)
    assert_close(rest, found[:, 6:])


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(5, 5),
        torch.ones(5, 4, dtype=torch.bool),
        torch.ones(3, 5, 5, dtype=torch.bool),
        torch.ones(1, 1, 1, 5, 5, dtype=torch.bool),
    ],
)
def test_mask_of_another_kind_is_refused(family, mask):
    model = tiny(family)
    with pytest.raises(ValueError, match=r"mask must be bool .* broadcast to .* \[2, 4, 5, 5\]"):
        model(some_ids(model, 2, 5), mask=mask)


# --- loss ---------------------------------------------------------------------------------------


class _WrappedHead(nn.Module):
    """What an adapter makes of a head: the base and an addition."""

    def __init__(self, base):
        super().__init__()
        self.base, self.shift = base, nn.Parameter(torch.randn(base.out_features) * 0.1)

    def forward(self, x):
        return self.base(x) + self.shift


@check("loss in chunks")
@pytest.mark.parametrize("chunk", [1, 2**24])
def test_loss_goes_through_a_wrapped_head(family, monkeypatch, chunk):
    monkeypatch.setattr("minilora.models.causal._CHUNK_ELEMENTS", chunk)
    model = tiny(family)
    model.lm_head = _WrappedHead(model.lm_head)
    ids = some_ids(model, 8, 9)  # 64 rows: two chunks of the smallest size
    labels = ids.clone()
    labels[:, 3:5] = -100
    wanted = _head_mean(model(ids), labels)
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    found = model.loss(ids, labels)
    found.backward()
    assert_close(found, wanted)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name])


@pytest.mark.parametrize("head", ["plain", "wrapped", "compiled"])
def test_logits_are_capped_in_every_loss(family, head):
    model = tiny(family)
    ids = some_ids(model, 3, 9)
    model.logit_cap = None
    plain = model(ids)
    model.logit_cap = 0.5
    capped = model(ids)
    assert_close(capped, 0.5 * torch.tanh(plain / 0.5))
    assert (capped - plain).abs().max() > 0.1
    if head == "wrapped":
        model.lm_head = _WrappedHead(model.lm_head)
    model.compiled_loss = head == "compiled"
    wanted = _head_mean(model(ids), ids)
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    found = model.loss(ids, ids)
    found.backward()
    assert_close(found, wanted)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name])


def test_loss_runs_the_hooks_of_a_head(family):
    model = tiny(family)
    ids = some_ids(model, 2, 5)
    handle = model.lm_head.register_forward_hook(lambda module, args, out: out * 2)
    doubled = model.loss(ids, ids)
    assert_close(doubled, _head_mean(model(ids), ids))
    handle.remove()
    assert abs(model.loss(ids, ids) - doubled) > 0.01


def test_loss_of_frozen_weights_needs_no_gradient(family):
    model = tiny(family).requires_grad_(False)
    ids = some_ids(model, 2, 5)
    assert not model.loss(ids, ids).requires_grad


@pytest.mark.parametrize("tokens", [1, 4])
def test_loss_refuses_labels_none_of_which_counts(family, tokens):
    model = tiny(family)
    ids = some_ids(model, 2, tokens)
    labels = torch.full_like(ids, -100)
    labels[:, 0] = 5  # nothing predicts the first token
    with pytest.raises(ValueError, match="at least one label after the first token must count"):
        model.loss(ids, labels)


def test_loss_refuses_other_labels(family):
    model = tiny(family)
    ids = some_ids(model, 2, 5)
    with pytest.raises(ValueError, match=r"labels must be int64 of input_ids' shape \[2, 5\]"):
        model.loss(ids, ids[:, :4])
    with pytest.raises(ValueError, match=r"found torch\.int32"):
        model.loss(ids, ids.int())
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 29\)"):
        model.loss(ids, ids + 29)


# --- checkpointing, compile, copies -------------------------------------------------------------


def test_gradient_checkpointing_changes_no_gradient_and_runs_layers_again(family):
    model = tiny(family)
    ids = some_ids(model, 2, 6)
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients(checkpointing):
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        calls.clear()
        model.loss(ids, ids).backward()
        return [parameter.grad.clone() for parameter in model.parameters()], len(calls)

    model.train()
    plain, once = gradients(False)
    again, twice = gradients(True)
    model.eval()
    _, evaluating = gradients(True)
    assert (once, twice, evaluating) == (1, 2, 1)
    for left, right in zip(plain, again, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("cached", [False, True])
def test_forward_compiles_in_one_graph(family, cached):
    model = tiny(family)
    ids = some_ids(model, 2, 6)
    torch._dynamo.reset()  # graphs of one forward are limited, and the families share it
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        if cached:
            caches = [KVCache(model, 2, 8) for _ in range(2)]
            assert_close(compiled(ids, cache=caches[0]), model(ids, cache=caches[1]))
            assert caches[0].length == 6
        else:
            assert_close(compiled(ids), model(ids))


def test_deepcopy_keeps_the_head_tied(family):
    model = tiny(family, tied=True)
    twin = copy.deepcopy(model)
    ids = some_ids(model, 1, 4)
    assert twin.lm_head.weight is twin.get_input_embeddings().weight
    assert twin.lm_head.weight is not model.lm_head.weight
    assert torch.equal(twin(ids), model(ids))


def test_tied_head_is_one_parameter(family):
    model = tiny(family, tied=True)
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tiny(family).lm_head.weight is not tiny(family).get_input_embeddings().weight


# --- input that does not fit --------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(1, 2),
        torch.zeros(2, 0, dtype=torch.int64),
        torch.zeros(0, 2, dtype=torch.int64),
        torch.zeros(1, 2, dtype=torch.int16),
    ],
)
def test_forward_refuses_what_are_no_ids(family, ids):
    with pytest.raises(ValueError, match=r"input_ids must be \[batch, tokens\] of int64 or int32"):
        tiny(family)(ids)


@pytest.mark.parametrize("wrong", [-1, 29])
def test_forward_refuses_ids_out_of_range(family, wrong):
    ids = torch.tensor([[0, 28, wrong]])
    with pytest.raises(ValueError, match=r"token ids must lie in \[0, 29\), found ids from"):
        tiny(family)(ids)


def test_forward_refuses_a_sequence_that_is_too_long(family):
    model = tiny(family)
    assert model(some_ids(model, 1, 32)).shape == (1, 32, 29)
    with pytest.raises(ValueError, match=r"at most 32 tokens .*, found 33"):
        model(some_ids(model, 1, 33))
    cache = KVCache(model, 1, 40)
    model(some_ids(model, 1, 30), cache=cache)
    with pytest.raises(ValueError, match=r"at most 32 tokens .*, found 33"):
        model(some_ids(model, 1, 3), cache=cache)


def test_forward_refuses_positions_that_do_not_fit(family):
    model = tiny(family)
    ids = some_ids(model, 2, 3)
    with pytest.raises(ValueError, match=r"positions must be integers of shape \[3\] or \[2, 3\]"):
        model(ids, positions=torch.arange(4))
    with pytest.raises(ValueError, match="positions must be integers"):
        model(ids, positions=torch.arange(3.0))
    with pytest.raises(ValueError, match=r"positions must lie in \[0, 32\), found 0 to 32"):
        model(ids, positions=torch.tensor([0, 1, 32]))


def test_forward_refuses_no_last_position(family):
    model = tiny(family)
    with pytest.raises(ValueError, match="last must be 1 or more positions, or None"):
        model(some_ids(model, 1, 3), last=0)
