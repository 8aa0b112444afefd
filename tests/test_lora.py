"""LoRA on linears against a dense float64 oracle, and the files against PEFT itself."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import minilora
from minilora.kernels import dropout_mask, linear_cross_entropy, lora_linear, reference
from minilora.layers import LoRALinear, frozen_linear, lora_layers

SIZES = st.sampled_from([1, 2, 3, 7, 13, 16, 33])


class Net(nn.Module):
    def __init__(self, k=12, n=20):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(k, n), nn.Linear(k, n, bias=False)
        self.mlp = nn.Sequential(nn.Linear(n, n), nn.GELU(), nn.Linear(n, k))
        self.lm_head = nn.Linear(k, 9)

    def forward(self, x):
        return self.lm_head(self.mlp(self.q_proj(x) * self.v_proj(x)))


def net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Net().to(dtype)


def shake(model, adapter="default", scale=0.3):
    for layer in lora_layers(model).values():
        if adapter in layer.adapters:
            nn.init.normal_(layer.adapters[adapter].lora_B, std=scale)
    return model


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before, flags):
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [p.requires_grad for p in model.parameters()] == flags


@settings(max_examples=40, deadline=None)
@given(m=st.integers(0, 9), k=SIZES, n=SIZES, r=st.integers(1, 9), dims=st.integers(1, 4),
       bias=st.booleans(), fused=st.booleans(), seed=st.integers(0, 99))  # fmt: skip
def test_lora_linear_matches_the_dense_oracle(m, k, n, r, dims, bias, fused, seed):
    """Output and every gradient, both paths, 1-D to 4-D, empty batches, r above min(in, out)."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(k, n, bias=bias))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minilora.inject(model, r=r, alpha=2.5 * r + 1)
    shake(model)
    layer = model[0]
    if not fused:
        layer.base.register_forward_hook(lambda *_: None)
    shape = {1: (k,), 2: (m, k), 3: (2, m, k), 4: (1, m, 3, k)}[dims]
    x = torch.randn(shape, requires_grad=True)
    y = model(x)
    grad_out = torch.randn_like(y)
    y.backward(grad_out)
    assert layer.last_path in ((None,) if not x.numel() else ("fused" if fused else "general",))
    factors = layer.adapters["default"]
    A, B = factors.lora_A.detach().double(), factors.lora_B.detach().double()
    W, X, G = layer.base.weight.double(), x.detach().double(), grad_out.double()
    scaling = (2.5 * r + 1) / r
    expected = X @ (W + scaling * B @ A).T + (layer.base.bias.double() if bias else 0)
    flat_x, flat_g = X.reshape(-1, k), G.reshape(-1, n)
    pairs = [
        (y, expected),
        (x.grad, G @ (W + scaling * B @ A)),
        (factors.lora_A.grad, scaling * (flat_g @ B).T @ flat_x),
        (factors.lora_B.grad, scaling * flat_g.T @ (flat_x @ A.T)),
    ]
    for ours, oracle in pairs:
        torch.testing.assert_close(ours.double(), oracle, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("fused", [True, False])
def test_lora_linear_gradcheck_and_dropout_masks_grad_x(p, fused):
    layer = minilora.inject(
        nn.Sequential(nn.Linear(5, 4).double()), r=2, alpha=3, dropout=p, dtype=torch.float64
    )
    shake(layer)
    if not fused:
        layer[0].base.register_forward_hook(lambda *_: None)

    def run(x, A, B):
        torch.manual_seed(3)  # the same mask each time
        swap = {"0.adapters.default.lora_A": A, "0.adapters.default.lora_B": B}
        return torch.func.functional_call(layer, swap, (x,))

    factors = layer[0].adapters["default"]
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, factors.lora_A, factors.lora_B))


