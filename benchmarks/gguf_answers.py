"""Whether llama.cpp answers from an exported adapter as minilora does, and how often rightly.

    python benchmarks/gguf_answers.py ADAPTER [--data examples/questions.csv]

ADAPTER is the folder of a run on that file. Every question is asked, greedily, in a conversation of
its own: here over the base in float32 and in bfloat16, and in llama.cpp from base and adapter and
from the merged model in each type. A row says how many answers are the file's, and how many are
those of float32 here. Rows are added to benchmarks/results/gguf_answers.csv.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

import minilora

ROOT = Path(__file__).resolve().parents[1]
CSV = ROOT / "benchmarks" / "results" / "gguf_answers.csv"
TYPES = ("f32", "f16", "bf16", "q8_0")
ASK = """
import json, sys
sys.path.insert(0, sys.argv[1])
import ask_llama_cpp
asked = ask_llama_cpp.server(sys.argv[2], sys.argv[3] or None)
questions = json.load(sys.stdin)
print("\\n" + json.dumps([ask_llama_cpp.answer(asked, one) for one in questions]))
"""


def ours(adapter: Path, questions: list[str], dtype: torch.dtype) -> list[str]:
    """Return the answers over the base in a dtype."""
    model, tokenizer = minilora.load_model("smollm2-135m", dtype=dtype)
    minilora.load(model, adapter)
    return minilora.generate(model, questions, tokenizer=tokenizer, chat=True, max_new_tokens=128)


def theirs(questions: list[str], model: Path | str, lora: Path | str = "") -> list[str]:
    """Return llama.cpp's answers, from a process of its own."""
    words = [sys.executable, "-c", ASK, ROOT / "examples", model, lora]
    done = subprocess.run(
        [*map(str, words)], input=json.dumps(questions), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def command(*words: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "minilora", *map(str, words)],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "questions.csv")
    parser.add_argument("--print", action="store_true", help="print answers that differ")
    options = parser.parse_args()
    with open(options.data, encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    questions, wanted = [row["question"] for row in rows], [row["answer"] for row in rows]
    reference = ours(options.adapter, questions, torch.float32)
    new = not CSV.exists()
    with tempfile.TemporaryDirectory() as folder, open(CSV, "a", encoding="utf-8") as table:
        writer = csv.writer(table, lineterminator="\n")
        if new:
            writer.writerow(["data", "program", "file", "questions", "right", "as_f32", "processor",
                             "date"])  # fmt: skip

        def say(program: str, file: str, answers: list[str]) -> None:
            stripped = [one.strip() for one in answers]
            right = sum(a == b for a, b in zip(stripped, wanted, strict=True))
            same = sum(a == b.strip() for a, b in zip(stripped, reference, strict=True))
            row = [options.data.name, program, file, len(rows), right, same]
            print(*row, flush=True)
            writer.writerow([*row, minilora.hardware().name, date.today().isoformat()])
            table.flush()
            if options.print:
                for q, a, b in zip(questions, stripped, reference, strict=True):
                    if a != b.strip():
                        print(f"    {q}\n      f32 here: {b.strip()}\n      {file}: {a}")

        say("minilora", "base f32 + adapter", reference)
        say("minilora", "base bf16 + adapter", ours(options.adapter, questions, torch.bfloat16))
        adapter = Path(folder, "adapter.gguf")
        command("export", options.adapter, "--gguf", adapter)
        base = command("fetch", "smollm2-135m")
        say("llama.cpp", "base q4_1 + adapter", theirs(questions, base, adapter))
        for type in TYPES:
            merged = Path(folder, f"{type}.gguf")
            command("merge", options.adapter, "--gguf", merged, "--type", type)
            say("llama.cpp", f"merged {type}", theirs(questions, merged))
            merged.unlink()


if __name__ == "__main__":
    main()
