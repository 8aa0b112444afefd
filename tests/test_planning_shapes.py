"""Where a shape comes from, and what is no model."""

import json

import pytest
from torch import nn

from minilora.models import GPT2, GPT2Config, LlamaConfig
from minilora.planning.shapes import PRESETS, read_shape

SMALL = LlamaConfig(97, 64, 128, 3, 4, 2, 16, 64)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SMALL.to_dict()))
    return tmp_path / "model"


def test_a_folder_and_its_config_are_read(folder):
    assert read_shape(folder).config == SMALL
    assert read_shape(folder).stored
    found = read_shape(str(folder / "config.json"))
    assert found.config == SMALL
    assert not found.stored


def test_modules_configs_and_shapes_are_taken():
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11)
    model = GPT2(config)
    found = read_shape(model)
    assert (found.config, found.config.model_type, found.stored) == (config, "gpt2", False)
    assert read_shape(found) is found
    assert read_shape(config).config == config
    assert found.parameters == sum(p.numel() for p in model.parameters())


def test_a_preset_is_known_in_any_case():
    assert read_shape("Llama-2-7B").config is PRESETS["llama-2-7b"].config
    assert read_shape("smollm2-135m").stored
    assert not read_shape("gpt2").stored


@pytest.mark.real_model
def test_the_real_file_has_the_presets_shape():
    from minilora.loading.fetching import _SOURCES, cache_folder

    file = cache_folder() / _SOURCES["smollm2-135m"].name
    if not file.exists():
        pytest.skip("needs `minilora fetch smollm2-135m`")
    found, preset = read_shape(file).config, PRESETS["smollm2-135m"].config
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "num_key_value_heads", "tie_word_embeddings"):  # fmt: skip
        assert getattr(found, key) == getattr(preset, key)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("lama-2-7b", "a hub name, found 'lama-2-7b'; nearest: llama-2-7b, llama-2-70b"),
        ("tinyllama", "nearest: tinyllama-1.1b"),
        ("zzzz", "there are: gpt2, gpt2-medium"),
        ("qwen2.5-8b", "nearest: qwen2.5-"),
        ("gemma-2-4b", "nearest: gemma-2-"),
    ],
)
def test_unknown_names_get_the_nearest(name, match):
    with pytest.raises(ValueError, match=match):
        read_shape(name)


def test_what_is_no_model(tmp_path, folder):
    with pytest.raises(TypeError, match="needs a model's name, path, config or module, found int"):
        read_shape(7)
    with pytest.raises(ValueError, match="keep in memory, found Linear; pass the name of a preset"):
        read_shape(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="a model folder must hold config.json"):
        read_shape(tmp_path)
    entries = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(entries | {"model_type": "bert"}))
    with pytest.raises(
        ValueError, match=r"must be of a causal language model of text, found .* \(bert\)"
    ):
        read_shape(folder)
    (folder / "config.json").write_text(json.dumps(entries | {"hidden_size": -8}))
    with pytest.raises(ValueError, match="hidden_size must be an integer above 0, found -8"):
        read_shape(folder)
