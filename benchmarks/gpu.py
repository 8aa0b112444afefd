"""Check, then time, everything on a CUDA device; each stage is a process of its own with a limit.

    python benchmarks/gpu.py                # all stages → results/gpu.csv; about ten minutes
    python benchmarks/gpu.py STAGE …        # only these; checks,tests run side by side
    python benchmarks/gpu.py --out FOLDER … # rows and logs go there, as they come

Stages: `env` versions and the card's two rates; `checks` every kernel × format × tile against
float64, three runs equal to the bit; `tests` the kernels' and the device's own tests; `layers` one
linear beside what else is installed; `kernels` each launch alone beside cuBLAS; `models` training
steps of whole models; `smollm2` the real model through the command; `sanitize` compute-sanitizer on
small launches; `ranks` one process under torchrun.
A row is written as it is measured, so a stage that is stopped loses one. SMOKE=1 runs everything
small, on the CPU in Triton's interpreter: to test these files, not to time.
"""

import csv
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results" / "gpu.csv"
SMOKE = os.environ.get("SMOKE") == "1"
if SMOKE:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # for the stages, which inherit it
LIMITS = {  # seconds
    "env": 30, "checks": 95, "tests": 95, "layers": 85, "kernels": 50, "models": 160,
    "smollm2": 105, "sanitize": 60, "ranks": 60,
}  # fmt: skip
if SMOKE:  # the interpreter on few cores
    LIMITS = {stage: 3 * limit for stage, limit in LIMITS.items()}
SHARDS = {"checks": 6}  # processes at a time: what takes long is compiling
GROUPS = (("env",), ("checks", "tests"), ("layers",), ("kernels",), ("models",), ("smollm2",),
          ("sanitize",), ("ranks",))  # fmt: skip
TESTS = (
    "cuda", "triton_dropout", "triton_lora_forward", "triton_lora_backward", "triton_lora",
    "triton_eager", "triton_int8", "triton_decode", "triton_stored", "triton_layers",
    "triton_cross_entropy",
)  # fmt: skip
FIELDS = (
    "gpu", "driver", "torch", "triton", "commit", "stage", "what", "ok", "M", "K", "N", "r", "p",
    "dtype", "format", "compiled", "rows", "length", "ms", "graph_ms", "host_us", "tb_s", "tflops",
    "tokens_s", "peak_gb", "planned_gb", "planned_ms", "losses", "y", "grad_x", "grad_A", "grad_B",
    "repeats", "value", "error",
)  # fmt: skip
START = time.perf_counter()


def say(*words):
    print(f"[{time.perf_counter() - START:6.1f} s]", *words, flush=True)


class Rows:
    """Append rows as JSON lines, and print them short."""

    def __init__(self, stage, folder):
        self.stage = stage
        folder.mkdir(parents=True, exist_ok=True)
        self.file = open(folder / f"{stage}.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    def add(self, what, **row):
        row = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
        unknown = row.keys() - set(FIELDS)
        assert not unknown, unknown
        self.file.write(json.dumps({"stage": self.stage, "what": what} | row, default=str) + "\n")
        self.file.flush()
        print(what, *(f"{k}={v}" for k, v in row.items()), flush=True)


def run(stage, folder, shard="0/1"):
    """Run one stage in this process; return its exit code."""
    import gpu_layers
    import gpu_models

    code = {
        "env": gpu_layers.env, "checks": gpu_layers.checks, "layers": gpu_layers.layers,
        "kernels": gpu_layers.kernels, "models": gpu_models.models, "smollm2": gpu_models.smollm2,
        "ranks": gpu_models.ranks, "tests": tests, "sanitize": sanitize,
    }[stage]  # fmt: skip
    rows = Rows(stage, folder)
    if stage == "checks":
        return int(code(rows, *map(int, shard.split("/"))) or 0)
    return int(code(rows) or 0)


def tests(rows):
    """Run the kernels' own tests on the device, on many cores: what takes long is compiling."""
    files = [str(ROOT / f"tests/test_{name}.py") for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "--maxfail=60", "-p",
               "no:cacheprovider", *(name for name in files if Path(name).exists())]  # fmt: skip
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(1 if SMOKE else min(10, os.cpu_count() or 1))]
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        process.wait(LIMITS["tests"] - 15)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it says what it has found so far
        process.wait()
    rows.add("pytest", ok=process.returncode == 0, value=f"exit code {process.returncode}")
    return process.returncode


