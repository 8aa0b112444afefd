"""Ctrl-C while the command still imports PyTorch: a line and exit code 130, as later on."""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def _is_command() -> bool:
    """Return whether this process is `minilora …` or `python -m minilora …`."""
    words = sys.orig_argv
    module = words[words.index("-m") + 1 :][:1] if "-m" in words else []
    return module == ["minilora"] or [Path(word).stem for word in sys.argv[:1]] == ["minilora"]


def _end(signum: int, frame: Any) -> None:
    os.write(2, b"minilora: interrupted\n")
    os._exit(130)  # an exception could be lost among half-made modules


def end_by_exception() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again: what must be put in order can be."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if (
    _is_command()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, _end)
