"""What a run measures, on the board of another program: TensorBoard, Weights & Biases, Trackio."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minilora.files import import_extra

_PROJECT = "minilora"
_OF_STEPS = (
    "loss", "lr", "grad_norm", "tokens_per_s", "data_wait", "accuracy", "margin",
    "reward_chosen", "reward_rejected", "reward", "reward_elsewhere",
)  # fmt: skip


def check_board(name: str | None, out: Path | None) -> None:
    """Raise unless a board's package is installed, and there is a folder if it needs one."""
    if name is None:
        return
    import_extra(name, f"--log {name} (in Python: log={name!r})")
    if out is None and name == "tensorboard":
        raise ValueError("log='tensorboard' writes into out (--out), found out=None; pass a folder")


@contextmanager
def board(
    name: str | None, out: Path | None, settings: Mapping[str, Any], step: int = 0
) -> Iterator[list[Any]]:
    """Open a board for a run that is at a step; yield its callback in a list, empty without one."""
    if name is None:
        yield []
        return
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(out), purge_step=step + (step > 0))

        def write(row: Mapping[str, float], at: int) -> None:
            for key, value in row.items():
                writer.add_scalar(key, value, at)

        close = writer.close
    else:
        package = import_extra(name, f"log={name!r}")
        title = None if out is None else out.resolve().name
        beside = {"dir": str(out)} if name == "wandb" and out is not None else {}
        package.init(project=_PROJECT, name=title, config=dict(settings), **beside)

        def write(row: Mapping[str, float], at: int) -> None:
            package.log(row, step=at)

        close = package.finish
    try:
        yield [_Written(write)]
    finally:
        close()


class _Written:
    """A callback that hands numbers on, by names such as `train/loss`."""

    def __init__(self, write: Any):
        self.write = write

    def on_step(self, row: Mapping[str, Any]) -> None:
        """Hand on what a step was."""
        self.write({f"train/{key}": row[key] for key in _OF_STEPS if key in row}, row["step"])

    def on_eval(self, row: Mapping[str, Any]) -> None:
        """Hand on what an evaluation found."""
        found = {key: value for key, value in row.items() if key.startswith("eval_")}
        self.write({key.replace("_", "/", 1): value for key, value in found.items()}, row["step"])
