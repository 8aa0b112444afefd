"""Adapter files: the same bytes back, atomic as a pair, refused when they do not fit."""

import base64
import copy
import itertools
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import bits, net, shake, unchanged
from torch import nn

import minilora
from minilora.lora.layer import lora_layers
from minilora.peft.config import read_config


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
    with pytest.raises(
        ValueError,
        match=r"on another base: sampled weights of q_proj .*\(in Python, verify=False loads",
    ):
        minilora.load(net(seed=1), tmp_path)
    minilora.load(net(seed=1), tmp_path, verify=False)
    narrow = minilora.load(net(dtype=torch.bfloat16), tmp_path)  # the same base, rounded
    x = torch.randn(3, 12)
    torch.testing.assert_close(narrow(x.bfloat16()).float(), model(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("fails", [1, 2, 3])
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
    with pytest.raises(RuntimeError, match="must be written, but that failed: killed"):
        minilora.save(other, tmp_path)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    if fails < 3:
        minilora.load(net(), tmp_path)  # the old pair, whole
        return
    with pytest.raises(ValueError, match=r"safetensors and .*config\.json must be saved together"):
        minilora.load(net(), tmp_path)


CONFIGS = [
    ({"peft_type": "LOHA"}, "peft_type must be 'LORA'"),
    ({"use_dora": True}, "missing: .*lora_magnitude_vector"),
    ({"modules_to_save": ["lm_head"]}, r"missing: base_model\.model\.lm_head\.bias"),
    ({"modules_to_save": [3]}, "modules_to_save must be a list of names"),
    ({"bias": "lora_only"}, r"missing: base_model\.model\.mlp\.0\.base_layer\.bias"),
    ({"bias": "some"}, "bias must be 'none', 'all' or 'lora_only', found 'some'"),
    ({"lora_bias": True}, "missing: .*lora_B.bias"),
    ({"layers_to_transform": ["x"]}, "layers_to_transform must be a block number"),
    ({"layers_to_transform": [0]}, "does not fit this model: layers must name blocks"),
    ({"use_qalora": True}, "use_qalora=True may change what is computed"),
    ({"invented_by_a_newer_peft": 3}, "invented_by_a_newer_peft=3 may change"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changed the base"),
    ({"r": "8"}, "r must be a whole number"),
    ({"r": 5}, "must have shape"),
    ({"r": 10**12}, "r must be at most 65,536, found 1000000000000"),
    (
        {"rank_pattern": {f"a{i}": 2 for i in range(5000)}},
        "must have at most 4,096 keys, found 5,000",
    ),
    ({"target_modules": "(a|[a-z_.0-9]+)+!"}, "must match a linear, embedding or conv"),
    (
        {"exclude_modules": ["x" * 10**6] * 9, "target_modules": ["y" * 10**6]},
        "does not fit this mo",
    ),
    ({"x" * 10**5: "y" * 10**5}, "x…='y+… .100,002 characters. may change"),
    ({"lora_alpha": None}, "lora_alpha must be a finite number"),
    ({"lora_dropout": 2}, "dropout must lie in"),
    ({"target_modules": []}, "target_modules must be a non-empty list"),
    ({"target_modules": ["q_proj"]}, "not called for by target_modules"),
    ({"target_modules": ["q_proj", "v_proj", "mlp.0", "mlp.2", "lm_head"]}, "missing: .*lm_head"),
    ({"target_modules": ["nothing"]}, "does not fit this model"),
    ({"rank_pattern": [1]}, "rank_pattern must be a mapping of regex"),
    ({"rank_pattern": {"(": 1}}, "rank_pattern must be a valid regular expression"),
    ({"use_rslora": "yes"}, "use_rslora must be True or False"),
]


@pytest.mark.parametrize(("changes", "text"), CONFIGS)
def test_load_refuses_a_config_and_leaves_the_model_as_it_was(tmp_path, changes, text):
    saved(tmp_path)
    edit(tmp_path, **changes)
    model = net()
    before, flags = bits(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=text) as caught:
        minilora.load(model, tmp_path, verify=False)
    assert len(str(caught.value)) < 600
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


def rewrite(folder, **metadata):
    """Replace entries of the weights' metadata, tensors as they are."""
    file = folder / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        kept = opened.metadata()
    kept.pop("minilora_sha256")
    save_file(tensors, file, kept | metadata)


@pytest.mark.parametrize(
    "base",
    ["[", "[1]", '{"q_proj": 3}', '{"q_proj": {"format": "x"}}',
     '{"q_proj": {"format": "x", "sample": "abc"}}'],
)  # fmt: skip
def test_load_refuses_an_unreadable_fingerprint(tmp_path, base):
    saved(tmp_path)
    rewrite(tmp_path, minilora_base=base)
    with pytest.raises(ValueError, match="minilora_base in the metadata must be readable"):
        minilora.load(net(), tmp_path)
    minilora.load(net(), tmp_path, verify=False)


def test_load_refuses_a_fingerprint_of_another_length(tmp_path):
    saved(tmp_path)
    row = {"q_proj": {"format": "float32", "sample": base64.b64encode(b"\0" * 8).decode()}}
    rewrite(tmp_path, minilora_base=json.dumps(row))
    with pytest.raises(ValueError, match="sampled weights of q_proj must be 64 numbers"):
        minilora.load(net(), tmp_path)


@pytest.mark.parametrize("base", [{"gone": {"format": "float32", "sample": ""}}, {}])
def test_load_ignores_a_fingerprint_of_layers_it_does_not_wrap(tmp_path, base):
    model, x = saved(tmp_path), torch.randn(2, 12)
    rewrite(tmp_path, minilora_base=json.dumps(base))
    with pytest.warns(UserWarning, match="says nothing of the base"):
        assert torch.equal(minilora.load(net(), tmp_path)(x), model(x))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.full((4, 12), float("nan")), "must hold floats that are finite in torch.float32"),
        (torch.full((4, 12), 1e300, dtype=torch.float64), "finite in torch.float32, found torch.f"),
        (torch.ones(4, 12, dtype=torch.int32), "must hold floats .* found torch.int32"),
        (torch.ones(4, 13), r"must have shape \[4, 12\].*found \[4, 13\]"),
    ],
)
def test_load_refuses_factors_and_leaves_the_model_as_it_was(tmp_path, value, text):
    saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.q_proj.lora_A.weight"] = value
    save_file(tensors, file)
    model = net()
    before, flags = bits(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=text):
        minilora.load(model, tmp_path)
    unchanged(model, before, flags)


