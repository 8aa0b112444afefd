"""Mixed batches equal their adapters one by one; switching never recompiles."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import net, shake, two_adapters
from torch import nn
from torch.utils.checkpoint import checkpoint

import minilora
from minilora.kernels import row_masks
from minilora.lora import end_switching, mixed, prepare_switching
from minilora.lora.layer import lora_layers

ADAPTERS = {
    "a": {"r": 3, "alpha": 5},
    "b": {"r": 2, "alpha": 7, "rslora": True, "targets": ["embed", "up"]},
    "c": {"r": 4, "alpha": 6, "init": "pissa", "targets": ["up", "down"]},
    "d": {"r": 2, "alpha": 3, "dora": True, "targets": ["embed", "conv", "down"]},
    "e": {"r": 1, "alpha": 2, "lora_bias": True, "targets": ["up", "conv"]},
}


class Conv1D(nn.Module):
    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = (
            nn.Parameter(torch.randn(nx, nf) / 3),
            nn.Parameter(torch.randn(nf)),
        )

    def forward(self, x):
        return x @ self.weight + self.bias


class Net(nn.Module):
    """One layer of each kind: ids [B, 4] to [B, 5]."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.up, self.down = nn.Linear(6, 10), Conv1D(6, 10)
        self.conv = nn.Conv2d(2, 3, 2)
        self.head = nn.Linear(3 * 3 * 2, 5)

    def forward(self, ids):
        x = self.down(torch.tanh(self.up(self.embed(ids))))  # [B, 4, 6]
        x = self.conv(x.reshape(len(ids), 2, 4, 3))  # [B, 3, 3, 2]
        return self.head(torch.tanh(x).flatten(1))


def adapted(names=ADAPTERS, dropout=0.0):
    torch.manual_seed(0)
    model = Net()
    for name in names:
        options = {"targets": ["embed", "up", "down", "conv"], **ADAPTERS[name]}
        minilora.inject(model, adapter=name, dropout=dropout, **options)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for p in layer.adapters.parameters():
                p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


def one_by_one(model, ids, rows):
    outs = []
    for i, name in enumerate(rows):
        minilora.activate(model, None if name == "base" else name)
        outs.append(model(ids[i : i + 1]))
    return torch.cat(outs)


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.sampled_from(["base", *ADAPTERS]), min_size=1, max_size=8))
def test_mixed_rows_equal_each_adapter_alone(rows):
    model = adapted()
    ids = torch.arange(4 * len(rows)).reshape(-1, 4) * 5 % 9
    with torch.no_grad():
        expected = one_by_one(model, ids, rows)
        minilora.activate(model, ["a", "d"])  # of no matter within the block
        outside = model(ids)
        with mixed(model, rows):
            torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(ids), outside)


def test_mixed_gradients_equal_each_adapter_alone():
    model, rows = adapted().train(), ["d", "a", "base", "c", "b", "e", "a"]
    for layer in lora_layers(model).values():
        layer.adapters.requires_grad_(True)
    ids = torch.arange(28).reshape(7, 4) * 5 % 9
    grads = []
    for run in (lambda: one_by_one(model, ids, rows), lambda: model(ids)):
        model.zero_grad()
        with mixed(model, rows) if grads else minilora.disabled(model):
            if not grads:
                pass
            else:
                run().square().sum().backward()
        if not grads:
            run().square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert set(grads[0]) == set(grads[1])
    assert sum("adapters" in name for name in grads[0]) > 20
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5)


def test_mixed_recomputes_in_whatever_thread_runs_the_backward_pass():
    """Autograd's own, for a GPU."""
    model, ids = adapted().train(), torch.arange(12).reshape(3, 4) % 9
    for layer in lora_layers(model).values():
        layer.adapters.requires_grad_(True)
    grads = []
    for again in (False, True):
        model.zero_grad()
        with mixed(model, ["d", "a", "base"]):
            y = checkpoint(model, ids, use_reentrant=False) if again else model(ids)
            loss = y.square().sum()
            with ThreadPoolExecutor(1) as other:
                other.submit(loss.backward).result()
                with pytest.raises(RuntimeError, match="must be used by one thread"):
                    other.submit(model, ids).result()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert grads[0] and all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_mixed_draws_dropout_by_row():
    """Rows of the base are never dropped; a row's mask scales what it keeps."""
    model = adapted(["a"], dropout=0.5).train()
    ids = torch.tensor([[1, 2, 3, 4]]).expand(64, 4)
    with torch.no_grad(), mixed(model, ["a"] * 32 + ["base"] * 32):
        y = model(ids)
    with torch.no_grad(), minilora.disabled(model):
        plain = model(ids)
    assert torch.equal(y[32:], plain[32:])
    assert len(y[:32].unique(dim=0)) == 32


