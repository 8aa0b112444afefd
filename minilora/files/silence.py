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
    work = _Work(what, total, unit, say, on_terminal())
    with every_so_often(work.look):
        try:
            yield work.add
        finally:
            work.close()


class _Work:
    """A piece of work under way."""

    def __init__(
        self, what: str, total: int | None, unit: str, say: Callable[[str], None], bar: bool
    ):
        self.what, self.total, self.unit, self.say = what, total, unit, say
        self.done = 0
        self.began = self.said = time.perf_counter()
        self.bar: Any = None
        if bar:
            from tqdm import tqdm

            form = "{bar:20} {desc}" if total else "{desc}"
            self.bar = tqdm(total=total, desc=what, leave=False, bar_format=form)

    def add(self, count: int) -> None:
        """Count work that is done."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)

    def look(self) -> None:
        """Show how far it is, where that is due."""
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.set_description_str(f"{self.what}: {self._line(now)}")
        elif now - self.said >= SILENCE:
            self.said = now
            self.say(f"{self.what}: {self._line(now)}")

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()

    def _line(self, now: float) -> str:
        passed = now - self.began
        if not self.total or not self.done:
            return f"{passed:.0f} s so far"
        left = passed * (self.total - self.done) / self.done
        return (
            f"{self.done:,} of {self.total:,} {self.unit}, {self.done / passed:,.0f} a second, "
            f"{left:.0f} s left"
        )