def test_load_refuses_a_name_in_use_and_a_merged_model(tmp_path):
    model = saved(tmp_path)
    with pytest.raises(ValueError, match="already has an adapter 'default'; choose another"):
        minilora.load(model, tmp_path)
    minilora.merge(model)
    with pytest.raises(RuntimeError, match=r"load\(\) needs unmerged weights"):
        minilora.load(model, tmp_path, "b")


def test_save_refuses_an_unknown_adapter_and_a_plain_model(tmp_path):
    with pytest.raises(ValueError, match="there is no adapter 'b'; this model has: default"):
        minilora.save(minilora.inject(net(), r=2, alpha=3), tmp_path, "b")
    with pytest.raises(ValueError, match=r"save\(\) needs a model with adapters"):
        minilora.save(net(), tmp_path)
    with pytest.raises(ValueError, match="must hold adapter_config.json and adapter_model"):
        minilora.load(net(), tmp_path / "nowhere")


def test_save_into_a_folder_that_cannot_be_made_says_so(tmp_path):
    (tmp_path / "file").write_text("here first")
    with pytest.raises(RuntimeError, match="file/run must be written, but that failed: Not a dir"):
        minilora.save(minilora.inject(net(), r=2, alpha=3), tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "here first"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must hold a JSON object, found list"),
        ("[" * 100_000, "must be JSON"),
        ('{"peft_type": "LORA", "target_modules": ["a"], "exclude_modules": [3]}',
         "exclude_modules must be a list of names, a string or null"),
        ('{"peft_type": "LORA", "target_modules": ["a"], "fan_in_fan_out": 2}',
         "fan_in_fan_out must be true or false"),
        ('{"peft_type": "LORA", "target_modules": ["a"], "alpha_pattern": {"a": 0}}',
         "alpha_pattern must be a finite number"),
    ],
)  # fmt: skip
def test_read_config_refuses(tmp_path, text, message):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "adapter_config.json")


def test_load_refuses_another_base_in_another_format(tmp_path):
    """Codes of the same base are alike, those of another one are not."""
    saved(tmp_path)
    other = minilora.quantize(net(seed=1), "int8", targets=["q_proj"])
    with pytest.raises(ValueError, match=r"weights of q_proj must be alike .cosine -?0\.\d+, 0.98"):
        minilora.load(other, tmp_path)


@pytest.mark.parametrize("there", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("here", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_base_with_the_adapter_merged_is_another_one_in_every_dtype(tmp_path, there, here):
    """The adapter would be added twice; a merged base is 0.9998 alike."""
    model = minilora.inject(net(dtype=there), r=2, alpha=3)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.adapters["default"].lora_B, std=0.02)
    minilora.save(model, tmp_path)
    minilora.load(net(dtype=there).to(here), tmp_path)
    minilora.merge(model)
    merged = minilora.eject(model).to(here)
    with pytest.raises(ValueError, match="was trained on another base: sampled weights of .* must"):
        minilora.load(merged, tmp_path)


def test_adapters_of_peft_load_without_a_note_on_the_base(tmp_path):
    model, x = saved(tmp_path), torch.randn(2, 12)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file), file)  # as PEFT writes it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = minilora.load(net(), tmp_path)
        minilora.load(net(), tmp_path, verify=False)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("order", list(itertools.permutations(["frozen", "trained", "also"])))
