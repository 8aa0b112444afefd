"""A GPU that computes nothing: what a step of whole models takes there, but for its time.

`no_op_cuda.c` stands in for CUDA's runtime, driver and cuBLAS. With a torch built for CUDA all host
code runs as on an H200: peaks of memory are those of a real one (seven runs were apart by 0.00 to
0.07 GB), and launches, copies and the host's time are counted. Numbers are zeros, and cuDNN's
attention is left out.

    python benchmarks/no_op_cuda.py                      # rows of results/no_op_cuda.csv
    python benchmarks/no_op_cuda.py SCRIPT [ARGUMENT …]  # any script on such a device

It needs gcc, and the packages that torch's CUDA builds bring; minilora must be importable.
"""

import ctypes
import functools
import json
import os
import runpy
import shutil
import site
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = os.environ.get("NO_OP_CUDA", "")
BIG = {"name": "llama-3.1-8b"}
SMALL = {"name": "llama-3.2-3b", "r": 32, "targets": ["q_proj", "v_proj"], "p": 0.0, "batch": 4,
         "length": 768}  # fmt: skip
SMOLLM2 = {"name": "smollm2-135m", "r": 8, "p": 0.0, "batch": 16, "length": 80}
CONTENDERS = [
    {"code": code, **model, **options, "compile": compile}
    for model, quantized in ((BIG, True), (SMALL, False), (SMOLLM2, False))
    for code, options in (
        ("minilora", {}),
        ("minilora", {"backend": "triton"}),
        *(
            ("minilora", {"format": format, "backend": backend})
            for format in ("nf4", "int8")
            for backend in ("torch", "triton")
            if quantized
        ),
        ("peft", {}),
    )
    for compile in (False, True)
]
FIELDS = [
    "date", "commit", "torch", "model", "program", "base", "backend", "compiled", "r", "p", "rows",
    "length", "peak_gb", "planned_gb", "launches", "copies", "host_ms", "error", "processor",
]  # fmt: skip


def build(folder):
    """Compile the library; return its path."""
    target = Path(folder, "libcuda.so.1")
    places = site.getsitepackages()
    headers = ("nvidia/cu13/include", "triton/backends/nvidia/include")
    found = [f"-I{place}/{name}" for name in headers for place in places
             if Path(place, name).is_dir()]  # fmt: skip
    if len(found) < len(headers) or not shutil.which("gcc"):
        sys.exit(
            f"gcc and the headers of torch for CUDA 13 must be here ({', '.join(headers)}), "
            f"found gcc {shutil.which('gcc')} and {found}; install them"
        )
    command = ["gcc", "-shared", "-fPIC", "-O1", "-w", *found, HERE / "no_op_cuda.c", "-o", target]
    subprocess.run(command, check=True)
    return target


def again(library, arguments):
    """Run this script in a process that finds the library; return what that process gives."""
    folder = str(library.parent)
    names = {"NO_OP_CUDA": library, "LD_PRELOAD": library, "LD_LIBRARY_PATH": folder,
             "TRITON_LIBCUDA_PATH": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}  # fmt: skip
    environment = os.environ | {name: str(value) for name, value in names.items()}
    return functools.partial(
        subprocess.run, [sys.executable, __file__, *arguments], env=environment, check=False
    )


def pretend():
    """Answer what the host asks of numbers: everything is finite, and every row learns."""
    import torch

    whole, places = torch.Tensor.all, torch.Tensor.nonzero

    def all_(self, *args, **named):
        return torch.tensor(True) if self.is_cuda else whole(self, *args, **named)

    def nonzero(self, **named):
        if not self.is_cuda or self.dim() != 1:
            return places(self, **named)
        return torch.zeros(len(self), 1, dtype=torch.int64, device=self.device)

    torch.Tensor.all, torch.Tensor.nonzero = all_, nonzero
    torch.backends.cuda.enable_cudnn_sdp(False)


def our_model(name, format, backend, r, targets, p):
    """Make the model from shapes: quantizing would read numbers."""
    import gpu_models
    import torch

    import minilora
    from minilora.models import Llama
    from minilora.planning.saved import copied

    config = gpu_models.config_of(name)
    model = Llama(config, dtype=torch.bfloat16, device="meta").requires_grad_(False)
    if format:
        minilora.quantize(model, format, targets=list(targets))
    minilora.inject(model, r=r, alpha=2 * r, targets=list(targets), dropout=p)
    for layer in minilora.lora.lora_layers(model).values():
        layer.backend = backend
    return copied(model, lambda _, t: torch.zeros(t.shape, dtype=t.dtype, device="cuda")).train()


class Row(dict):
    """Takes the row that `gpu_models.measure` adds."""

    def add(self, _, **row):
        self.update(row)


def one(contender):
    """Print the row of one contender."""
    sys.path.insert(0, str(HERE))
    import gpu_models
    import torch

    from minilora.planning import Settings, count_memory, read_shape

    pretend()
    library, marks = ctypes.CDLL(LIBRARY), []
    counters = [ctypes.c_long.in_dll(library, f"no_op_{name}") for name in ("launches", "copies")]
    gpu_models.our_model, gpu_models.STEPS = our_model, 4
    gpu_models._wait = lambda: marks.append([counter.value for counter in counters])
    settings = dict(contender)
    name, code = settings.pop("name"), settings.pop("code")
    row = Row()
    gpu_models.measure(row, code, name, **settings)
    if "error" not in row:
        launches, copies = (b - a for a, b in zip(*marks[-2:], strict=True))
        row |= {"launches": launches, "copies": copies, "host_ms": row["host_us"] / 1e3}
    if code == "minilora":
        planned = Settings(
            format=row["format"], r=row["r"], batch_size=row["rows"], length=row["length"],
            targets=list(settings.get("targets", gpu_models.LINEARS)), dropout=row["p"],
            compile=row["compiled"],
        )  # fmt: skip
        row["planned_gb"] = count_memory(read_shape(name), planned, gpu=True, process=0).peak / 1e9
    row |= {"model": name, "program": code, "base": row["format"] or "bf16",
            "backend": settings.get("backend", "torch"), "torch": torch.__version__}  # fmt: skip
    print(json.dumps(row))


def rows(library):
    """Measure every contender in a process of its own, and append the rows."""
    import csv
    import datetime

    from minilora.kernels import hardware

    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    fixed = {"date": f"{datetime.date.today()}", "commit": commit, "processor": hardware().name}
    path = HERE / "results/no_op_cuda.csv"
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, FIELDS, extrasaction="ignore", lineterminator="\n")
        if fresh:
            out.writeheader()
        for contender in CONTENDERS:
            done = again(library, ["--one", json.dumps(contender)])(capture_output=True, text=True)
            last = (done.stdout.strip() or "{}").splitlines()[-1]
            row = json.loads(last) if last[:1] == "{" else {"error": done.stderr[-200:]}
            row = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
            out.writerow(fixed | row)
            file.flush()
            print(contender, {k: row.get(k) for k in FIELDS[12:17]}, row.get("error", ""))


if __name__ == "__main__":
    if LIBRARY and sys.argv[1] == "--one":
        one(json.loads(sys.argv[2]))
    elif LIBRARY:
        pretend()
        sys.argv = sys.argv[1:]
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        with tempfile.TemporaryDirectory() as folder:
            built = build(folder)
            if sys.argv[1:]:
                sys.exit(again(built, sys.argv[1:])().returncode)
            rows(built)
