"""The GPT-2 example, offline in a small setting and from a checkpoint folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minilora.loading.saving import save_pretrained
from minilora.models import GPT2, GPT2Config

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "gpt2.py"


def run(*arguments):
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    command = [sys.executable, EXAMPLE, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_gpt2_example_adapts_what_it_pretrained():
    code, text, errors = run("--minutes", 0.1, "--steps", 40, "--package", "json")
    assert code == 0, errors
    assert "base bit-identical: True" in text
    assert "r=8 on 16 layers" in text


@pytest.mark.peers
def test_gpt2_example_adapts_a_checkpoint_folder(tmp_path):
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
    code, text, errors = run("--model", tmp_path, "--steps", 60, "--package", "json")
    assert code == 0, errors
    assert "base bit-identical: True" in text
    assert "r=8 on 8 layers" in text


def test_gpt2_example_names_a_missing_package():
    code, _, errors = run("--package", "no_such_package")
    assert code == 2
    assert "--package must name a package of" in errors
