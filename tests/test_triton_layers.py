"""Layers that asked for Triton: the torch path's numbers, autocast, checkpointing, compile."""

import pytest
import torch
from small_models import read_by
from torch import nn
from torch.utils.checkpoint import checkpoint
from triton_cases import DEVICE, needs_kernels

import minilora
from minilora.kernels import row_masks
from minilora.models import Conv1D, Llama, LlamaConfig
from minilora.running.loss import token_loss

needs_kernels()


class Two(nn.Module):
    """A linear with a bias, a Conv1D and a linear without."""

    def __init__(self, width=24):
        super().__init__()
        self.one = nn.Linear(width, 40)
        self.two = Conv1D(width, 40)
        self.three = nn.Linear(width, 9, bias=False)
        nn.init.normal_(self.two.weight, std=0.2)

    def forward(self, x):
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))


def pair(shake, dtype=torch.float32, **options):
    """The same adapted model twice: on torch, and on Triton."""
    models = []
    for backend in ("torch", "triton"):
        torch.manual_seed(3)
        model = Two().to(dtype).to(DEVICE)
        options = {"r": 5, "alpha": 8, "targets": "all-linear", "exclude": []} | options
        models.append(shake(minilora.inject(model, backend=backend, **options)))
    return models


def gradients(model, x):
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.float().square().mean().backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad} | named


def paths(model):
    return {m.last_path for m in model.modules() if hasattr(m, "last_path")}


def assert_same(found, expected, dtype):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        eps = torch.finfo(dtype).eps
        difference = (value.double() - expected[name].double()).norm()
        assert difference <= 8 * eps * expected[name].double().norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_triton_layers_match_the_torch_path(shake, dtype):
    plain, ours = pair(shake, dtype)
    x = torch.randn(2, 7, 24, device=DEVICE).to(dtype)
    assert_same(gradients(ours, x), gradients(plain, x), dtype)
    assert paths(ours) == {"triton"}
    assert paths(plain) == {"fused"}


def test_several_adapters_are_one_of_the_summed_rank(shake):
    plain, ours = pair(shake)
    for model in (plain, ours):
        torch.manual_seed(4)
        minilora.inject(model, r=3, alpha=5, targets="all-linear", adapter="b",
                        backend=model.one.backend)  # fmt: skip
        shake(model, "b", seed=5)
        minilora.activate(model, ["default", "b"], trainable=["default", "b"])
    x = torch.randn(11, 24, device=DEVICE)
    assert_same(gradients(ours, x), gradients(plain, x), torch.float32)
    assert paths(ours) == {"triton"}


def test_autocast_computes_in_its_dtype(shake):
    plain, ours = pair(shake)
    x = torch.randn(5, 24, device=DEVICE)
    with torch.autocast(DEVICE, torch.float16):
        found, expected = ours(x), plain(x)
    assert found.dtype == expected.dtype == torch.float16
    torch.testing.assert_close(found, expected, rtol=4e-3, atol=4e-3)
    assert paths(ours) == {"triton"}


