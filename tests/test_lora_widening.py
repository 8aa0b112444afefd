"""bfloat16 on a CPU that multiplies it slowly: every product in float32, results rounded once.

Whether a CPU is such a one is said by a faked `hardware()`, so that all machines test both kinds.
"""

import dataclasses

import pytest
import torch
from small_models import read_by
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import minilora
from minilora.kernels import (
    FrozenLinear,
    causal_attention,
    conv1d_forward,
    conv1d_grad_x,
    cross_entropy,
    dense_forward,
    dense_grad_x,
    dropout_mask,
    frozen_product,
    hardware,
    linear_cross_entropy,
    lora_add,
    lora_linear,
    probe,
)
from minilora.lora.layer import lora_layers
from minilora.lora.widening import widened
from minilora.models import GPT2, GPT2Config, Llama, LlamaConfig
from minilora.running.evaluation import evaluate
from minilora.running.generation import generate
from minilora.training.config import TrainConfig
from minilora.training.loop import fit

BF16 = torch.bfloat16
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "addmm_", "linear", "matmul")


class Products(TorchDispatchMode):
    """Collects the dtypes that matrix products run in."""

    def __init__(self):
        super().__init__()
        self.dtypes, self.of_linears = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in PRODUCTS:
            found = {a.dtype for a in args if isinstance(a, torch.Tensor)}
            self.dtypes |= found
            if "bmm" not in func.overloadpacket.__name__:
                self.of_linears |= found
        return func(*args, **(kwargs or {}))


def claim(monkeypatch, float32, bfloat16):
    found = dataclasses.replace(hardware(), float32=float32, bfloat16=bfloat16)
    monkeypatch.setattr(probe, "hardware", lambda *_: found)
    torch._dynamo.reset()  # a compiled function keeps what it was told


