"""What a run shows and leaves behind: progress, metrics.jsonl and a loss curve."""

import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from minilora.files import (
    SILENCE,
    UnwritableError,
    every_so_often,
    import_extra,
    on_terminal,
    open_plain,
    print_line,
    ticking,
    write,
)
from minilora.running import CompileClock, Evaluation
from minilora.training.callbacks import Callbacks
from minilora.training.lock import to_resume

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss.png"


class Monitor:
    """Show progress (a bar on a terminal with tqdm, plain lines otherwise) and append metrics.

    Nothing is silent for more than five seconds: what takes longer is said to be under way, but
    not to callbacks. Of a step that is said only when it takes twice as long as the last one.

    Without `out` nothing is left behind. Where a run goes on, `start` steps are done, and what is
    recorded of them stays if it was `begun`. There is a plain line `every` so many steps.
    """

    def __init__(
        self,
        total: int | None,
        start: int,
        out: Path | None,
        every: int,
        quiet: bool = False,
        callbacks: Callbacks | None = None,
        clock: CompileClock | None = None,
        begun: bool = False,
    ):
        self.total, self.every, self.quiet = total, every, quiet
        self.callbacks, self.clock = callbacks or Callbacks(), clock or CompileClock()
        self.file = None if out is None else out / METRICS_FILE
        if self.file is not None:
            _keep_until(self.file, start if begun else -1)
        self.doing, self.since = "preparing", seconds()
        self.said = self.since
        self.usual = 0.0  # seconds of the last step
        self.bar: Any = None
        if not quiet and on_terminal():
            from tqdm import tqdm

            # Without tqdm's own estimate of the time left, which counts evaluations as steps.
            done = "{l_bar}{bar}| {n_fmt}/{total_fmt}" if total else "{n_fmt} steps"
            self.bar = tqdm(
                total=total,
                initial=start,
                dynamic_ncols=True,
                bar_format=f"{done} [{{elapsed}}{{postfix}}]",
            )
        self._watched = ExitStack()
        if not quiet:
            self._watched.enter_context(every_so_often(self._look))

    def begin(self, doing: str) -> None:
        """Note what is under way from now on."""
        self.doing, self.since = doing, seconds()

    def _look(self) -> None:
        """Let the bar's clock go on, or break a silence."""
        taken = seconds() - self.since
        usual = self.doing.startswith("step") and taken < 2 * self.usual  # as steps do
        if self.bar is not None:
            self.bar.refresh()
        elif seconds() - self.said >= SILENCE and not usual:
            compiling = "" if self.clock.began is None else ", compiling"
            self._print(f"{self.doing}: {taken:.0f} s so far{compiling}")

    def _print(self, line: str) -> None:
        self.said = seconds()
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print_line(line)

    @contextmanager
    def evaluating(self, tokens: int) -> Iterator[Callable[[int], None]]:
        """Show an evaluation of so many tokens under way; yield what counts those that are done."""
        self.begin("evaluating")
        with ticking("evaluating", tokens, "tokens", not self.quiet, self._print) as tick:
            yield tick
        self.begin("saving")

    def step(self, row: dict, left: float | None) -> None:
        """Record one optimizer step; `left` is the time left in seconds, if known."""
        self._append(row)
        self.usual = seconds() - self.since
        self.callbacks("on_step", row)
        time_left = "" if left is None else f"{left / 60:.1f} min left"
        if self.bar is not None:
            self.bar.set_postfix_str(
                f"loss {row['loss']:.3f},{_of_pairs(row)} lr {row['lr']:.2e}, "
                f"{row['tokens_per_s']:,.0f} tok/s, {time_left}",
                refresh=False,
            )
            self.bar.update()
        elif self._due(row["step"]):
            of = f"/{self.total}" if self.total else ""
            self.say(
                f"step {row['step']:>4}{of}  loss {row['loss']:.4f} {_of_pairs(row)} "
                f"lr {row['lr']:.2e}  grad "
                f"{row['grad_norm']:.3f}  {row['tokens_per_s']:,.0f} learned tokens/s  {time_left}"
            )

    def _due(self, step: int) -> bool:
        """Return whether a step has a plain line: every so many, or it would be silent too long."""
        now = seconds()  # the next step takes about as long as this one
        silent = not self.quiet and now - self.said + now - self.since >= SILENCE
        return step % self.every == 0 or step in (1, self.total) or silent

    def evaluation(self, step: int, measured: Evaluation) -> None:
        """Record one evaluation."""
        row: dict[str, float | None] = {"step": step, "eval_loss": measured.loss}
        if measured.accuracy is None:
            row["eval_perplexity"] = measured.perplexity
            rest = f"perplexity {measured.perplexity:.3f}"
        else:
            row |= {"eval_accuracy": measured.accuracy, "eval_margin": measured.margin}
            rest = f"accuracy {measured.accuracy:.3f}, margin {measured.margin:.3f}"
        self._append(row)
        self.callbacks("on_eval", row)
        self.say(f"step {step:>4}  held-out loss {measured.loss:.4f}, {rest}")

    def sample(self, step: int, text: str) -> None:
        """Record what the model wrote."""
        self._append({"step": step, "sample": text})
        self.say(f"step {step:>4}  sample: {text}")

    def say(self, line: str) -> None:
        """Print a line without breaking the bar."""
        self.callbacks("on_log", line)
        if not self.quiet:
            self._print(line)

    def close(self) -> None:
        """End the bar."""
        self._watched.close()
        if self.bar is not None:
            self.bar.close()

    def _append(self, row: dict) -> None:
        if self.file is None:
            return
        try:
            with open(self.file, "a", encoding="utf-8", opener=open_plain) as file:
                file.write(json.dumps(_plain(row)) + "\n")
        except OSError as error:
            raise RuntimeError(
                f"{self.file} must take another line, but writing failed: "
                f"{error.strerror or error}; free space there and go on with "
                f"{to_resume(self.file.parent)}"
            ) from error


