"""Passes that do not fit: split in halves, the same gradient, remembered, and said."""

import math
import os
import subprocess
import sys
import textwrap
import warnings
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preference_pairs import pairs
from training_models import Tiny, examples, factors, fit, same, tiny

import minilora
from minilora.planning import pass_rows
from minilora.running.loss import token_loss
from minilora.training.config import TrainConfig
from minilora.training.gradient import _UNORDERED, Gradient
from minilora.training.state import load_state


def limited(rows, seen=None):
    """A loss that, as CUDA would, runs out of memory on more than so many rows: in the backward
    pass, after part of the gradient has been accumulated."""

    def loss(model, batch):
        if seen is not None and torch.is_grad_enabled():
            seen.append(len(batch))
        total, tokens = token_loss(model, batch)
        if len(batch) > rows and torch.is_grad_enabled():
            total = total + Fails.apply(model.model.layers[0].self_attn.q_proj.adapters[
                "default"].lora_A.sum())  # fmt: skip
        return total, tokens

    return loss


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 0

    @staticmethod
    def backward(ctx, grad):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Unordered(torch.autograd.Function):
    """Has no order to add up in, as torch says of `put_`; and counts how it was asked."""

    asked: ClassVar[list[bool]] = []

    @staticmethod
    def forward(ctx, x):
        return x * 0

    @staticmethod
    def backward(ctx, grad):
        Unordered.asked.append(torch.is_deterministic_algorithms_warn_only_enabled())
        return grad.clone().put_(torch.tensor([0]), torch.zeros(1))


def test_an_operation_without_an_order_is_run_all_the_same_and_said(capsys):
    """Strict is what makes attention's backward pass on CUDA add up in one order."""

    def loss(model, batch):
        total, tokens = token_loss(model, batch)
        A = model.model.layers[0].self_attn.q_proj.adapters["default"].lora_A
        return total + Unordered.apply(A.sum()), tokens

    Unordered.asked.clear()
    plain, strict = tiny(), tiny()
    options = {"batch_size": 4, "max_steps": 2, "quiet": False}
    torch.use_deterministic_algorithms(False)  # the suite has switched it on
    expected = fit(plain, examples(4), loss=loss, **options)
    assert "may differ" not in capsys.readouterr().err
    torch.use_deterministic_algorithms(True, warn_only=True)  # as runs on CUDA do
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        got = fit(strict, examples(4), loss=loss, **options)
    assert Unordered.asked == [False, False, False, True, True]
    assert got.losses == expected.losses and same(factors(plain), factors(strict))
    said = capsys.readouterr().err
    assert said.count("a run repeated may differ in the last bits: put_ does not have a ") == 1
    assert torch.is_deterministic_algorithms_warn_only_enabled()


def test_what_older_versions_say_of_cublas_is_known_too():
    """They refuse without a workspace that is set in the environment, unless only asked to warn."""
    said = (
        "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)`"
    )
    assert any(text in said for text in _UNORDERED)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_split_has_the_same_gradient(dropout):
    """In float64 three steps agree to rounding, dropout's masks included."""
    whole, parts = (tiny(dropout=dropout).double() for _ in range(2))
    options = {"max_steps": 3, "batch_size": 7, "accumulate": 2, "dtype": "auto", "lr": 1e-2}
    expected = fit(whole, examples(21), **options)
    got = fit(parts, examples(21), loss=limited(2), **options)
    assert got.losses == pytest.approx(expected.losses, rel=1e-12)
    left, right = factors(whole), factors(parts)
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-7, atol=1e-10)


def test_split_is_remembered_and_said(capsys):
    seen = []
    fit(tiny(), examples(16), loss=limited(3, seen), batch_size=8, max_steps=3, quiet=False)
    assert seen == [8, 4, 2, 2, 2, 2, *[2] * 8][: len(seen)] and len(seen) == 2 + 12
    said = capsys.readouterr().err
    for tried, size in (("a micro-batch of 8", 4), ("a pass of 4", 2)):
        line = (
            f"{tried} rows did not fit in memory: from here on in passes of {size}, with the same "
        )
        assert f"{line}gradient\n" in said


def test_a_failed_pass_leaves_the_gradient_so_far_to_the_bit(monkeypatch):
    """Also where adding 0 would not: -0.0."""
    seen, parts = [], Gradient._parts

    def noted(self, batch, size, index):
        gradients = [p.grad for p in self.run.names if p.grad is not None]
        seen.append((index, size, [g.view(torch.int32).clone() for g in gradients]))
        if (index, size) == (1, 4):  # does not fit, and has added to the gradient
            torch._foreach_add_(gradients, 1.0)
            return None
        sums = parts(self, batch, size, index)
        if index == 0:
            next(iter(self.run.names)).grad.view(-1)[:2] = torch.tensor([-0.0, 1e-42])
        return sums

    monkeypatch.setattr(Gradient, "_parts", noted)
    fit(tiny(), examples(8), batch_size=4, accumulate=2, max_steps=1)
    assert [part[:2] for part in seen] == [(0, 4), (1, 4), (1, 2)]
    _, before, again = (part[2] for part in seen)
    assert -(2**31) in before[0]
    assert len(before) == len(again) > 1
    assert all(torch.equal(a, b) for a, b in zip(before, again, strict=True))


