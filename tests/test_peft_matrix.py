"""The matrix: every kind of layer with every option, PEFT as judge in both directions."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import minilora
from minilora.lora.layer import lora_layers

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peers

F32 = {"rtol": 1e-5, "atol": 1e-5}
IDS = torch.arange(22).reshape(2, 11) * 7 % 50


class ConvNet(nn.Module):
    """3×3 with stride and padding, 1×1, and a linear head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.point = nn.Conv2d(8, 10, 1, bias=False)
        self.wide = nn.Conv2d(10, 6, (3, 1), padding="same")
        self.norm = nn.GroupNorm(2, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        y = self.norm(self.wide(torch.relu(self.point(torch.relu(self.stem(x))))))
        return self.head(y.mean((2, 3)))


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=24, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


# kind of layer: (model, input, targets in regex, a target for patterns, a module to save)
KINDS = {
    "linear": (llama, IDS, r".*\.(q_proj|v_proj|up_proj|down_proj)", "q_proj", "lm_head"),
    "conv1d": (gpt2, IDS, r".*\.(c_attn|c_fc|c_proj)", "c_attn", "ln_f"),
    "embedding": (llama, IDS, r".*(embed_tokens|k_proj)", "embed_tokens", "lm_head"),
    "conv2d": (ConvNet, torch.linspace(-1, 1, 2 * 3 * 9 * 7).reshape(2, 3, 9, 7),
               "stem|point|wide", "point", "head"),
}  # fmt: skip
# option: (arguments of inject, fields of LoraConfig); "<pattern>" is replaced
OPTIONS = {
    "plain": ({}, {}),
    "rslora": ({"rslora": True}, {"use_rslora": True}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "dora-rslora": ({"dora": True, "rslora": True}, {"use_dora": True, "use_rslora": True}),
    "patterns": (
        {"rank_pattern": {"<pattern>": 2}, "alpha_pattern": {"<pattern>": 9}},
        {"rank_pattern": {"<pattern>": 2}, "alpha_pattern": {"<pattern>": 9}},
    ),
    "bias-all": ({"bias": "all"}, {"bias": "all"}),
    "bias-lora-only": ({"bias": "lora_only"}, {"bias": "lora_only"}),
    "lora-bias": ({"lora_bias": True}, {"lora_bias": True}),
    "modules-to-save": ({"modules_to_save": ["<save>"]}, {"modules_to_save": ["<save>"]}),
    "gaussian": ({"init": "gaussian"}, {"init_lora_weights": "gaussian"}),
    "orthogonal": ({"init": "orthogonal"}, {"init_lora_weights": "orthogonal"}),
    "pissa": ({"init": "pissa"}, None),
    "pissa-niter": ({"init": "pissa_niter_4"}, None),
    "olora": ({"init": "olora"}, None),
}
LINEAR_ONLY = {"orthogonal", "pissa", "pissa-niter", "olora"}
# PEFT refuses or has no meaning for these.
LEFT_OUT = {("embedding", "lora-bias")} | {
    (kind, option) for kind in ("embedding", "conv2d") for option in LINEAR_ONLY
}
CELLS = [(k, o) for k in KINDS for o in OPTIONS if (k, o) not in LEFT_OUT]


def made(kind):
    torch.manual_seed(0)
    model = KINDS[kind][0]().eval()
    with torch.no_grad():  # transformers starts biases at 0, which would hide a mistake
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.3)
    return model


def filled(options, kind):
    text = {"<pattern>": KINDS[kind][3], "<save>": KINDS[kind][4]}

    def fill(value):
        if isinstance(value, dict):
            return {text.get(k, k): v for k, v in value.items()}
        return [text.get(v, v) for v in value] if isinstance(value, list) else value

    return {key: fill(value) for key, value in options.items()}


def run(model, kind):
    with torch.no_grad():
        out = model(KINDS[kind][1])
    return getattr(out, "logits", out)


def shake(parameters):
    """Move everything an adapter trains, so that each part of it matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * 0.2)


def strict():
    """Every warning an error, but for what PEFT and transformers say of their own affairs."""
    context = warnings.catch_warnings()
    context.__enter__()
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing", FutureWarning)
    # Says that a lora_bias beside no bias can't be merged: true, and of no config or key.
    warnings.filterwarnings("ignore", ".lora_bias=True. was passed but the targeted layer")
    return context


@pytest.mark.parametrize(("kind", "option"), CELLS)
def test_peft_loads_what_save_wrote(tmp_path, kind, option):
    base = made(kind)
    targets = KINDS[kind][2]
    ours = minilora.inject(copy.deepcopy(base), r=4, alpha=6, targets=targets,
                           **filled(OPTIONS[option][0], kind))  # fmt: skip
    shake(p for p in ours.parameters() if p.requires_grad)
    minilora.save(ours, tmp_path)
    context = strict()
    try:
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    finally:
        context.__exit__(None, None, None)
    expected = run(ours, kind)
    assert not torch.allclose(expected, run(base, kind), atol=1e-3)
    torch.testing.assert_close(run(theirs, kind), expected, **F32)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path, tmp_path / "theirs"):
        again = minilora.load(copy.deepcopy(base), folder)
        torch.testing.assert_close(run(again, kind), expected, **F32)
    if option == "lora-bias" and any(m.bias is None for m in lora_layers(ours).values()):
        with pytest.raises(ValueError, match="merging lora_bias adds to the bias of .*found none"):
            minilora.merge(ours)
        return
    minilora.merge(ours)
    torch.testing.assert_close(run(ours, kind), expected, **F32)


def test_ranks_without_an_alpha_have_scaling_1_in_peft_too(tmp_path):
    """With one alpha PEFT's scalings are those of ours; without one, the file names each."""
    base, pattern = made("linear"), {"q_proj": 2, "layers.1.mlp.up_proj": 3}
    for alpha in (None, 6):
        ours = minilora.inject(copy.deepcopy(base), r=4, alpha=alpha, rank_pattern=pattern)
        shake(p for p in ours.parameters() if p.requires_grad)
        folder = minilora.save(ours, tmp_path / str(alpha))
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        scalings = {n.removeprefix("base_model.model."): m.scaling["default"]
                    for n, m in theirs.named_modules() if hasattr(m, "lora_A")}  # fmt: skip
        config = peft.LoraConfig(
            r=4, lora_alpha=6, rank_pattern=pattern, target_modules="all-linear"
        )
        made_there = peft.get_peft_model(copy.deepcopy(base), config)
        wanted = {n.removeprefix("base_model.model."): m.scaling["default"] if alpha else 1.0
                  for n, m in made_there.named_modules() if hasattr(m, "lora_A")}  # fmt: skip
        assert scalings == wanted and len(scalings) == 14
        assert len(set(scalings.values())) == (3 if alpha else 1)
        torch.testing.assert_close(run(theirs, "linear"), run(ours, "linear"), **F32)


@pytest.mark.parametrize(("kind", "option"), [c for c in CELLS if OPTIONS[c[1]][1] is not None])
def test_load_reads_what_peft_wrote(tmp_path, kind, option):
    base = made(kind)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=KINDS[kind][2],
        fan_in_fan_out=kind == "conv1d",
        **filled(OPTIONS[option][1], kind),
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    shake(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    ours = minilora.load(copy.deepcopy(base), tmp_path)
    expected = run(theirs, kind)
    assert not torch.allclose(expected, run(base, kind), atol=1e-3)
    torch.testing.assert_close(run(ours, kind), expected, **F32)
    before = {n: v.clone() for n, v in ours.state_dict().items()}
    if option == "lora-bias":
        return
    minilora.merge(ours)
    torch.testing.assert_close(run(ours, kind), expected, **F32)
    minilora.unmerge(ours)
    assert all(torch.equal(v, before[n]) for n, v in ours.state_dict().items())
    with minilora.disabled(ours):
        assert torch.equal(run(ours, kind), run(base, kind))
    minilora.eject(ours)
    assert all(torch.equal(v, base.state_dict()[n]) for n, v in ours.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ["plain", "dora", "rslora"])
def test_gradients_equal_pefts(tmp_path, kind, option):
    base = made(kind)
    ours = minilora.inject(copy.deepcopy(base), r=4, alpha=6, targets=KINDS[kind][2],
                           **OPTIONS[option][0])  # fmt: skip
    shake(p for p in ours.parameters() if p.requires_grad)
    minilora.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    for model in (ours, theirs):
        out = model(KINDS[kind][1])
        getattr(out, "logits", out).square().sum().backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for fqn, layer in lora_layers(ours).items():
        for name, parameter in layer.adapters["default"].named_parameters():
            key = {"magnitude": "lora_magnitude_vector"}.get(name, name)
            of_layer = [n for n in expected if n.startswith(f"base_model.model.{fqn}.")]
            plain = {n: n.replace("lora_embedding_", "lora_") for n in of_layer}
            hits = [n for n in of_layer if key in plain[n]]
            assert len(hits) == 1, (fqn, name, hits)
            grad = expected[hits[0]].reshape(parameter.shape)
            scale = float(grad.abs().max())
            torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters_sum_like_pefts(tmp_path, kind):
    base = made(kind)
    ours = minilora.inject(copy.deepcopy(base), r=4, alpha=6, targets=KINDS[kind][2])
    minilora.inject(ours, r=2, alpha=5, rslora=True, targets=[KINDS[kind][3]], adapter="b")
    shake(p for n, p in ours.named_parameters() if "adapters" in n)
    for name in ("default", "b"):
        minilora.save(ours, tmp_path, name)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    theirs.load_adapter(tmp_path / "b", "b")
    for names in (["default"], ["b"], ["default", "b"]):
        theirs.base_model.set_adapter(names)
        minilora.activate(ours, names)
        torch.testing.assert_close(run(theirs, kind), run(ours, kind), **F32)


def test_dora_among_several_depends_on_their_order_in_peft(tmp_path):
    """As docs/peft.md says: the two agree where one is DoRA, and the first."""
    base = made("linear")
    targets = KINDS["linear"][2]
    ours = minilora.inject(copy.deepcopy(base), r=4, alpha=6, targets=targets)
    minilora.inject(ours, r=2, alpha=5, dora=True, targets=targets, adapter="b")
    shake(p for n, p in ours.named_parameters() if "adapters" in n)
    for name in ("default", "b"):
        minilora.save(ours, tmp_path, name)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    theirs.load_adapter(tmp_path / "b", "b")
    found = []
    for names in (["b", "default"], ["default", "b"]):
        theirs.base_model.set_adapter(names)
        minilora.activate(ours, names)
        found.append((run(theirs, "linear"), run(ours, "linear")))
    torch.testing.assert_close(*found[0], **F32)
    torch.testing.assert_close(found[1][1], found[0][1], **F32)
    assert not torch.allclose(found[1][0], found[0][0], atol=1e-2)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_peft_takes_a_lora_bias_beside_any_init(tmp_path, init):
    base, (_, _, targets, *_) = made("linear"), KINDS["linear"]
    ours = minilora.inject(
        copy.deepcopy(base), r=4, alpha=6, targets=targets, lora_bias=True, init=init
    )
    shake(p for p in ours.parameters() if p.requires_grad)
    assert minilora.check(minilora.save(ours, tmp_path))[0].takes
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(run(theirs, "linear"), run(ours, "linear"), **F32)


def tied_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=1,
        num_attention_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("options", "tied"),
    [
        ({"modules_to_save": ["lm_head"]}, True),
        ({"modules_to_save": ["embed_tokens"]}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, True),
        ({"target_modules": ["embed_tokens"]}, True),
        ({}, False),
    ],
)
def test_layers_that_peft_trains_as_one_are_not_trained_apart(tmp_path, options, tied):
    """Its `ensure_weight_tying`."""
    base = tied_llama()
    options = {"target_modules": ["q_proj"], "ensure_weight_tying": True} | options
    config = peft.LoraConfig(r=2, lora_alpha=3, **options)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    shake(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    ours = minilora.load(copy.deepcopy(base), tmp_path, verify=False)
    torch.testing.assert_close(run(ours, "linear"), run(theirs, "linear"), **F32)
    if not tied:
        minilora.load(base, tmp_path, trainable=True)
        return
    with pytest.raises(
        ValueError, match=r"found lm_head and model\.embed_tokens, .* trainable=Fal"
    ):
        minilora.load(base, tmp_path, trainable=True)


def test_layers_of_two_ties_are_no_tie(tmp_path):
    def net():
        torch.manual_seed(0)
        parts = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in ("a", "b", "c", "d")})
        parts["b"].weight, parts["d"].weight = parts["a"].weight, parts["c"].weight
        return parts

    minilora.save(minilora.inject(net(), r=2, targets=["a", "c"]), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"ensure_weight_tying": True}))
    loaded = minilora.load(net(), tmp_path, trainable=True, verify=False)
    assert sum(p.requires_grad for p in loaded.parameters()) == 4