@pytest.fixture
def slow(monkeypatch):
    claim(monkeypatch, 66.0, 1.0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def fast(monkeypatch):
    claim(monkeypatch, 400.0, 2700.0)
    yield
    torch._dynamo.reset()


def rounded_once(found, true):
    """Half a unit in the last place of bf16 (2⁻⁸ relative), and f32's rounding of the sums."""
    assert found.dtype == BF16
    torch.testing.assert_close(found.double(), true, rtol=2**-8 * 1.01, atol=2e-5)


def layer(kind, n=13, k=17):
    W, b = torch.randn(n, k).to(BF16), torch.randn(n).to(BF16)
    if kind == "dense":
        return FrozenLinear((W, b), dense_forward, dense_grad_x), W.double(), b.double()
    return (
        FrozenLinear((W.t().contiguous(), b), conv1d_forward, conv1d_grad_x),
        W.double(),
        (b.double()),
    )


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["dense", "conv1d"])
def test_lora_linear_is_the_oracle_rounded_once(slow, kind, p):
    base, W, b = layer(kind)
    A, B = torch.randn(3, 17, requires_grad=True), torch.randn(13, 3, requires_grad=True)
    x, G = torch.randn(2, 5, 17).to(BF16).requires_grad_(), torch.randn(2, 5, 13).to(BF16)
    mask = dropout_mask(x, p) if p else None
    with Products() as products:
        y = lora_linear(x, base, A, B, 5 / 3, mask, p)
        gx, gA, gB = torch.autograd.grad(y, (x, A, B), G)
    assert products.dtypes == {torch.float32}
    keep = 1.0 if mask is None else mask.double() / (1 - p)
    X, g, delta = x.detach().double(), G.double(), 5 / 3 * (B @ A).detach().double()
    rounded_once(y, X @ W.T + (X * keep) @ delta.T + b)
    rounded_once(gx, g @ W + (g @ delta) * keep)
    g_delta = 5 / 3 * torch.einsum("abn,abk->nk", g, X * keep)
    torch.testing.assert_close(gA.double(), B.detach().double().T @ g_delta, rtol=1e-4, atol=1e-4)
    S = ((X * keep) @ A.detach().double().T).to(BF16).double()  # kept in x's dtype
    wanted = 5 / 3 * torch.einsum("abn,abr->nr", g, S)
    torch.testing.assert_close(gB.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_single_row_reads_the_weight_as_it_is(slow, rows):
    base, W, b = layer("dense")
    x = torch.randn(rows, 17).to(BF16)
    with Products() as products, torch.no_grad():
        y = frozen_product(x, base)
    assert products.dtypes == ({BF16} if rows == 1 else {torch.float32})
    torch.testing.assert_close(y.double(), x.double() @ W.T + b, rtol=2**-7, atol=2e-2)


def test_a_fast_cpu_multiplies_what_it_is_given(fast):
    base, *_ = layer("dense")
    A, B = torch.randn(3, 17), torch.randn(13, 3)
    x = torch.randn(4, 17).to(BF16).requires_grad_()
    head, labels = torch.randn(11, 17).to(BF16), torch.tensor([1, 2, 3, 4])
    with Products() as products:
        lora_linear(x, base, A, B, 2.0).sum().backward()
        lora_add(x.detach()[:, :13], x.detach(), A, B, 2.0)
        linear_cross_entropy(x, head, labels).backward()
        frozen_product(x, base).sum().backward()
    assert products.dtypes == {BF16}


def test_a_frozen_product_and_the_general_branch(slow):
    base, W, b = layer("conv1d")
    A, B = torch.randn(3, 17), torch.randn(13, 3)
    x, G = torch.randn(6, 17).to(BF16).requires_grad_(), torch.randn(6, 13).to(BF16)
    y0 = torch.randn(6, 13).to(BF16)
    with Products() as products:
        y = frozen_product(x, base)
        (gx,) = torch.autograd.grad(y, x, G)
        added = lora_add(y0, x.detach(), A, B, 4 / 3)
    assert products.dtypes == {torch.float32}
    rounded_once(y, x.detach().double() @ W.T + b)
    rounded_once(gx, G.double() @ W)
    branch = 4 / 3 * x.detach().double() @ A.double().T @ B.double().T
    rounded_once(added, y0.double() + branch)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("panel", [2**22, 5 * 9])  # all rows of the head, or five at a time
def test_the_loss(slow, autocast, fused, panel, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_PANEL_ELEMENTS", panel)
    hidden, weight = torch.randn(70, 9).to(BF16), torch.randn(23, 9).to(BF16)
    labels = torch.randint(23, (70,))
    h, W = (
        t.float().requires_grad_() if autocast else t.requires_grad_() for t in (hidden, weight)
    )
    with Products() as products, torch.autocast("cpu", BF16, enabled=autocast):
        loss = linear_cross_entropy(h, W, labels, fused=fused, reduction="sum")
        gh, gW = torch.autograd.grad(loss, (h, W))
    assert products.dtypes == {torch.float32}
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    true = nn.functional.cross_entropy(exact[0] @ exact[1].T, labels, reduction="sum")
    wanted = torch.autograd.grad(true, exact)
    assert loss.item() == pytest.approx(true.item(), rel=1e-5)
    for mine, theirs in zip((gh, gW), wanted, strict=True):
        rounded_once(mine.to(BF16), theirs)


@pytest.mark.parametrize("traced", [False, True])
def test_attention_backwards(slow, traced):
    q, k, v = (torch.randn(2, h, 150, 8).to(BF16).requires_grad_() for h in (6, 2, 2))
    G = torch.randn(2, 6, 150, 8).to(BF16)
    run = torch.compile(causal_attention, dynamic=True) if traced else causal_attention
    out = run(q, k, v, 0.3)
    with Products() as products:
        found = torch.autograd.grad(out, (q, k, v), G)
    assert traced or products.dtypes == {torch.float32}  # the mode sees no compiled graph
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    true = nn.functional.scaled_dot_product_attention(
        *exact, is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(out.double(), true, rtol=0.02, atol=0.02)
    for mine, theirs in zip(found, torch.autograd.grad(true, exact, G.double()), strict=True):
        error = (mine.double() - theirs).norm() / theirs.norm()
        assert error < 0.01, error


LLAMA = LlamaConfig(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=6,
)  # fmt: skip
GPT = GPT2Config(vocab_size=61, n_positions=64, n_embd=24, n_layer=2, n_head=4)
ROWS = [{"input_ids": list(range(i, i + 9))} for i in range(1, 7)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_run_an_evaluation_and_a_text_never_multiply_bf16(slow, kind):
    torch.manual_seed(0)
    model = Llama(LLAMA) if kind == "llama" else GPT2(GPT)
    minilora.inject(model.to(BF16), r=2, alpha=3, targets=["q_proj" if kind == "llama" else "c_fc"])
    before = {name: "forward" in m.__dict__ for name, m in model.named_modules()}
    with Products() as products:
        fit(model, ROWS, config=TrainConfig(max_steps=2))
        evaluate(model, ROWS)
        generate(model, [[1, 2, 3], [4, 5, 6]], max_new_tokens=2)
    assert products.dtypes == {torch.float32}
    assert before == {name: "forward" in m.__dict__ for name, m in model.named_modules()}
    assert {layer.last_path for layer in lora_layers(model).values()} == {"fused"}


def test_a_transformers_model_trains_with_linears_and_head_in_float32(slow):
    transformers = pytest.importorskip("transformers")
    entries = {k: v for k, v in dataclasses.asdict(LLAMA).items() if v is not None}
    config = transformers.LlamaConfig(**entries, attn_implementation="sdpa")
    model = transformers.LlamaForCausalLM(config).to(BF16)
    minilora.inject(model, r=2, alpha=3, targets=["q_proj"])
    minilora.evaluate(model, ROWS)  # tries four tokens once, with a hook on the head
    with Products() as products:
        fit(model, ROWS, config=TrainConfig(max_steps=1))
    assert products.of_linears == {torch.float32}  # its own attention is left as it is


def test_a_call_by_keyword_and_a_layer_without_a_weight_are_left_alone(slow):
    linear, bare = nn.Linear(5, 3).to(BF16).requires_grad_(False), nn.Linear(5, 3)
    del bare.weight
    x = torch.randn(4, 5).to(BF16)
    plain = linear(input=x)
    with widened(nn.ModuleList([linear, bare])):
        assert torch.equal(linear(input=x), plain)
        with pytest.raises(TypeError, match="positional argument"):
            linear(x, x)
        with pytest.raises(RuntimeError, match="shape"):
            linear(torch.randn(4, 6).to(BF16))
        assert "forward" not in bare.__dict__


def test_what_trains_or_does_more_than_its_class_computes_as_before(slow):
    net = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)).to(BF16)
    for module in net[1:]:
        module.requires_grad_(False)
    net[1].register_forward_hook(lambda *_: None)
    net[2].forward = own = lambda x: x
    x = torch.randn(3, 5).to(BF16)
    plain = [module(x) for module in net]
    with widened(net):
        found = [module(x) for module in net]
        assert net[2].forward is own
    for i in range(3):
        assert torch.equal(found[i], plain[i])
    found[0].sum().backward()
    assert net[0].weight.grad is not None
    assert "forward" not in net[3].__dict__ and net[2].forward is own


def test_an_error_puts_forwards_back(slow):
    net = nn.Sequential(nn.Linear(5, 5)).to(BF16).requires_grad_(False)
    with pytest.raises(KeyError), widened(net), widened(net):
        assert "forward" in net[0].__dict__
        raise KeyError
    assert "forward" not in net[0].__dict__


def test_nothing_is_replaced_where_bf16_is_fast_or_absent(fast, monkeypatch):
    net = nn.Sequential(nn.Linear(5, 5))
    with widened(net.to(BF16)):
        assert "forward" not in net[0].__dict__
    claim(monkeypatch, 66.0, 1.0)
    monkeypatch.setattr(probe, "hardware", None)  # a float32 model does not pay for the probe
    with widened(net.float()):
        assert "forward" not in net[0].__dict__


def test_autocast_over_a_bf16_layer_is_widened(slow):
    linear = nn.Linear(7, 5).to(BF16).requires_grad_(False)
    x = torch.randn(3, 7)
    with widened(linear), Products() as products, torch.autocast("cpu", BF16):
        y = linear(x)
    assert products.dtypes == {torch.float32}
    rounded_once(y, x.to(BF16).double() @ linear.weight.double().T + linear.bias.double())


@pytest.mark.parametrize("format", [None, "nf4"])
def test_compiled_steps_are_the_eager_ones(slow, format):
    losses = []
    for compile in (False, True):
        torch.manual_seed(0)
        wider = dataclasses.replace(
            LLAMA, hidden_size=64, intermediate_size=64, num_hidden_layers=1
        )
        model = Llama(wider).to(BF16)
        if format is not None:
            minilora.quantize(model, format, **read_by(format, block_size=32))
        minilora.inject(model, r=2, alpha=3)
        config = TrainConfig(max_steps=3, lr=1e-2, compile=compile)
        losses.append(fit(model, ROWS, config=config).losses)
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
