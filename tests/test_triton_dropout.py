"""Dropout in one pass on CUDA by backend="torch": a kernel that hashes its mask.

Where there is no GPU, `dropout_mask` is told that kernels run on the CPU, as the interpreter's do.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sweeps import examples
from test_kernels_low_rank import frozen, general, oracle
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from triton_cases import DEVICE, DTYPES, SIZES, Output, needs_kernels, operand, seed_tensor

needs_kernels()

import minilora  # noqa: E402
from minilora.kernels import (  # noqa: E402
    drop,
    dropout,
    dropout_mask,
    lora_linear,
    row_masks,
)
from minilora.kernels.dropout import hashed_mask, row_seeds  # noqa: E402
from minilora.kernels.triton.dropout import launch_drop  # noqa: E402
from minilora.kernels.triton.launch import Launch  # noqa: E402
from minilora.kernels.triton.tiles import Tile, drop_tile  # noqa: E402
from minilora.lora import layer as layers  # noqa: E402
from minilora.models import Llama, LlamaConfig  # noqa: E402
from minilora.planning.saved import SavedBytes, saved_bytes  # noqa: E402
from minilora.running.loss import token_loss  # noqa: E402

PATHS = {"fused": lora_linear, "general": general}


@pytest.fixture(autouse=True)
def kernels_run_here(monkeypatch):
    monkeypatch.setattr(dropout, "runs_on", lambda device: True)


def as_in_torch(monkeypatch):
    """Let `dropout_mask` hash masks as traced code does, of the same seeds."""

    def drawn(x, p):
        return hashed_mask(row_seeds(x), x.numel() // x.shape[-1], x.shape[-1], p).view(x.shape)

    monkeypatch.setattr(layers, "dropout_mask", drawn)


# --- the kernel


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@examples(8, 30)
@given(
    m=SIZES,
    n=SIZES,
    p=st.sampled_from([0.0, 1e-9, 0.1, 0.5, 1 - 1e-6, 1 - 2**-40]),
    wide=st.booleans(),
)
def test_drop_applies_the_hashed_mask_to_the_bit(dtype, m, n, p, wide):
    x, seeds = operand(m, n, dtype=dtype), seed_tensor(m=m)
    out = Output(m, n, dtype=dtype)
    launch_drop(x, seeds, p, out.tensor, Tile(1, 64, 0, 0) if wide else Tile(8, 16, 0, 0)).run()
    assert torch.equal(out.checked(), torch.where(hashed_mask(seeds, m, n, p), x, 0))


@pytest.mark.parametrize("shape", [(7,), (0, 5), (4, 0), (6, 9), (6, 5, 9), (6, 3, 4, 2)], ids=str)
@pytest.mark.parametrize("layout", ["plain", "strided", "transposed"])
def test_an_input_of_any_shape_and_strides_is_dropped_as_rows(shape, layout):
    x = operand(*shape, layout="plain" if layout == "transposed" else layout)
    x = x.transpose(0, -1).contiguous().transpose(0, -1) if layout == "transposed" else x
    with row_masks([4, 2**62 + 1], DEVICE):
        seeds = dropout_mask(x, 0.5)
    assert seeds.shape == ((1,) if x.dim() == 1 else (2,))
    rows = x.numel() // max(1, shape[-1])
    mask = hashed_mask(seeds, rows, shape[-1], 0.5).view(shape)
    assert torch.equal(drop(x, seeds, 0.5), torch.where(mask, x, 0))


def test_the_chosen_tiles_have_16_elements_a_thread():
    assert {drop_tile(n).m * drop_tile(n).n for n in (1, 576, 4096, 11008)} == {2048}


# --- the layers


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(7, 24), (4, 5, 24), (2, 2, 3, 24)], ids=str)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.usefixtures("nan_memory")
def test_values_and_gradients_match_float64_with_the_same_mask(path, shape, strided):
    n, r, p, scaling = 20, 3, 0.4, 5 / 3
    x, W, b = operand(*shape), operand(n, 24), operand(n)
    A, B = operand(r, 24).requires_grad_(), operand(n, r).requires_grad_()
    x = x.transpose(0, -1).contiguous().transpose(0, -1) if strided else x
    x, G = x.requires_grad_(), operand(*shape[:-1], n)
    with row_masks([3, 5] if len(shape) > 2 else [3], DEVICE):
        seeds = dropout_mask(x, p)
    assert seeds.dtype == torch.int64
    y = PATHS[path](x, frozen(W, b), A, B, scaling, seeds, p)
    y.backward(G)
    mask = hashed_mask(seeds, x.numel() // 24, 24, p).view(shape)
    exact = oracle(x, W, b, A, B, scaling, mask, p, G)
    for found, wanted in zip((y, x.grad, A.grad, B.grad), exact, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize("path", PATHS)
def test_gradients_pass_gradcheck_once_and_twice(path):
    def leaf(*shape):
        return operand(*shape, dtype=torch.float64).requires_grad_()

    W, seeds = operand(2, 3, dtype=torch.float64), seed_tensor()

    def run(x, A, B):
        return PATHS[path](x, frozen(W, None), A, B, 7 / 3, seeds, 0.4)

    leaves = leaf(2, 3), leaf(1, 3), leaf(2, 1)
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def adapted(module, **options):
    torch.manual_seed(3)
    model = nn.Sequential(module).to(DEVICE)
    minilora.inject(model, r=3, alpha=7, targets=["0"], exclude=[], dropout=0.5, **options)
    for adapter in model[0].adapters.values():
        adapter.lora_B.data.normal_()
    return model


def gradients(model, x, seeds=(1, 2)):
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(4)
    with row_masks(seeds, DEVICE):
        y = model(x)
        y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize(
    ("module", "options", "path"),
    [
        (nn.Linear(8, 6), {}, "fused"),
        (nn.Linear(8, 6), {"compute_dtype": torch.float64}, "general"),
        (nn.Linear(8, 6), {"dora": True}, "general"),
        (nn.Linear(8, 6), {"init": "pissa"}, "general"),
        (nn.Conv2d(4, 5, 3), {}, "general"),
        (nn.Conv2d(4, 5, 3), {"dora": True}, "general"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_layers_have_the_numbers_of_a_mask_that_is_stored(monkeypatch, module, options, path):
    model = adapted(module, **options)
    x = torch.randn(*((4, 4, 5, 8) if isinstance(module, nn.Conv2d) else (4, 5, 8)), device=DEVICE)
    found = gradients(model, x)
    assert model[0].last_path == path
    as_in_torch(monkeypatch)
    for a, b in zip(found, gradients(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_eager_code_has_the_masks_of_traced_code_and_of_backend_triton(backend):
    model, x = adapted(nn.Linear(8, 6)), torch.randn(4, 5, 8, device=DEVICE)
    expected = gradients(model, x)
    if backend == "triton":
        model[0].backend = backend
        found = gradients(model, x)
    else:
        found = gradients(torch.compile(model, backend=backend, fullgraph=True), x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("parts", [[[0, 1], [2]], [[2, 0], [1]]], ids=["halves", "ranks"])
def test_a_row_has_its_mask_whatever_lies_beside_it(parts):
    model, seeds = adapted(nn.Linear(8, 6)), [11, 5, 2**62 + 7]
    x = torch.randn(3, 5, 8, device=DEVICE)
    whole = gradients(model, x, seeds)
    apart = [gradients(model, x[some], [seeds[i] for i in some]) for some in parts]
    for i, value in enumerate(whole):
        found = [part[i] for part in apart]
        if i < 2:  # of rows: y and grad_x
            order = [row for some in parts for row in some]
            torch.testing.assert_close(torch.cat(found), value[order], rtol=1e-6, atol=1e-6)
        else:
            torch.testing.assert_close(sum(found), value, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_mask(reentrant):
    model, x = adapted(nn.Linear(8, 6)), torch.randn(4, 5, 8, device=DEVICE)
    expected = gradients(model, x)
    again = gradients(Again(model, reentrant), x)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


class Again(nn.Module):
    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


# --- what it costs


@pytest.mark.parametrize("rows", [1, 16])
def test_a_layer_takes_three_launches_whatever_the_number_of_rows(monkeypatch, rows):
    model, run, seen = adapted(nn.Linear(8, 6)), Launch.run, []

    def counted(launch):
        seen.append(launch.kernel.fn.__name__)
        run(launch)

    monkeypatch.setattr(Launch, "run", counted)
    gradients(model, torch.randn(rows, 5, 8, device=DEVICE), range(rows))
    assert seen == ["drop"] * 3  # of x forward, of x and grad_x backward


def test_where_no_kernel_can_run_the_same_mask_is_hashed():
    """In batched gradients, under `torch.func`, while tracing, on values negated lazily."""
    x, G = (operand(6, 24).to(DEVICE).requires_grad_(wanted) for wanted in (True, False))
    seeds = seed_tensor(3)
    y = drop(x, seeds, 0.5)
    batched = torch.stack([G, 2 * G])
    (found,) = torch.autograd.grad(y, x, batched, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in batched]
    assert torch.equal(found, torch.stack(each))
    mapped = torch.vmap(lambda g: torch.autograd.grad(y, x, g, retain_graph=True)[0])(batched)
    assert torch.equal(mapped, found)
    lazy = torch.complex(torch.zeros_like(G), -G).conj().imag
    assert lazy.is_neg() and torch.equal(drop(lazy, seeds, 0.5), drop(G, seeds, 0.5))
    traced = make_fx(lambda t: drop(t, seeds, 0.5))(G)
    assert torch.equal(traced(2 * G), drop(2 * G, seeds, 0.5))


def llama(*targets, dtype=torch.float32):
    torch.manual_seed(6)
    model = Llama(LlamaConfig(19, 16, 24, 1, 2, 1, 8, 64), dtype=dtype)
    minilora.inject(model, r=2, alpha=3, targets=list(targets) or "all-linear", dropout=0.5)
    return model.to(DEVICE).train()


def test_no_mask_is_kept_and_a_plan_for_a_gpu_knows_it(monkeypatch):
    model, ids = llama(dtype=torch.bfloat16), torch.randint(0, 19, (2, 24), device=DEVICE)
    bases = [layer.base for layer in minilora.lora.lora_layers(model).values()]
    masks = 2 * 24 * sum(base.in_features for base in bases)
    monkeypatch.setattr("minilora.kernels.cpu.passes.native", lambda: None)
    monkeypatch.setattr("minilora.planning.saved.torch.cuda.is_available", lambda: False)
    real = []
    for gpu in (True, False):
        monkeypatch.setattr(dropout, "runs_on", lambda device, gpu=gpu: gpu)
        with saved_bytes() as bytes_of:
            model.hidden(ids)
        real.append(bytes_of(*model.parameters(), *model.buffers(), ids))
    assert real[1] - real[0] + 8 * len(bases) == masks  # a layer keeps a seed of 8 bytes
    assert SavedBytes(model)(2, 24).total == real[1]
    outputs = 2 * 24 * 16 * 2  # of attention, which a CPU's backward pass does without
    assert SavedBytes(model, device="cuda")(2, 24).total == real[0] + outputs


def test_fit_splits_a_micro_batch_with_the_same_gradient():
    def limited(model, batch):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return token_loss(model, batch)

    found = []
    for loss in (token_loss, limited):
        model = llama("q_proj", "up_proj")
        config = minilora.TrainConfig(max_steps=2, batch_size=4, dtype="float32", lr=0.1)
        rows = [{"input_ids": [1 + i, 2, 7 * i % 19, 3]} for i in range(8)]
        minilora.fit(model, rows, config=config, loss=loss, quiet=True)
        found.append([p.detach() for p in model.parameters() if p.requires_grad])
    for whole, split in zip(*found, strict=True):
        torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-5)