def test_an_embedding_alone_is_trained_though_its_head_is_tied(tmp_path):
    """GPT-2's is not one that PEFT ties adapters of."""
    base = made("conv1d")
    config = peft.LoraConfig(r=2, target_modules=["wte"], ensure_weight_tying=True)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    shake(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    ours = minilora.load(base, tmp_path, trainable=True)
    torch.testing.assert_close(run(ours, "conv1d"), run(theirs, "conv1d"), **F32)


def test_a_copy_within_a_copy_is_refused(tmp_path):
    """PEFT can't load its own file; `inject` makes one copy."""
    torch.manual_seed(0)
    base = roberta().eval()
    modules = ["classifier.out_proj", "classifier"]
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=modules)
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    with pytest.raises(KeyError, match="classifier.out_proj.weight"):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with pytest.raises(ValueError, match=r"found classifier\.out_proj in classifier: PEFT trains"):
        minilora.load(copy.deepcopy(base), tmp_path)
    ours = minilora.inject(copy.deepcopy(base), targets=["query"], modules_to_save=modules)
    shake(p for p in ours.parameters() if p.requires_grad)
    minilora.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, **F32)


def test_several_adapters_of_peft_load_side_by_side(tmp_path):
    base = made("linear")
    first = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    second = peft.LoraConfig(r=2, lora_alpha=5, use_rslora=True, target_modules=r".*\.[qv]_proj",
                             init_lora_weights=False)  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), first).eval()
    theirs.add_adapter("b", second)
    shake(p for n, p in theirs.named_parameters() if "lora_" in n)
    theirs.save_pretrained(tmp_path)
    ours = minilora.load(base, tmp_path)
    minilora.load(ours, tmp_path / "b", adapter="b")
    for name in ("default", "b"):
        theirs.set_adapter(name)
        minilora.activate(ours, name)
        torch.testing.assert_close(run(theirs, "linear"), run(ours, "linear"), **F32)


