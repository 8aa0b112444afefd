"""One model file in two commits in turns, evaluated, continued, trained: alike, and how fast?

    PYTHONPATH=benchmarks python benchmarks/two_commits.py 38510c9 [--rounds 20]

SmolLM2-135M's GGUF file in float32, one thread. Two processes, one with the named commit's code and
one with this tree's, hold the model and take turns (before, now, now, before, …), so that each pair
meets the same machine. `evaluate`: eight docstrings of up to 96 tokens in batches of four;
`generate`: 16 tokens. `train`: forward and backward of four of the docstrings, cut to the shortest,
with r = 8 on all linears. The seconds are the processes' processor time. Adds to
results/two_commits.csv: the medians, and the median of the pairs' ratios with its interval
(95 %, bootstrap).
"""

import argparse
import inspect
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from train_step import commit, processor, save

from minilora.loading.fetching import fetch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "two_commits.csv"
# Code that both commits understand: it answers each line on its input with seconds and a value.
WORKER = """
import json, sys, time
import torch
torch.set_num_threads(1)
import minilora
try:
    from minilora.loading.model import load_model
except ImportError:
    from minilora.models.loading import load_model
file, texts = sys.argv[1], json.loads(sys.argv[2])
model, tokenizer = load_model(file, dtype=torch.float32)
rows = [torch.tensor(tokenizer.encode(text)[:96]) for text in texts]
batch = torch.stack([ids[: min(map(len, rows[:4]))] for ids in rows[:4]])
rows = [{"input_ids": ids, "labels": ids} for ids in rows]
model.eval()
for line in sys.stdin:
    start = time.process_time()
    if line.strip() == "evaluate":
        value = minilora.evaluate(model, rows, batch_size=4).loss
    elif line.strip() == "train":  # a step without its update, so that all are alike
        if not model.training:
            minilora.inject(model.train(), r=8)
        loss = model.loss(batch, batch)
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None
        value = loss.item()
    else:
        prompt = tokenizer.encode("The capital of France is")
        value = minilora.generate(model, [prompt], max_new_tokens=16)[0]
    print(json.dumps([time.process_time() - start, value]), flush=True)
"""


def source(revision: str | None, folder: Path) -> Path:
    """Lay out a commit's package (or this tree's) as an installation would."""
    folder.mkdir()
    if revision is None:
        for name in ("minilora", "kernels"):
            shutil.copytree(ROOT / name, folder / name)
    else:
        command = ["git", "-C", str(ROOT), "archive", revision, "minilora", "kernels"]
        packed = subprocess.run(command, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", str(folder)], input=packed, check=True)
    (folder / "kernels").rename(folder / "minilora" / "kernels")
    return folder


def worker(folder: Path, file: Path, texts: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", WORKER, str(file), texts], env=environment,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip


def ask(process: subprocess.Popen, task: str) -> list:
    process.stdin.write(task + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return where 95 % of the medians of redrawn ratios lie."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[1949]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", help="a commit of this repository")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    file = fetch("smollm2-135m")
    modules = (argparse, random, subprocess, tempfile, statistics, inspect, json, torch)
    texts = json.dumps([inspect.getdoc(module) for module in modules])
    with tempfile.TemporaryDirectory() as place:
        folders = [source(options.before, Path(place, "before")), source(None, Path(place, "now"))]
        workers = [worker(folder, file, texts) for folder in folders]
        for task in ("evaluate", "generate", "train"):
            seconds: list[list[float]] = [[], []]
            values: list[list] = [[], []]
            for turn in range(options.rounds + 1):
                for one in (0, 1) if turn % 2 else (1, 0):
                    took, value = ask(workers[one], task)
                    values[one].append(value)
                    if turn:  # the first warms up
                        seconds[one].append(took)
            ratios = [now / before for before, now in zip(*seconds, strict=True)]
            least, most = interval(ratios)
            medians = [statistics.median(each) for each in seconds]
            row = {
                "task": task,
                "rounds": options.rounds,
                "before_s": f"{medians[0]:.3f}",
                "now_s": f"{medians[1]:.3f}",
                "ratio": f"{statistics.median(ratios):.3f}",
                "least": f"{least:.3f}",
                "most": f"{most:.3f}",
                "equal": all(each == values[0][0] for side in values for each in side),
                "value": "" if task == "generate" else values[0][0],
                "before": options.before,
                "processor": processor(),
                "torch": torch.__version__,
                "commit": commit(),
                "date": time.strftime("%Y-%m-%d"),
            }
            print(row, flush=True)
            save([row], RESULTS, list(row))
        for process in workers:
            process.stdin.close()
            process.wait()


if __name__ == "__main__":
    main()
