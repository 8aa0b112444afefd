"""Ask captum which words of a prompt made the model say what it says, adapter on and off.

    python examples/captum_attribution.py [--adapter out/demo] [--steps 128]

Captum (`pip install captum`) takes the model as it is: adapters are modules inside it, and
`minilora.disabled` gives the base. Integrated gradients run from a prompt of line breaks to the
prompt; their sum should be the difference of the two logits, so both are printed.

The first and the last token stay in both prompts. Many heads rest their attention on the first
token; moved along with the others it makes the logit so rough between the two prompts that the
integral does not settle (on SmolLM2 the sum was off by more than the difference itself at 32, 96
and 300 steps; with both kept, by 20 % at 32 and by less than 1 in 1000 at 128).
"""

import argparse
import contextlib
from pathlib import Path

import torch
from captum.attr import LayerIntegratedGradients

import minilora
from minilora.loading.model import load_model

PROMPT = """def size(path):
    return os.stat(path).st_size

# What it does:"""


def attributions(model, tokenizer, prompt: str, target: int, steps: int):
    """Return a number per token of the prompt, their sum, and the logits' difference."""
    ids = torch.tensor([tokenizer.encode(prompt)])
    start = ids.clone()
    start[:, 1:-1] = tokenizer.encode("\n")[-1]

    def logit(tokens):
        return model(tokens, last=1)[:, -1, target]

    gradients = LayerIntegratedGradients(logit, model.get_input_embeddings())
    found = gradients.attribute(ids, start, n_steps=steps, internal_batch_size=8)
    with torch.no_grad():
        difference = float(logit(ids) - logit(start))
    found = found.sum(-1)[0]
    return [tokenizer.decode([i]) for i in ids[0].tolist()], found, difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", type=Path, default=Path("out/demo"))
    parser.add_argument("--steps", type=int, default=128, help="of the integral")
    options = parser.parse_args()
    model, tokenizer = load_model("smollm2-135m", dtype=torch.float32)
    minilora.load(model, options.adapter)
    with torch.no_grad():
        target = int(model(torch.tensor([tokenizer.encode(PROMPT)]), last=1)[0, -1].argmax())
    print(f"why {tokenizer.decode([target])!r} comes next, token by token:")
    columns = []
    for state in (contextlib.nullcontext(), minilora.disabled(model)):
        with state:
            columns.append(attributions(model, tokenizer, PROMPT, target, options.steps))
    (words, on, on_logit), (_, off, off_logit) = columns
    print(f"{'token':>14}  {'adapter on':>10}  {'off':>10}")
    for word, a, b in zip(words, on.tolist(), off.tolist(), strict=True):
        print(f"{word!r:>14}  {a:>10.3f}  {b:>10.3f}")
    print(f"{'sum':>14}  {float(on.sum()):>10.3f}  {float(off.sum()):>10.3f}")
    print(f"{'logits differ':>14}  {on_logit:>10.3f}  {off_logit:>10.3f}")


if __name__ == "__main__":
    main()
