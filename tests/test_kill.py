"""Kill training at any moment, go on, and hold the adapter against an unbroken run's: same bits.

`make soak KILLS=200` kills as often as it is told.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from fork_train import Forks
from safetensors.torch import load_file
from test_cli import tiny_folder

KILLS = int(os.environ.get("KILLS", "10"))
ADAPTER = "adapter_model.safetensors"
# Everything a resumed run must get right: dropout, accumulation, more than one epoch, a schedule,
# evaluations with a best one, and a save after every step.
OPTIONS = [
    *("--max-steps", "10", "--batch-size", "3", "--accumulate", "2", "--dropout", "0.2"),
    *("--eval-every", "3", "--save-every", "1", "--max-length", "12", "--lr", "0.01"),
    *("--r", "4", "--alpha", "6", "--seed", "3", "--dtype", "float32"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    tiny_folder(folder / "model")
    chance = random.Random(5)
    for name, rows in (("train", 23), ("valid", 5)):
        lines = [
            json.dumps({"text": " ".join(chance.choices("abcdefgh", k=chance.randint(3, 11)))})
            for _ in range(rows)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def arguments(place, out, *more):
    data = ["--data", place / "train.jsonl", "--valid", place / "valid.jsonl"]
    whole = ["train", place / "model", *data, "--out", out, *OPTIONS, *more]
    return [str(part) for part in whole]


@pytest.fixture(scope="module")
def forks(place):
    made = Forks(place / "log.txt", arguments(place, place / "warm"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def unbroken(place, forks):
    """The adapters of a run that nothing disturbed, and how long it took."""
    begin = time.monotonic()
    assert forks.run(arguments(place, place / "whole")) == 0, forks.log.read_text()
    return adapters(place / "whole"), time.monotonic() - begin


def adapters(out):
    return {where: (out / where / ADAPTER).read_bytes() for where in (".", "last")}


def wait_for(file, log):
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.002)


def resumed(forks, place, out):
    """Go on to the end, as a user would: `--resume` if anything was begun there."""
    more = ["--resume"] if out.exists() and any(out.iterdir()) else []
    return forks.run(arguments(place, out, *more))


def test_train_killed_at_random_moments_ends_with_the_same_bits(place, forks, unbroken, capsys):
    """Runs are killed until they have had their kills, several to a run, and then finished.

    Some 10 s: a kill comes anywhere in the time of an unbroken run.
    """
    expected, took = unbroken
    chance, done, inside, before_save = random.Random(11), 0, 0, 0
    for run in range(KILLS):
        out = place / f"random-{run}"
        for _ in range(5):
            more = ["--resume"] if out.exists() and any(out.iterdir()) else []
            pid = forks.start(arguments(place, out, *more))
            time.sleep(chance.uniform(0.0, took))
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.kill(pid, signal.SIGKILL)
            if forks.code() == -signal.SIGKILL:
                done += 1
                inside += bool(list(out.glob(".state*.tmp")))
                before_save += not (out / "state.safetensors").exists()
        assert resumed(forks, place, out) == 0, forks.said()
        assert adapters(out) == expected
        if done >= KILLS:
            break
    with capsys.disabled():
        print(f"\n{done} kills, {inside} inside the write of a state, {before_save} before any")
    assert done >= KILLS


# (function, call): every call of the first saves, of state, adapter and metrics, and a later one.
POINTS = [(name, call) for name in ("replace", "fsync") for call in (*range(1, 5), 12)]


@pytest.mark.parametrize("point", [*POINTS, ("write", 1), ("write", 9)])
def test_train_killed_inside_a_save_ends_with_the_same_bits(place, forks, unbroken, point):
    out = place / f"inside-{point[0]}-{point[1]}"
    assert forks.run(arguments(place, out), die=point) == -signal.SIGKILL
    assert resumed(forks, place, out) == 0, forks.said()
    assert adapters(out) == unbroken[0]
    left = [file.name for folder in (out, out / "last") for file in folder.glob(".*")]
    assert left == [] and not (out / "run.lock").exists()


def test_minilora_train_as_a_command_is_killed_and_goes_on(place, unbroken, forks):
    """The same with the command as a user starts it, with nothing forked: two slow starts."""
    out = place / "command"
    command = [sys.executable, "-m", "minilora", *arguments(place, out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not (out / "state.previous.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    resume = [*command, "--resume"]
    done = subprocess.run(resume, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert adapters(out) == unbroken[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_train_asked_to_stop_finishes_the_step_and_says_how_to_go_on(
    place, forks, unbroken, number
):
    out = place / f"stop-{number}"
    forks.log.write_text("")
    pid = forks.start(arguments(place, out))
    wait_for(out / "state.safetensors", forks.log)
    os.kill(pid, number)
    assert forks.code() == 130
    said = forks.log.read_text()
    assert "finishing the step in hand" in said
    assert "go on with minilora resume " in said
    assert resumed(forks, place, out) == 0
    assert adapters(out) == unbroken[0]


def test_train_goes_on_from_the_state_before_a_damaged_one(place, forks, unbroken):
    """One flipped bit in the tensors, which safetensors itself would not notice."""
    killed = place / "damaged"
    assert forks.run(arguments(place, killed), die=("fsync", 30)) == -signal.SIGKILL
    for damage in ("flip", "cut", "gone"):
        out = shutil.copytree(killed, place / f"damaged-{damage}")
        state = out / "state.safetensors"
        content = bytearray(state.read_bytes())
        content[-9] ^= 1
        assert set(load_file(state)) and (out / "state.previous.safetensors").is_file()
        state.write_bytes(content if damage == "flip" else content[:3000])
        if damage == "gone":
            state.unlink()
        forks.log.write_text("")
        assert resumed(forks, place, out) == 0
        why = "is missing" if damage == "gone" else "is damaged"
        assert f"{state} {why}" in forks.log.read_text()
        assert "going on from the state before it, of step" in forks.log.read_text()
        assert adapters(out) == unbroken[0]


def test_train_refuses_a_folder_at_work_and_takes_one_whose_holder_was_killed(
    place, forks, unbroken, tmp_path
):
    from minilora.cli.command import main
    from minilora.training.lock import FolderLock

    out = place / "locked"
    pid = forks.start(arguments(place, out))
    wait_for(out / "state.safetensors", forks.log)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(RuntimeError, match=rf"process {pid} \(started \d{{4}}-.*at work in"):
            FolderLock(out)
        assert main(arguments(place, out, "--resume")) == 2
    finally:
        os.kill(pid, signal.SIGKILL)
    assert forks.code() == -signal.SIGKILL
    assert (out / "run.lock").exists()  # and yet no false alarm:
    assert resumed(forks, place, out) == 0
    assert adapters(out) == unbroken[0]


def test_kill_harness_would_notice_other_bits(place, forks, unbroken):
    """The comparison can fail: another seed gives another adapter."""
    out = place / "other"
    words = arguments(place, out)
    words[words.index("--seed") + 1] = "4"
    assert forks.run(words) == 0
    assert adapters(out) != unbroken[0]
