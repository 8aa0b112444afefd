"""inject: strict, exact about what is trainable, and unchanged on error."""

import dataclasses
import inspect

import pytest
import torch
from small_models import bits, net, shake, unchanged
from torch import nn

import minilora
from minilora.lora.config import AdapterConfig
from minilora.lora.layer import LoRALayer, lora_layers


def test_fresh_adapter_changes_nothing_and_freezes_the_rest():
    model, x = net(), torch.randn(3, 12)
    before = model(x)
    minilora.inject(model, r=4, alpha=6)
    assert torch.equal(model(x), before)
    model(x).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("adapters.default" in name)
        assert (parameter.grad is not None) == parameter.requires_grad


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


def test_dropout_of_embeddings_alone_is_refused():
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="dropout acts on the input of linear layers and convolut"):
        minilora.inject(model, r=2, targets=["0"], dropout=0.1)
    minilora.inject(model, r=2, targets=["0", "1"], dropout=0.1)


def test_values_swapped_in_do_not_change_how_a_layer_computes(tmp_path):
    model = minilora.inject(net(), r=2, alpha=3, compute_dtype="float32")
    minilora.save(shake(model), tmp_path)
    before = bits(model)
    with pytest.raises(ValueError, match="share its backend, found torch for q_proj, which has au"):
        minilora.load(model, tmp_path, replace=True, backend="torch")
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())
    minilora.load(model, tmp_path, replace=True, compute_dtype=torch.float32)


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


def test_inject_takes_every_setting_of_an_adapter_with_its_default():
    arguments = inspect.signature(minilora.inject).parameters
    for field in dataclasses.fields(AdapterConfig):
        assert arguments[field.name].default == field.default, field.name


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
    assert twice["a"][0] is twice["b"][0] and isinstance(twice["a"][0], LoRALayer)
    with pytest.warns(UserWarning, match="r=50 is above min"):
        minilora.inject(net(), r=50, alpha=3)
    ranks = minilora.inject(net(), 4, 6, rank_pattern={r"mlp\.\d": 2}, alpha_pattern={"q_proj": 8})
    found = {n: layer.adapters["default"] for n, layer in lora_layers(ranks).items()}
    assert [f.r for f in found.values()] == [4, 4, 2, 2]
    assert [f.scaling for f in found.values()] == [2.0, 1.5, 3.0, 3.0]
    for options, scalings in (
        ({}, [1, 1, 1, 1]), ({"rslora": True}, [2**0.5, 8**0.5, 8**0.5, 8**0.5]),
        ({"alpha": 8}, [4, 1, 1, 1]), ({"alpha_pattern": {"v_proj": 4}}, [1, 0.5, 1, 1]),
    ):  # fmt: skip
        ranks = minilora.inject(net(), 8, rank_pattern={"q_proj": 2}, **options)
        found = [layer.adapters["default"].scaling for layer in lora_layers(ranks).values()]
        assert found == pytest.approx(scalings)
    text = str(minilora.targets(net(), ["q_proj"], r=3))
    assert "1 of 5 linear layers (q_proj 1), 96 adapter parameters" in text and "head" in text


def test_fused_encoder_layer_calls_its_adapters():
    """In eval nn.TransformerEncoderLayer reads `linear1.weight` itself unless a child has hooks."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    model, x = nn.Sequential(layer), torch.randn(2, 3, 8)
    before = model(x)
    minilora.inject(model, r=2, alpha=3, targets=["linear1", "linear2"])
    shake(model)
    with torch.no_grad():
        assert not torch.allclose(model(x), before)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"rank_pattern": [2]}, TypeError, "rank_pattern must be a mapping of regex: number"),
        ({"rank_pattern": {3: 2}}, TypeError, "rank_pattern must have regex strings as keys"),
        ({"rank_pattern": {"q_proj": 0}}, ValueError, "rank_pattern must be a whole number"),
        ({"alpha_pattern": {"q_proj": 0}}, ValueError, "alpha_pattern must be a finite number"),
        ({"alpha": 10**400}, ValueError, "alpha must be a finite number"),
        ({"targets": [""]}, TypeError, "must be a list of module names"),
        (
            {"targets": r"embed.*"},
            ValueError,
            r"must match a linear, embedding or convolution, found no match",
        ),
    ],
)
def test_inject_refuses_patterns(options, error, text):
    with pytest.raises(error, match=text):
        minilora.inject(net(), **{"r": 2, "alpha": 3, **options})


def test_inject_refuses_a_lazy_layer_a_merged_model_and_no_linear():
    with pytest.raises(ValueError, match="0 has no weight yet"):
        minilora.inject(nn.Sequential(nn.LazyLinear(4)))
    merged = minilora.inject(net(), r=2, alpha=3)
    minilora.merge(merged)
    with pytest.raises(RuntimeError, match=r"inject\(\) needs unmerged weights"):
        minilora.inject(merged, adapter="b")
    with pytest.raises(ValueError, match="must find a linear layer besides the head, found none"):
        minilora.inject(nn.Sequential(nn.ReLU()))


class WithHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out, self.odd = nn.Embedding(7, 5), nn.Linear(5, 7), nn.Linear(5, 5)

    def get_output_embeddings(self):
        return self.odd


def test_targets_finds_the_head():
    """get_output_embeddings(), else the linear tied to an embedding, else a root-level name."""
    model = WithHead()
    assert [t.name for t in minilora.targets(model) if t.is_head] == ["odd"]
    minilora.inject(model, r=2, targets=["odd"])  # a wrapped head is still the head
    assert [t.name for t in minilora.targets(model) if t.is_head] == ["odd"]
    tied = WithHead()
    tied.get_output_embeddings = lambda: None
    tied.out.weight = tied.embed.weight
    assert [t.name for t in minilora.targets(tied) if t.is_head] == ["out"]
    assert [t.name for t in minilora.targets(net()) if t.is_head] == ["lm_head"]


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ({}, {"compute_dtype": "float32"}, r"share its compute_dtype, found torch.float32 for .*"
         r"which has None from an adapter before; pass that, or leave compute_dtype out"),
        ({"backend": "torch"}, {"backend": "triton"}, "share its backend, found triton for "),
    ],
)  # fmt: skip
def test_adapters_of_a_layer_share_how_it_computes(first, then, message, monkeypatch):
    monkeypatch.setattr("minilora.lora.injection.check_backend", lambda _: None)
    model = minilora.inject(net(), r=2, **first)
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        minilora.inject(model, r=2, adapter="b", **then)
    assert list(bits(model)) == list(before)
    minilora.inject(model, r=2, adapter="b", **first)
    minilora.inject(model, r=2, adapter="c")