def test_reference_backward_is_autograd_of_its_forward():
    x, W, A, B, g = (
        torch.randn(s, dtype=torch.float64) for s in ((5, 4), (3, 4), (2, 4), (3, 2), (5, 3))
    )
    mask = dropout_mask(x, 0.5)
    leaves = [t.clone().requires_grad_() for t in (x, A, B)]
    y = reference.lora_linear(leaves[0], W, None, leaves[1], leaves[2], 1.7, mask, 0.5)
    found = torch.autograd.grad(y, leaves, g)
    expected = reference.lora_linear_backward(g, x, W, A, B, 1.7, mask, 0.5)
    fused = [t.clone().requires_grad_() for t in (x, A, B)]
    frozen = frozen_linear(_frozen(W))
    ours = torch.autograd.grad(lora_linear(fused[0], frozen, *fused[1:], 1.7, mask, 0.5), fused, g)
    for a, b, c in zip(found, expected, ours, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(c, b)


def _frozen(weight):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight.dtype)
    linear.weight.data.copy_(weight)
    return linear.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_narrow_dtypes_are_as_exact_as_plain_torch(dtype, autocast):
    """RMS error against float64 at most 1.5 times that of the plain three-matmul sum."""
    torch.manual_seed(0)
    model = minilora.inject(nn.Sequential(nn.Linear(64, 48)), r=4, alpha=6)
    shake(model)
    factors, base = model[0].adapters["default"], model[0].base
    x = torch.randn(128, 64)
    A, B, W, b = (
        t.detach().double() for t in (factors.lora_A, factors.lora_B, base.weight, base.bias)
    )
    exact = x.double() @ (W + 1.5 * B @ A).T + b
    plain = x.to(dtype) @ W.to(dtype).T + b.to(dtype)
    plain = plain + 1.5 * ((x.to(dtype) @ A.to(dtype).T) @ B.to(dtype).T)
    if autocast:
        with torch.autocast("cpu", dtype=dtype):
            y = model(x)
    else:
        base.to(dtype)
        y = model(x.to(dtype))
    assert y.dtype == dtype and model[0].last_path == "fused"
    error = (y.double() - exact).square().mean().sqrt()
    assert error <= 1.5 * (plain.double() - exact).square().mean().sqrt()


def test_saved_for_backward_is_x_s_and_the_factors():
    model = minilora.inject(nn.Sequential(nn.Linear(64, 48)), r=4, alpha=6)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        model(torch.randn(10, 64))
    assert sorted(sizes) == sorted([10 * 64, 10 * 4, 4 * 64, 48 * 4, 48 * 64, 48])


def test_compiled_layer_gives_the_same_numbers():
    model = shake(minilora.inject(nn.Sequential(nn.Linear(16, 8)), r=4, alpha=6))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 16)
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append(model[0].adapters["default"].lora_A.grad.clone())
    torch.testing.assert_close(*grads)


def test_general_path_is_taken_where_the_base_may_do_more():
    linear = nn.Linear(4, 4).requires_grad_(False)
    assert frozen_linear(linear) is not None
    hooked = copy.deepcopy(linear)
    hooked.register_forward_hook(lambda *_: None)
    replaced = copy.deepcopy(linear)
    replaced.forward = lambda x: x
    trainable = copy.deepcopy(linear).requires_grad_(True)
    shaped = nn.utils.parametrizations.weight_norm(copy.deepcopy(linear))
    subclass = type("Mine", (nn.Linear,), {})(4, 4).requires_grad_(False)
    for base in (hooked, replaced, trainable, shaped, subclass):
        assert frozen_linear(base) is None


def test_fresh_adapter_changes_nothing_and_freezes_the_rest():
    model, x = net(), torch.randn(3, 12)
    before = model(x)
    minilora.inject(model, r=4, alpha=6)
    assert torch.equal(model(x), before)
    model(x).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("adapters.default" in name)
        assert (parameter.grad is not None) == parameter.requires_grad