def test_mixed_rows_keep_their_masks_in_another_batch():
    model = adapted(["a"], dropout=0.5).train()
    ids, found = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]]), []
    for rows in ([0, 1], [0], [1]):
        torch.manual_seed(5)
        with torch.no_grad(), mixed(model, ["a"] * len(rows)), row_masks([7 + i for i in rows]):
            found.append(model(ids[rows]))
    torch.testing.assert_close(torch.cat(found[1:]), found[0])


def test_mixed_bfloat16_stays_bfloat16():
    model = adapted(["a", "b"]).bfloat16()
    ids = torch.arange(12).reshape(3, 4) % 9
    with torch.no_grad(), mixed(model, ["a", "base", "b"]):
        assert model(ids).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:minilora. r=")
def test_mixed_refuses():
    model = adapted(["a", "b"])
    for rows, error, text in [
        ("a", TypeError, "a list of adapters' names, one per row"),
        (["a", 3], TypeError, "a list of adapters' names"),
        (["a", "x"], ValueError, "no adapter 'x'; this model has: a, b"),
    ]:
        with pytest.raises(error, match=text), mixed(model, rows):
            pass
    with pytest.raises(ValueError, match="given 2 adapters.*saw 3 rows"), mixed(model, ["a", "b"]):
        model(torch.zeros(3, 4, dtype=torch.long))
    minilora.inject(model, adapter="whole", targets=["up"], modules_to_save=["head"])
    with pytest.raises(ValueError, match="'whole' brings trained copies"), mixed(model, ["whole"]):
        pass
    minilora.merge(model)
    with pytest.raises(RuntimeError, match=r"mixed\(\) needs unmerged"), mixed(model, ["a"]):
        pass
    with pytest.raises(ValueError, match=r"mixed\(\) needs a model with adapters"):
        mixed(Net(), ["base"]).__enter__()


def test_copies_of_the_active_adapter_act_on_no_row():
    model = adapted(["a", "b"]).eval()
    minilora.inject(model, adapter="whole", targets=["up"], modules_to_save=["head"], bias="all")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.5)
    ids = torch.arange(12).reshape(3, 4) % 9
    minilora.activate(model, "a")
    with mixed(model, ["a", "b", "base"]):
        wanted = model(ids)
    minilora.activate(model, "whole")
    before = model(ids)
    with mixed(model, ["a", "b", "base"]):
        assert torch.equal(model(ids), wanted)
    assert torch.equal(model(ids), before)


def test_what_mixed_would_ignore_is_refused():
    """Its rows decide: a base that is asked for must not be something else."""
    model, x = two_adapters().eval(), torch.randn(3, 12)
    with mixed(model, ["default", "b", "base"]):
        y = model(x)
        for call, verb in (
            (lambda: minilora.disabled(model).__enter__(), "a verb that switches adapters"),
            (lambda: minilora.disabled(model, "b").__enter__(), "a verb that switches adapters"),
            (lambda: minilora.activate(model, "b"), r"activate\(\)"),
        ):
            with pytest.raises(RuntimeError, match=f"^{verb} must be called outside of mixed"):
                call()
        assert torch.equal(model(x), y)
    with minilora.disabled(model):
        assert not torch.equal(model(x), y)
        with mixed(model, ["default", "b", "base"]):
            assert torch.equal(model(x), y)


def ranked():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), Conv1D(5, 12))
    for r in (4, 8, 16):
        minilora.inject(model, r=min(r, 16), alpha=r + 1, targets=["0", "2"], adapter=f"r{r}")
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for p in layer.adapters.parameters():
                p.normal_(std=0.3)
    return model.eval()


