"""What a user's own code is told while a run goes on."""

from collections.abc import Iterable, Sequence
from typing import Any

NAMES = ("on_step", "on_eval", "on_save", "on_log")


class Callbacks:
    """Call the methods that a user's objects have.

    - `on_step(row)` after every optimizer step, with what `metrics.jsonl` gets.
    - `on_eval(row)` after every evaluation, the same.
    - `on_save(folder)` after the state was saved.
    - `on_log(line)` with every line the run says, quiet or not.

    An exception in one ends the run with the state saved.

    Raises:
        TypeError: an object without any of these methods.
    """

    def __init__(self, objects: Sequence[Any] = ()):
        if not isinstance(objects, Iterable):
            raise TypeError(
                f"callbacks must be a list of objects, found one {type(objects).__name__}; put it "
                f"in a list"
            )
        self.objects = list(objects)
        for each in self.objects:
            if isinstance(each, type):
                raise TypeError(
                    f"a callback must be an object, found the class {each.__name__}; pass "
                    f"{each.__name__}()"
                )
            if not any(callable(getattr(each, name, None)) for name in NAMES):
                raise TypeError(
                    f"a callback must have a method on_step, on_eval, on_save or on_log, found "
                    f"{type(each).__name__} without any"
                )

    def __call__(self, name: str, value: Any) -> None:
        """Call the method of each object that has it."""
        for each in self.objects:
            method = getattr(each, name, None)
            if callable(method):
                method(value)
