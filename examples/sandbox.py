"""Judge untrusted Python functions: each in a process that can do nothing but answer calls.

    verdict = judge(program, prompt, test, entry_point)

Two processes are started. The *worker* runs the untrusted text and then answers calls of one
function, as JSON over a pipe. The *checker* runs the test, whose `candidate(…)` is such a call, and
writes the verdict into a pipe of its own. So a candidate never meets the test, the values it is
compared with or the verdict: it can return wrong values, and nothing else. What comes back is made
of plain values (None, bool, int, float, complex, str, bytes, list, tuple, set, dict) before it is
compared, so an `__eq__` of the candidate's own has no say.

Before either runs its text, it gives up for good every system call but those that compute, read
and write what is open and end the process (seccomp; Linux on x86-64 or arm64). It can open no file,
to read or to write, make no process, thread or socket and signal nobody. Memory, processor time,
file sizes, processes and core files are limited too, the environment is empty, the working folder
is a fresh one that is removed, and a parent that dies takes both along.

What this does not withstand: a hole in the kernel's or the processor's own walls, and code that
knows the right answers by heart. Measuring how long something takes is not prevented.
"""

import contextlib
import ctypes
import importlib
import json
import os
import platform
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import KeysView
from typing import Any, NamedTuple

SECONDS = 3  # of a processor, each process
WALL = 15  # seconds in all: the machine may be busy
MEMORY = 512 * 2**20  # bytes of address space
MESSAGE = 2**16  # bytes of an answer, at most
# Modules that a text may import: they are imported before files can't be opened any more.
MODULES = {
    "abc", "array", "ast", "base64", "binascii", "bisect", "calendar", "cmath", "collections",
    "copy", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools", "hashlib",
    "heapq", "inspect", "io", "itertools", "json", "math", "numbers", "operator", "os", "queue",
    "random", "re", "statistics", "string", "struct", "sys", "textwrap", "time", "types", "typing",
    "unicodedata",
}  # fmt: skip
ALWAYS = ("_strptime", "encodings.ascii", "encodings.latin_1", "encodings.idna")  # imported late

# Numbers of the system calls that stay, on x86-64 and arm64 (asm/unistd_64.h,
# asm-generic/unistd.h): none opens, makes, names or signals anything.
CALLS = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233), "nanosleep": (35, 101),
    "getpid": (39, 172), "exit": (60, 93), "gettid": (186, 178), "futex": (202, 98),
    "clock_gettime": (228, 113), "clock_nanosleep": (230, 115), "exit_group": (231, 94),
    "getrandom": (318, 278),
}  # fmt: skip
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH_…

SEQUENCES = {"list": (list,), "tuple": (tuple,), "set": (set, frozenset, KeysView)}
PASSED, UNCONFINED, READY = "passed", "unconfined", b"ready\n"


class Verdict(NamedTuple):
    """Whether a candidate passed, and what happened where it did not."""

    passed: bool
    reason: str


def judge(program: str, prompt: str, test: str, entry_point: str) -> Verdict:
    """Run a test of HumanEval's form against a function of an untrusted program.

    Args:
        program: untrusted; defines the function.
        prompt: what the program was asked to complete; the checker runs it, since tests call what
            it defines before the function.
        test: defines `check(candidate)`, which raises where the candidate is wrong.
        entry_point: the function's name.

    Raises:
        RuntimeError: this system can't confine a process; nothing untrusted was run.
    """
    calls, answers, verdict = os.pipe(), os.pipe(), os.pipe()
    jobs = {
        "worker": ([program, entry_point], [calls[0], answers[1]]),
        "checker": ([prompt, test, entry_point], [answers[0], calls[1], verdict[1]]),
    }
    started: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            try:
                for role, (job, pipes) in jobs.items():
                    started.append(_start(role, job, pipes, folder))
            finally:
                for number in (*calls, *answers, verdict[1]):
                    os.close(number)
            found = _read_until(verdict[0], time.monotonic() + WALL)
        finally:
            os.close(verdict[0])
            for process in started:
                os.killpg(process.pid, signal.SIGKILL)  # not waited for yet, so it is still its own
                process.wait()
    if found == UNCONFINED:
        raise RuntimeError(
            "untrusted code is run under seccomp alone, which takes Linux on x86-64 or arm64 and a "
            "kernel that allows it; found none; run this elsewhere"
        )
    return Verdict(found == PASSED, found or "the checker ran out of processor time or memory")


def _start(role: str, job: list[str], pipes: list[int], folder: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-X", "utf8", __file__, role, *map(str, pipes)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        pass_fds=pipes, env={"HOME": folder}, cwd=folder, start_new_session=True,
    )  # fmt: skip
    with contextlib.suppress(BrokenPipeError), process.stdin as inbox:  # type: ignore[union-attr]
        inbox.write(json.dumps(job).encode())
    return process


def _read_until(pipe: int, limit: float) -> str:
    """Return what is written into a pipe until it is closed."""
    found = b""
    while select.select([pipe], [], [], max(0.0, limit - time.monotonic()))[0]:
        piece = os.read(pipe, MESSAGE)
        found += piece
        if not piece or len(found) > MESSAGE:
            return found.decode(errors="replace")
    return "out of time"


