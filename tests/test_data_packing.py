"""Packing: first-fit, and a document's loss and gradient are the same packed and alone."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_models import CONFIG, Tiny, examples, factors, fit, same, tiny

import minilora
from minilora.data.batches import Batches, as_examples, pad
from minilora.data.examples import Example
from minilora.data.packing import first_fit, pack
from minilora.models import GPT2, GPT2Config
from minilora.running.loss import token_loss


@settings(max_examples=60)
@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 31))
def test_first_fit_is_first_fit(sizes, room):
    """Against the plain search through all bins."""
    expected, free = [], []
    for index, size in enumerate(sizes):
        number = next((i for i, left in enumerate(free) if left >= size), len(free))
        if number == len(free):
            free.append(room)
            expected.append([])
        expected[number].append(index)
        free[number] -= size
    assert first_fit(sizes, room) == expected


def models():
    small = GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=64)
    torch.manual_seed(3)
    gpt2 = minilora.inject(GPT2(small), r=3, alpha=7).double()
    for module in (gpt2,):
        for name, p in module.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(p, std=0.1)
    return {"llama": tiny().double(), "gpt2": gpt2}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_documents_loss_and_gradient_are_the_same_packed_and_alone(name):
    model = models()[name]
    trained = [p for p in model.parameters() if p.requires_grad]
    documents = as_examples(examples(11))
    rows = pack(documents, 40)
    assert 1 < len(rows) < 8
    batch = pad(rows)
    packed, tokens = token_loss(model, batch)
    packed.backward()
    gradients = [p.grad.clone() for p in trained]
    model.zero_grad()
    alone, count = 0.0, 0
    for document in documents:
        total, n = token_loss(model, pad([document]))
        total.backward()
        alone, count = alone + float(total.detach()), count + n
    assert tokens == count
    assert float(packed.detach()) == pytest.approx(alone, rel=1e-13)
    for gradient, parameter in zip(gradients, trained, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-10, atol=1e-12)


def test_documents_would_see_each_other_without_the_mask():
    """The test above can fail: as one document the row has another loss."""
    model = models()["llama"]
    row = pack(examples(3), 64)[0]
    kept, _ = token_loss(model, pad([row]))
    mixed, _ = token_loss(model, pad([dataclasses.replace(row, lengths=())]))
    assert abs(float(kept.detach()) - float(mixed.detach())) > 1e-6


def test_pack_keeps_every_token_and_unlearns_only_what_has_nothing_before_it():
    documents = as_examples(examples(30))
    rows = pack(documents, 24)
    assert all(len(row.input_ids) <= 24 for row in rows)
    cut = []
    for row in rows:
        start = 0
        for length in row.lengths or (len(row.input_ids),):
            stop = start + length
            cut.append((tuple(row.input_ids[start:stop]), tuple(row.labels[start + 1 : stop])))
            start = stop
    assert sorted(cut) == sorted((tuple(d.input_ids), tuple(d.labels[1:])) for d in documents)


def test_positions_and_mask_of_a_packed_batch():
    batch = pad(pack([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}, {"input_ids": [1] * 6}], 6))
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, -1], [0] * 6]
    assert batch.positions().tolist()[0][:5] == [0, 1, 2, 0, 1]
    mask = batch.document_mask()[0, 0].int().tolist()
    assert mask[2] == [1, 1, 1, 0, 0, 0] and mask[4] == [0, 0, 0, 1, 1, 0]
    assert mask[5] == [0, 0, 0, 0, 0, 1]  # padding sees itself: no row of the softmax is empty
    with pytest.raises(ValueError, match="must hold packed rows"):
        pad(as_examples([{"input_ids": [1, 2]}])).positions()


def test_pack_refuses_what_cannot_be_packed():
    with pytest.raises(ValueError, match="must fit a row of 4 tokens, but example 1 has 5"):
        pack([{"input_ids": [1, 2]}, {"input_ids": [1] * 5}], 4)
    with pytest.raises(ValueError, match="packed once, but example 0 is a packed row"):
        pack(pack([{"input_ids": [1, 2]}] * 2, 4), 9)
    with pytest.raises(ValueError, match="length must be at least 2"):
        pack([{"input_ids": [1, 2]}], 1)
    with pytest.raises(ValueError, match="lengths must be those of its documents, 3 in all"):
        as_examples([{"input_ids": [1, 2, 3], "lengths": [1, 1]}])
    with pytest.raises(ValueError, match=r"each at least 1, found \[0, 3\]; pack the row again"):
        as_examples([{"input_ids": [1, 2, 3], "lengths": [0, 3]}])


def test_fit_refuses_packed_rows_for_a_model_that_would_mix_them():
    rows = pack(examples(5), 40)
    model = minilora.inject(Tiny(), r=2, alpha=3)
    with pytest.raises(ValueError, match="packed rows need a model that keeps .*, but Tiny"):
        fit(model, rows)
    with pytest.raises(ValueError, match="packed rows need a model that keeps"):
        token_loss(model, pad(rows))


def test_fit_packed_resumes_bit_equal_and_other_documents_are_other_data(tmp_path):
    rows = pack(examples(40), 32)
    options = {"max_steps": 8, "batch_size": 2, "accumulate": 2, "schedule": "constant"}
    whole, half, again = (tiny(dropout=0.2) for _ in range(3))
    fit(whole, rows, **options)
    fit(half, rows, out=tmp_path, **{**options, "max_steps": 3})
    with pytest.raises(ValueError, match="same data and options, found digest"):
        other = [dataclasses.replace(row, lengths=()) for row in rows]
        fit(tiny(dropout=0.2), other, out=tmp_path, resume=True, **options)
    fit(again, rows, out=tmp_path, resume=True, **options)
    assert same(factors(whole), factors(again))
    assert "documents packed in" in Batches(rows, batch_size=2).about()
    assert CONFIG.vocab_size == 61


def test_a_document_alone_in_its_row_is_counted():
    rows = pack([Example((1, 2, 3), (1, 2, 3)) for _ in range(3)], 6)
    assert Batches(rows, batch_size=1).about().startswith("3 documents packed in 2 rows, 9 tokens")
