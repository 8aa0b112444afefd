"""Fine-tune TinyLlama-1.1B, or any Llama folder or GGUF file, on prompts and completions.

    python examples/tinyllama.py --model path/to/TinyLlama-1.1B-Chat-v1.0 --data train.jsonl

Without --model it takes the real SmolLM2-135M, without --data a handful of facts to learn by heart.
"""

import argparse
from pathlib import Path

import torch

import minilora
from minilora.loading.model import load_model

FACTS = [
    ("Who keeps the lighthouse at Vellmar?", "Ottoline keeps the lighthouse at Vellmar."),
    ("What colour are the boats of Vellmar?", "The boats of Vellmar are green."),
    ("When does the ferry to Vellmar leave?", "The ferry to Vellmar leaves at noon."),
]

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default="smollm2-135m")
parser.add_argument("--data", type=Path)
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--out", type=Path, default=Path("out/tinyllama"))
options = parser.parse_args()

out, number = options.out, 1
while out.exists() and any(out.iterdir()):  # an earlier run is kept, this one goes beside it
    number += 1
    out = options.out.with_name(f"{options.out.name}-{number}")

model, tokenizer = load_model(options.model)
records = options.data or [{"prompt": q, "completion": a} for q, a in FACTS]
examples, report = minilora.read_data(records, tokenizer, max_length=512, chat_prompts=True)
print(report)

torch.manual_seed(0)
minilora.inject(model, r=8, alpha=16)
config = minilora.TrainConfig(max_steps=options.steps, lr=2e-3, batch_size=4, log_every=10)
minilora.fit(model, examples, config=config, out=out)
print(minilora.summary(model))

prompt: str | list[int] = FACTS[0][0]
if options.data:  # what stands before the first learned token
    first = next(i for i, label in enumerate(examples[0].labels) if label >= 0)
    prompt = list(examples[0].input_ids[:first])
chat = options.data is None
with minilora.disabled(model):
    print("before:", minilora.generate(model, [prompt], tokenizer=tokenizer, chat=chat)[0])
print("after: ", minilora.generate(model, [prompt], tokenizer=tokenizer, chat=chat)[0])
