"""What `check` says of adapter folders, whole and edited; PEFT judges what is said of it."""

import json
import re
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import net, shake
from test_lora_combination import ALL, add, kinds

import minilora
from minilora.peft.checking import Reader, ReaderList, check
from minilora.peft.portable import export

# What `check` says, by reader, of what `save` writes with these options; {} takes all.
SAVED = {
    "plain": ({}, {}),
    "rslora": ({"rslora": True}, {"llama.cpp": "use_rslora and .*scaled by 1.25 instead"}),
    "rank pattern": (
        {"rank_pattern": {"q_proj": 2}},
        {"vLLM": "q_proj would be scaled by 1.25 instead of 2.5 .1 such"},
    ),
    "same scaling": ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2.5}},
                     {"llama.cpp": "q_proj would be scaled by 2.5 instead of 1.25"}),
    "alpha pattern": (
        {"alpha_pattern": {"q_proj": 9}},
        {"vLLM": "by 1.25 instead of 2.25", "llama.cpp": "by 1.25 instead of 2.25"},
    ),
    "dora": ({"dora": True}, dict.fromkeys(
        ("vLLM", "llama.cpp"), "use_dora .first: mlp.0. is refused")),
    "bias": ({"bias": "all"}, {"vLLM": "bias='all' is refused", "llama.cpp": "refused as no LoRA"}),
    "lora bias": ({"lora_bias": True}, dict.fromkeys(
        ("vLLM", "llama.cpp"), "lora_bias .first: mlp.0. is refused")),
    "lora bias, gaussian": ({"lora_bias": True, "init": "gaussian"}, dict.fromkeys(
        ("vLLM", "llama.cpp"), "lora_bias .first: mlp.0. is refused")),
    "modules to save": (
        {"modules_to_save": ["lm_head"]},
        dict.fromkeys(
            ("vLLM", "llama.cpp"), r"lm_head.(bias|weight) is refused as no LoRA weight .2 such"
        ),
    ),
}  # fmt: skip


def verdicts(folder):
    return {reader.name: reader for reader in check(folder)}


@pytest.mark.parametrize("option", SAVED)
def test_check_of_what_save_writes(tmp_path, option):
    options, expected = SAVED[option]
    minilora.save(shake(minilora.inject(net(), r=4, alpha=5, **options)), tmp_path)
    found = verdicts(tmp_path)
    assert list(found) == ["PEFT", "vLLM", "llama.cpp"]
    for name, reader in found.items():
        assert reader.takes == (name not in expected), reader
        assert name not in expected or matches(expected[name], reader.problems), reader


def matches(pattern, texts):
    return any(re.search(pattern, text) for text in texts)


@pytest.mark.parametrize("option", [o for o in SAVED if o not in ("bias", "modules to save")])
def test_all_readers_take_an_export(tmp_path, option):
    options = SAVED[option][0]
    model = minilora.inject(net(), r=4, alpha=5, **options)
    shake(model)
    export(model, tmp_path, r=3)
    assert all(reader.takes for reader in check(tmp_path)), str(check(tmp_path))


