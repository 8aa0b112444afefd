"""The kernel over the logits against the softmax in float64, and against the tensor operations."""

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sweeps import examples
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_cases import DEVICE, DTYPES, INTERPRETED, Output, assert_as_exact, needs_kernels

needs_kernels()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from minilora.kernels.triton.cross_entropy import (  # noqa: E402
    exponents_by_rows,
    launch_exponents,
    tanh,
)
from minilora.kernels.triton.tiles import Tile  # noqa: E402

module = importlib.import_module("minilora.kernels.cross_entropy")
SMALL = Tile(0, 64, 0, 0, 4, 1)  # a row of 97 takes two blocks


def exact(logits, labels, cap):
    """Sums, losses and `e − s·onehot` in float64; for each the size of what it subtracts."""
    y, own = logits.double(), torch.zeros(logits.shape, dtype=torch.float64, device=DEVICE)
    own.scatter_(1, labels[:, None], 1.0)
    t = torch.tanh(y / cap) if cap else torch.zeros_like(y)
    z = cap * t if cap else y
    largest = z.amax(1, keepdim=True)
    e = torch.exp(z - largest)
    sums = e.sum(1, keepdim=True)
    picked = z.gather(1, labels[:, None])
    losses = sums.log() - (picked - largest)
    # The label's entry from the other ones: so it does not cancel here either.
    others = (e * (1 - own)).sum(1, keepdim=True)
    grad = (e * (1 - own) - others * own) * (1 - t**2)
    # An exponential is off by what its argument is, a difference of two numbers that are rounded.
    wide = e * (1 + z.abs() + largest.abs())
    total = wide.sum(1, keepdim=True)
    sizes = total, sums.log() + picked.abs() + largest.abs(), (wide + total * own) * (1 + t**2)
    if logits.dtype == torch.float16:
        return (torch.ones_like(sums), losses, grad / sums), (total, sizes[1], sizes[2] / sums)
    return (sums, losses, grad), sizes


def run(logits, labels, cap, tile=SMALL):
    """Launch on a copy, everything between guard bands of memory that is NaN before."""
    rows = len(logits)
    y = Output(*logits.shape, dtype=logits.dtype)
    y.tensor.copy_(logits)
    sums, losses = Output(rows, 1), Output(rows, 1)
    launch_exponents(y.tensor, labels, cap, sums.tensor, losses.tensor, tile).run()
    return sums.checked(), losses.checked(), y.checked()


def by_tensors(logits, labels, cap):
    y = logits.clone()
    sums, losses = module._exponents_by_rows(y, labels, cap)
    return sums, losses, y


def held(logits, labels, cap, found):
    """Hold each result to float64, as near as the tensor operations come."""
    plain = by_tensors(logits, labels, cap)
    truth = exact(logits, labels, cap)
    names = ("sums", "losses", "grad")
    for name, ours, theirs, right, size in zip(names, found, plain, *truth, strict=True):
        assert_as_exact(ours, right, theirs, name, size)


