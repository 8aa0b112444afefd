"""`copy.deepcopy`, `pickle` and `torch.save` of the live model, in every state it can be in."""

import copy
import io
import pickle

import pytest
import torch
from test_lora_combination import F64, IDS, add, kinds
from torch import nn

import minilora
from minilora.lora import end_switching, mixed, prepare_switching
from minilora.lora.layer import lora_layers
from minilora.lora.survey import Survey

LINEARS = ["linear", "turned", "out"]


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
}


def two(**options):
    """Every kind of layer with two adapters, the second in use."""
    return add(add(kinds(), "a"), "b", seed=2, **options)


def merged(keep, **options):
    model = two(**options)
    minilora.merge(model, keep=keep, untie=bool(options))
    return model


def slotted():
    model = two(r=1).eval()
    prepare_switching(model, max_r=4)
    minilora.activate(model, ["a", "b"])
    return model


class Tied(nn.Module):
    """A head that is its embedding's weight."""

    def __init__(self, width=6):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, width), nn.Linear(width, 11, bias=False)
        self.up = nn.Linear(width, width)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.up(self.embed(ids))))


def tied():
    torch.manual_seed(0)
    model = minilora.inject(Tied().double(), r=2, alpha=3, targets=["head"], dtype=F64)
    nn.init.normal_(model.head.adapters["default"].lora_B)
    return model


def tied_merged():
    model = tied()
    minilora.merge(model, untie=True)
    return model


def quantized(format, keep=None, **options):
    """Adapters over a quantized base; merged where `keep` says so."""
    torch.manual_seed(0)
    model = minilora.quantize(Tied(64), format, block_size=32 if format == "int4" else 64)
    model = minilora.inject(model, r=3, alpha=5, targets=["up"], dtype=torch.float32, **options)
    nn.init.normal_(model.up.adapters["default"].lora_B)
    if keep is not None:
        minilora.merge(model, keep=keep, mode="dequantize")
    return model


STATES = {
    "every kind": two,
    "dora": lambda: two(dora=True),
    "lora bias": lambda: two(targets=LINEARS, lora_bias=True),
    "pissa": lambda: two(targets=LINEARS, init="pissa"),
    "olora": lambda: two(targets=LINEARS, init="olora"),
    "rslora and dropout": lambda: two(rslora=True, dropout=0.5),
    "trained copies": lambda: two(bias="all", modules_to_save=["out"], targets=LINEARS[:2]),
    "prepared for switching": slotted,
    "merged, kept in memory": lambda: merged("memory"),
    "merged, kept on disk": lambda: merged("disk"),
    "merged, not kept": lambda: merged(None),
    "merged with trained copies": lambda: merged("memory", bias="all", targets=LINEARS),
    "tied": tied,
    "untied by merging": tied_merged,
    "over int8": lambda: quantized("int8"),
    "over nf4": lambda: quantized("nf4", dora=True),
    "over int4": lambda: quantized("int4"),
    "nf4 merged, kept in memory": lambda: quantized("nf4", keep="memory"),
    "int8 merged, kept on disk": lambda: quantized("int8", keep="disk"),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_the_same_and_apart(state, way, snapshot, same):
    model = STATES[state]()
    y, before = model.eval()(IDS), snapshot(model)
    twin = WAYS[way](model)
    same(before, snapshot(twin))
    assert torch.equal(twin(IDS), y)
    assert str(minilora.summary(twin)) == str(minilora.summary(model))
    assert [layer.view.transposed for layer in lora_layers(twin).values()] == [
        layer.view.transposed for layer in lora_layers(model).values()
    ]
    own = {t.data_ptr() for t in [*model.parameters(), *model.buffers()] if t.numel()}
    assert not own & {t.data_ptr() for t in [*twin.parameters(), *twin.buffers()] if t.numel()}
    with torch.no_grad():
        for tensor in [*twin.parameters(), *twin.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(1.5)
    assert not torch.equal(twin(IDS), y)
    same(before, snapshot(model))
    assert torch.equal(model(IDS), y)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("way", WAYS)
def test_every_verb_does_to_a_copy_what_it_does_to_the_model(state, way, snapshot, same):
    model = STATES[state]().eval()
    twin = WAYS[way](model)
    kept = snapshot(model)
    for verb in verbs(model):
        verb(twin)
    same(kept, snapshot(model))  # nothing of the twin is the model's
    for verb in verbs(model):
        verb(model)
    same(snapshot(model), snapshot(twin))
    assert torch.equal(twin(IDS), model(IDS))


def verbs(model):
    """What can be done next in this state, up to the plain model."""
    layers = lora_layers(model)
    names = list(dict.fromkeys(name for layer in layers.values() for name in layer.adapters))
    merged_now = [layer for layer in layers.values() if layer.merged]
    if any(layer.route.kept is None for layer in merged_now):
        return [minilora.eject]
    found = [minilora.unmerge] if merged_now else []
    if any(layer.room for layer in layers.values()):
        found += [lambda m: minilora.activate(m, "a"), end_switching]
    found += [lambda m: minilora.activate(m, names[0], trainable=names[0])]
    found += [lambda m: minilora.rename(m, names[0], "new")]
    mode = "dequantize" if model.embed.embedding_dim == 64 else None  # those are quantized
    found += [lambda m: minilora.merge(m, untie=True, mode=mode), minilora.unmerge]
    return [*found, minilora.eject]


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_made_while_rows_are_mixed_is_outside_of_it(way):
    model = two(targets=["linear", "turned"]).eval()
    rows = (["a", "base", "b"] * 5)[: len(IDS)]
    expected = model(IDS)
    with mixed(model, rows):
        y = model(IDS)
        twin = WAYS[way](model)
        assert torch.equal(twin(IDS), expected)
        assert torch.equal(model(IDS), y) and not torch.equal(y, expected)
    with mixed(twin, rows):
        assert torch.equal(twin(IDS), y)
    assert torch.equal(model(IDS), expected)


@pytest.mark.parametrize("way", WAYS)
def test_training_a_copy_leaves_the_model_alone(way, snapshot, same):
    model = two(bias="all", targets=["linear", "out"])
    minilora.activate(model, "b", trainable="b")
    before = snapshot(model)
    twin = WAYS[way](model)
    trained = [p for p in twin.parameters() if p.requires_grad]
    twin(IDS).square().sum().backward()
    assert len(trained) == len([p for p in model.parameters() if p.requires_grad])
    assert all(p.grad is not None for p in [*trained, *Survey(twin).copies_of("b").values()])
    torch.optim.SGD(trained, lr=0.1).step()
    same(before, snapshot(model))
    assert all(p.grad is None for p in model.parameters())


def test_a_copy_of_a_switching_model_switches_its_own_slot():
    model = slotted()
    twin = copy.deepcopy(model)
    expected = {}
    for name in ("a", "b"):
        minilora.activate(model, name)
        expected[name] = model(IDS)
    minilora.activate(model, "a")
    minilora.activate(twin, "b")
    assert torch.equal(twin(IDS), expected["b"])
    assert torch.equal(model(IDS), expected["a"])
