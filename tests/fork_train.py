"""Run `minilora` commands, each in a process of its own, forked from one that has imported it.

Start-up is most of a short run; a fork has it behind it. A request is a line of JSON on stdin,
`{"args": [...], "stderr": file, "die": [function, call]}`; the answer `{"pid": n}` and, when it has
ended, `{"code": n}` (negative: the signal). `die` sends SIGKILL to itself at the call-th use of a
function of `os`, before it acts, and for "write" half way through the state's bytes.
"""

import builtins
import json
import os
import signal
import sys

import jinja2  # noqa: F401
import tokenizers  # noqa: F401

import minilora
from minilora.cli import main
from minilora.models import LlamaConfig


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
            if mode == "wb" and ".state." in str(file):
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


def _child(request):
    log = os.open(request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
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


def serve():
    """Fork for every request; what a run imports on the way is imported before."""
    config = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4}
    model = minilora.inject(minilora.models.Llama(LlamaConfig(**config, **heads)), r=1, alpha=2)
    rows = [{"input_ids": [1, 2, 3]}]
    minilora.fit(model, rows, quiet=True, config=minilora.TrainConfig(dtype="float32"))
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _child(request)
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    serve()
