"""Trained copies (bias=, modules_to_save=): which parameter is where, and what inject refuses."""

import copy
import io
import pickle

import pytest
import torch
from small_models import bits, net, unchanged
from torch import nn

import minilora
from minilora.lora.layer import lora_layers
from minilora.lora.survey import Survey


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self):
        super().__init__()
        self.embed, self.mid = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(6, 9)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.norm(torch.tanh(self.mid(self.embed(ids)))))


IDS = torch.arange(9)
NET_BIASES = ["q_proj.bias", "mlp.0.bias", "mlp.2.bias", "lm_head.bias"]
HEAD = ["lm_head.weight", "lm_head.bias"]
ASKED = [
    ({"bias": "all"}, NET_BIASES),
    ({"bias": "lora_only"}, NET_BIASES[:3]),
    ({"bias": "lora_only", "targets": ["q_proj", "v_proj"]}, ["q_proj.bias"]),
    ({"modules_to_save": ["lm_head"]}, HEAD),
    ({"modules_to_save": "lm_head"}, HEAD),
    ({"modules_to_save": ["mlp"], "targets": ["q_proj"]}, [
        "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"]),
    ({"modules_to_save": ["lm_head"], "bias": "all"}, [*NET_BIASES, "lm_head.weight"]),
]  # fmt: skip


def place(model, name):
    """The parameter that the model computes with, by the plain model's dotted name."""
    module, _, leaf = name.rpartition(".")
    holder = model.get_submodule(module)
    return getattr(holder, "base", holder)._parameters[leaf]


def moved(model, adapter="default", by=0.5):
    """Shift an adapter's copies, so that they differ from the base."""
    for parameter in Survey(model).copies_of(adapter).values():
        parameter.data.add_(by)
    return model


# ── training ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("options", "names"), ASKED)
def test_copies_train_and_the_base_keeps_its_bits(options, names):
    model = net()
    before, flags = bits(model), [p.requires_grad for p in model.parameters()]
    held = {name: place(model, name) for name in names}
    minilora.inject(model, r=2, alpha=3, **options)
    assert set(Survey(model).copies_of("default")) == set(names)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert not {id(p) for p in trained} & {id(p) for p in held.values()}
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 12)).square().sum().backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
    for name, value in Survey(model).copies_of("default").items():
        assert value is place(model, name) and not torch.equal(value, before[name])
        assert torch.equal(held[name], before[name]) and held[name].grad is None
    minilora.eject(model)
    unchanged(model, before, flags)
    assert all(place(model, name) is parameter for name, parameter in held.items())


def test_copies_of_a_second_adapter_start_from_the_base():
    model = moved(minilora.inject(net(), r=2, bias="all"))
    minilora.inject(model, r=2, bias="all", adapter="b")
    for name in NET_BIASES:
        assert torch.equal(Survey(model).copies_of("b")[name], net().state_dict()[name])
        assert not torch.equal(Survey(model).copies_of("default")[name], net().state_dict()[name])


# ── every verb puts the right objects in their places ──────────────────────────────────────────


def two_owners():
    """Adapter a copies all biases, b the norm of no one and the head, c nothing."""
    model = net()
    originals = {name: place(model, name) for name in [*NET_BIASES, "lm_head.weight"]}
    minilora.inject(model, r=2, alpha=3, bias="lora_only", adapter="a")
    minilora.inject(
        model, r=2, alpha=3, targets=["v_proj"], modules_to_save=["lm_head"], adapter="b"
    )
    minilora.inject(model, r=2, alpha=3, targets=["q_proj"], adapter="c")
    return moved(moved(model, "a"), "b", 0.25), originals


def assert_places(model, originals, active):
    expected = dict(originals)
    for adapter in active:
        expected |= Survey(model).copies_of(adapter)
    for name, parameter in expected.items():
        assert place(model, name) is parameter, name


