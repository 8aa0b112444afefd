"""What minilora computes and writes, as SHA-256: the same before and after a change of structure.

    python tests/golden.py --write FILE       # before the change, on this machine
    python tests/golden.py --compare FILE     # after it, on the same machine; exit 1 if one differs

Bits depend on the processor and on torch, so no hashes are kept in the repository. Adapters are
those of five steps on the layer shapes of SmolLM2-135M and GPT-2 with fixed weights.
"""

import argparse
import contextlib
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from byte_tokenizer import byte_tokenizer

import minilora
from minilora.loading.model import load_model
from minilora.loading.saving import save_pretrained
from minilora.models import GPT2, GPT2Config, Llama, LlamaConfig

VOCABULARY = 512
SMOLLM2 = LlamaConfig(VOCABULARY, 576, 1536, 2, 9, 3, 64, 512, tie_word_embeddings=True)
GPT2_SMALL = GPT2Config(VOCABULARY, 256, 768, 2, 12)
RUNS = {
    "f32": {},
    "int8": {"quantize": "int8"},
    "nf4": {"quantize": "nf4"},
    "int4": {"quantize": "int4"},
    "bf16": {"dtype": torch.bfloat16},
    "dropout": {"inject": {"dropout": 0.1}},
    "dora": {"inject": {"dora": True, "rslora": True}},
    "pissa": {"inject": {"init": "pissa"}},
    "copies": {"inject": {"modules_to_save": ["norm"]}},
    "bias": {"inject": {"bias": "lora_only"}},
    "attention": {"inject": {"targets": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}},
    "accumulate": {"fit": {"accumulate": 2, "batch_size": 2}},
    "checkpointing": {"fit": {"checkpointing": True, "lora_plus_ratio": 4.0}},
    "constant": {"fit": {"schedule": "constant", "clip": None, "weight_decay": 0.1}},
}
ONLY = {"copies": "smollm2", "attention": "smollm2", "bias": "gpt2"}


def model_of(family: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(1)
    model = Llama(SMOLLM2) if family == "smollm2" else GPT2(GPT2_SMALL)
    return model.to(dtype).eval()


def rows(seed: int, count: int = 16) -> list[dict]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(9, 41, (count,), generator=draw).tolist()
    ids = [torch.randint(0, VOCABULARY, (n,), generator=draw).tolist() for n in lengths]
    return [{"input_ids": row, "labels": [-100] * 4 + row[4:]} for row in ids]


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def tensors(named: dict[str, torch.Tensor]) -> str:
    whole = hashlib.sha256()
    for name in sorted(named):
        value = named[name].detach().contiguous()
        whole.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        whole.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def files(folder: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".safetensors", ".json") and "state" not in file.name:
            yield str(file.relative_to(folder)), sha(file.read_bytes())


def trained(family: str, run: dict, out: Path, **options: object) -> torch.nn.Module:
    model = model_of(family, run.get("dtype", torch.float32))
    if "quantize" in run:
        minilora.quantize(model, run["quantize"])
    torch.manual_seed(2)
    minilora.inject(model, **{"r": 4, "alpha": 6, **run.get("inject", {})})
    settings = {"max_steps": 5, "lr": 1e-3, "batch_size": 4} | run.get("fit", {})
    config = minilora.TrainConfig(**settings)
    minilora.fit(model, rows(3), config=config, out=out, quiet=True, **options)
    return model


def adapter(model: torch.nn.Module) -> str:
    return tensors({n: p for n, p in model.named_parameters() if p.requires_grad})


class Stop:
    """Ctrl-C after the third step."""

    def on_step(self, row: dict) -> None:
        if row["step"] == 3:
            raise KeyboardInterrupt


def golden(where: Path) -> Iterator[tuple[str, str]]:
    for family in ("smollm2", "gpt2"):
        for name, run in RUNS.items():
            if ONLY.get(name, family) != family:
                continue
            out = where / f"{family}-{name}"
            yield f"{family} {name}: adapter", adapter(trained(family, run, out))
            for file, digest in files(out):
                if file.count("/") == 0 and not file.startswith("metrics"):
                    yield f"{family} {name}: {file}", digest
        yield from after(family, where)


def after(family: str, where: Path) -> Iterator[tuple[str, str]]:
    """What the other verbs make of a trained adapter: resumed, merged, generated, written."""
    out, run = where / f"{family}-resumed", {"fit": {"save_every": 1}, "inject": {"dropout": 0.1}}
    with contextlib.suppress(KeyboardInterrupt):
        trained(family, run, out, callbacks=[Stop()])
    yield f"{family} resumed: adapter", adapter(trained(family, run, out, resume=True))
    model = minilora.load(model_of(family), where / f"{family}-f32")
    prompts = [row["input_ids"][:9] for row in rows(5, 3)]
    greedy = minilora.generate(model, prompts, max_new_tokens=12)
    drawn = minilora.generate(model, prompts, max_new_tokens=12, temperature=0.9, top_k=50, seed=6)
    yield f"{family} generated", sha(json.dumps([greedy, drawn]).encode())
    with torch.no_grad():
        logits = model(torch.tensor([prompts[0]]))
    yield f"{family} logits", tensors({"logits": logits})
    found = minilora.evaluate(model, rows(4, 4))
    yield f"{family} evaluated", sha(repr(found.loss).encode())
    minilora.merge(model)
    yield f"{family} merged", tensors(dict(model.state_dict()))
    minilora.eject(model)
    save_pretrained(model, where / f"{family}-merged", byte_tokenizer())
    for file, digest in files(where / f"{family}-merged"):
        yield f"{family} save_pretrained: {file}", digest
    read, _ = load_model(where / f"{family}-merged")
    yield f"{family} read back", tensors(dict(read.state_dict()))
    for format in ("int8", "nf4", "int4"):
        small, _ = load_model(where / f"{family}-merged", format)
        yield f"{family} load_quantized {format}", tensors(dict(small.state_dict()))
        with torch.no_grad():
            yield f"{family} {format} logits", tensors({"l": small(torch.tensor([prompts[0]]))})
        save_pretrained(small, where / f"{family}-stored-{format}")
        for file, digest in files(where / f"{family}-stored-{format}"):
            yield f"{family} save_quantized {format}: {file}", digest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--write", type=Path)
    choice.add_argument("--compare", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = dict(golden(Path(folder)))
    if args.write:
        args.write.write_text(json.dumps(found, indent=0))
        print(f"{len(found)} hashes written")
        return 0
    before = json.loads(args.compare.read_text())
    names = list(dict.fromkeys([*before, *found]))
    other = [name for name in names if before.get(name) != found.get(name)]
    print("\n".join(f"differs: {name}" for name in other) or f"{len(found)} hashes, all the same")
    return 1 if other else 0


if __name__ == "__main__":
    sys.exit(main())
