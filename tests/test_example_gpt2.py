"""The GPT-2 example, offline in a small setting and from a checkpoint folder."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from minilora.loading.saving import save_pretrained
from minilora.models import GPT2, GPT2Config

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "gpt2.py"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the example and return what it prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, arguments)])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_gpt2_example_adapts_what_it_pretrained(run):
    text = run("--minutes", 0.03, "--steps", 20, "--package", "json")
    assert "base bit-identical: True" in text
    assert "r=8 on 16 layers" in text


@pytest.mark.peers
def test_gpt2_example_adapts_a_checkpoint_folder(tmp_path, run):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE({**vocabulary, "<|endoftext|>": 256}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_positions=48, n_embd=32, n_layer=2, n_head=2,
                        bos_token_id=256, eos_token_id=256)  # fmt: skip
    save_pretrained(GPT2(config), tmp_path)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    text = run("--model", tmp_path, "--steps", 20, "--package", "json")
    assert "base bit-identical: True" in text
    assert "r=8 on 8 layers" in text


def test_gpt2_example_names_a_missing_package(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run("--package", "no_such_package")
    assert stop.value.code == 2
    assert "--package must name a package of" in capsys.readouterr().err