def test_verbs_put_the_right_parameters_back():
    model, originals = two_owners()
    assert_places(model, originals, ())  # c is active alone
    for active in (["a"], ["b"], ["a", "b"], ["c", "b"], [], ["b", "c", "a"]):
        minilora.activate(model, active)
        assert_places(model, originals, active)
        with minilora.disabled(model):
            assert_places(model, originals, ())
        assert_places(model, originals, active)
        if active:
            minilora.merge(model)
            assert_places(model, originals, active)
            minilora.unmerge(model)
            assert_places(model, originals, active)
    minilora.activate(model, "c")
    minilora.merge(model, ["a", "b"])  # named, not active
    assert_places(model, originals, ["a", "b"])
    minilora.unmerge(model)
    assert_places(model, originals, ())
    minilora.activate(model, ["a", "b"])
    mine = Survey(model).copies_of("a")
    minilora.rename(model, "a", "z")
    assert list(Survey(model).copies_of("z").values()) == list(mine.values())
    assert Survey(model).copies_of("a") == {}
    assert_places(model, originals, ["z", "b"])
    minilora.delete(model, "z")
    assert_places(model, originals, ["b"])
    minilora.eject(model)
    assert_places(model, originals, ())
    assert list(model.state_dict()) == list(net().state_dict())


def test_deleting_the_last_owner_leaves_no_trace():
    model, originals = two_owners()
    minilora.activate(model, "a")
    for name in ("a", "b"):
        minilora.delete(model, name)
        assert_places(model, originals, ())
    assert not any("_minilora_copies" in key for key in model.state_dict())
    minilora.delete(model, "c")
    assert list(model.state_dict()) == list(net().state_dict())


def test_eject_after_merge_keeps_the_copies():
    model, _ = two_owners()
    minilora.activate(model, ["a", "b"])
    model.eval()
    x = torch.randn(3, 12)
    y = model(x)
    minilora.merge(model)
    minilora.eject(model)
    torch.testing.assert_close(model(x), y)
    assert list(model.state_dict()) == list(net().state_dict())
    assert all(p.requires_grad for p in model.parameters())


def test_adapters_with_copies_of_one_parameter_cannot_be_active_together():
    model = minilora.inject(net(), r=2, bias="all", adapter="a")
    minilora.inject(model, r=2, modules_to_save=["lm_head"], adapter="b")
    minilora.inject(model, r=2, adapter="c")
    before, flags = bits(model), [p.requires_grad for p in model.parameters()]
    text = (
        "'a' and 'b' each bring a trained copy of lm_head.bias; copies can't be summed, so "
        "activate one of them at a time"
    )
    for call in (minilora.activate, minilora.merge):
        with pytest.raises(ValueError, match=text):
            call(model, ["a", "c", "b"])
        unchanged(model, before, flags)
        assert {m.active for m in lora_layers(model).values()} == {("c",)}
    minilora.activate(model, ["c", "b"])


# ── copying, pickling, converting the model ────────────────────────────────────────────────────


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "by", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch_save]
)
def test_a_copied_model_has_its_own_copies(by):
    model, _ = two_owners()
    minilora.activate(model, ["a", "b"])
    x = torch.randn(3, 12)
    y, before = model(x), bits(model)
    twin = by(model)
    assert torch.equal(twin(x), y)
    for adapter in ("a", "b"):
        for name, parameter in Survey(twin).copies_of(adapter).items():
            assert place(twin, name) is parameter
            assert parameter is not Survey(model).copies_of(adapter)[name]
    moved(twin, "a")
    assert not torch.equal(twin(x), y)
    minilora.eject(twin)
    assert all(torch.equal(v, net().state_dict()[n]) for n, v in twin.state_dict().items())
    unchanged(model, before, [p.requires_grad for p in model.parameters()])
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("active", [None, "a", ["a", "b"]])
def test_converting_the_model_converts_copies_and_originals(active):
    model, _ = two_owners()
    minilora.activate(model, active)
    x = torch.randn(3, 12)
    y = model(x)
    model.to(torch.float64)
    torch.testing.assert_close(model(x.double()).float(), y, rtol=1e-5, atol=1e-5)
    for names in (None, "b", "a"):
        minilora.activate(model, names)
        assert model(x.double()).dtype == torch.float64
    for name, parameter in Survey(model).copies_of("a").items():
        assert place(model, name) is parameter
    minilora.eject(model)
    assert all(p.dtype == torch.float64 for p in model.parameters())


def test_state_dict_of_one_model_fits_the_other():
    model, _ = two_owners()
    twin, _ = two_owners()
    moved(model, "a", 2.0)
    twin.load_state_dict(model.state_dict())
    minilora.activate(model, ["a", "b"])
    minilora.activate(twin, ["a", "b"])
    x = torch.randn(3, 12)
    assert torch.equal(model(x), twin(x))


