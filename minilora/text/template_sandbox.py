"""jinja2's sandbox with bounds, for chat templates; `docs/decisions.md` says what has none."""

import time
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

_SECONDS = 2.0  # a rendering takes well under a millisecond
_SIZE = 2**24  # characters and items of all results together, beside 16 times the messages'
_PADDING = {"batch", "center", "expandtabs", "format", "format_map", "indent", "ljust", "rjust",
            "slice", "to_bytes", "translate", "zfill"}  # filters and methods  # fmt: skip


class _Marked(Extension):  # `{% generation %}` marks assistant text for training: read as its text
    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment whose loop steps, calls, operators and output pay for what they made."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, filters: dict[str, Any], functions: dict[str, Any]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Marked, loopcontrols])
        self.filters = {k: v for k, v in self.filters.items() if k not in _PADDING} | filters
        self.filters["_steps"] = lambda items: map(self.paid, items)
        self.filters["_joined"] = lambda parts: self.paid("".join(map(str, parts)))
        self.globals = {k: v for k, v in self.globals.items() if k != "lipsum"} | functions

    def start(self, size: int = 0) -> None:
        """Begin a rendering of messages of `size` characters."""
        self._end, self._left = time.monotonic() + _SECONDS, _SIZE + 16 * size

    def paid(self, value: Any) -> Any:
        """Return what a step made, once it is paid for."""
        self._left -= len(value) if isinstance(value, (str, list, tuple)) else 1
        if self._left < 0 or (isinstance(value, int) and value.bit_length() > 2**16):
            raise SecurityError("it makes too much text")
        if time.monotonic() > self._end:
            raise SecurityError(f"it runs for more than {_SECONDS:.0f} seconds")
        return value

    def compiled(self, source: str) -> Any:
        """Compile a template; loops and `~`, where jinja2 has no hook, go through filters."""
        self.start()
        tree: Any = self.parse(source)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "_steps", [], [], None, None)
        for node in tree.find_all(nodes.Concat):
            node.nodes = [nodes.Filter(nodes.List(node.nodes), "_joined", [], [], None, None)]
        return self.from_string(tree.set_environment(self))

    def concat(self, parts: Any) -> str:  # type: ignore[override]
        """Join output: of the template, of macros, of set blocks."""
        return "".join(map(self.paid, parts))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Refuse methods that pad."""
        return attr not in _PADDING and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Leave `str.format` to `is_safe_attribute`."""

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: D102, N805
        return __self.paid(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator that can't make too much."""
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise SecurityError(f"the {operator} operator on a {type(left).__name__} is refused")
        sizes = [len(each) if hasattr(each, "__len__") else each for each in (left, right)]
        if operator == "*" and sizes[0] * sizes[1] > self._left and sizes != [left, right]:
            raise SecurityError("it makes too much text")
        return self.paid(super().call_binop(context, operator, left, right))