def sanitize(rows):
    """Look for memory errors and races, on one small case of each kernel."""
    if SMOKE or not shutil.which("compute-sanitizer"):
        rows.add("compute-sanitizer", value="not here")
        return 0
    code = (
        "import torch, minilora\n"
        "for f in (None, 'int8', 'nf4', 'int4'):\n"
        "  for M, K, N in ((300, 256, 320), (40, 256, 320)):\n"
        "    m = torch.nn.Sequential(torch.nn.Linear(K, N)).to('cuda', torch.bfloat16)\n"
        "    if f: minilora.quantize(m, f, targets=['0'])\n"
        "    minilora.inject(m, r=16, alpha=32, targets=['0'], exclude=[], dropout=0.1,"
        " backend='triton')\n"
        "    x = torch.randn(M, K, device='cuda', dtype=torch.bfloat16, requires_grad=True)\n"
        "    m(x).sum().backward()\n"
        "torch.cuda.synchronize()\n"
    )
    tools = {
        tool: subprocess.Popen(
            ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c",
             code],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for tool in ("memcheck", "racecheck")
    }  # fmt: skip
    bad = 0
    for tool, process in tools.items():
        try:
            text, _ = process.communicate(timeout=LIMITS["sanitize"] - 10)
        except subprocess.TimeoutExpired:
            process.kill()
            text = "time out"
        found = text.strip().splitlines()[-1][:200] if text.strip() else ""
        rows.add(tool, ok=process.returncode == 0, value=found)
        bad += process.returncode == 9
    return bad


def drive(groups, folder):
    """Run groups of stages one after another; the stages of a group run side by side."""
    failed = []
    for group in groups:
        say("stages", *group)
        until = time.perf_counter() + (1200 if SMOKE else max(LIMITS[name] for name in group))
        running = []
        for name in group:
            shards = 1 if SMOKE else SHARDS.get(name, 1)
            for i in range(shards):
                log = open(folder / f"{name}.log", "a", encoding="utf-8")  # noqa: SIM115
                command = [
                    sys.executable,
                    __file__,
                    "--out",
                    folder,
                    "--run",
                    name,
                    f"{i}/{shards}",
                ]
                process = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
                running.append((name, process))
        for name, process in running:
            try:
                done = process.wait(max(0.1, until - time.perf_counter()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                done = "time out"
            if done:
                failed.append((name, done))
        for name in group:
            text = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
            kept = [line for line in text.splitlines() if " ok=True" not in line]
            print("\n".join(line[:230] for line in kept[-25:]), flush=True)
        say("ended", *group)
    say("failed:", failed or "none")
    return 1 if failed else 0


def write_csv(folder, target):
    """Turn the rows of a folder into one table."""
    import torch
    import triton

    card = driver = "none"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_name()
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        if shutil.which(ask[0]):
            driver = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()
    commit = (
        os.environ.get("COMMIT")
        or subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    )
    same = {"gpu": card, "driver": driver, "torch": torch.__version__,
            "triton": triton.__version__, "commit": commit}  # fmt: skip
    with open(target, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                writer.writerow(same | json.loads(line))


def main(arguments):
    sys.path.insert(0, str(HERE))
    import torch

    folder = Path(os.environ.get("OUT", "out/gpu"))
    if arguments[:1] == ["--out"]:
        folder, arguments = Path(arguments[1]), arguments[2:]
    if arguments[:1] == ["--run"]:
        return run(arguments[1], folder, *arguments[2:])
    if not (torch.cuda.is_available() or SMOKE):
        print("benchmarks/gpu.py needs a CUDA device, and torch sees none; nothing was timed")
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    code = drive([name.split(",") for name in arguments] or GROUPS, folder)
    write_csv(folder, folder / "gpu.csv" if SMOKE or arguments else RESULTS)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
