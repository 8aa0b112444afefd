"""Peak memory of each rank while a base is read in parts and trained by FSDP2, on CPUs.

    python benchmarks/rank_memory.py [--csv benchmarks/results/rank_memory.csv]

A Llama of 151 million weights with random values, written once in float32; 1, 2 and 4 processes on
one machine (gloo), each with one thread. A peak is the growth of the process's resident memory over
what it held before it began to read, the mapped file's pages left out.
"""

import argparse
import csv
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import minilora
from minilora.loading.model import load_model
from minilora.loading.saving import save_pretrained
from minilora.models import Llama, LlamaConfig
from minilora.planning.machines import forget_peak, peak_bytes
from minilora.training.ranks import Ranks
from minilora.training.sharding import sharded

SHAPE = LlamaConfig(8192, 1024, 4096, 8, 16, 16, 64, 512)


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def worker(place: str, format: str, out: str) -> None:
    torch.set_num_threads(1)
    ranks, seen = Ranks("fsdp"), [0]

    def watched(model):
        put = prepare(model)

        def putting(fqn, value):
            put(fqn, value)
            seen.append(status("RssAnon"))

        return putting

    def inject(model):
        minilora.inject(model, r=8, alpha=16)

    prepare = sharded(ranks, inject)
    before = status("RssAnon")
    if format == "float32":
        model = load_model(place, dtype=torch.float32, prepare=watched)[0]
    else:
        model = load_model(place, format, dtype=torch.float32, prepare=watched)[0]
    forget_peak()
    rows = [{"input_ids": list(range(2, 34))}] * 4
    config = minilora.TrainConfig(
        parallel="fsdp", max_steps=2, batch_size=4, checkpointing=True, dtype="float32"
    )
    minilora.fit(model, rows, config=config, quiet=True)
    told = {
        "held_bytes": sum(p.to_local().nbytes for p in model.parameters()),  # type: ignore[operator]
        "loading_bytes": max(seen) - before,
        "training_bytes": peak_bytes() - status("RssFile") - before,
    }
    Path(out, f"{ranks.rank}.json").write_text(json.dumps(told))


def measure(place: Path, format: str, world: int) -> dict[str, object]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as out:
        started = []
        for rank in range(world):
            variables = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo",
                "OMP_WAIT_POLICY": "PASSIVE", "PYTHONSAFEPATH": "1",
            }  # fmt: skip
            command = [sys.executable, __file__, "--worker", str(place), format, out]
            started.append(subprocess.Popen(command, env=os.environ | variables))
        assert [process.wait() for process in started] == [0] * world
        told = [json.loads(Path(out, f"{rank}.json").read_text()) for rank in range(world)]
    largest = {key: max(row[key] for row in told) for key in told[0]}
    return {"base": format, "ranks": world, **largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--worker", nargs=3)
    options = parser.parse_args()
    if options.worker:
        return worker(*options.worker)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        tokenizer = load_model("smollm2-135m")[1]
        save_pretrained(Llama(SHAPE), folder, tokenizer)
        whole = Path(folder, "model.safetensors").stat().st_size
        for format in ("float32", "nf4"):
            for world in (1, 2, 4):
                found = {"stored_bytes": whole, "torch": torch.__version__}
                rows.append(measure(Path(folder), format, world) | found)
                print(rows[-1], flush=True)
    if options.csv is not None:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return None


if __name__ == "__main__":
    main()
