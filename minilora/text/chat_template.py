"""Chat templates: Jinja programs that come with a model, compiled once, rendered per conversation.

The bounds that hold while one runs are in `template_sandbox`.
"""

import contextlib
import functools
import json
import re
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from minilora.files import import_extra


def plain_messages(messages: Any) -> list[dict[str, Any]]:
    """Return a deep copy of messages, made of JSON types only."""
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
    """Compile a template, Jinja as transformers reads it, once and render conversations with it.

    `variables` are the names of the values it reads that `render` does not set by itself.
    """

    def __init__(self, source: str) -> None:
        version = import_extra("jinja2", "a chat template").__version__
        if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < (3, 1, 6):
            raise RuntimeError(
                f"chat templates need jinja2 3.1.6 or newer, whose sandbox holds, found "
                f'{version}: pip install -U "jinja2>=3.1.6"'
            )
        from jinja2 import meta

        from minilora.text.template_sandbox import Sandbox

        self._lock = threading.Lock()  # the sandbox counts for one rendering at a time
        functions = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self._sandbox = Sandbox({"tojson": _tojson}, functions)
        with _one_error("is not valid"):
            self._template = self._sandbox.compiled(source)
            free = meta.find_undeclared_variables(self._sandbox.parse(source))
        own = {"messages", "add_generation_prompt", *self._sandbox.globals}
        self.variables = frozenset(free) - own

    def render(self, messages: list[dict[str, Any]], **values: Any) -> str:
        """Return the text of messages, as `plain_messages` returns them, and further variables."""
        with self._lock, _one_error("cannot render these messages"):
            self._sandbox.start(len(json.dumps([messages, values])))
            messages = [_with_reasoning(message) for message in messages]
            return self._template.render(messages=messages, **values)


compiled = functools.lru_cache(maxsize=32)(ChatTemplate)  # by its source


@contextlib.contextmanager
def _one_error(what: str) -> Iterator[None]:
    """Turn whatever a template raises into a ValueError."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"the chat template {what}: {str(error) or type(error).__name__}"
        ) from error


# --- what transformers gives to templates ---------------------------------------------------------

# What a message's reasoning is called: the first is what most templates read, gpt-oss' the second.
REASONING = ("reasoning_content", "thinking", "reasoning")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its reasoning under the names that templates read."""
    found = [message[key] for key in REASONING if message.get(key) is not None]
    return {"thinking": found[0], **message, "reasoning_content": found[0]} if found else message


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, **options: Any) -> str:
    indent = min(indent, 16) if indent else None
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise ValueError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form[:100])  # C makes of it at most 256 times as much