def test_load_makes_trainable_exactly_what_was_asked(tmp_path, order):
    """By name, whatever was loaded before, and whatever the base was."""
    for seed, name in enumerate(order):
        model = shake(minilora.inject(net(), r=2 + seed, alpha=3, adapter=name), name)
        minilora.save(model, tmp_path, name)
    model = net()
    asked = {"frozen": False, "trained": True, "also": True}
    for loaded, name in enumerate(order, 1):
        minilora.load(model, tmp_path / name, name, trainable=asked[name])
        for key, parameter in model.named_parameters():
            mine = [n for n in order[:loaded] if f".adapters.{n}." in key]
            assert parameter.requires_grad == any(asked[n] for n in mine), key
    minilora.load(model, tmp_path / "frozen", "frozen", replace=True)
    minilora.delete(model, "also")
    flags = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert flags == {key for key, _ in model.named_parameters() if ".adapters.trained." in key}


def test_save_into_a_read_only_folder_says_so_and_keeps_what_is_there():
    """Also for root, whom no mode stops: so the test gives that up while it saves."""
    folder = Path(tempfile.mkdtemp())
    try:
        saved(folder)
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        other = shake(minilora.inject(net(), r=2, alpha=3))
        folder.chmod(0o555)
        owner = os.geteuid()
        if owner == 0:
            os.seteuid(65534)
        try:
            for call in (minilora.save, minilora.export):
                with pytest.raises(RuntimeError, match=f"{folder}.*Permission denied; make the fo"):
                    call(other, folder)
        finally:
            os.seteuid(owner)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


class Nested(nn.Module):
    """A module called `weight` holding one called `lora_A`, and a name that ends another's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.ModuleDict({"lora_A": nn.Linear(6, 6)})
        self.proj = nn.Linear(6, 6)
        self.a = nn.ModuleDict({"proj": nn.Linear(6, 6)})

    def forward(self, x):
        return self.a["proj"](self.proj(self.weight["lora_A"](x)))


@pytest.mark.parametrize("adapter", ["lora", "base_model", "weight", "default"])
@pytest.mark.parametrize("targets", [r"weight\.lora_A|proj", "proj", "all-linear"])
def test_names_that_break_string_surgery_survive_the_files(tmp_path, adapter, targets):
    torch.manual_seed(0)
    plain, x = Nested(), torch.randn(3, 6)
    model = copy.deepcopy(plain)
    minilora.inject(model, r=2, alpha=3, targets=targets, adapter=adapter)
    shake(model, adapter)
    folder = minilora.save(model, tmp_path)
    again = minilora.load(copy.deepcopy(plain), folder, adapter)
    assert list(lora_layers(again)) == list(lora_layers(model))
    assert torch.equal(again(x), model(x))
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("place", "named"), [
    ("/home/me/.cache/huggingface/hub/models--someone--a--b/snapshots/0f1e2d", "someone/a--b"),
    ("someone/model", "someone/model"), ("out/merged", "out/merged"), (None, None), ("", None),
])  # fmt: skip
def test_the_config_names_the_base_and_not_this_machines_cache(tmp_path, place, named):
    model = minilora.inject(net(), r=2)
    model.name_or_path = place
    minilora.save(model, tmp_path / "a")
    minilora.save(model, tmp_path / "b", base_name="me/base")
    configs = [json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in "ab"]
    assert [c["base_model_name_or_path"] for c in configs] == [named, "me/base"]


def test_save_names_layers_that_training_did_not_reach(tmp_path):
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
            self.calls = [self.first]  # `inject` can't see a plain list

        def forward(self, x):
            for call in self.calls:
                x = call(x)
            return self.last(x)

    model = minilora.inject(Listed(), r=2, targets=["first", "last"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minilora.save(model, tmp_path / "fresh")
    model(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"adds nothing in 1 of 2 layers \(first: first\)"):
        minilora.save(model, tmp_path / "trained")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_replacing_values_keeps_their_dtype_and_rounds_once(tmp_path, dtype):
    """And `dtype=` is not needed for it."""
    model = shake(minilora.inject(net(), r=4, alpha=6, dtype=torch.float64)).double()
    minilora.save(model, tmp_path)
    other = minilora.inject(net(), r=4, alpha=6, dtype=dtype)
    minilora.load(other, tmp_path, replace=True, verify=False)
    for fqn, layer in lora_layers(model).items():
        wanted, found = layer.adapters["default"], lora_layers(other)[fqn].adapters["default"]
        assert found.lora_B.dtype == dtype
        assert torch.equal(found.lora_A, wanted.lora_A.to(dtype))
        assert torch.equal(found.lora_B, wanted.lora_B.to(dtype))


def test_values_too_large_for_what_they_replace_are_refused(tmp_path):
    model = minilora.inject(net(), r=4, alpha=6)
    lora_layers(model)["q_proj"].adapters["default"].lora_B.data.fill_(1e6)
    minilora.save(model, tmp_path)
    other = minilora.inject(net(), r=4, alpha=6, dtype=torch.float16)
    with pytest.raises(ValueError, match="must hold floats that are finite in torch.float16"):
        minilora.load(other, tmp_path, replace=True)
