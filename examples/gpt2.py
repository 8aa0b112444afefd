"""Adapt GPT-2 with LoRA: a checkpoint folder of yours, or a small one pretrained here in a minute.

    python examples/gpt2.py [--model path/to/gpt2] [--minutes 1]

Without --model a small byte-level GPT-2 learns the standard library's source in general and is then
adapted to one package (`--package tkinter`). Printed at the end: the held-out loss on that package
before and after, and that the base is bit-identical – only the adapter moved.
"""

import argparse
import sysconfig
import time
from pathlib import Path

import torch

import minilora
from minilora.loading.model import load_model
from minilora.models import GPT2, GPT2Config

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", type=Path, help="a Hugging Face folder of a GPT-2")
parser.add_argument("--package", default="tkinter", help="what to adapt to (default tkinter)")
parser.add_argument("--minutes", type=float, default=1.0, help="pretraining time (default 1)")
parser.add_argument("--steps", type=int, default=150, help="LoRA steps (default 150)")
options = parser.parse_args()
torch.manual_seed(0)


def read(folder: Path, skip: str = "") -> str:
    """Join the Python files below a folder, all but one package of it and the tests."""
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", skip}
    files = [f for f in sorted(folder.rglob("*.py"))
             if not left_out & set(f.relative_to(folder).parts)]  # fmt: skip
    return "\n".join(f.read_text(encoding="utf-8", errors="ignore") for f in files)


library = Path(sysconfig.get_path("stdlib"))
own = read(library / options.package)
if not own:
    parser.error(f"--package must name a package of {library}, found no source for it")
if options.model:
    model, tokenizer = load_model(options.model, dtype=torch.float32)
    if not isinstance(model, GPT2):
        parser.error(f"--model must be a GPT-2 folder, found {type(model).__name__}")
    encode = tokenizer.encode
else:
    shape = {"n_positions": 128, "n_embd": 128, "n_layer": 4, "n_head": 4}
    model = GPT2(GPT2Config(vocab_size=256, **shape, bos_token_id=None, eos_token_id=None))
    encode = lambda text: list(text.encode())  # noqa: E731 - one byte, one token
length = min(128, model.config.n_positions)


def windows(text: str) -> list[dict[str, list[int]]]:
    """Cut a text into examples of one length."""
    ids = encode(text)
    starts = range(0, len(ids) - length, length)
    return [{"input_ids": ids[i : i + length]} for i in starts]


if not options.model:  # an ordinary training loop: the model is an nn.Module
    ids = torch.tensor(encode(read(library, skip=options.package)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < 60 * options.minutes:
        at = torch.randint(len(ids) - length, (16, 1)) + torch.arange(length)
        loss = model.loss(ids[at], ids[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    print(f"pretrained on {len(ids):,} bytes without {options.package}: {steps} steps, "
          f"loss {loss.item():.3f}")  # fmt: skip

examples = windows(own)
train, test = examples[len(examples) // 10 :], examples[: len(examples) // 10][:100]
base = {name: value.clone() for name, value in model.state_dict().items()}
minilora.inject(model, r=8, alpha=16)  # every Conv1D: c_attn, c_proj, c_fc
config = minilora.TrainConfig(max_steps=options.steps, lr=2e-3, batch_size=16, log_every=50)
with minilora.disabled(model):
    before = minilora.evaluate(model, test)
minilora.fit(model, train, config=config)
after = minilora.evaluate(model, test)
print(f"held out from {options.package}: loss {before.loss:.3f} -> {after.loss:.3f}")
print(minilora.summary(model))

minilora.eject(model)
same = all(torch.equal(value, base[name]) for name, value in model.state_dict().items())
print("base bit-identical:", same)
if not same or after.loss >= before.loss:
    raise SystemExit("the example did not do what it says")
