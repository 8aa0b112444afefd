"""Run by test_packaging.py where torch, safetensors and numpy are installed, and no extra."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import torch

import minilora
from minilora.cli.command import VERBS, main
from minilora.files.extras import EXTRAS
from minilora.loading import save_pretrained
from minilora.models import Llama, LlamaConfig

missing = {name for name in EXTRAS if importlib.util.find_spec(name) is None}
assert missing >= {"tokenizers", "huggingface_hub", "matplotlib", "tqdm"}, missing  # torch: jinja2

torch.manual_seed(0)
CONFIG = LlamaConfig(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=6,
)  # fmt: skip
plain = Llama(CONFIG)
save_pretrained(plain, "model")
rows = [{"input_ids": list(range(i, i + 9))} for i in range(8)]


def loss(model):
    return minilora.evaluate(model, rows).loss


before = loss(plain)
minilora.inject(plain, r=2, alpha=3)
said = io.StringIO()
with contextlib.redirect_stderr(said):
    config = minilora.TrainConfig(max_steps=5, lr=1e-2, batch_size=4, compile=False)
    minilora.fit(plain, rows, out="run", config=config)
assert "the curve needs matplotlib" in said.getvalue(), said.getvalue()
assert 'pip install "minilora[plots]"' in said.getvalue()
minilora.save(plain, "adapter")
again = Llama(CONFIG)
again.load_state_dict(minilora.eject(plain).state_dict())
minilora.load(again, "adapter")
assert loss(again) < before

Path("rows.jsonl").write_text('{"text": "a b c"}\n')
TEXT, HUB = "minilora[text]", "minilora[hub]"
ANSWERS = {
    "train": (["model", "--data", "rows.jsonl", "--out", "trained", "--max-steps", "1"], TEXT),
    "eval": (["model", "--data", "rows.jsonl"], TEXT),
    "generate": (["model", "a"], TEXT),
    "chat": (["model"], TEXT),
    "data": (["rows.jsonl", "--model", "model"], TEXT),
    "merge": (["model", "--adapter", "adapter", "--out", "new"], TEXT),
    "quantize": (["model", "--format", "int8", "--out", "new"], TEXT),
    "targets": (["model"], TEXT),
    "export": (["adapter", "new", "--model", "model"], TEXT),
    "explain": (["adapter", "--model", "model"], TEXT),
    "plan": (["owner/model"], HUB),
    "check": (["adapter"], None),
    "docs": (["cpu"], None),
    "fetch": (["no-such-model"], None),  # not its name: nothing is downloaded
}
others = {"compare", "repeat", "resume", "tune"}  # read a model in the same way
assert ANSWERS.keys() | others == VERBS.keys()
for verb, (arguments, extra) in ANSWERS.items():
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main([verb, *arguments])
    named = re.findall(r'pip install "(minilora\[\w+\])"', said.getvalue())
    assert named == ([extra] if extra else []), (verb, said.getvalue())
    assert code == 2 if extra else code < 3, (verb, code)
print("every verb answered")
