"""Every verb in random order on one small model, against a dense float64 model written apart.

The oracle below knows nothing of minilora: it keeps each adapter's tensors as float64, computes
the scaling from r and alpha itself, and multiplies whole effective weights. After every step the
model must give the oracle's numbers, its base must be the very bits it was, `requires_grad` must be
what the oracle expects by name, and a move that is refused must have changed nothing.
"""

import copy
import itertools
import math
import pickle
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn
from torch.nn import functional as F

import minilora
from minilora.lora.layer import lora_layers
from minilora.lora.survey import Survey

IDS = torch.tensor([[0, 1, 2, 3], [6, 5, 4, 0]])
# Of the largest output; the worst seen in ten thousand steps was 8.5e-7.
TOLERANCE = 1e-5


class Conv1D(nn.Module):
    """GPT-2's linear: weight `[in, out]`."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.4)
        self.bias = nn.Parameter(torch.randn(nf) * 0.3)

    def forward(self, x):
        return x @ self.weight + self.bias


class Block(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.c_fc, self.down = Conv1D(8, 6), nn.Linear(8, 6, bias=bias)

    def forward(self, x):
        return self.down(torch.tanh(self.c_fc(x)))


class Small(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embed, self.conv = nn.Embedding(7, 6), nn.Conv2d(4, 4, 3, padding=1)
        self.layers = nn.ModuleList([Block(True), Block(False)])
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 7)
        nn.init.normal_(self.norm.weight, 1.0, 0.2)
        nn.init.normal_(self.norm.bias, 0.0, 0.2)
        if tied:
            self.head.weight = self.embed.weight
        self.norm.bias.requires_grad_(False)  # flags that eject has to bring back
        self.layers[0].down.weight.requires_grad_(False)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.conv(x.reshape(-1, 4, 2, 3)).reshape(x.shape)
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return self.head(self.norm(x))


# ── the oracle ─────────────────────────────────────────────────────────────────────────────────

LAYERS = {
    "embed": "embedding", "conv": "conv", "layers.0.c_fc": "conv1d", "layers.0.down": "linear",
    "layers.1.c_fc": "conv1d", "layers.1.down": "linear", "head": "linear",
}  # fmt: skip
WITH_BIAS = [name for name in LAYERS if name not in ("embed", "layers.1.down")]


def matrix(fqn, weight):
    """A weight in its own layout as `[N, K]`."""
    return weight.T if LAYERS[fqn] in ("embedding", "conv1d") else weight.flatten(1)


def layout(fqn, matrix, like):
    return matrix.T if LAYERS[fqn] in ("embedding", "conv1d") else matrix.reshape(like.shape)


def dense_forward(p, ids):
    """The whole network by hand, from float64 parameters by name."""

    def norm(x):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * p["norm.weight"] + p["norm.bias"]

    x = p["embed.weight"][ids]
    image = F.pad(x.reshape(-1, 4, 2, 3), (1, 1, 1, 1))
    patches = torch.stack([image[:, :, i : i + 2, j : j + 3] for i in range(3) for j in range(3)])
    kernel = p["conv.weight"].flatten(2).permute(2, 0, 1)  # [9, out, in]
    conv = torch.einsum("pbihw,poi->bohw", patches, kernel) + p["conv.bias"][:, None, None]
    x = x + conv.reshape(x.shape)
    for i in "01":
        hidden = torch.tanh(norm(x) @ p[f"layers.{i}.c_fc.weight"] + p[f"layers.{i}.c_fc.bias"])
        x = x + hidden @ p[f"layers.{i}.down.weight"].T + p.get(f"layers.{i}.down.bias", 0.0)
    return norm(x) @ p["head.weight"].T + p["head.bias"]


@dataclass
class Factors:
    A: torch.Tensor  # [R, K]
    B: torch.Tensor  # [N, R]
    r: int
    alpha: float
    rslora: bool = False
    magnitude: torch.Tensor | None = None
    lora_bias: torch.Tensor | None = None
    offset: tuple[torch.Tensor, torch.Tensor] | None = None  # A and scaled B at the start

    @property
    def scaling(self):
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def added(self, W):
        """What is added to W; the length of a DoRA row is a constant to the gradient."""
        delta = self.scaling * self.B @ self.A
        if self.offset is not None:
            delta = delta - self.offset[1] @ self.offset[0]
        if self.magnitude is None:
            return delta
        ratio = self.magnitude / (W + delta).square().sum(1).sqrt().detach()
        return ratio[:, None] * (W + delta) - W

    def parts(self):
        found = {"lora_A": self.A, "lora_B": self.B, "magnitude": self.magnitude,
                 "lora_bias": self.lora_bias}  # fmt: skip
        return {name: value for name, value in found.items() if value is not None}

    def as_saved(self):
        """What a file holds: a frozen offset becomes part of a plain adapter of twice the rank."""
        if self.offset is None:
            return replace(self)
        A = torch.cat([self.A, self.offset[0]])
        B = torch.cat([self.scaling * self.B, -self.offset[1]], 1)
        return Factors(A, B, len(A), len(A), False, self.magnitude)

    def shape(self):
        return {name: value.shape for name, value in self.parts().items()}, self.offset is None


@dataclass
class Adapter:
    factors: dict[str, Factors]
    copies: dict[str, torch.Tensor] = field(default_factory=dict)
    trainable: bool = True

    def as_saved(self):
        saved = {fqn: f.as_saved() for fqn, f in self.factors.items()}
        return copy.deepcopy(Adapter(saved, self.copies))

    def shape(self):
        return {fqn: f.shape() for fqn, f in self.factors.items()}, set(self.copies)


def effective(base, adapters):
    """Every parameter of the network with these adapters in it."""
    own = dict(base)
    for adapter in adapters:
        own |= adapter.copies
    found = dict(own)
    for adapter in adapters:
        for fqn, factors in adapter.factors.items():
            key, bias = f"{fqn}.weight", f"{fqn}.bias"
            delta = factors.added(matrix(fqn, own[key]))
            found[key] = found[key] + layout(fqn, delta, own[key])
            if factors.lora_bias is not None:
                found[bias] = found.get(bias, 0.0) + factors.scaling * factors.lora_bias
    return found


# ── what is drawn ──────────────────────────────────────────────────────────────────────────────

NAMES = ["default", "a", "b"]
SEEDS = st.integers(0, 2**16)
SPECS = [
    ("all-linear", [n for n in LAYERS if LAYERS[n] in ("linear", "conv1d")]),
    (["c_fc"], ["layers.0.c_fc", "layers.1.c_fc"]),
    (["down", "head"], ["layers.0.down", "layers.1.down", "head"]),
    (["embed"], ["embed"]),
    (["conv", "layers.0.down"], ["conv", "layers.0.down"]),
    (r"embed|layers\.1\..*", ["embed", "layers.1.c_fc", "layers.1.down"]),
    (["c_fc", "down", "conv", "embed", "head"], list(LAYERS)),
]
UNDER = {
    "norm": ["norm.weight", "norm.bias"],
    "head": ["head.weight", "head.bias"],
    "embed": ["embed.weight"],
    "layers.1": ["layers.1.c_fc.weight", "layers.1.c_fc.bias", "layers.1.down.weight"],
}


@st.composite
def injections(draw, tied):
    """Legal arguments of inject, and the dotted names they select."""
    targets, names = draw(st.sampled_from(SPECS))
    if targets == "all-linear" and tied:
        names = [n for n in names if n != "head"]
    names = list(names)
    options = {"targets": targets}
    if len(names) > 1 and draw(st.integers(0, 4)) == 0:
        options["exclude"] = [names[0]]
        del names[0]
    linear = all(LAYERS[n] in ("linear", "conv1d") for n in names)
    inits = ["kaiming", "gaussian"] * 2 + ["orthogonal", "pissa", "olora"] * linear
    init = options["init"] = draw(st.sampled_from(inits))
    simple = init in ("kaiming", "gaussian")
    options["r"] = draw(st.sampled_from([2, 4] if init == "orthogonal" else [1, 2, 3]))
    options["alpha"] = draw(st.sampled_from([0.5, 3.5, 7, -2.5]))
    options["rslora"] = draw(st.booleans())
    options["dora"] = draw(st.integers(0, 3)) == 0
    options["dropout"] = 0.0 if names == ["embed"] else draw(st.sampled_from([0.0, 0.25]))
    if simple and not options["dora"]:
        options["lora_bias"] = "embed" not in names and draw(st.booleans())
    if any(n.endswith("down") for n in names) and draw(st.integers(0, 3)) == 0:
        options["rank_pattern"], options["alpha_pattern"] = {"down": 2}, {"down": 6.5}
    modes = ["none"] * 2 + ["all"] + ["lora_only"] * any(n in WITH_BIAS for n in names)
    options["bias"] = draw(st.sampled_from(modes))
    free = [m for m in UNDER if not any(n == m or n.startswith(m + ".") for n in names)]
    if draw(st.integers(0, 2)) == 0 and free:
        options["modules_to_save"] = [draw(st.sampled_from(free))]
    return options, names


BAD_OPTIONS = [
    ({"targets": ["c_fc", "c_fd"]}, "'c_fd' matches none"),
    ({"targets": ["norm"]}, "'norm' matches norm, a LayerNorm"),
    ({"targets": ["down"], "modules_to_save": ["layers.0"]}, "name it in one of the two"),
    ({"targets": ["down"], "modules_to_save": ["nothing"]}, "'nothing' matches none"),
    ({"targets": ["embed"], "bias": "lora_only"}, "must find a bias to train, found none"),
    ({"targets": ["embed"], "dropout": 0.25}, "dropout acts on the input of linear layers"),
    ({"targets": ["embed"], "lora_bias": True}, "not for embeddings, and embed is one"),
    ({"targets": ["conv"], "init": "pissa"}, "is for linear layers, but conv is a Conv2d"),
    ({"targets": ["c_fc"], "dora": True, "lora_bias": True}, "has no meaning with dora"),
    ({"targets": ["down"], "r": 3, "init": "orthogonal"}, "needs an even r, found 3"),
    ({"targets": ["down"], "layers": [2]}, r"found \[2\]; there are: 0, 1"),
    ({"targets": ["down"], "adapter": "keys"}, "taken by torch.nn.ModuleDict"),
]


def picture(model):
    """All that a refused move must leave as it is."""
    return (
        [(n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)],
        [(n, p.detach().clone()) for n, p in model.named_parameters()],
        [(n, b.clone()) for n, b in model.named_buffers()],
        [(n, type(m), m.training) for n, m in model.named_modules()],
        [(n, m.active, m.merged) for n, m in lora_layers(model).items()],
    )


def assert_same(before, after):
    assert before[0] == after[0]
    assert before[3:] == after[3:]
    for old, new in zip(before[1] + before[2], after[1] + after[2], strict=True):
        assert old[0] == new[0]
        assert torch.equal(old[1], new[1]), old[0]


class Verbs(RuleBasedStateMachine):
    @initialize(tied=st.booleans(), seed=SEEDS, data=st.data())
    def start(self, tied, seed, data):
        torch.manual_seed(seed)
        self.model, self.tied = Small(tied).eval(), tied
        self.folder = Path(tempfile.mkdtemp(prefix="minilora-verbs-"))
        self.flags = {
            n: p.requires_grad for n, p in self.model.named_parameters(remove_duplicate=False)
        }
        self.adapters, self.active = {}, ()
        self.merged, self.keep, self.in_layers = None, None, {}
        self.twins = []
        self.new_base()
        self.refused(ValueError, r"needs a model with adapters, found none", data.draw(
            st.sampled_from([
                lambda: minilora.activate(self.model, None), lambda: minilora.merge(self.model),
                lambda: minilora.unmerge(self.model), lambda: minilora.eject(self.model),
                lambda: minilora.save(self.model, self.folder), lambda: minilora.delete(
                    self.model, "default"),
            ])))  # fmt: skip
        self.do_inject(data, seed)

    def new_base(self):
        self.bits = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.base = {name: value.double() for name, value in self.bits.items()}
        self.saved = []  # (folder, what must come back)

    def teardown(self):
        for twin, before in getattr(self, "twins", ()):  # copies and originals share nothing
            assert_same(before, picture(twin))
        shutil.rmtree(getattr(self, "folder", "/nonexistent"), ignore_errors=True)

    # ── what holds after every step

    def contributions(self):
        """The adapters that the model computes with now."""
        return [self.adapters[n] for n in (self.active if self.merged is None else self.merged)]

    @invariant()
    def output_is_the_oracles(self):
        with torch.no_grad():
            found = self.model(IDS).double()
        expected = dense_forward(effective(self.base, self.contributions()), IDS)
        error = (found - expected).abs().max() / expected.abs().max()
        assert error <= TOLERANCE, float(error)

    @invariant()
    def flags_are_as_asked(self):
        of_copies = {
            id(p): self.adapters[a].trainable for a in self.adapters
            for p in Survey(self.model).copies_of(a).values()
        }  # fmt: skip
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            parts = name.split(".")
            if not self.adapters:
                expected = self.flags[name]
            elif "adapters" in parts:
                expected = self.adapters[parts[parts.index("adapters") + 1]].trainable
            else:
                expected = of_copies.get(id(parameter), False)
            assert parameter.requires_grad == expected, name

    @invariant()
    def places_hold_what_they_should(self):
        layers = lora_layers(self.model)
        there = {n: {a for a in self.adapters if n in self.adapters[a].factors} for n in LAYERS}
        assert {n: set(m.adapters) for n, m in layers.items()} == {
            n: names for n, names in there.items() if names
        }
        if not self.adapters:
            assert list(self.model.state_dict()) == list(self.bits)
            return
        found = {a.name: a for a in minilora.summary(self.model).adapters}
        assert {n: a.merged for n, a in found.items()} == {
            n: n in (self.merged or ()) for n in self.adapters
        }
        if self.merged is None:
            assert {n for n, a in found.items() if a.active} == set(self.active)
        held = dict(self.model.named_parameters(remove_duplicate=False))
        for name, adapter in self.adapters.items():
            copies = Survey(self.model).copies_of(name)
            assert set(copies) == set(adapter.copies)
            for key, parameter in copies.items() if self.merged is None else ():
                module, _, leaf = key.rpartition(".")
                place = held[f"{module}.base.{leaf}" if module in layers else key]
                assert (place is parameter) == (name in self.active), (name, key)

    @invariant()
    def base_is_the_same_bits(self):
        if not self.adapters:
            now, changed = self.model, ()
        else:
            now, changed = copy.deepcopy(self.model), ()
            if self.merged is not None and self.keep is not None:
                minilora.unmerge(now)
            elif self.merged is not None:
                touched = {fqn for a in self.merged for fqn in self.adapters[a].factors}
                copied = {key for a in self.merged for key in self.adapters[a].copies}
                changed = copied | {f"{n}.{k}" for n in touched for k in ("weight", "bias")}
            minilora.eject(now)
        state = now.state_dict()
        assert list(state) == list(self.bits)
        for name, value in self.bits.items():
            assert name in changed or torch.equal(state[name], value), name
        if self.tied and not changed:
            assert now.head.weight is now.embed.weight

    # ── moves

    def free_names(self):
        return [name for name in NAMES if name not in self.adapters]

    def refused(self, error, text, call):
        before = picture(self.model)
        with pytest.raises(error, match=text):
            call()
        assert_same(before, picture(self.model))

    @precondition(lambda self: self.merged is None and self.free_names())
    @rule(data=st.data(), seed=SEEDS)
    def inject(self, data, seed):
        self.do_inject(data, seed)

    def do_inject(self, data, seed):
        torch.manual_seed(seed)
        name = data.draw(st.sampled_from(self.free_names()))
        options, names = data.draw(injections(self.tied))
        minilora.inject(self.model, adapter=name, **options)
        assert {n for n, m in lora_layers(self.model).items() if name in m.adapters} == set(names)
        factors = {fqn: self.read(fqn, name, options) for fqn in names}
        keys = [f"{n}.bias" for n in names if n in WITH_BIAS and options["bias"] == "lora_only"]
        keys += [n for n in self.base if "bias" in n and options["bias"] == "all"]
        for module in options.get("modules_to_save", ()):
            keys += UNDER[module]
        self.adapters[name] = Adapter(factors, {key: self.base[key].clone() for key in keys})
        self.active = (name,)

    def read(self, fqn, name, options):
        """A fresh adapter's factors; all but what is drawn at random is the oracle's own."""
        held = self.model.get_submodule(fqn).adapters[name]
        patterned = "rank_pattern" in options and fqn.endswith("down")
        r, alpha = (2, 6.5) if patterned else (options["r"], options["alpha"])
        A, B = (f.detach().double().flatten(1) for f in (held.lora_A, held.lora_B))
        found = Factors(A, B, r, alpha, options["rslora"])
        assert A.shape[0] == B.shape[1] == r
        W = matrix(fqn, self.base[f"{fqn}.weight"])
        start = options["init"]
        if start in ("pissa", "olora"):
            found.offset = (A.clone(), found.scaling * B)
            if start == "pissa":
                U, S, V = torch.linalg.svd(W, full_matrices=False)
                best = U[:, :r] * S[:r] @ V[:r]
                assert (found.offset[1] @ A - best).abs().max() < 1e-4
        elif start == "orthogonal":
            assert (B @ A).abs().max() < 1e-5
        else:
            assert not (A if LAYERS[fqn] == "embedding" else B).any()
        if options["dora"]:
            found.magnitude = W.square().sum(1).sqrt()
        if options.get("lora_bias"):
            found.lora_bias = torch.zeros(len(W), dtype=torch.float64)
        return found

    @precondition(lambda self: self.merged is None and self.adapters)
    @rule(data=st.data(), seed=SEEDS)
    def randomise(self, data, seed):
        """Write values of the oracle's choice into all that an adapter trains."""
        name = data.draw(st.sampled_from(list(self.adapters)))
        adapter, generator = self.adapters[name], torch.Generator().manual_seed(seed)

        def noise(like, std):
            return torch.randn(like.shape, generator=generator).double() * std

        with torch.no_grad():
            for fqn, f in adapter.factors.items():
                held = self.model.get_submodule(fqn).adapters[name]
                values = {"lora_A": noise(f.A, 0.4), "lora_B": noise(f.B, 0.4)}
                if f.magnitude is not None:
                    values["magnitude"] = f.magnitude * (1 + noise(f.magnitude, 0.2))
                if f.lora_bias is not None:
                    values["lora_bias"] = noise(f.lora_bias, 0.3)
                values = {part: value.float() for part, value in values.items()}
                for part, value in values.items():
                    parameter = getattr(held, part)
                    parameter.copy_(value.reshape(parameter.shape))
                f.A, f.B = values["lora_A"].double(), values["lora_B"].double()
                if f.magnitude is not None:
                    f.magnitude = values["magnitude"].double()
                if f.lora_bias is not None:
                    f.lora_bias = values["lora_bias"].double()
            for key, parameter in Survey(self.model).copies_of(name).items():
                value = (self.base[key] + noise(self.base[key], 0.2)).float()
                parameter.copy_(value)
                adapter.copies[key] = value.double()

    @precondition(lambda self: self.merged is None and self.active)
    @rule(seed=SEEDS)
    def differentiate(self, seed):
        """Gradients reach exactly what is active and trainable, with the oracle's numbers."""
        used = {n: copy.deepcopy(self.adapters[n]) for n in self.active}
        leaves = []
        for name, adapter in used.items():
            for fqn, f in adapter.factors.items():
                held = self.model.get_submodule(fqn).adapters[name]
                leaves += [(getattr(held, part), leaf) for part, leaf in f.parts().items()]
            copies = Survey(self.model).copies_of(name)
            leaves += [(copies[key], leaf) for key, leaf in adapter.copies.items()]
        leaves = [(parameter, leaf.requires_grad_()) for parameter, leaf in leaves]
        wanted = {id(parameter) for parameter, _ in leaves if parameter.requires_grad}
        if not wanted:
            return
        G = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(seed))
        (self.model(IDS) * G).sum().backward()
        (dense_forward(effective(self.base, used.values()), IDS) * G.double()).sum().backward()
        for name, parameter in self.model.named_parameters():
            assert (parameter.grad is not None) == (id(parameter) in wanted), name
        largest = max(float(leaf.grad.abs().max()) for _, leaf in leaves)
        for parameter, leaf in leaves:
            if parameter.requires_grad:
                error = parameter.grad.double().reshape(leaf.shape) - leaf.grad
                assert error.abs().max() <= 10 * TOLERANCE * largest
        self.model.zero_grad(set_to_none=True)

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def save(self, data):
        name = data.draw(st.sampled_from(list(self.adapters)))
        below = self.folder / str(len(self.saved))
        found = minilora.save(self.model, below, name)
        assert found == (below if name == "default" else below / name)
        self.saved.append((found, self.adapters[name].as_saved()))

    @precondition(lambda self: self.merged is None and self.saved and self.free_names())
    @rule(data=st.data(), trainable=st.booleans())
    def load(self, data, trainable):
        name = data.draw(st.sampled_from(self.free_names()))
        folder, content = data.draw(st.sampled_from(self.saved))
        minilora.load(self.model, folder, name, trainable=trainable)
        self.adapters[name] = replace(copy.deepcopy(content), trainable=trainable)
        self.active = (name,)

    @precondition(lambda self: self.merged is None and self.saved and self.adapters)
    @rule(data=st.data())
    def load_in_place(self, data):
        name = data.draw(st.sampled_from(list(self.adapters)))
        folder, content = data.draw(st.sampled_from(self.saved))
        if content.shape() != self.adapters[name].shape():
            self.refused(ValueError, "replace=True needs the layers, ranks and options",
                         lambda: minilora.load(self.model, folder, name, replace=True))  # fmt: skip
            return
        minilora.load(self.model, folder, name, replace=True)
        content = copy.deepcopy(content)
        self.adapters[name] = replace(content, trainable=self.adapters[name].trainable)

    def conflicting(self, names):
        pairs = itertools.combinations(names, 2)
        return any(set(self.adapters[a].copies) & set(self.adapters[b].copies) for a, b in pairs)

    @precondition(lambda self: self.merged is None and self.adapters)
    @rule(data=st.data())
    def activate(self, data):
        every = list(self.adapters)
        names = data.draw(st.lists(st.sampled_from(every), unique=True))
        trainable = data.draw(st.none() | st.lists(st.sampled_from(every), unique=True))
        asked = names[0] if len(names) == 1 else names or data.draw(st.sampled_from([None, []]))

        def call():
            minilora.activate(self.model, asked, trainable=trainable)

        if self.conflicting(names):
            self.refused(ValueError, "each bring a trained copy of .* one of them at a time", call)
            return
        call()
        self.active = tuple(names)
        for name, adapter in self.adapters.items() if trainable is not None else ():
            adapter.trainable = name in trainable

    @precondition(lambda self: self.merged is None and self.adapters)
    @rule(fails=st.booleans())
    def disable(self, fails):
        before = picture(self.model)
        try:
            with minilora.disabled(self.model):
                active, self.active = self.active, ()
                self.output_is_the_oracles()
                self.places_hold_what_they_should()
                self.active = active
                if fails:
                    raise KeyError
        except KeyError:
            assert fails
        assert_same(before, picture(self.model))

    @precondition(lambda self: self.merged is None and self.adapters)
    @rule(data=st.data(), keep=st.sampled_from(["memory", "disk", None]), untie=st.booleans())
    def merge(self, data, keep, untie):
        every = list(self.adapters)
        asked = data.draw(st.none() | st.lists(st.sampled_from(every), unique=True))
        names = self.active if asked is None else tuple(asked)

        def call():
            minilora.merge(self.model, asked, keep=keep, untie=untie)

        copied = {key for adapter in self.adapters.values() for key in adapter.copies}
        touched = {fqn for n in names for fqn in self.adapters[n].factors}
        biased = {
            fqn for n in names for fqn, f in self.adapters[n].factors.items()
            if f.lora_bias is not None
        }  # fmt: skip
        tied = self.tied and touched & {"embed", "head"} and not untie
        if not names:
            self.refused(ValueError, "needs an adapter: none is active and none was named", call)
        elif self.conflicting(names):
            self.refused(ValueError, "each bring a trained copy of", call)
        elif "layers.1.down" in biased:
            self.refused(ValueError, "adds to the bias of .*, found none", call)
        elif tied and not copied & {"embed.weight", "head.weight"}:
            self.refused(ValueError, "both share one weight; pass --untie", call)
        elif tied or any(f"{fqn}.bias" in copied for fqn in biased):
            # With copies about, refusing may be more careful than it need be; it is never wrong.
            before = picture(self.model)
            try:
                call()
            except ValueError:
                assert_same(before, picture(self.model))
            else:
                self.merged, self.keep = names, keep
        else:
            call()
            self.merged, self.keep = names, keep

    @precondition(lambda self: self.merged is not None)
    @rule()
    def unmerge(self):
        if self.keep is None and any(self.adapters[n].factors for n in self.merged):
            self.refused(RuntimeError, r"merge\(keep=None\) kept none",
                         lambda: minilora.unmerge(self.model))  # fmt: skip
            return
        minilora.unmerge(self.model)
        self.merged = None

    @precondition(lambda self: self.merged is None and self.adapters and self.free_names())
    @rule(data=st.data())
    def rename(self, data):
        old = data.draw(st.sampled_from(list(self.adapters)))
        new = data.draw(st.sampled_from(self.free_names()))
        minilora.rename(self.model, old, new)
        self.adapters = {new if n == old else n: a for n, a in self.adapters.items()}
        self.active = tuple(new if n == old else n for n in self.active)

    @precondition(lambda self: self.merged is None and self.adapters)
    @rule(data=st.data())
    def delete(self, data):
        name = data.draw(st.sampled_from(list(self.adapters)))
        minilora.delete(self.model, name)
        del self.adapters[name]
        self.active = tuple(n for n in self.active if n != name)

    @precondition(lambda self: len(self.adapters) > 1 or self.merged is not None)
    @rule()
    def eject(self):
        assert minilora.eject(self.model) is self.model
        if self.merged is not None:
            values = effective(self.base, self.contributions())
            for name, value in self.model.state_dict().items():
                error = (value.double() - values[name]).abs().max()
                assert error <= TOLERANCE * (1 + values[name].abs().max()), name
            self.tied = self.model.head.weight is self.model.embed.weight
            self.new_base()
        self.adapters, self.active, self.merged = {}, (), None

    @rule(by=st.sampled_from([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]))
    def go_on_with_a_copy(self, by):
        twin = by(self.model)
        self.twins.append((self.model, picture(self.model)))
        self.model = twin

    # ── illegal moves

    @rule(data=st.data())
    def try_what_is_refused(self, data):
        model, there = self.model, list(self.adapters)
        unknown = [
            lambda: minilora.activate(model, "nobody"),
            lambda: minilora.activate(model, [*there, "nobody"]),
            lambda: minilora.activate(model, None, trainable="nobody"),
            lambda: minilora.merge(model, [*there, "nobody"], keep=None),
            lambda: minilora.delete(model, "nobody"),
            lambda: minilora.rename(model, "nobody", "somebody"),
            lambda: minilora.save(model, self.folder / "no", "nobody"),
        ]
        in_use = [
            lambda: minilora.inject(model, 2, 5, targets=["conv"], adapter=there[0]),
            lambda: minilora.rename(model, there[-1], there[0]),
        ]
        merged = {
            "inject": lambda: minilora.inject(model, 2, 5, targets=["conv"], adapter="more"),
            "activate": lambda: minilora.activate(model, there[0]),
            "disabled": lambda: minilora.disabled(model).__enter__(),
            "merge": lambda: minilora.merge(model, there[0]),
            "delete": lambda: minilora.delete(model, there[0]),
            "rename": lambda: minilora.rename(model, there[0], "more"),
        }
        if self.saved:
            in_use.append(lambda: minilora.load(model, self.saved[0][0], there[0]))
            merged["load"] = lambda: minilora.load(model, self.saved[0][0], "more")
        kinds = ["options"] * (self.merged is None)
        if there:
            kinds += ["unknown", "in use"] if self.merged is None else ["merged"]
        kind = data.draw(st.sampled_from(kinds))
        if kind == "unknown":
            call = data.draw(st.sampled_from(unknown))
            self.refused(ValueError, "there is no adapter 'nobody'; this model has: ", call)
            assert not (self.folder / "no").exists()
        elif kind == "in use":
            call = data.draw(st.sampled_from(in_use))
            self.refused(ValueError, f"already has an adapter.*'{there[0]}'", call)
        elif kind == "merged":
            verb = data.draw(st.sampled_from(list(merged)))
            self.refused(RuntimeError, rf"{verb}\(\) needs unmerged", merged[verb])
        else:
            options, text = data.draw(st.sampled_from(BAD_OPTIONS))
            options = {"r": 2, "alpha": 5, "adapter": "more", **options}
            self.refused(ValueError, text, lambda: minilora.inject(model, **options))


TestVerbs = Verbs.TestCase
# Shrinking a failing run takes minutes: add Phase.shrink where a run is too long to be read.
TestVerbs.settings = settings(
    max_examples=100,
    stateful_step_count=15,
    deadline=None,
    report_multiple_bugs=False,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
