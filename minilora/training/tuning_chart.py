"""A tuning's held-out losses against the learning rate."""

import io
from pathlib import Path

from minilora.files import import_extra, write
from minilora.training.trials import Trial, Tuning, by_adapter

CHART_FILE = "tune.png"
_COLOURS = ("#8fa7bd", "#4f7ea8", "#1f4e79", "#102a43")  # comparisons, the first one palest


def draw_rates(found: Tuning) -> Path | None:
    """Draw `tune.png` into the tuning's folder; None where there is no loss to draw."""
    groups = by_adapter(found.trials)
    steps = sorted({step for trial in found.trials for step in trial.losses})
    if not steps:
        return None
    import_extra("matplotlib", "the chart")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(groups) ** 0.5 + 1.4, 4.2), layout="constrained")
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, trials in zip(panels, groups, strict=True):
        _panel(axes, found, sorted(trials, key=lambda trial: trial.lr), steps)
        if len(groups) > 1:
            name = ", ".join(f"{key}={value}" for key, value in trials[0].adapter.items())
            axes.set_title(name or "as it is", fontsize=10)
    panels[0].set_ylabel("held-out loss, nats per token")
    panels[-1].legend(frameon=False, fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format="png")
    return write(found.out / CHART_FILE, drawn.getvalue())


def _panel(axes, found: Tuning, trials: list[Trial], steps: list[int]) -> None:
    """Draw one adapter's trials: a line for each comparison, with intervals against its best."""
    axes.set_xscale("log")
    if found.before is not None:
        axes.axhline(found.before, color="#999", lw=0.8, ls=":", label="before training")
    for i, step in enumerate(steps):
        here = [trial for trial in trials if step in trial.losses]
        colour = _COLOURS[min(i, len(_COLOURS) - 1)]
        rates, losses = [t.lr for t in here], [t.losses[step] for t in here]
        axes.plot(rates, losses, "o-", ms=5, color=colour, lw=1.2, label=f"step {step}")
        for trial, loss in zip(here, losses, strict=True):
            if (gap := trial.against.get(step)) is not None:
                ends = [loss - gap.change + gap.low, loss - gap.change + gap.high]
                axes.plot([trial.lr] * 2, ends, color=colour, lw=2.5, alpha=0.5)
    result, chosen = found.result, found.chosen
    if chosen in trials and chosen and result and result.best:
        label = f"the chosen one's best, step {result.best_step}"
        axes.plot([chosen.lr], [result.best.loss], "*", ms=13, color="#c50", label=label)
    gone = [trial.lr for trial in trials if (trial.left or "").startswith("diverged")]
    if gone:  # at the upper edge, whatever the axis
        axes.plot(gone, [1.0] * len(gone), "x", color="#b00", ms=9, label="diverged",
                  transform=axes.get_xaxis_transform(), clip_on=False)  # fmt: skip
    rates = [trial.lr for trial in trials]
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=30)
    axes.minorticks_off()
    axes.set_xlabel("learning rate")
    axes.grid(alpha=0.3)