# ── tied and shared parameters ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("module", ["embed", "out"])
def test_a_copy_of_one_end_leaves_the_other_end_alone(module):
    model = Tied()
    shared, before = model.embed.weight, model.embed.weight.detach().clone()
    minilora.inject(model, r=2, alpha=3, targets=["mid"], modules_to_save=[module])
    moved(model)
    other = {"embed": "out", "out": "embed"}[module]
    assert place(model, f"{other}.weight") is shared
    assert (
        place(model, f"{module}.weight") is Survey(model).copies_of("default")[f"{module}.weight"]
    )
    assert torch.equal(shared, before)
    minilora.merge(model)
    minilora.eject(model)
    assert torch.equal(place(model, f"{other}.weight"), before)
    assert torch.equal(place(model, f"{module}.weight"), before + 0.5)


def test_copies_of_both_ends_are_two_and_eject_ties_again():
    model = Tied()
    minilora.inject(model, r=2, alpha=3, targets=["mid"], modules_to_save=["embed", "out"])
    assert model.embed.weight is not model.out.weight
    assert model.embed.weight.requires_grad and model.out.weight.requires_grad
    minilora.eject(model)
    assert model.embed.weight is model.out.weight


def test_a_shared_module_has_one_copy_under_its_first_name():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"x": shared, "y": shared, "z": nn.Linear(4, 4)})
    minilora.inject(model, r=2, targets=["z"], modules_to_save=["x"])
    assert set(Survey(model).copies_of("default")) == {"x.weight", "x.bias"}
    moved(model)
    assert model["x"] is model["y"]
    minilora.activate(model, None)
    assert model["y"].weight is place(model, "x.weight")


# ── what inject refuses, model unchanged ───────────────────────────────────────────────────────