@pytest.mark.filterwarnings("ignore:minilora. r=")
def test_switching_never_recompiles(tmp_path):
    """Over 20 switches among r = 4, 8, 16, sums, the base and a hot swap: one compilation."""
    from torch._dynamo.testing import CompileCounterWithBackend

    model = ranked()
    plain = copy.deepcopy(model)
    minilora.save(model, tmp_path, "r8")
    prepare_switching(model, max_r=24)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(3, 6)
    choices = ["r4", "r8", "r16", None, ["r4", "r16"], ["r8", "r16"], "r8"] * 3
    with torch.no_grad():
        for choice in choices:
            minilora.activate(model, choice)
            minilora.activate(plain, choice)
            torch.testing.assert_close(compiled(x), plain(x), rtol=1e-5, atol=1e-6)
        with minilora.disabled(model), minilora.disabled(plain):
            torch.testing.assert_close(compiled(x), plain(x), rtol=1e-5, atol=1e-6)
        minilora.delete(model, "r8")
        minilora.load(model, tmp_path / "r8", "new")
        minilora.activate(plain, "r8")
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:minilora. r=")
def test_hot_swap_serves_new_weights(tmp_path):
    model, other = ranked(), ranked()
    with torch.no_grad():
        for layer in lora_layers(other).values():
            layer.adapters["r8"].lora_B.mul_(-2)
            layer.adapters["r8"].alpha = 3
    minilora.save(other, tmp_path, "r8")
    x = torch.randn(3, 6)
    parameter = model[0].adapters["r8"].lora_A
    for slots in (False, True):
        if slots:
            prepare_switching(model, max_r=16)
        minilora.activate(model, "r8")
        minilora.activate(other, "r8")
        minilora.load(model, tmp_path / "r8", "r8", replace=True, verify=False)
        assert model[0].adapters["r8"].lora_A is parameter
        torch.testing.assert_close(model(x), other(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="replace=True needs the layers, ranks and options"):
        minilora.load(model, tmp_path / "r8", "r16", replace=True, verify=False)


@pytest.mark.filterwarnings("ignore:minilora. r=")
def test_prepare_switching_refuses_and_ends():
    model = ranked()
    minilora.activate(model, ["r8", "r16"])
    for max_r, text in [(0, "max_r must be a whole"), (8, "'r16' on 0 has rank 16, and the slot"),
                        (20, "must hold what is active, found ranks 24")]:  # fmt: skip
        with pytest.raises(ValueError, match=text):
            prepare_switching(model, max_r)
        assert model[0].route is None
    minilora.activate(model, "r4")
    prepare_switching(model, 16)
    with pytest.raises(ValueError, match="adapter 'wide' on 0 has rank 17"):
        minilora.inject(model, r=17, adapter="wide", targets=["0"])
    with pytest.raises(ValueError, match="has DoRA, and a slot"):
        minilora.inject(model, r=2, dora=True, adapter="d", targets=["0"])
    with pytest.raises(ValueError, match=r"must fit the slots.*found ranks 20 on 0"):
        minilora.activate(model, ["r4", "r16"])
    model.train()
    with pytest.raises(RuntimeError, match=r"can't be trained.*call end_switching\(model\)"):
        model(torch.randn(2, 6))
    end_switching(model)
    model(torch.randn(2, 6)).sum().backward()
    minilora.inject(model, r=2, adapter="whole", targets=["0"], bias="lora_only")
    with pytest.raises(ValueError, match="'whole' brings trained copies"):
        prepare_switching(model, 16)


def test_slots_are_as_wide_as_the_widest_adapter(tmp_path):
    model = minilora.inject(net(), r=4, alpha=6, dtype=torch.bfloat16)
    model = shake(shake(minilora.inject(model, r=2, alpha=5, adapter="b")), "b").eval()
    minilora.save(model, tmp_path, "b")
    x = torch.randn(5, 12)
    with torch.no_grad():
        wanted = model(x)
        prepare_switching(model, 8)
        torch.testing.assert_close(model(x), wanted, rtol=1e-6, atol=1e-6)
        end_switching(model)
        minilora.delete(model, "b")
        prepare_switching(model, 8)
        minilora.load(model, tmp_path / "b", "b")
        torch.testing.assert_close(model(x), wanted, rtol=1e-6, atol=1e-6)


def test_a_state_dict_reaches_the_slots():
    trained, x = two_adapters().eval(), torch.randn(3, 12)
    model = minilora.inject(net(), r=4, alpha=6)
    minilora.inject(model, r=2, alpha=5, adapter="b", targets=["q_proj"])
    for one in (trained, model):
        minilora.activate(one, ["default", "b"])
    prepare_switching(model.eval(), 6)
    model.load_state_dict(trained.state_dict())
    torch.testing.assert_close(model(x), trained(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [minilora.disabled, lambda model: mixed(model, ["b", "base"])])
def test_blocks_keep_the_adapters_they_know(block, tmp_path):
    model, x = two_adapters().eval(), torch.randn(2, 12)
    minilora.save(model, tmp_path, adapter="b")
    minilora.activate(model, ["default", "b"])
    y = model(x)
    with block(model):
        for call in (
            lambda: minilora.delete(model, "b"),
            lambda: minilora.rename(model, "b", "c"),
            lambda: prepare_switching(model, 8),
            lambda: minilora.inject(model, r=2, adapter="d"),
            lambda: minilora.load(model, tmp_path / "b", "e"),
        ):
            with pytest.raises(RuntimeError, match="must be called outside of disabled.. and mix"):
                call()
        with pytest.raises(RuntimeError, match="must be called outside of"):
            minilora.merge(model, "b")
    assert torch.equal(model(x), y)
    minilora.rename(model, "b", "c")
    assert torch.equal(model(x), y)