def test_dropout_is_drawn_from_torchs_generator(shake):
    _, ours = pair(shake, dropout=0.5)
    x = torch.randn(6, 24, device=DEVICE)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(ours(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    ours.eval()
    assert torch.equal(ours(x), ours(x))


def test_dropout_averages_to_the_undropped_branch():
    """With W = 0 the output is the branch: its mean over draws is the branch without dropout."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(32, 4, bias=False)).to(DEVICE)
    layer[0].weight.data.zero_()
    minilora.inject(layer, r=2, alpha=2, targets=["0"], exclude=[], dropout=0.3, backend="triton")
    layer[0].adapters["default"].lora_B.data.normal_()
    draws = 4000 if DEVICE == "cuda" else 1000
    x = torch.randn(1, 32, device=DEVICE).expand(draws, 32).contiguous()  # a row is a draw
    with torch.no_grad():
        drawn = layer(x)
        exact = layer.eval()(x[:1])[0]
    error = drawn.std(0) / draws**0.5
    assert ((drawn.mean(0) - exact).abs() < 5 * error).all()


@pytest.mark.parametrize("format", [None, "int8", "nf4", "int4"])
@pytest.mark.parametrize("parts", [[[0, 1], [2]], [[2, 0], [1]]], ids=["halves", "ranks"])
def test_a_row_has_its_mask_whatever_lies_beside_it(format, parts):
    """Parts of a batch, as a split or another process has them, sum to the batch's gradient."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(128, 20)).to(DEVICE)
    if format:
        compute = read_by(format, compute="dequantize")
        minilora.quantize(model, format, targets=["0"], exclude=[], **compute)
    minilora.inject(model, r=3, alpha=7, targets=["0"], exclude=[], dropout=0.5, backend="triton")
    model[0].adapters["default"].lora_B.data.normal_()
    x, seeds, found = torch.randn(3, 5, 128, device=DEVICE), [11, 5, 2**62 + 7], []
    for rows in ([[0, 1, 2]], parts):
        model.zero_grad()
        out = torch.empty(3, 5, 20, device=DEVICE)
        for some in rows:
            torch.manual_seed(4)
            with row_masks([seeds[i] for i in some]):
                out[some] = model(x[some])
        out.square().sum().backward()
        factors = model[0].adapters["default"]
        found.append([out.detach(), factors.lora_A.grad, factors.lora_B.grad])
    assert paths(model) == {"triton"}
    for whole, apart in zip(*found, strict=True):
        torch.testing.assert_close(apart, whole, rtol=1e-5, atol=1e-4)


def test_fit_splits_a_micro_batch_with_the_same_gradient():
    """The pass that does not fit is repeated in halves, and the adapter goes the same way."""

    def limited(model, batch):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return token_loss(model, batch)

    found = []
    for loss in (token_loss, limited):
        torch.manual_seed(6)
        model = Llama(LlamaConfig(19, 16, 16, 1, 2, 1, 8, 16)).to(DEVICE)
        minilora.inject(model, r=2, alpha=3, targets=["q_proj", "up_proj"], dropout=0.5,
                        backend="triton")  # fmt: skip
        config = minilora.TrainConfig(max_steps=2, batch_size=4, dtype="float32", lr=0.1)
        rows = [{"input_ids": [1 + i, 2, 7 * i % 19, 3]} for i in range(8)]
        minilora.fit(model, rows, config=config, loss=loss, quiet=True)
        found.append([p.detach() for p in model.parameters() if p.requires_grad])
    assert paths(model) == {"triton"}
    for whole, split in zip(*found, strict=True):
        torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_mask(shake, reentrant):
    _, ours = pair(shake, dropout=0.4)
    x = torch.randn(6, 24, device=DEVICE)
    results = []
    for again in (False, True):
        ours.zero_grad()
        torch.manual_seed(7)
        leaf = x.clone().requires_grad_()
        y = checkpoint(ours, leaf, use_reentrant=reentrant) if again else ours(leaf)
        y.square().sum().backward()
        results.append(
            [y.detach(), leaf.grad, *(p.grad for p in ours.parameters() if p.requires_grad)]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compile_breaks_no_graph(shake, dropout):
    """The operators stay whole under backend="eager"; test_triton.py lowers them to kernels."""
    _, ours = pair(shake, dropout=dropout)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    x = torch.randn(6, 24, device=DEVICE)
    torch.manual_seed(1)
    expected = gradients(ours, x)
    ours.zero_grad()
    torch.manual_seed(1)
    found = gradients(compiled, x)
    found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
    assert_same(found, expected, torch.float32)


def test_a_base_that_must_be_called_takes_the_general_path(shake):
    plain, ours = pair(shake)
    for model in (plain, ours):
        model.one.base.register_forward_hook(lambda module, args, out: out * 2)
    x = torch.randn(6, 24, device=DEVICE)
    assert_same(gradients(ours, x), gradients(plain, x), torch.float32)
    assert ours.one.last_path == "general"
    assert ours.two.last_path == "triton"


def test_float64_raises_with_the_reason(shake):
    _, ours = pair(shake, torch.float64)
    with pytest.raises(
        RuntimeError,
        match="backend='triton' cannot run: its kernels compute in float32, float16 or bfloat16, "
        "found torch.float64; cast the input or use backend='torch'",
    ):
        ours(torch.randn(2, 24, dtype=torch.float64, device=DEVICE))


def test_a_second_derivative_raises(shake):
    _, ours = pair(shake)
    x = torch.randn(3, 24, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()
