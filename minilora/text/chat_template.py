"""Chat templates: Jinja programs that come with a model, compiled once, rendered per conversation.

What holds while one runs is in `template_sandbox`.
"""

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any


def plain_messages(messages: Any) -> list[dict[str, Any]]:
    """Copy messages, made of JSON types only.

    Args:
        messages: a list of dicts, each with a string `role`.

    Returns:
        A deep copy.

    Raises:
        TypeError: messages or something inside them of another type.
        ValueError: a message without a role, or no message at all.
    """
    if not isinstance(messages, (list, tuple)):
        raise TypeError(
            f"messages must be a list of dicts with 'role' and 'content', found "
            f"{type(messages).__name__}"
        )
    if not messages:
        raise ValueError("messages must hold at least one message, found none")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise TypeError(f"messages[{i}] must be a dict, found {type(message).__name__}")
        if not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{i}] must have a 'role' that is a string, found none")
    return [map_strings(message, str) for message in messages]


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Copy JSON data with every string in it changed, keys left as they are."""
    if isinstance(value, str):
        return change(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [map_strings(item, change) for item in value]
    if isinstance(value, dict):
        return {str(key): map_strings(item, change) for key, item in value.items()}
    raise TypeError(f"a message may hold only JSON types, found {type(value).__name__}")


class ChatTemplate:
    """Compile a template once and render conversations with it.

    Attributes:
        source: the Jinja source.
        variables: names of the values it reads that `render` does not set by itself.

    Args:
        source: Jinja source, as transformers reads it.

    Raises:
        ValueError: source that is no valid or no permitted template.
        RuntimeError: jinja2 is missing or has known ways out of its sandbox (before 3.1.6).
    """

    def __init__(self, source: str) -> None:
        try:
            from minilora.text.template_sandbox import Sandbox
        except ImportError as error:
            raise RuntimeError(
                'chat templates need jinja2: pip install "minilora[text]"'
            ) from error
        self.source = source
        self._lock = threading.Lock()  # the sandbox counts for one rendering at a time
        self._sandbox = Sandbox()
        with _one_error("is not valid"):
            self._template = self._sandbox.compiled(source)
            self.variables: frozenset[str] = self._sandbox.variables(source) - {"messages"}

    def render(self, messages: list[dict[str, Any]], **values: Any) -> str:
        """Return the text of a conversation.

        Args:
            messages: plain data, as `plain_messages` returns it.
            values: further variables the template may read.

        Returns:
            The text.

        Raises:
            ValueError: the template refuses the messages, fails, or exceeds its bounds.
        """
        with self._lock, _one_error("cannot render these messages"):
            self._sandbox.start(messages, values)
            return self._template.render(messages=messages, **values)


@contextlib.contextmanager
def _one_error(what: str) -> Iterator[None]:
    """Turn whatever a template raises into a ValueError."""
    try:
        yield
    except Exception as error:
        reason = re.sub(r" at 0x[0-9a-f]+", "", str(error)) or type(error).__name__
        raise ValueError(f"the chat template {what}: {reason}") from error