@pytest.mark.parametrize("options", [{}, {"dora": True}])
def test_peft_agrees_on_an_embedding_that_scales_its_output(tmp_path, options):
    """Gemma multiplies what it looks up by √width: the adapter's part too."""
    config = transformers.Gemma3TextConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=1, head_dim=6,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.Gemma3ForCausalLM(config).eval()
    assert float(base.model.embed_tokens.embed_scale) == pytest.approx(24**0.5, rel=0.01)
    ours = minilora.inject(copy.deepcopy(base), r=4, alpha=6, targets=["embed_tokens"], **options)
    shake(p for p in ours.parameters() if p.requires_grad)
    minilora.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    expected = run(ours, "linear")
    assert not torch.allclose(expected, run(base, "linear"), atol=1e-3)
    torch.testing.assert_close(run(theirs, "linear"), expected, **F32)
    minilora.merge(ours, untie=True)
    torch.testing.assert_close(run(ours, "linear"), expected, **F32)


def table():
    """The compatibility table of docs/peft.md: what the tests above prove, cell by cell."""
    names = {"linear": "Linear", "conv1d": "Conv1D", "embedding": "Embedding", "conv2d": "Conv2d"}
    lines = [f"| option | {' | '.join(names.values())} |", "|---" * (len(names) + 1) + "|"]
    for option, (arguments, fields) in OPTIONS.items():
        said = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        both = "both ways" if fields is not None else "ours → PEFT"
        cells = ["–" if (kind, option) in LEFT_OUT else both for kind in KINDS]
        lines.append(f"| {f'`{said}`' if said else 'plain'} | {' | '.join(cells)} |")
    return "\n".join(lines).replace("<pattern>", "q_proj").replace("<save>", "head")