class Odd(nn.Module):
    """One of each, and things that can't be copied."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(7, 6), nn.Conv2d(3, 6, 1)
        self.fused, self.plain = nn.Linear(6, 12), nn.Linear(6, 10, bias=False)
        self.bnorm, self.act = nn.BatchNorm1d(6), nn.ReLU()
        self.block = nn.ModuleDict({"fc": nn.Linear(6, 6), "norm": nn.LayerNorm(6)})


COPIED = [
    ({"bias": "some"}, ValueError, "bias must be 'none', 'all' or 'lora_only', found 'some'"),
    ({"bias": None}, ValueError, "bias must be 'none', 'all' or 'lora_only', found None"),
    ({"bias": ["all"]}, ValueError, r"bias must be .* found \['all'\]"),
    (
        {"bias": "lora_only", "targets": ["plain", "embed"]},
        ValueError,
        "bias='lora_only' must find a bias to train, found none",
    ),
    ({"modules_to_save": 3}, TypeError, "modules_to_save must be a list of module names, found 3"),
    ({"modules_to_save": None}, TypeError, "a list of module names, found None"),
    ({"modules_to_save": {"block": 1}}, TypeError, r"a list of module names, found \{'block': 1\}"),
    ({"modules_to_save": ["nom"]}, ValueError, "every entry of modules_to_save must match a mod"),
    ({"modules_to_save": ["orm"]}, ValueError, "'orm' matches none"),
    ({"modules_to_save": ""}, ValueError, "'' matches none"),
    ({"modules_to_save": [3]}, ValueError, "3 matches none"),
    (
        {"modules_to_save": ["fused"]},
        ValueError,
        "modules_to_save trains a whole copy of fused, but fused is a target of LoRA too; name it "
        "in one of the two",
    ),
    (
        {"modules_to_save": ["block"], "targets": ["fc"]},
        ValueError,
        "a whole copy of block, but block.fc is a target of LoRA too",
    ),
    (
        {"modules_to_save": ["bnorm"]},
        ValueError,
        "found the buffer bnorm.num_batches_tracked, which is not copied",
    ),
    ({"modules_to_save": ["act"]}, ValueError, "needs a module of parameters, found none in act"),
]
INITS = [
    ({"init": "zeros"}, "init must be one of kaiming, .* olora, found 'zeros'"),
    ({"init": "pissa_niter_0"}, "init must be one of .* found 'pissa_niter_0'"),
    ({"init": "pissa_niter_"}, "init must be one of"),
    ({"init": "Kaiming"}, "init must be one of"),
    ({"init": None}, "found None"),
    ({"init": True}, "found True"),
    ({"init": ["kaiming"]}, "init must be one of"),
    (
        {"init": "pissa", "targets": ["fused", "embed"]},
        "init='pissa' is for linear layers, but embed is a Embedding; inject that layer apart",
    ),
    ({"init": "orthogonal", "targets": ["conv"]}, "is for linear layers, but conv is a Conv2d"),
    ({"init": "orthogonal", "r": 3}, "init='orthogonal' needs an even r, found 3 for fused"),
    (
        {"init": "orthogonal", "rank_pattern": {"plain": 1}, "targets": ["fused", "plain"]},
        "needs an even r, found 1 for plain",
    ),
    (
        {"init": "olora", "r": 7},
        r"init='olora' takes r directions of the weight, but fused of shape \[12, 6\] has fewer "
        "than r=7; lower r there with rank_pattern",
    ),
]
COMBINED = [
    ({"lora_bias": True, "dora": True}, "lora_bias=True has no meaning with dora=True"),
    ({"lora_bias": True, "init": "pissa"}, "lora_bias=True has no meaning with init='pissa'"),
    ({"lora_bias": True, "targets": ["fused", "embed"]}, "is not for embeddings, and embed is one"),
]
FLAGS = [
    ({flag: value}, TypeError, f"{flag} must be True or False, found {value!r}")
    for flag in ("rslora", "dora", "lora_bias") for value in (1, "yes", None)
]  # fmt: skip
OTHERS = [(o, ValueError, text) for o, text in INITS + COMBINED]


@pytest.mark.parametrize(("options", "error", "text"), COPIED + OTHERS + FLAGS)
def test_inject_refuses_and_leaves_the_model_as_it_was(options, error, text):
    model = Odd()
    before, flags = bits(model), [p.requires_grad for p in model.parameters()]
    options = {"r": 2, "alpha": 5, "targets": ["fused"], **options}
    with pytest.raises(error, match=text):
        minilora.inject(model, **options)
    unchanged(model, before, flags)
    assert not any(name.startswith("_minilora") for name in vars(model))
    # The same on a model that has an adapter with copies in their places.
    minilora.inject(model, 2, 5, targets=["fc"], bias="all", adapter="first")
    moved(model, "first")
    before, flags = bits(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=text):
        minilora.inject(model, **options)
    unchanged(model, before, flags)


def test_bias_all_needs_a_bias_somewhere():
    with pytest.raises(ValueError, match="bias='all' must find a bias to train, found none"):
        minilora.inject(nn.Sequential(nn.Linear(3, 3, bias=False)), r=2, bias="all")


# ── where copies and adapters meet (each found by trying to break it) ──────────────────────────


# the copies are a child of the model, which nn.Sequential calls like any other
@pytest.mark.parametrize("options", [{"bias": "all"}, {"modules_to_save": ["2"]}])
def test_a_sequential_still_runs_with_copies(options):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(2, 4)
    y = model(x)
    minilora.inject(model, r=2, alpha=3, targets=["0"], **options)
    assert len(model) == 3
    torch.testing.assert_close(model(x), y)


def overlapping(**options):
    """Adapter a is on q_proj, adapter b trains a whole copy of q_proj; b is active."""
    model = minilora.inject(net(), r=2, alpha=3, targets=["q_proj"], adapter="a", **options)
    nn.init.normal_(model.q_proj.adapters["a"].lora_B)
    minilora.inject(
        model, r=2, alpha=3, targets=["v_proj"], modules_to_save=["q_proj"], adapter="b"
    )
    return moved(model, "b")


def parts_of(model, adapter):
    return {n: p.detach().clone() for n, p in Survey(model).copies_of(adapter).items()}


# merging writes into the trained copy, and unmerging puts the base's values into it
@pytest.mark.parametrize("active", [None, ["a", "b"]])
@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_merging_leaves_a_trained_copy_as_it_is(keep, active, tmp_path):
    model = overlapping().eval()
    x, before = torch.randn(3, 12), parts_of(model, "b")
    minilora.activate(model, ["a", "b"])
    y = model(x)
    minilora.activate(model, active)
    minilora.merge(model, ["a", "b"], keep=keep)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    minilora.save(model, tmp_path, "b")
    minilora.unmerge(model)
    after = parts_of(model, "b")
    assert all(torch.equal(after[n], value) for n, value in before.items())
    minilora.activate(model, ["a", "b"])
    assert torch.equal(model(x), y)
    again = minilora.load(net(), tmp_path / "b")
    assert torch.equal(again.q_proj.weight, before["q_proj.weight"])


# an adapter that both trains the bias and adds a lora_bias to it
@pytest.mark.parametrize("active", [None, "default"])
@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_merging_a_lora_bias_leaves_a_trained_bias_as_it_is(keep, active, tmp_path):
    model = net().eval()
    minilora.inject(model, 2, 3, targets=["q_proj"], bias="lora_only", lora_bias=True)
    nn.init.normal_(model.q_proj.adapters["default"].lora_bias)
    moved(model)
    x = torch.randn(3, 12)
    y, before = model(x), parts_of(model, "default")
    minilora.activate(model, active)
    try:
        minilora.merge(model, "default", keep=keep)
    except ValueError as error:
        assert "merging lora_bias adds to the bias of q_proj" in str(error)  # refusing is fine
    else:
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
        minilora.save(model, tmp_path)
        minilora.unmerge(model)
        saved = minilora.load(net(), tmp_path).eval()
        torch.testing.assert_close(saved(x), y, rtol=1e-5, atol=1e-5)
    after = parts_of(model, "default")
    assert all(torch.equal(after[n], value) for n, value in before.items())


# a copy in the embedding's place hides that the head shares the embedding's weight
@pytest.mark.parametrize("copied", ["embed", "out"])
def test_a_copy_does_not_hide_a_tied_weight_from_merge(copied):
    other = {"embed": "out", "out": "embed"}[copied]
    model = Tied().eval()
    minilora.inject(model, 2, 3, targets=["mid"], modules_to_save=[copied], adapter="a")
    minilora.inject(model, 2, 3, targets=[other], adapter="b")
    for name in ("lora_A", "lora_B"):
        nn.init.normal_(getattr(getattr(model, other).adapters["b"], name))
    y = model(IDS)
    minilora.activate(model, "a")
    with pytest.raises(ValueError, match="because both share one weight"):
        minilora.merge(model, "b")
    minilora.merge(model, "b", untie=True)
    torch.testing.assert_close(model(IDS), y)


# the head is found by the weight it shares
def test_a_copy_does_not_hide_the_head_from_all_linear():
    model = minilora.inject(Tied(), 2, 3, modules_to_save=["embed"], adapter="a")
    minilora.inject(model, 2, 3, adapter="b")
    assert list(lora_layers(model)) == ["mid"]


# what an adapter of the base starts from, and is compared with, is another one's copy
@pytest.mark.parametrize("options", [{"dora": True}, {"init": "pissa"}, {"init": "olora"}])
def test_a_new_adapter_starts_from_the_base_and_not_from_a_copy(options):
    model = minilora.inject(net(), 2, 3, targets=["v_proj"], modules_to_save=["q_proj"])
    moved(model)
    plain = net()
    minilora.inject(model, 2, 3, targets=["q_proj"], adapter="a", **options)
    minilora.inject(plain, 2, 3, targets=["q_proj"], adapter="a", **options)
    here, there = (m.q_proj.adapters["a"] for m in (model, plain))
    if "dora" in options:
        assert torch.equal(here.magnitude, there.magnitude)
    else:
        torch.testing.assert_close(
            here.offset_B @ here.offset_A, there.offset_B @ there.offset_A, rtol=0, atol=1e-5
        )
    x = torch.randn(3, 12)
    torch.testing.assert_close(model(x), net()(x), rtol=1e-5, atol=1e-5)


# the fingerprint has to be the base's
@pytest.mark.parametrize("merged", [False, True])
def test_save_and_load_look_at_the_base_and_not_at_a_copy(merged, tmp_path):
    model = overlapping()
    if merged:
        minilora.activate(model, ["a", "b"])
        minilora.merge(model)
    minilora.save(model, tmp_path, "a")
    minilora.load(net(), tmp_path / "a")
    other = minilora.inject(net(), 2, 3, targets=["v_proj"], modules_to_save=["q_proj"])
    minilora.load(moved(other), tmp_path / "a", "a")


# a tied head with a bias is left out of what merge(keep="disk") writes
@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_untied_head_with_a_lora_bias_unmerges(keep):
    model = Tied()
    minilora.inject(model, 2, 3, targets=["out"], lora_bias=True)
    for parameter in model.out.adapters.parameters():
        nn.init.normal_(parameter)
    before = bits(model)
    minilora.merge(model, keep=keep, untie=True)
    minilora.unmerge(model)
    unchanged(model, before, [p.requires_grad for p in model.parameters()])
    assert model.out.base.weight is model.embed.weight


# a bias shared by two layers gets both lora_biases, and unmerge restores the second state
@pytest.mark.parametrize("untie", [False, True])
def test_merging_a_lora_bias_respects_a_shared_bias(untie):
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].bias = model["a"].bias
    minilora.inject(model, 2, 3, lora_bias=True)
    for parameter in [p for p in model.parameters() if p.requires_grad]:
        nn.init.normal_(parameter)
    x, before = torch.randn(3, 4), bits(model)
    expected = [model[name](x) for name in "ab"]
    model.eval()
    try:
        minilora.merge(model, untie=untie)
    except ValueError:
        pass  # refusing, as for a shared weight, is fine
    else:
        for name, y in zip("ab", expected, strict=True):
            torch.testing.assert_close(model[name](x), y, rtol=1e-5, atol=1e-5)
        minilora.unmerge(model)
    unchanged(model, before, [p.requires_grad for p in model.parameters()])


# eject leaves copies trainable that stand for frozen parameters, and an untied head frozen
def test_eject_after_merge_brings_the_flags_back():
    model = net()
    model.lm_head.requires_grad_(False)
    minilora.inject(model, 2, 3, modules_to_save=["lm_head"])
    minilora.merge(model)
    minilora.eject(model)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == set(HEAD)
    tied = minilora.inject(Tied(), 2, 3, targets=["out"])
    minilora.merge(tied, untie=True)
    minilora.eject(tied)
    assert all(p.requires_grad for p in tied.parameters())


# buffers of another adapter (an offset) count as the module's own
def test_buffers_of_an_adapter_are_not_the_modules():
    model = minilora.inject(net(), 2, 3, targets=["mlp.0"], adapter="a", init="pissa")
    minilora.inject(model, 2, 3, targets=["q_proj"], modules_to_save=["mlp"], adapter="b")
    assert "mlp.0.weight" in Survey(model).copies_of("b")


# a verb on the whole does not see the copies of an adapter injected into a part
def test_verbs_on_the_whole_see_the_copies_of_a_part():
    model = nn.ModuleDict({"part": net(), "rest": nn.Linear(3, 3)})
    before = bits(model)
    minilora.inject(model["part"], 2, 3, modules_to_save=["lm_head"])
    moved(model["part"])
    with minilora.disabled(model):
        assert torch.equal(model["part"].lm_head.weight, before["part.lm_head.weight"])
    minilora.eject(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


# several names for one reach the user as an unpacking error
@pytest.mark.parametrize("names", [["a", "b"], []])
@pytest.mark.parametrize("verb", [minilora.delete, lambda m, n: minilora.rename(m, n, "z")])
def test_verbs_that_take_one_name_say_so(verb, names):
    model = minilora.inject(minilora.inject(net(), adapter="a"), adapter="b")
    with pytest.raises((TypeError, ValueError), match=r"delete\(\)|rename\(\)|one adapter"):
        verb(model, names)


# keep=None keeps an untied head's weight all the same
def test_keep_none_keeps_nothing_of_an_untied_head():
    model = minilora.inject(Tied(), 2, 3, targets=["out"])
    minilora.merge(model, keep=None, untie=True)
    with pytest.raises(RuntimeError, match=r"merge\(keep=None\) kept none"):
        minilora.unmerge(model)


def test_a_copied_bias_is_no_option_of_that_name(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    minilora.inject(model, r=2, targets=["0"], modules_to_save=["1"])
    name = "1.trained_copies.by_adapter.default.bias"
    assert model.get_parameter(name) is model[1].bias
    model.load_state_dict(model.state_dict(), assign=True)
    minilora.save(model, tmp_path)
    assert Survey(model).copies["default"].modules_to_save == ["1"]


def test_copies_of_a_part_stay_trainable_when_the_whole_gets_an_adapter():
    model = Tied()
    whole = nn.Sequential(model)
    minilora.inject(model, r=2, adapter="a", targets=["mid"], modules_to_save=["norm"])
    minilora.inject(whole, r=2, adapter="b", targets=["0.mid"])
    minilora.activate(whole, "a")
    model(IDS).square().sum().backward()
    assert model.norm.weight.requires_grad
    assert model.norm.weight.grad.abs().sum() > 0
