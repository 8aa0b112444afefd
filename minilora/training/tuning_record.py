"""What a tuning has measured, on the disk: one JSON file that is whole after every evaluation."""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from minilora.files import write_json
from minilora.training.config import TrainConfig
from minilora.training.lock import LOCK_FILE, to_resume
from minilora.training.trials import Trial

TUNE_FILE = "tune.json"
START = "start"  # the folder of a run before its first step
_VERSION = 1


class Record:
    """The measurements of a tuning.

    Attributes:
        steps: of a whole run, 0 until that is settled.
        before: held-out loss before training, None until that is measured.
        losses: summed loss of each held-out example by trial, and by steps done.
        diverged: why, by trial.
    """

    def __init__(self, out: Path, trials: Sequence[Trial], config: TrainConfig):
        self.file, self.trials = out / TUNE_FILE, trials
        self.settings = _settings(trials, config)
        self.steps = 0
        self.before: float | None = None
        self.losses: dict[str, dict[int, list[float]]] = {trial.name: {} for trial in trials}
        self.diverged: dict[str, str] = {}

    def check_folder(self, resume: bool, begun: bool | None = None) -> None:
        """Raise ValueError unless a tuning may write into its folder."""
        file, out = self.file, self.file.parent
        check_tuning(out, resume, begun)
        for name in (START, *(trial.name for trial in self.trials)):
            if not file.is_file() and (out / name).exists():
                raise ValueError(f"{out / name} must not be there yet; name another folder")

    def read(self) -> bool:
        """Take up what was measured before; return whether there was something."""
        if not self.file.is_file():
            return False
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
            same = found["version"] == _VERSION and found["settings"] == self.settings
            if same:
                self.steps, self.before = found["steps"], found["before"]
                self.diverged = dict(found["diverged"])
                for name in self.losses:
                    some = found["losses"][name].items()
                    self.losses[name] = {int(step): list(sums) for step, sums in some}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.file} must be what a tuning wrote, but reading it failed "
                f"({error!r:.120}); start anew in another folder"
            ) from None
        if not same:
            raise ValueError(
                f"a resumed tuning must have its rates, adapters and settings as before, found "
                f"others than in {self.file}; set them back, or start anew in another folder"
            )
        return True

    def write(self) -> None:
        """Write what was measured so far."""
        found = {
            "version": _VERSION, "settings": self.settings, "steps": self.steps,
            "before": self.before, "diverged": self.diverged, "losses": self.losses,
        }  # fmt: skip
        write_json(self.file, found)


def check_tuning(out: Path, resume: bool, begun: bool | None = None) -> None:
    """Raise ValueError unless `out` is free for a tuning, or holds the one that is to go on.

    `begun` says whether one was killed in it; None: if its lock's file is there.
    """
    file = out / TUNE_FILE
    begun = (out / LOCK_FILE).exists() if begun is None else begun
    if resume and not (file.is_file() or begun):
        raise ValueError(
            f"resume needs {file}, and there is none; start without resume, or name the folder of "
            f"an earlier tuning"
        )
    if not resume and file.exists():
        raise ValueError(
            f"{out} holds an earlier tuning; continue it with {to_resume(out)}, or name another "
            f"folder to start anew"
        )


def _settings(trials: Sequence[Trial], config: TrainConfig) -> dict[str, Any]:
    """Return what a resumed tuning must have the same."""
    told = config.to_dict()
    kept = [field.name for field in fields(TrainConfig) if not field.metadata["may_differ"]]
    same = {name: told[name] for name in (*kept, "epochs", "max_steps")}
    listed = [[trial.name, trial.lr, dict(trial.adapter)] for trial in trials]
    return json.loads(json.dumps({"config": same, "trials": listed}, default=str))
