"""What a run measures, on the board of another program: TensorBoard, Weights & Biases, Trackio."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minilora.files import import_extra

_PROJECT = "minilora"
_TRAINING = ("loss", "lr", "grad_norm", "tokens_per_s", "data_wait")
_PAIRS = (
    "accuracy", "margin", "reward_chosen", "reward_rejected", "reward", "reward_elsewhere"
)  # fmt: skip


def check_board(name: str | None, out: Path | None) -> None:
    """Raise unless a board's package is installed, and there is a folder if it needs one."""
    if name is None:
        return
    import_extra(name, f"log={name!r} (--log {name})")
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
    title = None if out is None else out.resolve().name
    if name == "tensorboard":
        import_extra("tensorboard", "log='tensorboard'")
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(out), purge_step=step + (step > 0))

        def write(row: Mapping[str, float], at: int) -> None:
            for key, value in row.items():
                writer.add_scalar(key, value, at)

        try:
            yield [_Written(write)]
        finally:
            writer.close()
        return
    package = import_extra(name, f"log={name!r}")
    beside = {"dir": str(out)} if name == "wandb" and out is not None else {}
    package.init(project=_PROJECT, name=title, config=dict(settings), **beside)
    try:
        yield [_Written(lambda row, at: package.log(row, step=at))]
    finally:
        package.finish()


class _Written:
    """A callback that hands numbers on, by names such as `train/loss`."""

    def __init__(self, write: Any):
        self.write = write

    def on_step(self, row: Mapping[str, Any]) -> None:
        """Hand on what a step was."""
        names = (key for key in (*_TRAINING, *_PAIRS) if key in row)
        self.write({f"train/{key}": row[key] for key in names}, row["step"])

    def on_eval(self, row: Mapping[str, Any]) -> None:
        """Hand on what an evaluation found."""
        found = {key: value for key, value in row.items() if key.startswith("eval_")}
        self.write({key.replace("_", "/", 1): value for key, value in found.items()}, row["step"])
