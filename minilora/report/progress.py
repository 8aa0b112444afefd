"""How far an explanation is: what is being done, and the time left."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from minilora.data import Example


def tokens_of(examples: Sequence[Example] | None) -> int:
    """Return the tokens of a pass over examples."""
    return sum(len(example.input_ids) for example in examples or ())


class Progress:
    """One line on stderr that is written over in a terminal, and else a line each.

    `progress` is whether to say anything; a number: a line in so many seconds at most.
    """

    def __init__(self, progress: bool | float):
        self.progress, self.width = progress, 0
        self.every = 0.0 if progress is True else float(progress)
        self.last = time.monotonic()
        self.tokens = 0  # still to be measured, in all passes
        self.rate = 0.0  # tokens a second of the last pass, 0 before there was one

    def __call__(self, line: str) -> None:
        """Say what is being done from now on, and how long all that is left takes."""
        now = time.monotonic()
        if not self.progress or now - self.last < self.every:
            return
        self.last = now
        if line and self.rate:
            line += f"; about {self.tokens / self.rate:.0f} s left"
        if not sys.stderr.isatty():
            print(line, end="\n" if line else "", file=sys.stderr, flush=True)
        else:
            print(f"\r{line:<{self.width}}", end="" if line else "\r", file=sys.stderr, flush=True)
            self.width = max(self.width, len(line))

    def took(self, tokens: int, seconds: float) -> None:
        """Note that so many tokens have been measured."""
        self.tokens -= tokens
        self.rate = tokens / max(1e-9, seconds)

    @contextmanager
    def measuring(self, line: str, tokens: int) -> Iterator[None]:
        """Say a line, and note the time of a pass."""
        self(line)
        begun = time.monotonic()
        yield
        self.took(tokens, time.monotonic() - begun)
