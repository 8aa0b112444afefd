"""Run `minilora` commands, each in a process of its own, forked from one that has imported it.

Start-up is most of a short run; a fork has it behind it. A request is a line of JSON on stdin,
`{"args": [...], "stderr": file, "die": [function, call]}`; the answer `{"pid": n}` and, when it has
ended, `{"code": n}` (negative: the signal). `die` sends SIGKILL to itself at the call-th use of a
function of `os`, before it acts, and for "write" half way through the state's bytes.

`{"call": "module:function", "options": {...}, "ranks": n, "stderr": file}` calls a function of a
test file in n processes with torchrun's variables; the answers are `{"pids"}` and `{"codes"}`.
"""

import builtins
import contextlib
import faulthandler
import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import traceback

import jinja2  # noqa: F401
import tokenizers  # noqa: F401
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401

from minilora.cli.command import main


def _die_at(name, call):
    """Kill this process at the call-th use of a function."""
    left = [call]

    def dead():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if name == "write":
        real_open = builtins.open

        def opening(file, mode="r", *arguments, **options):
            opened = real_open(file, mode, *arguments, **options)
            if mode == "xb" and ".state." in str(file):
                write = opened.raw.write if hasattr(opened, "raw") else opened.write

                def half(content):
                    write(bytes(content)[: len(content) // 2])
                    dead()
                    return write(bytes(content)[len(content) // 2 :])

                class Half:
                    def __enter__(self):
                        return self

                    def __exit__(self, *error):
                        opened.close()

                    def __getattr__(self, key):
                        return half if key == "write" else getattr(opened, key)

                return Half()
            return opened

        builtins.open = opening
        return
    real = getattr(os, name)

    def dying(*arguments, **options):
        dead()
        return real(*arguments, **options)

    setattr(os, name, dying)


def _log_to(file):
    """Write what this process prints into a file, and where it was if it crashes."""
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()


def _child(request):
    _log_to(request["stderr"])
    if request.get("die"):
        _die_at(*request["die"])
    code = 3
    try:
        code = main(request["args"])
    except SystemExit as end:
        code = end.code
    finally:
        sys.stderr.flush()
        os._exit(code)


def _ranks(request):
    module, function = request["call"].split(":")
    call = getattr(importlib.import_module(module), function)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(request["ranks"]):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        _log_to(request["stderr"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                       "WORLD_SIZE": str(request["ranks"]), "MASTER_PORT": str(port),
                       "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
        code = 3
        try:
            call(**request["options"])
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pids


def serve():
    """Fork for every request; what a run imports on the way is imported before."""
    if len(sys.argv) > 1:  # a run of the command
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            assert main(json.loads(sys.argv[1])) == 0
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "call" in request:
            pids = _ranks(request)
            print(json.dumps({"pids": pids}), flush=True)
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
            print(json.dumps({"codes": codes}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _child(request)
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


class Forks:
    """`minilora` processes from one that has imported it already."""

    def __init__(self, log, warm_up=None):
        self.log = log
        place = os.path.dirname(__file__)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": place}
        self.server = subprocess.Popen(
            [sys.executable, __file__, *([json.dumps(warm_up)] if warm_up else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

        self._answer()  # what it imports is imported

    def start(self, args, die=None):
        return self._ask(args=args, die=die)["pid"]

    def code(self):
        return self._answer()["code"]

    def run(self, args, die=None):
        self.start(args, die)
        return self.code()

    def start_ranks(self, call, ranks, **options):
        """Call a function in several processes."""
        return self._ask(call=call, ranks=ranks, options=options)["pids"]

    def codes(self):
        return self._answer()["codes"]

    def said(self):
        """Return the end of what the last run wrote; all of it from a crash on, if there was one.

        After one, other ranks write much about a lost process.
        """
        text = self.log.read_bytes()[self.began :].decode(errors="replace")
        crash = text.find("Fatal Python error")
        return text[-3000:] if crash < 0 else text[crash : crash + 6000]

    def close(self):
        self.server.stdin.close()
        self.server.wait(timeout=30)

    def _ask(self, **request):
        self.began = self.log.stat().st_size if self.log.exists() else 0
        self.server.stdin.write(json.dumps({**request, "stderr": str(self.log)}) + "\n")
        self.server.stdin.flush()
        return self._answer()

    def _answer(self):
        line = self.server.stdout.readline()
        assert line, f"the server ended: {self.log.read_text()}"
        return json.loads(line)


if __name__ == "__main__":
    serve()