@pytest.mark.parametrize("dtype", DTYPES)
@examples(12, 60)
@given(
    rows=st.sampled_from([1, 2, 3, 7]),
    V=st.sampled_from([1, 2, 63, 64, 65, 97, 300]),
    label=st.sampled_from(["first", "last", "any"]),
    scale=st.sampled_from([0.01, 1.0, 20.0]),
    cap=st.sampled_from([None, 0.5, 3.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_sums_losses_and_gradient_match_float64(dtype, rows, V, label, scale, cap, seed):
    torch.manual_seed(seed)
    logits = (torch.randn(rows, V) * scale).to(dtype).to(DEVICE)
    labels = torch.randint(V, (rows,), device=DEVICE)
    if label != "any":
        labels.fill_(0 if label == "first" else V - 1)
    held(logits, labels, cap, run(logits, labels, cap))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [None, 30.0])
def test_the_tile_that_is_chosen_takes_rows_longer_than_itself(dtype, cap):
    logits = (torch.randn(3, 4097) * 5).to(dtype).to(DEVICE)
    labels = torch.tensor([0, 4096, 77], device=DEVICE)
    y = logits.clone()
    held(logits, labels, cap, (*exponents_by_rows(y, labels, cap), y))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [None, 5.0])
def test_extreme_logits_neither_overflow_nor_give_nan(dtype, cap):
    """The largest and the least numbers there are, −∞ among others, rows of equal ones."""
    most = torch.finfo(dtype).max
    logits = torch.zeros(6, 97, dtype=dtype, device=DEVICE)
    logits[0, 3] = most
    logits[1] = -most
    logits[2] = most
    logits[3, ::2] = -most
    logits[4, 5:] = float("-inf")
    logits[5, 65] = 1e4
    labels = torch.tensor([3, 96, 0, 1, 2, 65], device=DEVICE)
    truth, _ = exact(logits, labels, cap)
    for found, right in zip(run(logits, labels, cap), truth, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_gives_nan_and_leaves_the_others(value):
    logits = torch.randn(3, 97, device=DEVICE)
    logits[1, 70] = value
    labels = torch.tensor([1, 2, 3], device=DEVICE)
    sums, losses, y = torch.empty(3, 1), torch.empty(3, 1), logits.clone()
    sums, losses = sums.to(DEVICE), losses.to(DEVICE)
    launch_exponents(y, labels, None, sums, losses, SMALL).run()
    assert losses.isnan().flatten().tolist() == [False, True, False]
    assert (y / sums).isnan().all(1).tolist() == [False, True, False]


def test_the_label_of_a_sure_row_does_not_cancel():
    """p − 1 is −e^−12, which in bf16 would be 0 after 1 − p; without a cap its sum is near 1."""
    logits = torch.zeros(1, 2, dtype=torch.bfloat16, device=DEVICE)
    logits[0, 1] = 12
    _, losses, grad = run(logits, torch.tensor([1], device=DEVICE), None)
    right = torch.exp(torch.tensor(-12.0, dtype=torch.float64)).item()
    assert abs(grad[0, 1].item() + right) < 0.02 * right
    assert abs(losses.item() - right) < 0.02 * right


@triton.jit
def apply_tanh(x_ptr, out_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(out_ptr + offs, tanh(tl.load(x_ptr + offs)))


def test_tanh_is_exact_relative_to_itself():
    """From 1e−30 on, and closely around the end of the series; both signs."""
    x = torch.cat([torch.logspace(-30, 1.5, 192), torch.linspace(0.2, 0.3, 64)]).to(DEVICE)
    x = torch.cat([x, -x])
    found = torch.empty_like(x)
    apply_tanh[(1,)](x, found, SIZE=512)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(found.double(), torch.tanh(x.double()), rtol=8 * eps, atol=0)


@pytest.mark.skipif(not INTERPRETED, reason="loads are counted in the interpreter")
def test_each_logit_is_read_twice_and_written_once():
    import traffic

    logits = torch.randn(3, 300).bfloat16()
    sums, losses = torch.empty(3, 1), torch.empty(3, 1)
    launch = launch_exponents(logits, torch.zeros(3, dtype=torch.int64), None, sums, losses, SMALL)
    loads, stores = traffic.counted(launch)
    assert loads["y_ptr"] == 2 * logits.nbytes + 3 * 2  # and the label's once more
    assert stores["y_ptr"] == logits.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_through_the_kernel_is_the_one_without(monkeypatch, dtype, cap, reduction):
    """As on CUDA, where `runs_on` says so: several chunks, a strided label, both gradients."""
    hidden = torch.randn(90, 8).to(dtype).to(DEVICE).requires_grad_()
    weight = torch.randn(50, 8).to(dtype).to(DEVICE).requires_grad_(reduction == "mean")
    labels = torch.randint(50, (180,), device=DEVICE)[::2]
    inputs = [t for t in (hidden, weight) if t.requires_grad]
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(module, "_GPU_CHUNK_ELEMENTS", 1)
    found = []
    for taken in (False, True):
        monkeypatch.setattr(module, "runs_on", lambda device, taken=taken: taken)
        loss = module.linear_cross_entropy(hidden, weight, labels, cap=cap, reduction=reduction)
        found.append((loss, *torch.autograd.grad(loss.sum(), inputs)))
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).norm() <= 4 * torch.finfo(dtype).eps * a.double().norm()


@pytest.mark.skipif(not INTERPRETED, reason="on CUDA it does take the kernel")
def test_the_interpreter_alone_changes_nothing_on_a_cpu():
    assert module._way(torch.zeros(1), False) is module._exponents_by_rows


def test_what_the_kernel_lacks_takes_tensor_operations(monkeypatch):
    monkeypatch.setattr(module, "runs_on", lambda device: True)
    assert module._way(torch.zeros(1, device=DEVICE), False) is exponents_by_rows
    double = torch.zeros(1, dtype=torch.float64, device=DEVICE)
    assert module._way(double, False) is module._exponents_by_rows
    with FakeTensorMode():
        assert module._way(torch.zeros(1), False) is module._exponents_by_rows
