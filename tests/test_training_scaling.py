"""float16: a loss scale that moves as torch's own, skips overflows and resumes exactly."""

import json
import math
import re

import pytest
import torch
from training_models import CONFIG, examples, factors, fit, plain, same, tiny

import minilora
from minilora.models import Llama
from minilora.running.loss import token_loss
from minilora.training.scaling import FIRST_SCALE, LossScale
from minilora.training.state import load_state


def half(seed=0, **options):
    """A float16 base with a float32 adapter."""
    model = plain(seed).half()
    return minilora.inject(model, r=4, alpha=6, **options)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def overflowing(steps):
    """A loss whose gradient is Inf in these calls, though it is finite itself."""
    calls = []

    def loss(model, batch):
        total, count = token_loss(model, batch)
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) in steps:
                total = total + _Overflow.apply(total)
        return total, count

    return loss


class _Overflow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


@pytest.mark.parametrize("pattern", ["", "0", "00000", "11111", "1110111011111110", "01" * 20])
def test_loss_scale_moves_as_torchs_grad_scaler(pattern):
    ours = LossScale(2.0**10, growth=3)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for good in (mark == "1" for mark in pattern):
        parameter.grad = None
        theirs.scale(parameter.sum() * (1.0 if good else math.inf)).backward()
        theirs.step(optimizer)
        theirs.update()
        ours.after(good)
        assert ours.value == theirs.get_scale()
        assert ours.age == theirs._get_growth_tracker()


def test_loss_scale_stays_within_bounds_and_off_where_nothing_is_float16():
    low, high, off = LossScale(2.0**-13, growth=3), LossScale(2.0**23, growth=1), LossScale()
    for _ in range(9):
        low.after(False)
        high.after(True)
        off.after(False)
    assert (low.value, high.value, off) == (2.0**-14, 2.0**24, LossScale())
    assert not low.may_shrink() and high.may_shrink() and not off.may_shrink()


@pytest.mark.parametrize("how", ["base", "autocast"])
def test_fit_in_float16_learns_what_float32_learns(how, tmp_path, capsys):
    wide = tiny()
    expected = fit(wide, examples(6), valid=examples(6), epochs=20, lr=1e-2)
    narrow = half() if how == "base" else tiny()
    dtype = "auto" if how == "base" else "float16"
    got = fit(narrow, examples(6), valid=examples(6), epochs=20, lr=1e-2, dtype=dtype, out=tmp_path,
              quiet=False)  # fmt: skip
    assert got.before.loss == pytest.approx(expected.before.loss, rel=0.01)
    assert got.best.loss == pytest.approx(expected.best.loss, rel=0.05)
    assert got.best.loss < 0.8 * got.before.loss
    said = capsys.readouterr().err
    form = "base float16, no autocast" if how == "base" else "base float32, autocast float16"
    assert f"{form}, losses scaled by 256" in said
    assert {row["loss_scale"] for row in metrics(tmp_path) if "lr" in row} == {FIRST_SCALE}
    assert all(p.dtype == torch.float32 for p in factors(narrow).values())


def test_fit_in_float16_has_gradients_that_would_else_vanish():
    """A loss so small that its gradients lie below float16's smallest number."""

    def tiny_loss(model, batch):
        total, count = token_loss(model, batch)
        return total * 1e-6, count

    moved = {}
    for scaled in (True, False):
        model = half()
        before = factors(model)
        scale = LossScale(2.0**20, growth=2000) if scaled else LossScale()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("minilora.training.run.loss_scale", lambda *_, scale=scale: scale)
            try:
                fit(model, dtype="auto", max_steps=4, loss=tiny_loss, clip=None)
            except RuntimeError as error:
                assert "only zeros" in str(error)
        after = factors(model)
        moved[scaled] = sum(bool((after[n] != before[n]).any()) for n in before)
    assert moved[True] == len(before) > moved[False]