def test_adapters_sum_switch_and_roll_back():
    model, x = net().double(), torch.randn(3, 12, dtype=torch.float64)
    base = model(x)
    shake(minilora.inject(model, r=2, alpha=3, dtype=torch.float64))
    first = model(x)
    shake(minilora.inject(model, r=3, alpha=7, adapter="b", dtype=torch.float64), "b")
    second = model(x)
    minilora.activate(model, ["default", "b"])
    q = model.q_proj
    both = q.base.weight + sum(f.delta_weight() for f in q.adapters.values())
    torch.testing.assert_close(q(x), x @ both.T + q.base.bias)
    with minilora.disabled(model):
        assert torch.equal(model(x), base)
    minilora.activate(model, "b")
    assert torch.equal(model(x), second)
    minilora.activate(model, "default", trainable="b")
    assert torch.equal(model(x), first)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(flag == ("adapters.b." in name) for name, flag in flags.items())
    minilora.activate(model, None)
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("keep", ["memory", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_restores_the_very_bits(keep, dtype):
    model, x = net(dtype=dtype), torch.randn(3, 12, dtype=dtype)
    shake(minilora.inject(model, r=4, alpha=6))
    before, y = bits(model), model(x)
    W = model.q_proj.base.weight
    delta = model.q_proj.adapters["default"].delta_weight().to(dtype)
    assert not torch.equal((W + delta) - delta, W)  # subtracting would not do
    minilora.merge(model, keep=keep)
    model.eval()
    assert not torch.equal(model.q_proj.base.weight, before["q_proj.base.weight"])
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(model(x), y, rtol=tolerance, atol=tolerance)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        minilora.unmerge(one)
        unchanged(one, before, [p.requires_grad for p in model.parameters()])


def test_merged_model_refuses_what_would_be_lost(tmp_path):
    model, x = shake(minilora.inject(net(), r=4, alpha=6)), torch.randn(3, 12)
    minilora.save(model, tmp_path / "before")
    minilora.merge(model, keep=None)
    minilora.save(model, tmp_path / "after")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    model.train()
    calls = {
        "a merged adapter can't be trained": lambda: model(x),
        r"inject\(\) needs unmerged": lambda: minilora.inject(model, adapter="b"),
        r"load\(\) needs unmerged": lambda: minilora.load(model, tmp_path / "before", "b"),
        r"activate\(\) needs unmerged": lambda: minilora.activate(model, None),
        r"merge\(\) needs unmerged": lambda: minilora.merge(model),
        r"kept none": lambda: minilora.unmerge(model),
    }
    for text, call in calls.items():
        with pytest.raises(RuntimeError, match=text):
            call()
    merged = model.q_proj.base.weight.clone()
    assert torch.equal(minilora.eject(model).q_proj.weight, merged)


def test_merge_refuses_shared_and_overflowing_weights():
    tied = nn.Module()
    tied.embed, tied.out = nn.Embedding(9, 12), nn.Linear(12, 9, bias=False)
    tied.out.weight = tied.embed.weight
    shake(minilora.inject(tied, r=2, alpha=3, targets=["out"]))
    with pytest.raises(ValueError, match=r"merging into out would change embed\.weight too"):
        minilora.merge(tied)
    small = minilora.inject(nn.Sequential(nn.Linear(4, 4).half()), r=2, alpha=3)
    small[0].adapters["default"].lora_B.data.fill_(1e7)
    before = bits(small)
    with pytest.raises(ValueError, match="merged weight of 0 must be finite"):
        minilora.merge(small)
    unchanged(small, before, [p.requires_grad for p in small.parameters()])


def test_eject_gives_the_plain_model_back():
    model = net()
    model.v_proj.weight.requires_grad_(False)
    before, flags = bits(model), [p.requires_grad for p in model.parameters()]
    shake(minilora.inject(model, r=4, alpha=6))
    minilora.eject(model)
    unchanged(model, before, flags)


def test_copies_and_pickles_keep_the_numbers():
    model, x = shake(minilora.inject(net(), r=4, alpha=6)), torch.randn(3, 12)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        shake(twin)
        assert not torch.equal(twin(x), model(x))


REFUSED = [
    ({"targets": ["q_proj", "v_porj"]}, ValueError, r"'v_porj' matches none; did you mean v_proj"),
    ({"targets": ["proj"]}, ValueError, "'proj' matches none"),
    ({"targets": "q_proj|nothing.*x"}, None, None),
    ({"targets": "vproj"}, ValueError, r"pass a list: targets=\['vproj'\]"),
    ({"targets": "("}, ValueError, "valid regular expression"),
    ({"targets": []}, ValueError, "at least one layer"),
    ({"targets": 3}, TypeError, "must be a list of module names or a regex"),
    ({"targets": ["mlp"]}, ValueError, "'mlp' matches mlp, a Sequential"),
    ({"exclude": ["nope"]}, ValueError, "every entry of exclude must match"),
    ({"targets": ["q_proj"], "exclude": ["q_proj"]}, ValueError, "leaves no layer"),
    ({"r": 0}, ValueError, "r must be a whole number of at least 1, found 0"),
    ({"r": 2.0}, ValueError, "r must be a whole number"),
    ({"alpha": 0}, ValueError, "alpha must be a finite number other than 0"),
    ({"alpha": float("nan")}, ValueError, "alpha must be a finite"),
    ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\)"),
    ({"adapter": "a.b"}, ValueError, "letters, digits"),
    ({"adapter": "keys"}, ValueError, "taken by torch.nn.ModuleDict"),
    ({"dtype": torch.int8}, ValueError, "dtype must be a floating-point"),
    ({"compute_dtype": "float33"}, ValueError, "compute_dtype must be"),
    ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ({"backend": "triton"}, RuntimeError, "backend='triton' cannot run"),
    ({"init": "zeros"}, ValueError, "init must be one of"),
    ({"rank_pattern": {"k_proj": 2}}, ValueError, "every key of rank_pattern must match"),
]


@pytest.mark.parametrize(("options", "error", "text"), REFUSED)
def test_inject_refuses_and_leaves_the_model_as_it_was(options, error, text):
    model = net()
    before, flags = bits(model), [p.requires_grad for p in model.parameters()]
    if error is None:
        minilora.inject(model, r=2, alpha=3, **options)
        assert list(lora_layers(model)) == ["q_proj"]
        return
    with pytest.raises(error, match=text):
        minilora.inject(model, **{"r": 2, "alpha": 3, **options})
    unchanged(model, before, flags)


def test_inject_selection():
    model = minilora.inject(net(), r=2, alpha=3)
    assert list(lora_layers(model)) == ["q_proj", "v_proj", "mlp.0", "mlp.2"]  # not the head
    with pytest.raises(ValueError, match="q_proj already has an adapter named 'default'"):
        minilora.inject(model, r=2, alpha=3)
    with pytest.raises(ValueError, match="put it into an nn.Sequential"):
        minilora.inject(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="needs an nn.Module"):
        minilora.inject([1])
    attention = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="MultiheadAttention reads 0.out_proj.weight itself"):
        minilora.inject(attention)
    shared = nn.Linear(6, 6)
    twice = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    minilora.inject(twice, r=2, alpha=3)
    assert twice["a"][0] is twice["b"][0] and isinstance(twice["a"][0], LoRALinear)
    with pytest.warns(UserWarning, match="r=50 is above min"):
        minilora.inject(net(), r=50, alpha=3)
    ranks = minilora.inject(net(), 4, 6, rank_pattern={r"mlp\.\d": 2}, alpha_pattern={"q_proj": 8})
    found = {n: layer.adapters["default"] for n, layer in lora_layers(ranks).items()}
    assert [f.r for f in found.values()] == [4, 4, 2, 2]
    assert [f.scaling for f in found.values()] == [2.0, 1.5, 3.0, 3.0]
    text = str(minilora.targets(net(), ["q_proj"], r=3))
    assert "1 of 5 linear layers, 96 adapter parameters" in text and "head" in text


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 20), d=SIZES, v=st.integers(2, 40), seed=st.integers(0, 99))
def test_linear_cross_entropy_matches_the_dense_oracle(n, d, v, seed):
    torch.manual_seed(seed)
    hidden = torch.randn(n, d, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(v, d, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, v, (n,))
    labels[torch.rand(n) < 0.3] = -100
    labels[0] = v - 1
    ours = linear_cross_entropy(hidden, weight, labels)
    oracle = torch.nn.functional.cross_entropy(hidden @ weight.T, labels)
    torch.testing.assert_close(ours, oracle)
    found = torch.autograd.grad(ours, (hidden, weight))
    for a, b in zip(found, torch.autograd.grad(oracle, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b)


def test_linear_cross_entropy_in_chunks(monkeypatch):
    from minilora.kernels import cross_entropy

    hidden, weight = torch.randn(150, 8, requires_grad=True), torch.randn(40, 8)
    labels = torch.randint(0, 40, (150,))
    whole = linear_cross_entropy(hidden, weight, labels, reduction="sum")
    (g,) = torch.autograd.grad(whole, hidden)
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", 1)  # 32 rows, five chunks
    parts = linear_cross_entropy(hidden, weight, labels, reduction="sum")
    (h,) = torch.autograd.grad(parts, hidden)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(h, g)


def test_linear_cross_entropy_refuses():
    h, w, y = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    for call, text in [
        (lambda: linear_cross_entropy(h, w, torch.full((3,), -100)), "at least one label"),
        (lambda: linear_cross_entropy(h, w, y + 4), r"labels must lie in \[0, 5\)"),
        (lambda: linear_cross_entropy(h, w[:, :2], y), "the same D"),
        (lambda: linear_cross_entropy(h, w, y.float()), "labels must be int64"),
        (lambda: linear_cross_entropy(h, w.double(), y), "share a dtype"),
        (lambda: linear_cross_entropy(h, w, y, reduction="none"), "'mean' or 'sum'"),
    ]:
        with pytest.raises(ValueError, match=text):
            call()


# --- files


def saved(tmp_path, **options):
    model = shake(minilora.inject(net(), r=4, alpha=6, **options))
    minilora.save(model, tmp_path)
    return model


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_save_load_round_trip_keeps_every_byte(tmp_path):
    model, x = saved(tmp_path / "a", rank_pattern={"q_proj": 3}, rslora=True), torch.randn(3, 12)
    again = minilora.load(net(), tmp_path / "a")
    assert torch.equal(again(x), model(x))
    assert not any(p.requires_grad for p in again.parameters())
    minilora.save(again, tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"]  # fmt: skip


def test_load_refuses_another_base(tmp_path):
    model = saved(tmp_path)
    with pytest.raises(ValueError, match="trained on another base: sampled weights of q_proj"):
        minilora.load(net(seed=1), tmp_path)
    minilora.load(net(seed=1), tmp_path, verify=False)
    narrow = minilora.load(net(dtype=torch.bfloat16), tmp_path)  # the same base, rounded
    x = torch.randn(3, 12)
    torch.testing.assert_close(narrow(x.bfloat16()).float(), model(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("fails", [1, 2])
def test_interrupted_save_is_detected_or_harmless(tmp_path, monkeypatch, fails):
    import os

    saved(tmp_path)
    other = shake(minilora.inject(net(), r=4, alpha=9))
    real, calls = os.replace, []

    def replace(*arguments):
        calls.append(1)
        if len(calls) == fails:
            raise OSError("killed")
        real(*arguments)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="killed"):
        minilora.save(other, tmp_path)
    monkeypatch.undo()
    if fails == 1:
        minilora.load(net(), tmp_path)  # the old pair, whole
        return
    with pytest.raises(ValueError, match=r"safetensors and .*config\.json must be saved together"):
        minilora.load(net(), tmp_path)


CONFIGS = [
    ({"peft_type": "LOHA"}, "peft_type must be 'LORA'"),
    ({"use_dora": True}, "use_dora=True may change what is computed"),
    ({"modules_to_save": ["x"]}, "modules_to_save=.*may change"),
    ({"invented_by_a_newer_peft": 3}, "invented_by_a_newer_peft=3 may change"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changed the base"),
    ({"r": "8"}, "r must be a whole number"),
    ({"r": 5}, "must have shape"),
    ({"lora_alpha": None}, "lora_alpha must be a finite number"),
    ({"lora_dropout": 2}, "dropout must lie in"),
    ({"target_modules": []}, "target_modules must be a non-empty list"),
    ({"target_modules": ["q_proj"]}, "not called for by target_modules"),
    ({"target_modules": ["q_proj", "v_proj", "mlp.0", "mlp.2", "lm_head"]}, "missing: .*lm_head"),
    ({"target_modules": ["nothing"]}, "does not fit this model"),
    ({"rank_pattern": [1]}, "rank_pattern must be an object"),
    ({"rank_pattern": {"(": 1}}, "rank_pattern: "),
    ({"use_rslora": "yes"}, "use_rslora must be true or false"),
]


@pytest.mark.parametrize(("changes", "text"), CONFIGS)
def test_load_refuses_a_config_and_leaves_the_model_as_it_was(tmp_path, changes, text):
    saved(tmp_path)
    edit(tmp_path, **changes)
    model = net()
    before, flags = bits(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=text):
        minilora.load(model, tmp_path, verify=False)
    unchanged(model, before, flags)


def test_load_refuses_damaged_files(tmp_path):
    saved(tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole, text = weights.read_bytes(), config.read_text()
    edit(tmp_path, lora_alpha=7)
    with pytest.raises(ValueError, match="must be saved together"):
        minilora.load(net(), tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        minilora.load(net(), tmp_path)
    config.write_text(text)
    weights.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        minilora.load(net(), tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is missing"):
        minilora.load(net(), tmp_path)
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "v2").mkdir()
    config.rename(tmp_path / "up" / "v2" / "adapter_config.json")
    with pytest.raises(ValueError, match=r"did you mean .*v2\?"):
        minilora.load(net(), tmp_path / "up")


def test_save_refuses_nan_and_ambiguity(tmp_path):
    model = minilora.inject(net(), r=2, alpha=3)
    model.q_proj.adapters["default"].lora_B.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="q_proj: lora_B of adapter 'default' must be finite"):
        minilora.save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    two = minilora.inject(minilora.inject(net(), r=2, alpha=3), r=2, alpha=3, adapter="b")
    minilora.activate(two, ["default", "b"])
    with pytest.raises(ValueError, match="say which with adapter="):
        minilora.save(two, tmp_path)
    assert minilora.save(two, tmp_path, "b") == tmp_path / "b"


# --- PEFT as judge


def llama(seed=0):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config)


IDS = torch.arange(18).reshape(2, 9) * 7 % 50
OPTIONS = [
    {"alpha": 6},
    {"alpha": 7, "rslora": True, "targets": ["q_proj", "v_proj"]},
    {"alpha": 5, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {r"layers\.1\..*up_proj": 9}},
]


@pytest.mark.peers
@pytest.mark.parametrize("options", OPTIONS)
def test_peft_reads_what_we_write_without_a_warning_and_back(tmp_path, options):
    peft = pytest.importorskip("peft")
    ours = shake(minilora.inject(llama(), r=4, **options))
    minilora.save(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # transformers' own renaming, which PEFT has not followed yet
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing", FutureWarning)
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours")
    with torch.no_grad():
        expected = theirs(IDS).logits
        torch.testing.assert_close(ours(IDS).logits, expected, rtol=1e-5, atol=1e-5)
        theirs.save_pretrained(tmp_path / "theirs")
        back = minilora.load(llama(), tmp_path / "theirs")
        torch.testing.assert_close(back(IDS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.peers
def test_peft_adapters_load_here_several_at_once(tmp_path):
    peft = pytest.importorskip("peft")
    first = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    second = peft.LoraConfig(r=2, lora_alpha=5, use_rslora=True, target_modules=r".*\.[qv]_proj",
                             init_lora_weights=False)  # fmt: skip
    theirs = peft.get_peft_model(llama(), first)
    theirs.add_adapter("b", second)
    for name, parameter in theirs.named_parameters():
        if "lora_B.default" in name:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = minilora.load(llama(), tmp_path)
    minilora.load(ours, tmp_path / "b", adapter="b")
    with torch.no_grad():
        for name in ("default", "b"):
            theirs.set_adapter(name)
            minilora.activate(ours, name)
            torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.peers
def test_gradients_equal_pefts(tmp_path):
    peft = pytest.importorskip("peft")
    ours = shake(minilora.inject(llama(), r=4, alpha=6))
    minilora.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for fqn, layer in lora_layers(ours).items():
        for factor in ("lora_A", "lora_B"):
            grad = getattr(layer.adapters["default"], factor).grad
            key = f"base_model.model.{fqn}.{factor}.default.weight"
            torch.testing.assert_close(grad, expected[key], rtol=1e-4, atol=1e-6)
