"""One scan of a model: what it finds, the rules that all verbs share, and what it costs."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import minilora
from minilora.lora.survey import Survey, split_block


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.up = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        x = x + self.v_proj(torch.tanh(self.q_proj(self.norm(x))))
        return x + self.up(self.experts[0](x) + self.experts[1](x))


class Net(nn.Module):
    def __init__(self, depth=3, tied=False):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList([Block() for _ in range(depth)])
        self.lm_head = nn.Linear(4, 7, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.layers:
            x = block(x)
        return self.lm_head(x)


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def net(*names, **options):
    torch.manual_seed(0)
    model = Net(**options)
    for name in names:
        minilora.inject(model, r=2, alpha=3, adapter=name)
        for value in Survey(model).factors(name).values():
            nn.init.normal_(value.lora_B)
    return model


# ── what it costs ──────────────────────────────────────────────────────────────────────────────


def calls(verb, *args, **options):
    """How many calls a verb makes, Python's and C's: unlike time, the same every time."""
    count = [0]

    def counted(frame, event, argument):
        count[0] += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        verb(*args, **options)
    finally:
        sys.setprofile(None)
    return count[0]


VERBS = {
    "inject": lambda model: minilora.inject(model, r=2, adapter="b"),
    "inject with copies": lambda model: minilora.inject(
        model, r=2, adapter="b", bias="all", modules_to_save=["norm"], exclude=["experts"]
    ),
    "targets": lambda model: minilora.targets(model, ["q_proj", "up"], exclude=["experts"]),
    "activate": lambda model: minilora.activate(model, "a"),
    "rename": lambda model: minilora.rename(model, "a", "b"),
    "summary": minilora.summary,
    "delete": lambda model: minilora.delete(model, "a"),
}


@pytest.mark.parametrize("name", VERBS)
def test_the_work_of_a_verb_grows_with_depth_and_no_faster(name):
    counts = []
    for depth in (30, 60, 120):
        model = net("a", depth=depth)
        VERBS[name](net("a", depth=1))  # what is computed once for all
        counts.append(calls(VERBS[name], model))
    first, second = counts[1] - counts[0], counts[2] - counts[1]
    assert second == pytest.approx(2 * first, rel=0.01)


def test_inject_scans_the_model_a_fixed_number_of_times(monkeypatch):
    scans, made = [], Survey.__init__
    monkeypatch.setattr(
        Survey, "__init__", lambda self, model: (scans.append(1), made(self, model))[1]
    )
    for depth in (2, 20):
        scans.clear()
        minilora.inject(Net(depth), r=2)
        assert len(scans) == 1


# ── what it finds ──────────────────────────────────────────────────────────────────────────────


def test_a_survey_shows_the_plain_model_whatever_lies_in_it():
    plain = Survey(net())
    made = net("a")
    minilora.inject(made, r=2, adapter="b", targets=["lm_head"], modules_to_save=["norm"])
    for model in (made, torch.compile(made), copy.deepcopy(made)):
        survey = Survey(model)
        assert list(survey.modules) == list(plain.modules)
        assert [type(m) for m in survey.modules.values()] == list(map(type, plain.modules.values()))
        assert list(survey.parameters) == list(plain.parameters)
        assert (
            survey.head == "lm_head" and survey.adapters == ["a", "b"] and survey.active == ("b",)
        )
        assert list(survey.layers) == [n for n in survey.modules if n in survey.layers]
        assert list(survey.copies_of("b")) == [n for n in survey.parameters if ".norm." in n]


def test_a_shared_module_has_one_name_and_two_positions():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})})
    survey = Survey(model)
    assert list(survey.modules) == ["a", "b"]
    assert survey.positions(shared) == [(model, "a"), (model["b"], "c")]


def test_blocks_are_the_entries_of_the_outermost_lists():
    model = net("a")
    assert list(Survey(model).blocks.values()) == list(model.layers)
    assert list(Survey(model).blocks) == ["layers.0", "layers.1", "layers.2"]
    assert Survey(nn.Linear(2, 2)).blocks == {}
    nested = nn.ModuleDict({"stages": nn.ModuleList([nn.ModuleList([Block()]), Block()])})
    assert list(Survey(nested).blocks) == ["stages.0.0", "stages.1"]
    assert list(Survey(nn.Sequential(nn.Linear(2, 2))).blocks) == []


@pytest.mark.parametrize(("name", "parts"), [
    ("h.3.attn.c_proj", ("h", 3, "attn.c_proj")), ("a.h.3.mlp.0", ("a.h", 3, "mlp.0")),
    ("0.q", ("", 0, "q")), ("wte", ("", None, "wte")), ("mlp.0", ("", None, "mlp.0")),
])  # fmt: skip
def test_the_first_number_of_a_name_is_its_blocks(name, parts):
    assert split_block(name) == parts


# ── which adapter, if none is named ────────────────────────────────────────────────────────────

ONE_ADAPTER = {
    "save": minilora.save,
    "export": lambda model, folder: minilora.export(model, folder).adapter,
    "explain": lambda model, folder: minilora.explain(model).adapter,
}


@pytest.mark.parametrize("verb", ONE_ADAPTER)
def test_verbs_about_one_adapter_take_the_only_one_or_the_only_active_one(verb, tmp_path):
    def chosen(model):
        found = ONE_ADAPTER[verb](model, tmp_path)
        return found.name if verb == "save" else found

    model = net("a")
    minilora.activate(model, None)
    assert chosen(model) == "a"  # the only one
    model = net("a", "b")
    assert chosen(model) == "b"  # the only active one
    for active in (["a", "b"], None):
        minilora.activate(model, active)
        with pytest.raises(ValueError, match=r"several adapters are there \(a, b\); say which"):
            chosen(model)


def test_a_merged_model_is_about_what_is_merged():
    model = net("a", "b")
    minilora.merge(model, "a")
    assert Survey(model).adapter(None, "save") == "a"
    with pytest.raises(TypeError, match=r"save\(\) takes one adapter's name, found \['a'\]"):
        Survey(model).adapter(["a"], "save")


# ── trained copies belong to their module's name ───────────────────────────────────────────────


def test_a_trained_copy_goes_by_its_modules_own_name():
    model = net(tied=True)
    minilora.inject(model, r=2, alpha=3, modules_to_save=["lm_head", "norm"], bias="lora_only")
    trained = [n for n, p in model.named_parameters() if p.requires_grad and "adapters" not in n]
    kept = Survey(model).copies_of("default")
    assert trained == [n.replace("proj.", "proj.base.").replace("up.", "up.base.")
                       .replace("experts.0.", "experts.0.base.")
                       .replace("experts.1.", "experts.1.base.") for n in kept]  # fmt: skip
    inside = [name for name in model.state_dict() if "trained_copies" in name]
    for name in inside:
        owner, _, rest = name.partition(".trained_copies.")
        assert f"{owner}.{rest.rpartition('.')[2]}" in kept
    assert len(inside) == 2 * len(kept)  # and the base's own beside each


def test_copies_move_with_a_layer_that_is_wrapped_and_unwrapped():
    model = net()
    minilora.inject(model, r=2, targets=["up"], adapter="a", modules_to_save=["lm_head"])
    for value in Survey(model).copies_of("a").values():
        nn.init.normal_(value)
    expected = model(IDS)
    minilora.inject(model, r=2, targets=["lm_head"], adapter="b")  # wraps what has a copy
    assert "lm_head.trained_copies.by_adapter.a.weight" in model.state_dict()
    minilora.activate(model, "a")
    assert torch.equal(model(IDS), expected)
    minilora.delete(model, "b")
    assert type(model.lm_head) is nn.Linear and torch.equal(model(IDS), expected)
    minilora.delete(model, "a")
    assert not any("trained_copies" in name for name, _ in model.named_modules())


def test_quantize_keeps_trained_biases_and_refuses_trained_weights():
    model = net("a")
    minilora.inject(
        model, r=2, adapter="b", targets=["up"], bias="all", modules_to_save=["lm_head"]
    )
    for value in Survey(model).copies_of("b").values():
        nn.init.normal_(value)
    with pytest.raises(ValueError, match="an adapter trains a copy of lm_head.weight .* exclude="):
        minilora.quantize(model, "int8", targets=["lm_head"])
    biases = {n: v.detach().clone() for n, v in Survey(model).copies_of("b").items()}
    own = {n: v.detach().clone() for n, v in Survey(model).originals.items()}
    minilora.quantize(model, "int8")
    survey = Survey(model)
    for name, value in survey.copies_of("b").items():
        assert torch.equal(value, biases[name]) and survey.parameters[name].value is value
    with minilora.disabled(model):
        for name, value in own.items():
            assert torch.equal(survey.parameters[name].value, value)
    minilora.delete(model, "b")
    assert not any("trained_copies" in name for name, _ in model.named_modules())


def test_a_sequence_with_a_parameter_of_its_own_still_runs():
    class Scaled(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(3, 3), nn.ReLU())
            self.bias = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return super().forward(x) + self.bias

    model = nn.Sequential(Scaled(), nn.Linear(3, 3))
    x = torch.ones(2, 3)
    expected = model(x)
    minilora.inject(model, r=2, targets="0.0|1", bias="all")
    assert torch.equal(model(x), expected)


def test_names_of_wrappers_are_no_part_of_a_name():
    held = SimpleNamespace(model=nn.Sequential(nn.Linear(2, 2)))
    wrapped = nn.DataParallel(torch.compile(held.model))
    assert list(Survey(wrapped).modules) == ["0"] and Survey(wrapped).root is held.model