def edited(folder, config=None, tensors=None):
    """Write other config values, or other keys, into an adapter folder."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
    if tensors is not None:
        held = load_file(folder / "adapter_model.safetensors")
        save_file(tensors(held), folder / "adapter_model.safetensors")


P = "base_model.model."


def renamed(old, new):
    return lambda held: {k.replace(old, new): v for k, v in held.items()}


def without(part):
    return lambda held: {k: v for k, v in held.items() if part not in k}


def with_key(key):
    return lambda held: held | {key: torch.zeros(3)}


def biased(held):
    return held | {f"{P}{name}.lora_B.bias": torch.ones(20) for name in ("q_proj", "v_proj")}


def with_mlp(held):
    whole = {f"{P}mlp.{key}": value for key, value in net().mlp.state_dict().items()}
    return held | whole


BIASED = dict.fromkeys(("vLLM", "llama.cpp"), "lora_bias .first: q_proj. is refused")
COPIED = dict.fromkeys(("vLLM", "llama.cpp"), r"mlp.* is refused as no LoRA weight .4 such")
READERS = ("PEFT", "vLLM", "llama.cpp")
# Edits of a plain adapter on q_proj and v_proj: config, keys, and the problems that they make, one
# for all readers or by reader.
EDITED = {
    "no prefix": ({}, renamed(P, ""), "^q_proj.lora_A.weight is no key that PEFT looks for"),
    "no B": ({}, without("q_proj.lora_B"), "q_proj needs lora_A and lora_B, found only lora_A"),
    "other rank": ({"r": 2, "lora_alpha": 2.5}, None, "q_proj has rank 4, the config says 2"),
    "no target": ({"target_modules": ["v_proj"]}, None,
                  "q_proj is not in target_modules, so PEFT leaves its factors out"),
    "regex": ({"target_modules": "q_proj|v_proj"}, None, {}),
    "short regex": ({"target_modules": "v_proj"}, None, "q_proj is not in target_modules"),
    "dora without lengths": ({"use_dora": True}, None,
                             "q_proj lacks a magnitude, the config says use_dora=True"),
    "lengths without dora": (
        {}, lambda held: held | {f"{P}q_proj.lora_magnitude_vector": torch.ones(20)},
        "q_proj has a magnitude, the config says use_dora=False"),
    "bias without lora_bias": ({}, lambda held: held | {f"{P}v_proj.lora_B.bias": torch.ones(20)},
                               "v_proj has a lora_bias, the config says lora_bias=False"),
    "frozen embedding": ({}, with_key(f"{P}embed_tokens.base_layer.weight"), {}),
    "norm": ({}, with_key(f"{P}input_layernorm.weight"), "input_layernorm.weight is no key"),
    "pissa of PEFT": ({"init_lora_weights": "pissa"}, None, {
        "vLLM": "init_lora_weights='pissa' fits only the changed base",
        "llama.cpp": "'pissa' fits"}),
    "gaussian": ({"init_lora_weights": "gaussian"}, None, {}),
    "lora_bias": ({"lora_bias": True}, biased, BIASED),
    "gaussian beside lora_bias": (
        {"lora_bias": True, "init_lora_weights": "gaussian"}, biased,
        BIASED | {"PEFT": "lora_bias=True needs init_lora_weights .*, found 'gaussian'"}),
    "blocks beside a regex": (
        {"target_modules": "q_proj|v_proj", "layers_to_transform": [0]}, None,
        {"PEFT": "layers_pattern are refused where target_modules is a regex"}),
    "pattern beside a regex": (
        {"target_modules": "q_proj|v_proj", "layers_pattern": ["mlp"]}, None,
        {"PEFT": "layers_pattern are refused where target_modules is a regex"}),
    "pattern without blocks": ({"layers_pattern": ["mlp"]}, None, {
        "PEFT": "layers_pattern is refused without layers_to_transform"}),
    "copies": ({"modules_to_save": ["mlp"]}, with_mlp, COPIED),
    "a copy in a copy": ({"modules_to_save": ["mlp", "mlp.0"]}, with_mlp, COPIED | {
        "PEFT": r"modules_to_save must not name mlp\.0, which lies within mlp"}),
    "Conv1D": (
        {"fan_in_fan_out": True, "target_modules": ["c_attn", "v_proj"]},
        renamed("q_proj", "c_attn"),
        {"llama.cpp": "factors of Conv1D are transposed by mistake .first: c_attn"}),
}  # fmt: skip


@pytest.fixture
def plain(tmp_path):
    model = minilora.inject(net(), r=4, alpha=5, targets=["q_proj", "v_proj"])
    minilora.save(shake(model), tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize("edit", EDITED)
def test_check_of_edited_folders(plain, edit):
    config, tensors, expected = EDITED[edit]
    expected = dict.fromkeys(READERS, expected) if isinstance(expected, str) else expected
    edited(plain, config, tensors)
    for name, reader in verdicts(plain).items():
        assert reader.takes == (name not in expected), reader
        assert name not in expected or matches(expected[name], reader.problems), reader


@pytest.mark.peers
@pytest.mark.parametrize("edit", ["nothing", *EDITED])
def test_peft_judges_what_check_says_of_it(plain, edit):
    peft = pytest.importorskip("peft")
    edited(plain, {"task_type": None})  # a language model would have to generate
    shutil.copytree(plain, plain.parent / "good")
    edited(plain, *EDITED[edit][:2] if edit != "nothing" else ())
    takes = verdicts(plain)["PEFT"].takes
    model = peft.PeftModel.from_pretrained(net(), plain.parent / "good", adapter_name="good")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the keys say more
        try:
            result = model.load_adapter(plain, "judged")
            loaded = not (result.missing_keys or result.unexpected_keys)
        except (RuntimeError, ValueError, KeyError):
            loaded = False
    # Frozen weights are keys that PEFT writes and reads only where it wrapped that layer, and the
    # model of this test has no c_attn.
    assert loaded == takes or edit in ("frozen embedding", "Conv1D")


def test_check_notes(plain):
    edited(plain, {"init_lora_weights": "olora"})
    assert verdicts(plain)["PEFT"].notes == (
        "init_lora_weights='olora' changes the base's weights on loading",
    )


def test_check_of_every_kind_of_layer(tmp_path):
    export(add(kinds(), "a", targets=ALL), tmp_path)
    found = verdicts(tmp_path)
    assert found["PEFT"].takes
    for name in ("vLLM", "llama.cpp"):
        assert found[name].problems == ("convolutions take no LoRA (first: conv)",)
    export(add(kinds(), "a", targets=["embed", "linear"]), tmp_path)
    assert all(reader.takes for reader in check(tmp_path))


def test_table_of_readers():
    readers = ReaderList([Reader("PEFT", (), ("slow",)), Reader("vLLM", ("no", "never"), ())])
    assert str(readers).splitlines() == [
        "PEFT: yes", "  (note: slow)", "vLLM: no", "  - no", "  - never"
    ]  # fmt: skip


def test_check_refuses_what_it_cannot_read(plain):
    edits = {
        '{"peft_type": "IA3"}': "peft_type must be .LORA. .no other.*, found .IA3.",
        "[1]": "must hold a JSON object, found list",
        "{": "adapter_config.json. must be JSON",
        '{"peft_type": "LORA", "r": 0}': "r must be a whole number of at least 1, found 0",
        '{"peft_type": "LORA", "lora_alpha": "x"}': "lora_alpha must be a finite number",
        '{"peft_type": "LORA", "rank_pattern": [1]}': "rank_pattern must be a mapping of regex",
        '{"peft_type": "LORA", "alpha_pattern": {"(": 1}}': "alpha_pattern must be a valid regular",
        '{"peft_type": "LORA", "target_modules": "("}': "target_modules must be a valid regular",
        '{"peft_type": "LORA", "target_modules": 3}': "target_modules must be a non-empty list",
    }
    for text, error in edits.items():
        (plain / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=error):
            check(plain)
    (plain / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q"]}')
    (plain / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="must be a whole safetensors file, found it damaged"):
        check(plain)
    (plain / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="adapter_model.safetensors is missing"):
        check(plain)


def test_check_prints_keys_of_strangers_in_short_lines_without_control_characters(tmp_path):
    minilora.save(minilora.inject(net(), r=2, targets=["q_proj"]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    odd = {f"\x1b[2J\n{'x' * 900}{i}": torch.zeros(1) for i in range(50)}
    save_file(load_file(file) | odd, file)
    found = minilora.check(tmp_path)
    assert len(found[0].problems) == 50
    lines = str(found).splitlines()
    assert all(line.isprintable() and len(line) <= 610 for line in lines)
    assert "  - and 30 more" in lines and len(lines) < 80