class Passes:
    """Notes rows and tokens of each pass that training makes."""

    def __init__(self, monkeypatch):
        self.seen = []
        monkeypatch.setattr("minilora.training.loss.token_loss", self.loss)

    def loss(self, model, batch):
        if torch.is_grad_enabled():
            self.seen.append(tuple(batch.input_ids.shape))
        return token_loss(model, batch)


class Wrapper(torch.nn.Module):
    """A model of another class with the configuration of ours."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, input_ids, labels=None):
        return self.inner(input_ids, labels=labels) if labels is not None else self.inner(input_ids)


LONG_ROWS = [{"input_ids": [(7 * i + j) % 61 for j in range(16)]} for i in range(7)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_passes_of_so_many_tokens_have_the_same_gradient(monkeypatch, dropout):
    """In float64 three steps agree to rounding, masks included."""
    whole, parts = (tiny(dropout=dropout).double() for _ in range(2))
    options = {"max_steps": 3, "batch_size": 7, "dtype": "auto", "lr": 1e-2}
    expected = fit(whole, LONG_ROWS, **options)
    passes = Passes(monkeypatch)
    got = fit(parts, LONG_ROWS, pass_tokens=50, **options)  # three rows, so three passes
    assert passes.seen == [(2, 16), (2, 16), (3, 16)] * 3
    assert got.losses == pytest.approx(expected.losses, rel=1e-12)
    left, right = factors(whole), factors(parts)
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-7, atol=1e-10)


@given(rows=st.integers(1, 60), length=st.integers(1, 99), tokens=st.integers(1, 999))
def test_passes_hold_few_tokens_and_about_equally_many_rows(rows, length, tokens):
    each = pass_rows(rows, length, tokens)
    number = math.ceil(rows / each)
    assert each == 1 or each * length <= tokens
    assert number == math.ceil(rows / max(1, tokens // length)), "no more passes than needed"
    assert (number - 1) * each < rows <= number * each
    assert pass_rows(rows, length, None) == rows


def test_by_default_our_models_on_a_cpu_have_passes_of_limited_size(monkeypatch):
    """And whatever a batch might mean more to is computed whole."""
    monkeypatch.setattr("minilora.planning.batches.PASS_TOKENS", 50)
    passes = Passes(monkeypatch)
    split, whole = [(2, 16), (2, 16), (3, 16)], [(7, 16)]
    mixing, wrapped = tiny(), Wrapper(tiny())
    mixing.model.layers[0].mlp.register_module("norm", torch.nn.BatchNorm1d(24, affine=False))
    dropping = tiny()
    dropping.model.layers[0].mlp.register_module("drop", torch.nn.Dropout(0.1))
    head = tiny(dropout=0.3, targets=["q_proj", "lm_head"])
    cases = [
        (tiny(), {}, split), (tiny(), {"checkpointing": True}, split),
        (tiny(), {"pass_tokens": 112}, whole), (tiny(), {"loss": passes.loss}, whole),
        (tiny(), {"loss": passes.loss, "pass_tokens": 50}, split), (dropping, {}, whole),
        (dropping, {"pass_tokens": 50}, split), (head, {}, whole), (mixing, {}, whole),
        (wrapped, {}, whole),
    ]  # fmt: skip
    for model, options, expected in cases:
        passes.seen.clear()
        fit(model, LONG_ROWS, batch_size=7, max_steps=1, **options)
        assert passes.seen == expected, options


def test_pairs_are_computed_in_passes_too(monkeypatch):
    config = TrainConfig(batch_size=6, max_steps=2, loss="dpo", lr=1e-2)
    whole, parts = tiny().double(), tiny().double()
    expected = minilora.fit(whole, pairs(6), config=config, quiet=True)
    monkeypatch.setattr("minilora.planning.batches.PASS_TOKENS", 30)
    rows = []
    kept = Gradient._pass
    monkeypatch.setattr(
        Gradient,
        "_pass",
        lambda self, batch, *at: rows.append(len(batch)) or kept(self, batch, *at),
    )
    got = minilora.fit(parts, pairs(6), config=config, quiet=True)
    assert len(rows) > 4 and sum(rows) == 12
    assert got.losses == pytest.approx(expected.losses, rel=1e-12)
    left, right = factors(whole), factors(parts)
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-7, atol=1e-10)


def test_passes_under_fsdp_are_refused():
    with pytest.raises(ValueError, match="pass_tokens splits the passes of each rank alone, but"):
        TrainConfig(pass_tokens=100, parallel="fsdp")
    with pytest.raises(ValueError, match="pass_tokens must be"):
        TrainConfig(pass_tokens=0)


def test_a_split_says_so_where_the_model_drops_by_itself(capsys):
    model = tiny()
    model.model.layers[0].mlp.register_module("drop", torch.nn.Dropout(0.1))
    fit(model, examples(4), loss=limited(2), batch_size=4, max_steps=1, quiet=False)
    said = capsys.readouterr().err
    assert "same gradient but for the masks of the model's own dropout\n" in said


def test_a_split_says_so_where_the_head_drops(capsys):
    """It reads the learned tokens of all rows, so that their masks move with a split."""
    for targets, said in ((["q_proj", "lm_head"], " but for the masks of dropout on the head"),
                          (["q_proj"], "")):  # fmt: skip
        model = tiny(dropout=0.3, targets=targets)
        fit(model, examples(4), loss=limited(2), batch_size=4, max_steps=1, quiet=False)
        assert f"in passes of 2, with the same gradient{said}\n" in capsys.readouterr().err


def test_split_is_bit_equal_over_a_resumption(tmp_path):
    """The state knows the split, so no pass has to fail again."""
    options = {"batch_size": 6, "max_steps": 6, "schedule": "constant", "accumulate": 2}
    whole, half, again = (tiny(dropout=0.2) for _ in range(3))
    fit(whole, loss=limited(3), **options)
    fit(half, loss=limited(3), out=tmp_path, **{**options, "max_steps": 3})
    assert load_state(tmp_path)[1]["rows"] == [3]
    seen = []
    fit(again, loss=limited(3, seen), out=tmp_path, resume=True, **options)
    assert max(seen) == 3
    assert same(factors(whole), factors(again))


def test_split_of_a_half_in_which_nothing_is_learned():
    rows = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}]
    one, two = tiny().double(), tiny().double()
    options = {"batch_size": 2, "max_steps": 2, "dtype": "auto"}
    a, b = fit(one, rows, **options), fit(two, rows, loss=limited(1), **options)
    assert a.losses == pytest.approx(b.losses, rel=1e-12)


def test_one_row_that_does_not_fit_says_what_would():
    message = r"one row of \d+ tokens must fit in memory, .* checkpointing=True"
    with pytest.raises(RuntimeError, match=message):
        fit(tiny(), loss=limited(0), max_steps=1)


def test_another_error_is_not_taken_for_a_lack_of_memory():
    def loss(model, batch):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        fit(tiny(), loss=loss, max_steps=1)


def test_error_and_graph_are_gone_before_the_next_attempt():
    """Memory that the failed pass held must be free when it is tried again."""
    import gc
    import weakref

    held, alive = [], []

    class Holder:
        pass

    def loss(model, batch):
        if held and not alive:
            alive.append(held[0]() is not None)
        total, tokens = token_loss(model, batch)
        if len(batch) > 2:
            holder = Holder()
            held.append(weakref.ref(holder))
            raise torch.OutOfMemoryError(f"out of memory {len(batch)}")
        return total, tokens

    gc.disable()
    try:
        fit(tiny(), loss=loss, max_steps=1, batch_size=4)
    finally:
        gc.enable()
    assert alive == [False]


CHILD = """
import resource, sys
sys.path.insert(0, {tests!r})
import torch
from training_models import examples, fit, tiny
from minilora.running import token_loss
torch.set_num_threads(1)
fit(tiny(), examples(16), max_steps=1, batch_size=16)  # whatever is allocated once
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, -1))
def loss(model, batch):
    ballast = torch.empty(len(batch), 2**25 + 2**24, dtype=torch.uint8)  # 48 MiB a row
    total, tokens = token_loss(model, batch)
    return total + 0 * ballast[0, 0], tokens