def test_fit_skips_an_overflow_and_halves_the_scale(tmp_path, capsys):
    """The step does nothing to the adapter, and the next one goes on as if it had not been."""
    model, expected = half(), half()
    result = fit(model, dtype="auto", max_steps=3, loss=overflowing({3}), out=tmp_path,
                 schedule="constant", warmup=0.0, shuffle=False, quiet=False)  # fmt: skip
    assert (result.steps, result.skipped, len(result.losses)) == (3, 1, 2)
    assert "step 3 skipped: loss" in capsys.readouterr().err
    fit(expected, dtype="auto", max_steps=2, schedule="constant", warmup=0.0, shuffle=False)
    assert same(factors(model), factors(expected))
    rows = [row for row in metrics(tmp_path) if "lr" in row]
    assert [row["loss_scale"] for row in rows] == [256, 256, 128]
    assert load_state(tmp_path)[1]["scale"] == {"value": 128.0, "age": 0, "growth": 2000}


def test_fit_finds_its_scale_before_it_gives_up(capsys):
    """Overflows do not count as bad steps while the scale can still fall, and do afterwards."""
    result = fit(half(), dtype="auto", max_steps=9, max_bad_steps=2, quiet=False,
                 loss=overflowing(set(range(1, 8))))  # fmt: skip
    assert (result.steps, result.skipped) == (9, 7)
    said = capsys.readouterr().err
    assert re.search(r"step 7 skipped: .*\(not finite\); loss scale now 2\n", said)
    with pytest.raises(RuntimeError, match="2 steps in a row had a non-finite loss or gradient"):
        fit(half(), dtype="auto", max_steps=90, max_bad_steps=2, loss=overflowing(range(99)))


def test_fit_gives_up_on_a_loss_that_is_not_finite_at_once(capsys):
    """A smaller scale does not mend a forward pass."""

    def loss(model, batch):
        total, count = token_loss(model, batch)
        return total * math.nan, count

    with pytest.raises(RuntimeError, match="2 steps in a row"):
        fit(half(), dtype="auto", max_steps=9, max_bad_steps=2, loss=loss)


@pytest.mark.parametrize("stop", [2, 4, 5])
def test_fit_resumes_in_float16_bit_for_bit(tmp_path, stop):
    """Across a skipped step and a growing scale, with accumulation and dropout."""
    options = {"dtype": "auto", "accumulate": 2, "lr": 1e-2, "schedule": "constant", "warmup": 0.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minilora.training.run.loss_scale", lambda *_: LossScale(2.0**5, growth=2))
        whole, part, again = (half(dropout=0.2) for _ in range(3))
        fit(whole, max_steps=8, loss=overflowing({7}), out=tmp_path / "whole", **options)
        fit(part, max_steps=stop, loss=overflowing({7}), out=tmp_path / "part", **options)
        after = overflowing({7 - 2 * stop})
        fit(again, max_steps=8, loss=after, out=tmp_path / "part", resume=True, **options)
    assert same(factors(whole), factors(again))
    scales = [
        [row["loss_scale"] for row in metrics(tmp_path / name) if "lr" in row]
        for name in ("whole", "part")
    ]
    assert scales[0] == scales[1] == [32, 64, 64, 32, 32, 64, 64, 128]
    facts = load_state(tmp_path / "part")[1]
    assert facts["skipped"] == 1 and facts["scale"] == vars(LossScale(2.0**7, 0, 2))


def test_fit_in_float16_clips_and_accumulates_unscaled_gradients():
    """The scale, a power of 2, takes part in nothing: with any one the numbers are the same."""
    ends = []
    for scale in (1.0, 2.0**6, 2.0**13):
        model = tiny()
        with pytest.MonkeyPatch.context() as patch:
            start = LossScale(scale, growth=2000)
            patch.setattr("minilora.training.run.loss_scale", lambda *_, start=start: start)
            fit(model, max_steps=5, accumulate=3, clip=0.01, lr=1e-2)
        ends.append(factors(model))
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])
    plainly = tiny()
    fit(plainly, max_steps=5, accumulate=3, clip=0.01, lr=1e-2)
    assert same(ends[0], factors(plainly))


def test_fit_refuses_to_train_float16_parameters():
    with pytest.raises(ValueError, match=r"found model\.norm\.weight in float16, .*base as well"):
        fit(half(modules_to_save=["norm"]), dtype="auto")
    frozen = half(dtype="float16", adapter="other")
    minilora.inject(frozen, r=2, alpha=3)
    minilora.activate(frozen, ["other", "default"], trainable="default")
    assert fit(frozen, dtype="auto", max_steps=1).steps == 1
    assert isinstance(frozen, Llama) and CONFIG.vocab_size == 61