def test_readme_shows_this_matrix():
    readme = (Path(__file__).resolve().parents[1] / "docs" / "peft.md").read_text(encoding="utf-8")
    assert table() in readme, table()


class Experts(nn.Module):
    """Three blocks, each of a linear and three numbered experts."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"q": nn.Linear(8, 8), "experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(3))}
            )
            for _ in range(3)
        )
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        for block in self.layers:
            x = x + block["q"](x)
            for expert in block["experts"]:
                x = x + torch.tanh(expert(x))
        return self.attention(x[None], x[None], x[None])[0][0]


EXPERTS = [f"experts.{i}" for i in range(3)]


class Wrapped(nn.Module):
    """Names have a module before the blocks, as PEFT expects."""

    def __init__(self):
        super().__init__()
        self.model = Experts()

    def forward(self, x):
        return self.model(x)


def roberta():
    config = transformers.RobertaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=40, hidden_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.RobertaForSequenceClassification(config)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Wrapped, {"target_modules": ["q", *EXPERTS], "layers_to_transform": [0, 1]}),
        (Wrapped, {"target_modules": ["q", *EXPERTS], "layers_to_transform": [0, 1],
                   "layers_pattern": ["layers"]}),
        (Wrapped, {"target_modules": ["q"], "bias": "all"}),
        (roberta, {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
        (roberta, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ],
    ids=["experts", "experts-pattern", "in_proj_bias", "classifier", "classifier-all-linear"],
)  # fmt: skip
def test_what_peft_leaves_out_of_its_file_is_not_asked_for(tmp_path, make, options):
    torch.manual_seed(0)
    base = make().eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, lora_alpha=3, **options))
    shake([p for p in theirs.parameters() if p.requires_grad])
    theirs.eval().save_pretrained(tmp_path)
    ours = minilora.load(base, tmp_path, verify=False)
    x = IDS if make is roberta else torch.linspace(-1, 1, 24).reshape(3, 8)
    found, wanted = ours(x), theirs(x)
    torch.testing.assert_close(
        getattr(found, "logits", found), getattr(wanted, "logits", wanted), **F32
    )
