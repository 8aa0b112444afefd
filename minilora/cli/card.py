"""The README that a finished run puts beside its adapter: a model card, as the hub shows it."""

import argparse
import hashlib
from pathlib import Path

import minilora
from minilora.cli.run_file import RunFile
from minilora.files import one_line, write
from minilora.peft import CONFIG_FILE, read_config
from minilora.training import FitResult, TrainConfig

_SEAL = "<!-- as written: "


def write_card(
    options: argparse.Namespace,
    run: RunFile,
    config: TrainConfig,
    result: FitResult,
    settings: dict,
) -> None:
    """Write `README.md` into the run's folder, unless somebody else's is there.

    The keys of its head: https://huggingface.co/docs/hub/model-cards.
    """
    file: Path = options.out / "README.md"
    if file.exists() and not _is_ours(file.read_text(encoding="utf-8", errors="replace")):
        return
    stored = read_config(options.out / CONFIG_FILE)
    base = one_line(str(stored.get("base_model_name_or_path")))
    weights = Path(options.model).name  # a GGUF's are not those that the base has on the hub
    facts = {
        **({} if weights == Path(base).name else {"weights": weights}),
        "data": _described(options.data, run.data),
        **({"held-out data": _described(options.valid, run.held_out)} if options.valid else {}),
        **({} if config.loss == "ce" else {"loss": config.loss}),
        "steps": f"{result.steps} of {config.batch_size * config.accumulate} rows",
        "learned tokens": f"{result.tokens:,}",
        "learning rate": f"{config.lr:g}",
        **{name: stored[name] for name in ("r", "lora_alpha", "lora_dropout") if name in stored},
        **{name: settings[name] for name in settings if name not in ("r", "alpha", "dropout")},
        "seed": config.seed,
    }
    if result.before is not None and result.best is not None:
        facts["held-out loss"] = f"{result.before.loss:.4f} → {result.best.loss:.4f}"
    rows = "\n".join(f"| {one_line(k)} | {one_line(str(v))} |" for k, v in facts.items())
    text = f"""---
base_model: {base}
library_name: peft
tags:
- lora
- minilora
---

# A LoRA adapter for {base}

Trained with minilora {minilora.__version__}. `minilora chat THIS_FOLDER` talks to it;
`minilora repeat` runs it again from `run.toml`.

| | |
|---|---|
{rows}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "THIS_FOLDER")
```
"""
    write(file, f"{text}\n{_SEAL}{_seal(text)} -->\n")


def _described(names: list[str], hashes: dict[str, str]) -> str:
    """Name data files, each with the beginning of its hash; `run.toml` has the whole of it."""
    said = [f"{Path(name).name} ({found[:19]})" for name, found in hashes.items()]
    return ", ".join([*said, *(name for name in names if name.startswith("@"))])


def _seal(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_ours(card: str) -> bool:
    """Whether a card is as it was written, without a word of anybody else's."""
    text, mark, seal = card.rpartition(f"\n{_SEAL}")
    return bool(mark) and seal == f"{_seal(text)} -->\n"