# One epoch: the next would start a thread, and CPython waits for ever for one that lacks memory.
result = fit(tiny(), examples(32), loss=loss, max_steps=2, batch_size=16, quiet=False)
print(result.losses)
"""


def test_split_on_the_cpus_own_lack_of_memory():
    """In a process whose address space is limited the allocator fails in earnest."""
    code = textwrap.dedent(CHILD.format(tests=os.path.dirname(__file__)))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        "a micro-batch of 16 rows did not fit in memory: from here on in passes of" in done.stderr
    )
    expected = fit(tiny(), examples(32), max_steps=2, batch_size=16).losses
    assert eval(done.stdout) == pytest.approx(expected, rel=1e-5)


def test_masks_survive_checkpointing():
    """What the backward pass computes again draws the same masks."""
    plain, again = (tiny(dropout=0.3).double() for _ in range(2))
    options = {"max_steps": 2, "dtype": "auto"}
    fit(plain, **options)
    fit(again, checkpointing=True, **options)
    left, right = factors(plain), factors(again)
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-9, atol=1e-12)


def test_a_split_with_a_loss_of_ones_own():
    """A model that is not ours, its own loss, a tail batch smaller than the split."""

    def loss(model, batch):
        logits = model(batch.input_ids)[:, :-1].flatten(0, 1)
        labels = batch.labels[:, 1:].flatten()
        if len(batch) > 2:
            raise torch.OutOfMemoryError("too much")
        total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        return total, int((labels != -100).sum())

    torch.manual_seed(0)
    model = minilora.inject(Tiny(), r=2, alpha=3, exclude=["lm_head"])
    result = fit(model, examples(9), loss=loss, batch_size=4, epochs=1)
    assert result.steps == 3 and all(map(torch.isfinite, map(torch.tensor, result.losses)))