def _plain(value: Any) -> Any:
    """Return a row, or a value of one, without NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _of_pairs(row: dict) -> str:
    """Say what a step over pairs of answers came to; nothing of another."""
    if "accuracy" not in row:
        return ""
    return f" accuracy {row['accuracy']:.2f}  margin {row['margin']:.3f} "


def read_metrics(file: Path) -> list[dict]:
    """Read metrics; a line that a kill cut short is left out, null is what was not finite."""
    if not file.is_file():  # a pipe or a device has no end
        return []
    rows = []
    with open(file, encoding="utf-8", errors="replace", opener=open_plain) as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and type(row.get("step")) is int and _drawable(row["step"]):
                rows.append(row)
    return rows


def _drawable(value: object) -> bool:
    """Return whether a value is a number that a curve can show."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    return ok and abs(value) <= 1e30  # type: ignore[arg-type]


def _keep_until(file: Path, step: int) -> None:
    """Drop what was logged after the state that a resumed run continues from."""
    kept = []
    try:
        if step >= 0 and file.exists():
            kept = [json.dumps(row) for row in read_metrics(file) if row["step"] <= step]
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, "".join(line + "\n" for line in kept))
    except (OSError, UnwritableError) as error:
        raise RuntimeError(
            f"{file} must be written anew before the next step: {error}; mend that, then start as "
            f"you did: nothing was lost"
        ) from error


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the exponential moving averages of values, without bias towards the first.

    As Adam's moments: m ← decay · m + (1 − decay) · value, divided by 1 − decay^count.
    """
    mean, result, decay = 0.0, [], 0.9
    for count, value in enumerate(values, 1):
        mean = decay * mean + (1 - decay) * value
        result.append(mean / (1 - decay**count))
    return result


def draw_curve(out: Path) -> Path | None:
    """Draw the losses in metrics.jsonl; return None where there is no number."""
    rows = read_metrics(out / METRICS_FILE)
    steps = [(row["step"], row["loss"]) for row in rows if _drawable(row.get("loss"))]
    evals = [(row["step"], row["eval_loss"]) for row in rows if _drawable(row.get("eval_loss"))]
    if not steps and not evals:
        return None
    import_extra("matplotlib", "the curve")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    if steps:
        axes.plot(*zip(*steps, strict=True), color="#9ab", lw=0.8, label="training, each step")
        numbers, losses = zip(*steps, strict=True)
        axes.plot(numbers, smoothed(losses), color="#246", label="training, smoothed")
    if evals:
        axes.plot(*zip(*evals, strict=True), "o-", color="#c50", label="held out")
    axes.set_xlabel("optimizer step")
    of_pairs = any("accuracy" in row or "eval_accuracy" in row for row in rows)
    axes.set_ylabel("loss, mean of pairs" if of_pairs else "loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format="png")
    return write(out / CURVE_FILE, drawn.getvalue())


def seconds() -> float:
    """Return a clock that never goes backwards."""
    return time.perf_counter()
