"""Losses token by token against a softmax written out, and what is made of them."""

import math

import numpy as np
import pytest
import torch
from report_models import Letters, causal, sentences
from running_models import BY_LENGTH, llama

from minilora.data.batches import Example
from minilora.report.tokens import (
    Measured,
    decode,
    effects,
    encode,
    gap,
    measured,
    pieces,
    shown,
)
from minilora.running.evaluation import evaluate
from minilora.running.paired import token_losses


def oracle(model, example):
    """−log softmax of each learned token, one example at a time."""
    with torch.no_grad():
        logits = model(torch.tensor([example.input_ids]))[0].double().numpy()
    wide = logits - logits.max(1, keepdims=True)
    logs = wide - np.log(np.exp(wide).sum(1, keepdims=True))
    return [-logs[t - 1, y] for t, y in enumerate(example.labels) if t and y != -100]


def test_packed_rows_are_refused():
    """Their documents would see each other."""
    with pytest.raises(ValueError, match="found 2 packed into example 0; do not pack them"):
        token_losses(causal(), [Example([1, 2, 3, 4], [1, 2, 3, 4], (2, 2))], batch_size=1)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
@pytest.mark.parametrize("chunk", [2**24, 30])
def test_token_losses_are_those_of_each_example_alone(batch_size, chunk, monkeypatch):
    monkeypatch.setattr("minilora.running.paired.CHUNK", chunk)
    model, examples = causal(), sentences(7)
    model.train()
    found = token_losses(model, examples, batch_size=batch_size, pad_id=3)
    assert model.training
    for example, losses in zip(examples, found, strict=True):
        assert losses.tolist() == pytest.approx(oracle(model, example), rel=1e-5)
    whole = evaluate(model, examples)
    mean = measured(found, found)
    assert mean.before == mean.after == pytest.approx(whole.loss, rel=1e-6)
    assert (mean.tokens, mean.examples, mean.change, mean.error) == (whole.tokens, 7, 0, 0)
    assert not mean.clear


@pytest.mark.parametrize("kind", sorted(BY_LENGTH))
def test_padding_is_no_part_of_a_length_that_rotary_embeddings_depend_on(kind):
    model = llama(torch.float32, **BY_LENGTH[kind])
    examples = [Example(row, row) for row in ([1, 2, 3], [5, 4, 3, 2, 1, 0, 1, 7, 9], [6, 6])]
    for example, losses in zip(examples, token_losses(model, examples, batch_size=3), strict=True):
        assert losses.tolist() == pytest.approx(oracle(model, example), rel=1e-5)


def test_measured_error_is_that_of_independent_examples():
    """With examples of one length it is the textbook standard error of a mean."""
    torch.manual_seed(0)
    before = [torch.rand(4) for _ in range(50)]
    after = [b + torch.randn(4) * 0.1 + 0.3 for b in before]
    found = measured(before, after)
    means = [(a - b).double().mean().item() for b, a in zip(before, after, strict=True)]
    assert found.change == pytest.approx(np.mean(means))
    assert found.error == pytest.approx(np.std(means, ddof=1) / math.sqrt(50))
    assert found.clear


@pytest.mark.parametrize(
    ("number", "t"), [(1, None), (2, 12.706), (9, 2.306), (10, 2.262), (11, 2.228), (40, 2.0227)]
)
def test_a_change_is_clear_where_students_interval_excludes_zero(number, t):
    """With examples of one length it is the paired t-test (t from a table), from 10 on."""
    generator = torch.Generator().manual_seed(number)
    noise = torch.randn(number, 4, generator=generator)
    before = torch.rand(number, 4, generator=generator)
    seen = set()
    for shift in (0.01, 0.1, 0.2, 0.35, 0.5, 3.0):
        found = measured(list(before), list(before + noise + shift))
        if number == 1:
            assert found.error == math.inf and not found.clear
            continue
        means = (noise + shift).double().mean(1).numpy()
        half = t * means.std(ddof=1) / math.sqrt(number)
        assert found.half == pytest.approx(half, rel=1e-3)
        assert found.clear == (number >= 10 and abs(means.mean()) > half)
        seen.add(found.clear)
    assert seen == ({True, False} if number >= 10 else {False} if number > 1 else set())


