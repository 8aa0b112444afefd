"""A sandbox for chat templates, which come with a model and are untrusted code.

The language is the one transformers gives them (`trim_blocks`, `lstrip_blocks`, loop controls,
`raise_exception`, `strftime_now`, `tojson`). jinja2's sandbox denies Python's internals; on top of
that a rendering has a time and an amount of text. Every loop, call, filter, operator and output
pays for what it makes, and what could grow by a factor in one step pays before it does. Values are
plain data, so nothing prints an address. Imports jinja2; import this module only where a template
is used.
"""

import functools
import json
import re
import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, ValuesView
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

_SECONDS = 2.0  # a rendering takes well under a millisecond
_SIZE = 2**24  # characters and items of all results together, beside 16 times the messages'
_FILTERS = """abs capitalize count d default dictsort e escape first float int items last length
    list lower map max min reject rejectattr reverse safe select selectattr sort string title
    trim unique upper"""
_METHODS = """capitalize casefold count endswith find get index isalnum isalpha isascii isdecimal
    isdigit islower isnumeric isspace istitle isupper items keys lower lstrip partition removeprefix
    removesuffix rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase
    title upper values join replace"""
_DATA = (str, int, float, range, list, tuple, dict)
_LEAVES = (str, int, float, range, jinja2.Undefined, type(None))


class Generation(Extension):
    """Read `{% generation %}`, with which training tools mark assistant text, as its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: Any) -> Any:
        """Return the statements inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """A jinja2 environment in which every step that could run or grow without end is paid for."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        options: Any = {"trim_blocks": True, "lstrip_blocks": True, "finalize": self.data}
        super().__init__(extensions=[Generation, loopcontrols], **options)
        known = {name: self.filters[name] for name in _FILTERS.split()}
        known |= {"replace": self.replace, "tojson": self.tojson}
        known |= {"join": self.join, "_joined": self.join}
        self.filters = {name: self.paying(each) for name, each in known.items()}
        self.filters |= {"_counted": self.counted, "_made": self.made}
        self.globals = {
            "range": self.globals["range"],  # at most 100,000 long, by jinja2
            "namespace": self.globals["namespace"],
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),  # noqa: PLW0108 (not the type)
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self.start()

    def start(self, *given: Any) -> None:
        """Begin a rendering of messages and other values."""
        self.deadline = time.monotonic() + _SECONDS
        self.left = _SIZE + 16 * len(json.dumps(given))

    def pay(self, size: int) -> None:
        """Count `size` characters or items, and look at the clock."""
        self.left -= size
        if self.left < 0:
            raise SecurityError("it makes too much text")
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it runs for more than {_SECONDS:.0f} seconds")

    def counted(self, items: Iterable[Any], text: bool = False) -> Iterator[Any]:
        """Yield items and pay for each: one, or its length as text."""
        for item in items:
            self.pay(len(item) if text else 1)
            yield item

    def data(self, value: Any, free: bool = True) -> Any:
        """Return plain data and refuse anything else; unless `free`, pay for all inside."""
        waiting = [value]
        while waiting:
            one = waiting.pop()
            if isinstance(one, (list, tuple, dict)):
                waiting.extend(one.values() if isinstance(one, dict) else one)
            elif not isinstance(one, _LEAVES):
                raise SecurityError(f"a {type(one).__name__} is not text")
            size = one.bit_length() // 8 if isinstance(one, int) else 0
            self.pay(0 if free else len(one) if isinstance(one, str) else 1 + size)
        return value

    def made(self, value: Any) -> Any:
        """Pay for a result; views and iterators become lists."""
        if isinstance(value, (Iterator, KeysView, ValuesView, ItemsView)):
            value = list(self.counted(value))
        return self.data(value, free=False) if isinstance(value, _DATA) else value

    def paying(self, function: Any) -> Any:
        """Return a filter that takes data alone and pays for its result."""

        @functools.wraps(function)  # also copies jinja2's mark of who wants the environment first
        def paying(*args: Any, **kwargs: Any) -> Any:
            self.data([args[1:] if hasattr(function, "jinja_pass_arg") else args, kwargs])
            return self.made(function(*args, **kwargs))

        return paying

    def join(self, value: Any, d: Any = "", attribute: Any = None) -> str:
        """Join as jinja2 does, once the result is known to be small enough."""
        value = value if attribute is None else map(make_attrgetter(self, attribute), value)
        parts, between = [str(self.data(part)) for part in value], str(d)
        self.pay(sum(map(len, parts)) + len(parts) * len(between))
        return between.join(parts)

    def replace(self, s: Any, old: Any, new: Any, count: int = -1) -> str:
        """Replace, once the result is known to be small enough."""
        self.pay(str(s).count(str(old)) * len(str(new)))
        return str(s).replace(str(old), str(new), count)

    def tojson(self, value: Any, **options: Any) -> str:
        """Write JSON piece by piece, without the HTML escapes that jinja2's own filter puts in."""
        if options.get("indent") not in (None, *range(17)):
            raise SecurityError("tojson indents by up to 16")
        encoder = json.JSONEncoder(**{"ensure_ascii": False, **options})
        return "".join(self.counted(encoder.iterencode(value), text=True))

    def compiled(self, source: str) -> jinja2.Template:
        """Parse a template, route what the hooks below don't see through filters, compile it."""
        self.start()
        return self.from_string(_Counting().visit(self.parse(source)).set_environment(self))

    def variables(self, source: str) -> frozenset[str]:
        """Return the names a template reads and does not set."""
        return frozenset(meta.find_undeclared_variables(self.parse(source))) - set(self.globals)

    def concat(self, parts: Iterable[str]) -> str:  # type: ignore[override]
        """Join output: of the template, of macros, of set blocks."""
        return "".join(self.counted(parts, text=True))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Allow only some methods of data."""
        allowed = not isinstance(obj, _DATA) or not callable(value) or attr in _METHODS.split()
        return allowed and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Leave `str.format` to `is_safe_attribute`, which refuses it."""

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a function, method or macro of the template."""
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name in ("join", "replace"):
            return __self.join(args[0], owner) if name == "join" else __self.replace(owner, *args)
        return __self.made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator once its result is known to be small enough."""
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise SecurityError(f"the {operator} operator on a {type(left).__name__} is refused")
        for many, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(times, int) and not isinstance(many, (int, float)):
                self.pay(len(many) * max(times, 0))
        return self.made(super().call_binop(context, operator, left, right))


class _Counting(NodeTransformer):
    """Send through filters what jinja2 compiles to bare Python: loops, `~` and literals."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = _through("_counted", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through("_joined", nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: Any) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _through("_made", node)

    visit_Tuple = visit_Dict = visit_List


def _through(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > 100 or re.search(r"\d{3}", form):  # C libraries pad "%1000000Y"
        raise SecurityError(f"strftime_now takes a plain format, found {form[:100]!r}")
    return datetime.now().strftime(form)


if tuple(int(part) for part in re.findall(r"\d+", jinja2.__version__)[:3]) < (3, 1, 6):
    raise RuntimeError(
        f"chat templates need jinja2 3.1.6 or newer, whose sandbox holds, found "
        f'{jinja2.__version__}: pip install -U "jinja2>=3.1.6"'
    )
