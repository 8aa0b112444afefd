"""How far a piece of work is: a bar on a terminal, elsewhere a line every five seconds."""

import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SILENCE = 5.0  # seconds between two lines at most
_REFRESH = 0.5  # seconds between two looks at the clock


def on_terminal() -> bool:
    """Return whether bars can be drawn: stderr is a terminal, and tqdm is installed."""
    return sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None


def print_line(line: str) -> None:
    """Print a line on stderr at once."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def every_so_often(act: Callable[[], None]) -> Iterator[None]:
    """Call a function from a thread, twice a second, for the time of the block."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(_REFRESH):
            act()

    thread = threading.Thread(target=work, name="minilora-ticking", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def ticking(
    what: str,
    total: int | None = None,
    unit: str = "",
    shown: bool = True,
    say: Callable[[str], None] = print_line,
) -> Iterator[Callable[[int], None]]:
    """Show how far a piece of work is, with its speed and the time left.

    Args:
        what: is done, as "evaluating".
        total: units of all the work, None where only the time can be shown.
        unit: what is counted, as "tokens".
        shown: False shows nothing.
        say: takes the lines where no bar is drawn.

    Yields:
        What takes the number of units that were just done.
    """
    if not shown:
        yield lambda count: None
        return
    done = 0
    began = said = time.perf_counter()
    bar: Any = None
    if on_terminal():
        from tqdm import tqdm

        form = "{bar:20} {desc}" if total else "{desc}"
        bar = tqdm(total=total, desc=what, leave=False, bar_format=form)

    def add(count: int) -> None:
        nonlocal done
        done += count
        if bar is not None:
            bar.update(count)

    def look() -> None:
        nonlocal said
        now = time.perf_counter()
        if bar is not None:
            bar.set_description_str(f"{what}: {_how_far(now - began, done, total, unit)}")
        elif now - said >= SILENCE:
            said = now
            say(f"{what}: {_how_far(now - began, done, total, unit)}")

    with every_so_often(look):
        try:
            yield add
        finally:
            if bar is not None:
                bar.close()


def _how_far(passed: float, done: int, total: int | None, unit: str) -> str:
    if not total or not done:
        return f"{passed:.0f} s so far"
    left = passed * (total - done) / done
    speed = f"{done / passed:,.0f} a second"
    return f"{done:,} of {total:,} {unit}, {speed}, {left:.0f} s left"
