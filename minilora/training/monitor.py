"""What a run shows and leaves behind: progress, metrics.jsonl, a loss curve; and its health."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.lora_layer import LoRALayer, lora_layers

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss.png"


class Monitor:
    """Show progress (a bar on a terminal with tqdm, plain lines otherwise) and append metrics.

    Args:
        total: steps planned, or None under a time limit alone.
        start: steps already done.
        out: the run's folder, or None to leave nothing behind.
        every: steps between plain lines.
        quiet: show nothing.
    """

    def __init__(
        self, total: int | None, start: int, out: Path | None, every: int, quiet: bool = False
    ):
        self.total, self.every, self.quiet = total, every, quiet
        self.file = None if out is None else out / METRICS_FILE
        if self.file is not None:
            _keep_until(self.file, start)
        self.bar: Any = None
        if not quiet and sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def step(self, row: dict, left: float | None) -> None:
        """Record one optimizer step; `left` is the time left in seconds, if known."""
        self._append(row)
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix_str(
                f"loss {row['loss']:.3f}, lr {row['lr']:.2e}, {row['tokens_per_s']:,.0f} tok/s"
            )
        elif row["step"] % self.every == 0 or row["step"] == self.total or row["step"] == 1:
            of = f"/{self.total}" if self.total else ""
            time_left = "" if left is None else f"  {left / 60:4.1f} min left"
            self.say(
                f"step {row['step']:>4}{of}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
                f"grad {row['grad_norm']:.3f}  {row['tokens_per_s']:,.0f} tokens/s{time_left}"
            )

    def evaluation(self, row: dict) -> None:
        """Record one evaluation."""
        self._append(row)
        self.say(
            f"step {row['step']:>4}  held-out loss {row['eval_loss']:.4f}, "
            f"perplexity {row['eval_perplexity']:.3f}"
        )

    def say(self, line: str) -> None:
        """Print a line without breaking the bar."""
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()

    def _append(self, row: dict) -> None:
        if self.file is not None:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def _rows(file: Path) -> list[dict]:
    """Read metrics; a line that a kill cut short is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _keep_until(file: Path, step: int) -> None:
    """Drop what was logged after the state that a resumed run continues from."""
    kept = []
    if step and file.exists():
        kept = [json.dumps(row) for row in _rows(file) if row["step"] <= step]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def draw_curve(out: Path) -> Path | None:
    """Draw training and held-out loss from metrics.jsonl, or return None without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _rows(out / METRICS_FILE)
    steps = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    evals = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if steps:
        axes.plot(*zip(*steps, strict=True), color="#9ab", lw=0.8, label="training, each step")
        smooth, mean = [], steps[0][1]
        for step, loss in steps:
            mean += 0.1 * (loss - mean)
            smooth.append((step, mean))
        axes.plot(*zip(*smooth, strict=True), color="#246", label="training, smoothed")
    if evals:
        axes.plot(*zip(*evals, strict=True), "o-", color="#c50", label="held out")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out / CURVE_FILE, dpi=120)
    return out / CURVE_FILE


class Health:
    """Catch adapters that silently learn nothing, in the first steps of a run.

    Step 1: the zero-initialised factor of every trainable layer that saw a token has a finite,
    non-zero gradient. Step 2: the other factor too (at step 1 its gradient is exactly 0). Step 5:
    the zero-initialised factor has moved. A layer that saw no token is reported, not failed.
    """

    def __init__(self, model: nn.Module):
        self.layers: dict[str, LoRALayer] = {
            name: layer
            for name, layer in lora_layers(model).items()
            if any(p.requires_grad for n in layer.active for p in layer.adapters[n].parameters())
        }
        self.start: dict[str, torch.Tensor] = {}
        for layer in self.layers.values():
            layer.last_path = None

    def check(self, step: int) -> list[str]:
        """Check after the backward pass of a step, before the update; return remarks.

        Raises:
            RuntimeError: a factor without a gradient, or one that does not move.
        """
        seen = {name: layer for name, layer in self.layers.items() if layer.last_path}
        remarks = []
        if step == 1:
            self.start = {n: p.detach().clone() for n, p in self._factors(seen, "lora_B")}
            unseen = [name for name in self.layers if name not in seen]
            if unseen:
                remarks.append(f"{len(unseen)} adapted layers saw no token (first: {unseen[0]})")
        if step in (1, 2):
            self._require_gradients(seen, "lora_B" if step == 1 else "lora_A", step)
        if step == 5:
            for name, factor in self._factors(seen, "lora_B"):
                if name in self.start and torch.equal(factor, self.start[name]):
                    raise RuntimeError(
                        f"{name} must move as it is trained, but after {step - 1} steps it is what "
                        f"it was; is the optimizer given this parameter, and its rate above 0?"
                    )
            self.start = {}
        return remarks

    def _factors(self, layers: dict[str, LoRALayer], which: str):
        for name, layer in layers.items():
            for adapter in layer.active:
                factor = getattr(layer.adapters[adapter], which)
                if factor.requires_grad:
                    yield f"{name} ({which} of {adapter})", factor

    def _require_gradients(self, layers: dict[str, LoRALayer], which: str, step: int) -> None:
        dead = [n for n, f in self._factors(layers, which) if f.grad is None or not f.grad.any()]
        if dead:
            raise RuntimeError(
                f"every adapted layer must get a gradient, but {len(dead)} got none at step {step} "
                f"(first: {dead[0]}); something cuts the graph – a torch.no_grad() or .detach() in "
                f"the model, or activation checkpointing whose inputs need no gradient "
                f"(use_reentrant=True)"
            )


def seconds() -> float:
    """Return a clock that never goes backwards."""
    return time.perf_counter()
