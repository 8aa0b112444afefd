"""targets() and select_targets: which layers, why not, and numbers that inject keeps."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import Conv1D
from torch import nn

import minilora
from minilora.lora import base_of
from minilora.lora.layer import lora_layers
from minilora.lora.selection import TargetList, select_targets


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj, self.proj = Conv1D(18, 6), Conv1D(6, 6), nn.Linear(6, 6)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln, self.attn = nn.LayerNorm(6), Attention()
        self.mlp = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6))
        self.experts = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4)])


class Mixed(nn.Module):
    """Every kind of target, twelve blocks (1 and 11 both exist), a tied head."""

    def __init__(self):
        super().__init__()
        self.wte, self.stem = nn.Embedding(11, 6), nn.Conv2d(3, 6, 3)
        self.point, self.line = nn.Conv2d(6, 4, 1), nn.Conv1d(3, 4, 3)
        self.h = nn.ModuleList([Block() for _ in range(12)])
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.wte.weight


def blocks(*numbers, ends):
    return [f"h.{i}.{end}" for i in numbers for end in ends]


ALL = range(12)
LINEARS = ["attn.c_attn", "attn.c_proj", "attn.proj", "mlp.0", "mlp.2", "experts.0", "experts.1"]
FOUND = [
    ("all-linear", {}, blocks(*ALL, ends=LINEARS)),  # not the tied head, embedding, convolutions
    (["c_attn"], {}, blocks(*ALL, ends=["attn.c_attn"])),
    (["proj"], {}, blocks(*ALL, ends=["attn.proj"])),  # whole segments: not c_proj
    (["attn.proj", "wte"], {}, ["wte", *blocks(*ALL, ends=["attn.proj"])]),
    (["h.1.mlp.0"], {}, ["h.1.mlp.0"]),
    (["1.mlp.0"], {}, ["h.1.mlp.0"]),  # not h.11
    (["out"], {}, ["out"]),  # a head that is named is meant
    (["point", "stem", "wte"], {}, ["wte", "stem", "point"]),  # in the model's order
    (("stem",), {}, ["stem"]),
    ({"stem"}, {}, ["stem"]),
    (r"wte|stem|h\.0\..*", {}, ["wte", "stem", *blocks(0, ends=LINEARS)]),
    (r".*\.c_\w+", {"layers": [2]}, blocks(2, ends=LINEARS[:2])),
    (["all-linear"], {}, blocks(*ALL, ends=LINEARS)),  # as a command line has them
    ([r"h\.(0|3)\.attn\..*"], {"exclude": [r".*c_p.*"]},
     blocks(0, 3, ends=["attn.c_attn", "attn.proj"])),
    ("all-linear", {"layers": [11, 1]}, blocks(1, 11, ends=LINEARS)),
    ("all-linear", {"layers": 3}, blocks(3, ends=LINEARS)),
    ("all-linear", {"layers": range(2)}, blocks(0, 1, ends=LINEARS)),
    ("all-linear", {"layers": (0, 0)}, blocks(0, ends=LINEARS)),
    # The first number is the block: expert 1 of block 0 is not in block 1.
    (["experts.0", "experts.1"], {"layers": [1]}, blocks(1, ends=LINEARS[5:])),
    (["wte", "proj"], {"layers": [4]}, blocks(4, ends=["attn.proj"])),  # no number, no block
    ("all-linear", {"layers": [0], "exclude": ["mlp", "c_proj", "experts.1"]},
     blocks(0, ends=["attn.c_attn", "attn.proj", "experts.0"])),
    ("all-linear", {"exclude": r"h\.\d+\.(attn|mlp|experts)\..*[^1]"},
     blocks(*ALL, ends=["experts.1"])),
    (["proj", "wte"], {"exclude": ["h"]}, ["wte"]),
    (["proj", "wte"], {"exclude": ["attn"]}, ["wte"]),
    (["stem"], {"exclude": ["wte"]}, ["stem"]),  # an exclusion that takes nothing away
]  # fmt: skip


@pytest.mark.parametrize(("targets", "options", "names"), FOUND)
def test_selection_finds_exactly(targets, options, names):
    model = Mixed()
    assert select_targets(model, targets, **options) == names
    shown = minilora.targets(model, targets, r=2, **options)
    assert [t.name for t in shown if t.selected] == names
    minilora.inject(model, 2, 5, targets=targets, **options)
    assert list(lora_layers(model)) == names
    assert select_targets(model, targets, **options) == names  # LoRA layers are seen through
    assert minilora.targets(model, targets, r=2, **options) == shown


LAYERS = "layers must name blocks that hold targets="
REFUSED = [
    ("all-linear", {"layers": [12]}, ValueError, LAYERS + r".*found \[12\]; there are: 0, 1, 2"),
    ("all-linear", {"layers": [3, -1]}, ValueError, r"found \[-1\]; there are"),
    (["wte", "stem"], {"layers": [0]}, ValueError, r"found \[0\]; there are: no numbered blocks"),
    ("all-linear", {"layers": []}, ValueError, "found none; there are: 0, 1"),
    ("all-linear", {"layers": "1"}, TypeError, "layers must be block numbers, a list of whole n"),
    ("all-linear", {"layers": [1.0]}, TypeError, r"a list of whole numbers, found \[1.0\]"),
    ("all-linear", {"layers": True}, TypeError, "whole numbers, found True"),
    ("all-linear", {"layers": [None]}, TypeError, r"whole numbers, found \[None\]"),
    ("all-linear", {"layers": 1.5}, TypeError, "whole numbers, found 1.5"),
    (["c_att"], {}, ValueError, "every entry of targets must match a module, 'c_att' matches none"),
    (["c_att"], {}, ValueError, r"did you mean .*c_attn"),
    (["zzzzzzzzzz"], {}, ValueError, "the linears end in: 0, 1, 2, c_attn, c_proj, out, proj"),
    (["c_attn", "ln"], {}, ValueError, "'ln' matches h.0.ln, a LayerNorm"),
    (["mlp"], {}, ValueError, "must name linear layers, embeddings or 2-D convolutions, 'mlp' mat"),
    (["line"], {}, ValueError, "'line' matches line, a Conv1d"),  # torch's 1-D convolution
    ("line", {}, ValueError, r"must match a linear, embedding or convolution, found no match"),
    ("c_attn", {}, ValueError, r"for module names pass a list: targets=\['c_attn'\]"),
    ("(c_attn", {}, ValueError, "targets must be a valid regular expression"),
    ([], {}, ValueError, "targets must name at least one layer, found an empty list"),
    (["wte", 3], {}, TypeError, "targets must be a list of module names or a regex string"),
    ({"wte": 1}, {}, TypeError, "must be a list of module names or a regex string, found"),
    (None, {}, TypeError, "must be a list of module names or a regex string, found None"),
    ("all-linear", {"exclude": ["nope"]}, ValueError, "every entry of exclude must match a module"),
    ("all-linear", {"exclude": "nope"}, ValueError, "exclude='nope' is a regex over whole"),
    ("all-linear", {"exclude": "["}, ValueError, "exclude must be a valid regular expression"),
    ("all-linear", {"exclude": 5}, TypeError, "exclude must be a list of module names"),
    (["wte"], {"exclude": ["wte"]}, ValueError, r"exclude=\['wte'\] leaves no layer of targets="),
    (["wte"], {"rank_pattern": {"stem": 2}}, ValueError, "every key of rank_pattern must match a"),
    (["wte"], {"rank_pattern": {"wte": 0}}, ValueError, "rank_pattern must be a whole number of a"),
    (["wte"], {"r": True}, ValueError, "r must be a whole number of at least 1, found True"),
]  # fmt: skip


@pytest.mark.parametrize(("targets", "options", "error", "text"), REFUSED)
def test_selection_refuses_alike_in_the_dry_run_and_in_inject(targets, options, error, text):
    model = Mixed()
    keys = list(model.state_dict())
    with pytest.raises(error, match=text):
        minilora.targets(model, targets, **options)
    with pytest.raises(error, match=text):
        minilora.inject(model, targets=targets, **options)
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())


def test_layers_are_read_from_the_first_whole_number():
    model = nn.ModuleDict({
        "enc2": nn.ModuleDict({"layer": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])}),
        "0": nn.Sequential(nn.Linear(2, 2)), "last": nn.Linear(2, 2),
    })  # fmt: skip
    # enc2 holds no whole number, and the last part of a name is the layer, not a block.
    assert select_targets(model, layers=[0]) == ["0.0"]
    with pytest.raises(ValueError, match=r"found \[1\]; there are: 0$"):
        select_targets(model, layers=[1])


BASES = [
    (lambda: nn.Conv2d(4, 4, 3, groups=2), "0 is a grouped convolution .groups=2.; only groups=1"),
    (lambda: nn.Conv2d(4, 4, 3, groups=4), "is a grouped convolution .groups=4."),
    (
        lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        "0 pads by padding_mode='reflect'; only 'zeros' is supported",
    ),
    (lambda: nn.Embedding(5, 4, max_norm=1.0), "0 rescales its weight in every forward .max_norm."),
    (lambda: nn.LazyLinear(4), "0 has no weight yet .it is lazy.; run the model once"),
    (lambda: nn.LazyConv2d(4, 3), "0 has no weight yet .it is lazy."),
]


@pytest.mark.parametrize(("make", "text"), BASES)
def test_selection_refuses_layers_it_cannot_adapt(make, text):
    model = nn.Sequential(make(), nn.Linear(4, 4))
    for call in (minilora.targets, minilora.inject):
        with pytest.raises(ValueError, match=text):
            call(model, targets=["0", "1"])
        assert type(model[0]) is type(make()) and type(model[1]) is nn.Linear


@pytest.mark.parametrize("make", [make for make, text in BASES if "lazy" not in text])
def test_layers_beside_one_that_cannot_be_adapted_are_fine(make):
    model = minilora.inject(nn.Sequential(make(), nn.Linear(4, 4)), r=2, targets=["1"])
    assert list(lora_layers(model)) == ["1"]


# torch's own error, in the middle of the freezing
def test_a_lazy_layer_beside_the_targets_is_frozen_or_refused_as_a_whole():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4), nn.Linear(4, 4))
    try:
        minilora.inject(model, r=2, targets=["2"])
    except ValueError as error:
        assert re.search(r"\b1(\.weight)? has no weight yet", str(error)), error
        assert all(p.requires_grad for p in model.parameters())
        assert not any(name.startswith("_minilora") for name in vars(model))
    else:
        assert list(lora_layers(model)) == ["2"]


@pytest.mark.parametrize("make", [nn.ConvTranspose2d, nn.Conv3d, nn.Conv1d, nn.Bilinear])
def test_selection_refuses_layers_that_only_look_alike(make):
    model = nn.Sequential(make(4, 4, 3), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=f"'0' matches 0, a {make.__name__}; "):
        minilora.targets(model, ["0"])
    with pytest.raises(TypeError, match=f"no adapter goes on a {make.__name__}"):
        base_of(model[0])


def test_a_conv1d_is_told_by_its_transposed_weight():
    model = nn.ModuleDict({"gpt2": Conv1D(18, 6), "torchs": nn.Conv1d(6, 18, 1)})
    assert select_targets(model) == ["gpt2"]
    assert base_of(model["gpt2"]).shape == (18, 6)


@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 4), lambda: nn.Embedding(3, 4)])
def test_a_model_that_is_one_layer_is_refused(make):
    for call in (minilora.targets, minilora.inject):
        with pytest.raises(ValueError, match="the model itself is a single layer and has no par"):
            call(make())


def test_targets_prints_one_row_per_linear_and_target():
    text = str(minilora.targets(Mixed(), ["wte", "stem", "h.0.mlp.0"], r=2)).split("\n")
    row = {line.split()[0]: line for line in text[1:-1]}
    assert len(row) == 12 * len(LINEARS) + 1 + 2
    assert re.search(r"\[6, 11\] +2 +34$", row["wte"])
    assert re.search(r"\[6, 27\] +2 +66$", row["stem"])
    assert re.search(r"\[10, 6\] +2 +32$", row["h.0.mlp.0"])
    assert re.search(r"\[18, 6\] +- +0  \(left out\)$", row["h.3.attn.c_attn"])
    assert re.search(r"\[11, 6\] +- +0  head  \(left out\)$", row["out"])
    assert text[-1].startswith("3 of 87 ") and text[-1].endswith(" 132 adapter parameters")
    assert str(TargetList()).split("\n")[-1].startswith("0 of 0 ")


def test_targets_counts_what_each_entry_chose():
    found = minilora.targets(Mixed(), (e for e in ("proj", "mlp.0", "wte")), exclude=["h.3"])
    assert found.counts == {"proj": 11, "mlp.0": 11, "wte": 1}
    assert "linear layers (proj 11, mlp.0 11, wte 1), " in str(found).split("\n")[-1]
    for whole in ("all-linear", r".*\.proj"):
        found = minilora.targets(Mixed(), whole)
        assert found.counts == {} and "linear layers, " in str(found).split("\n")[-1]


@settings(max_examples=40)
@given(
    ends=st.lists(
        st.sampled_from(["wte", "stem", "point", "out", "c_attn", "proj", "mlp.0", "experts.1"]),
        min_size=1, unique=True,
    ),
    r=st.integers(1, 4),
    ranks=st.dictionaries(st.integers(0, 3), st.integers(1, 4), max_size=2),
    layers=st.none() | st.lists(st.integers(0, 11), min_size=1, unique=True),
)  # fmt: skip
def test_the_numbers_of_the_dry_run_are_those_of_inject(ends, r, ranks, layers):
    if not set(ends) - {"wte", "stem", "point", "out"}:
        layers = None
    model = Mixed()
    options = {"targets": ends, "layers": layers}
    chosen = select_targets(model, ends, layers=layers)
    options["rank_pattern"] = {
        chosen[i % len(chosen)].replace(".", r"\."): rank for i, rank in ranks.items()
    }
    shown = minilora.targets(model, r=r, **options)
    minilora.inject(model, r=r, **options)
    layer = lora_layers(model)
    assert [t.name for t in shown if t.selected] == list(layer)
    for t in shown:
        if t.selected:
            f = layer[t.name].adapters["default"]
            assert t.r == f.r and t.parameters == sum(p.numel() for p in f.parameters())
            assert f.delta_weight().shape == (t.out_features, t.in_features)
        else:
            assert t.parameters == 0
        assert t.is_head == (t.name == "out")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{len(layer)} of {len(shown)} " in str(shown).split("\n")[-1]
    assert f" {trainable:,} adapter parameters" in str(shown)
    printed = [line for line in str(shown).split("\n")[1:-1] if "left out" not in line]
    total = sum(int(line.removesuffix("  head").split()[-1].replace(",", "")) for line in printed)
    assert total == trainable


# anything false is taken for "exclude nothing"
@pytest.mark.parametrize("exclude", [0, False])
def test_exclude_of_another_type_is_refused(exclude):
    with pytest.raises(TypeError, match="exclude must be a list of module names or a regex"):
        select_targets(Mixed(), exclude=exclude)