def confine() -> None:
    """Give up everything but computing; nothing in this process can undo it.

    Raises:
        OSError, KeyError: this system can't do it.
    """
    most = {"AS": MEMORY, "CPU": SECONDS, "FSIZE": 0, "CORE": 0, "NPROC": 0}
    for name, value in most.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    column, architecture = ARCHITECTURES[platform.machine()]
    numbers = [both[column] for both in CALLS.values()]
    load, equal, give = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET
    kill, refuse, allow = 0x80000000, 0x00050001, 0x7FFF0000  # SECCOMP_RET_…, with EPERM
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    steps += [(equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    steps += [(give, 0, 0, refuse), (give, 0, 0, allow)]
    program = b"".join(struct.pack("HBBI", *step) for step in steps)

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))

    prctl = ctypes.CDLL(None, use_errno=True).prctl
    words = ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong
    prctl.argtypes = ctypes.c_int, *words
    filtered = ctypes.cast(ctypes.byref(Program(len(steps), program)), ctypes.c_void_p).value
    # PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP by SECCOMP_MODE_FILTER
    for number, *arguments in ((1, signal.SIGKILL, 0), (38, 1, 0), (22, 2, filtered)):
        if prctl(number, *arguments, 0, 0):
            raise OSError(ctypes.get_errno(), f"prctl({number}) failed")


def prepare(*texts: str) -> None:
    """Import what texts speak of, without running or parsing them, and give up all rights."""
    words = set(re.findall(r"\w+", " ".join(texts)))
    for name in (*ALWAYS, *sorted(MODULES & words)):
        importlib.import_module(name)
    confine()


def work(text: str, entry_point: str, calls: Any, answers: Any) -> None:
    """Run an untrusted text and answer calls of its function."""
    prepare(text)
    answers.write(READY)
    space: dict[str, Any] = {"__name__": "candidate"}
    problem = None
    try:
        exec(compile(text, "candidate", "exec"), space)
    except BaseException as error:  # SystemExit too
        problem = error
    for line in iter(calls.readline, b""):
        try:
            if problem is not None:
                raise problem
            answer = json.dumps({"value": encode(space[entry_point](*decode(json.loads(line))))})
        except BaseException as error:
            answer = json.dumps({"problem": f"{type(error).__name__}: {error}"[:200]})
        answers.write(answer.encode() + b"\n")


def check(prompt: str, test: str, entry_point: str, answers: Any, calls: Any) -> str:
    """Run a test against the worker and return the verdict."""
    prepare(prompt, test)
    if answers.readline(len(READY)) != READY:
        return UNCONFINED

    def candidate(*arguments: Any) -> Any:
        calls.write(json.dumps(encode(arguments)).encode() + b"\n")
        line = answers.readline(MESSAGE)
        if not line.endswith(b"\n"):
            raise RuntimeError("no answer: it ended, or took too much time, memory or room")
        answer = json.loads(line)
        if "problem" in answer:
            raise RuntimeError(answer["problem"])
        return decode(answer["value"])

    try:
        space: dict[str, Any] = {"__name__": "checker"}
        exec(compile(prompt, "prompt", "exec"), space)
        space[entry_point] = candidate  # the test of HumanEval/33 calls it by its name
        exec(compile(test, "test", "exec"), space)
        space["check"](candidate)
    except Exception as error:
        return f"{type(error).__name__}: {ascii(str(error))[:300]}"
    return PASSED


def encode(value: Any) -> Any:
    """Turn plain values into what JSON can say; anything else becomes an object like no other."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    for plain in (int, float, str):  # subclasses
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, dict):
        return ["dict", *([encode(k), encode(v)] for k, v in value.items())]
    for name, types in SEQUENCES.items():
        if isinstance(value, types):
            return [name, *map(encode, value)]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    return ["object"]


def decode(value: Any) -> Any:
    """Undo `encode`; whoever wrote it, what comes out is plain."""
    if not isinstance(value, list):
        if isinstance(value, dict):
            raise TypeError("not a value")
        return value
    name, *parts = value
    if name == "dict":
        return {decode(k): decode(v) for k, v in parts}
    if name in SEQUENCES:
        return SEQUENCES[name][0](map(decode, parts))
    if name == "object":
        return object()
    return bytes.fromhex(*parts) if name == "bytes" else complex(*map(float, parts))


def main(role: str, *pipes: str) -> None:
    """Be one of the two processes."""
    job = json.loads(sys.stdin.buffer.read())
    os.close(0)
    sys.stdin = None  # type: ignore[assignment]
    files: list[Any] = [os.fdopen(int(pipes[0]), "rb")]
    files += [os.fdopen(int(pipe), "wb", buffering=0) for pipe in pipes[1:]]
    if role == "worker":
        work(*job, *files)
        return
    ended = files.pop()
    try:
        ended.write(check(*job, *files).encode())
    except (OSError, KeyError, AttributeError):
        ended.write(UNCONFINED.encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