def losses(before, after, error=0.01, examples=10):
    return Measured(before, after, after - before, error, 100, examples)


@pytest.mark.parametrize(
    ("train", "valid", "verdict"),
    [
        ((4, 2), (4, 2.1), "not over-fitted"),
        ((4, 2), (4, 3.5), "over-fitted"),
        ((4, 2), (4, 4.5), "over-fitted"),
        ((4, 3), (4, 4.5, 0.9), "over-fitted or not, can't tell"),  # may be chance
        ((4, 3), (4, 3.9, 0.18), "over-fitted or not, can't tell"),  # 2 errors, but not t's
        ((4, 3), (4, 3.4, 0.1), "over-fitted or not, can't tell"),  # half may be gained, or not
        ((4, 3), (4, 3.2, 0.4), "over-fitted or not, can't tell"),
        ((4, 3), (4, 3.3, 0.05), "not over-fitted"),
        ((4, 3), (4, 3.7, 0.05), "over-fitted"),
        ((4, 3, 0.3), (4, 3.7, 0.05), "over-fitted or not, can't tell"),  # nor the gain sure
        ((4, 2), (4, 3.5, 0.01, 9), "over-fitted or not, can't tell"),
        ((4, 2, 0.01, 9), (4, 2.1), "over-fitted or not, can't tell"),
        ((4, 3, 0.01, 9), (4, 4.5), "over-fitted or not, can't tell"),
        ((4, 4), (4, 3.9), "not over-fitted"),
        ((4, 4, 0), (4, 4, 0), "not over-fitted"),  # nothing changed
        ((4, 5), (4, 5), "not over-fitted"),  # a bad run, but not by memorising
    ],
)
def test_gap_flags_what_was_memorised(train, valid, verdict):
    found = gap(losses(*train), losses(*valid))
    assert found.verdict == verdict
    assert found.overfitted == (verdict == "over-fitted")
    assert found.error >= found.valid.error


def test_effects_and_shown_examples_point_at_the_right_tokens():
    examples = [Example((1, 2, 3, 2), (1, 2, 3, 2)), Example((4, 2, 5), (-100, -100, 5))]
    before = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0])]
    after = [torch.tensor([0.5, 2.5, 0.5]), torch.tensor([2.0])]
    helped, hurt = effects(examples, before, after, Letters(), 5)
    (b,), (c,) = helped, hurt  # e did not change
    assert (b.token, b.context, b.before, b.after) == ("b", "abc", 3.0, 0.5)
    assert (b.example, b.position, b.times, b.total) == (0, 3, 2, -3.0)
    assert (c.token, c.context, c.times, c.total) == ("c", "ab", 1, 0.5)
    assert effects(examples, before, after, Letters(), 0) == ((), ())
    assert effects(examples, before, after, None, 1)[0][0].context == "<1><2><3>"
    told = shown(examples[1], before[1], after[1], Letters())
    assert told.tokens == ("d", "b", "e")
    assert told.before == told.after == (None, None, 2.0)


def test_pieces_come_from_tokenizers_of_either_make():
    class Theirs:
        """Drops the space a text begins with, as SentencePiece does."""

        def encode(self, text, add_special_tokens=True):
            return [1] * add_special_tokens + [ord(c) for c in text]

        def decode(self, ids, skip_special_tokens=True):
            return "".join(map(chr, ids)).removeprefix(" ") + "." * skip_special_tokens

    assert pieces(Theirs(), [98, 32, 97]) == ["b", " ", "a"]
    assert (encode(Theirs(), "ab"), encode(Letters(), "ab")) == ([97, 98], [1, 2])
    assert pieces(Letters(), [1, 0, 1]) == ["a", " ", "a"]
    assert decode(Letters(), [1, 0, 2]) == "a b"
