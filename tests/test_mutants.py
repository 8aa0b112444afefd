"""Damaged files and odd arguments: read, or refused in a line of ours, in bounded time and memory.

The mutants are read by `mutants.py` in a process of its own, so that whatever hangs, aborts or eats
memory is a failure of one case. `pytest --wide` tries ten times as many.
"""

import json
import queue
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

SUBJECTS = ["config", "adapter", "weights", "quantized", "tokenizer", "pieces", "gguf", "rows",
            "metrics", "command"]  # fmt: skip
CASES, WIDE = 25, 250  # of each subject
SECONDS = 10  # for one


class Reader:
    """A process that reads mutants; started again after one that ended it."""

    def __init__(self, script):
        self.process, self.script = None, script

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, self.script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.lines = queue.Queue()
        threading.Thread(target=self.listen, args=[self.process, self.lines], daemon=True).start()
        assert self.lines.get(timeout=120) == '"ready"\n'

    @staticmethod
    def listen(process, lines):
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    def read(self, subject, seed):
        """Return what became of a mutant."""
        if self.process is None:
            self.start()
        self.process.stdin.write(f"{subject} {seed}\n")
        self.process.stdin.flush()
        try:
            line = self.lines.get(timeout=SECONDS)
        except queue.Empty:
            self.stop()
            return f"took over {SECONDS} s"
        if line is not None:
            return json.loads(line)
        ended = self.process.wait()
        self.stop()
        return f"ended the process ({ended})"

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process = None


@pytest.fixture(scope="module")
def reader():
    reader = Reader(Path(__file__).with_name("mutants.py"))
    yield reader
    reader.stop()


@pytest.mark.parametrize("subject", SUBJECTS)
def test_mutants_are_read_or_refused_in_a_line(reader, subject, pytestconfig, tally):
    """The wide sweep takes minutes: some thousand files are written, damaged and read."""
    seeds = range(WIDE if pytestconfig.getoption("--wide") else CASES)
    found = {seed: reader.read(subject, seed) for seed in seeds}
    wrong = {seed: what for seed, what in found.items() if what not in ("read", "refused")}
    assert not wrong, f"{len(wrong)} of {len(seeds)}: {json.dumps(wrong, indent=1)}"
    counts = Counter(found.values())
    assert counts["refused"] or subject == "metrics", counts
    tally["mutants read or refused"] = tally.get("mutants read or refused", 0) + len(seeds)


STAND_IN = """
import sys
print('"ready"', flush=True)
for line in sys.stdin:
    if line.startswith("nothing"):
        sys.exit(1)
    print('"read"', flush=True)
"""


def test_the_reader_itself_is_watched(tmp_path):
    """A subject that ends the process is told, and the next mutant has a new one."""
    (tmp_path / "reads.py").write_text(STAND_IN)
    reader = Reader(tmp_path / "reads.py")
    assert reader.read("nothing", 0).startswith("ended the process (1)")
    assert reader.read("metrics", 0) == "read"
    reader.stop()
