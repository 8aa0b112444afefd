"""A sandbox for chat templates, which come with a model and are untrusted code.

The language is the one transformers gives them (`trim_blocks`, `lstrip_blocks`, loop controls,
`raise_exception`, `strftime_now`, `tojson`). jinja2's sandbox denies Python's internals; on top of
that a rendering may run for a few seconds and make a bounded amount of text: loops, calls, filters,
operators and joined output are counted, and what could grow in one step is measured before it is
computed or refused. Imports jinja2; import this module only where a template is used.
"""

import functools
import json
import re
import time
import types
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

_SECONDS = 2.0  # a rendering takes well under a millisecond
_CHARACTERS = 2**24  # of all intermediate results together, and 16 times the messages
_BITS = 2**16  # of an integer
_WIDEST = 10_000  # integer arguments of filters: widths, precisions
_FILTERS = """abs capitalize count d default dictsort e escape first float indent int items join
    last length list lower map max min reject rejectattr replace reverse round safe select
    selectattr sort string title trim unique upper"""
_METHODS = """capitalize casefold count endswith find get index isalnum isalpha isascii isdecimal
    isdigit islower isnumeric isspace istitle isupper items join keys lower lstrip partition
    removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines
    startswith strip swapcase title upper values"""
_DATA = (str, bytes, int, float, list, tuple, dict)


class Budget:
    """Time and text one rendering may use."""

    def __init__(self) -> None:
        self.start(None)

    def start(self, messages: Any) -> None:
        """Begin a rendering of `messages`."""
        self.deadline = time.monotonic() + _SECONDS
        self.left = _CHARACTERS + 16 * len(json.dumps(messages))

    def spend(self, size: int) -> None:
        """Count `size` characters or items, and look at the clock."""
        self.left -= size
        if self.left < 0:
            raise SecurityError("it makes too much text")
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it runs for more than {_SECONDS:.0f} seconds")

    def paid(self, result: Any) -> Any:
        """Count a result and return it."""
        self.spend(len(result) if isinstance(result, (str, list, tuple, dict)) else 1)
        return result

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield items, counting each (strings by their length)."""
        for item in items:
            self.spend(len(item) if isinstance(item, str) else 1)
            yield item

    def weigh(self, *values: Any) -> None:
        """Count everything inside, as often as it is reached: lists may share their items."""
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            self.spend(1)
            if isinstance(value, dict):
                waiting.extend(value.values())
            elif isinstance(value, (list, tuple)):
                waiting.extend(value)

    def weighed(self, value: Any) -> Any:
        """Weigh a value and return it."""
        self.weigh(value)
        return value

    def printable(self, value: Any) -> Any:
        """Return data that is safe to turn into text; refuse Python objects."""
        if not (value is None or isinstance(value, (*_DATA, jinja2.Undefined))):
            raise SecurityError(f"a {type(value).__name__} is not printed")
        return self.weighed(value)


class Generation(Extension):
    """Read `{% generation %}`, with which training tools mark assistant text, as its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: Any) -> Any:
        """Return the statements inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """A jinja2 environment in which every step that could run or grow without end is counted."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        budget = self.budget = Budget()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, loopcontrols],
            finalize=budget.printable,
        )
        known = {name: self.filters[name] for name in _FILTERS.split()} | {"tojson": _tojson}
        self.filters = {name: _counting(budget, name, each) for name, each in known.items()}
        self.filters["_counted"], self.filters["_paid"] = budget.counted, budget.paid
        self.filters["_weighed"] = budget.weighed
        self.filters["_joined"] = lambda parts: self.concat(
            [str(budget.printable(part)) for part in parts]
        )
        self.tests = {name: _weighing(budget, each) for name, each in self.tests.items()}
        self.globals = {
            "range": self.globals["range"],  # at most 100,000 long, by jinja2
            "namespace": self.globals["namespace"],
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),  # noqa: PLW0108 (not the type)
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def compiled(self, source: str) -> jinja2.Template:
        """Parse a template, route what the hooks below don't see through filters, compile it."""
        self.budget.start(None)
        tree = _Counting().visit(self.parse(source)).set_environment(self)
        return self.from_string(tree)

    def concat(self, parts: Iterable[str]) -> str:  # type: ignore[override]
        """Join output: of the template, of macros, of set blocks."""
        return "".join(self.budget.counted(parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator once its result is known to be small enough."""
        sized = (str, list, tuple)
        if operator == "+" and isinstance(left, sized) and isinstance(right, sized):
            self.budget.spend(len(left) + len(right))
        elif operator == "*" and isinstance(left, sized) and isinstance(right, int):
            self.budget.spend(len(left) * max(right, 0))
        elif operator == "*" and isinstance(right, sized) and isinstance(left, int):
            self.budget.spend(len(right) * max(left, 0))
        elif operator == "%" and isinstance(left, str):
            raise SecurityError("the % operator on text is not permitted")
        elif isinstance(left, int) and isinstance(right, int):
            power = max(right, 1) if operator == "**" else 1
            if left.bit_length() * power + right.bit_length() > _BITS:
                raise SecurityError(f"integers have at most {_BITS} bits")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a function, method or macro of the template."""
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(__obj, (types.BuiltinMethodType, types.MethodType)):
            if isinstance(owner, _DATA) and name not in _METHODS.split():
                raise SecurityError(f"the method {name} of {type(owner).__name__} is not permitted")
            __self.budget.weigh(owner, args)
        if isinstance(owner, str):
            _measure(__self.budget, name, owner, args, kwargs)
        return __self.budget.paid(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> None:
        """Leave `str.format` to `call`, which refuses it."""


class _Counting(NodeTransformer):
    """Send through filters what jinja2 compiles to bare Python: loops, `~`, slices, comparisons."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        if node.recursive:
            raise SecurityError("recursive loops are not permitted")
        self.generic_visit(node)
        node.iter = _through("_counted", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through("_joined", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through("_paid", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _through("_weighed", node.expr)
        for operand in node.ops:
            operand.expr = _through("_weighed", operand.expr)
        return node


def _through(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _counting(budget: Budget, name: str, function: Any) -> Any:
    """A filter that is measured before it runs and pays for its result."""

    @functools.wraps(function)  # also copies jinja2's mark of who wants the environment first
    def counting(*args: Any, **kwargs: Any) -> Any:
        skip = 1 if hasattr(function, "jinja_pass_arg") else 0
        value, given = args[skip], args[skip + 1 :]
        budget.weigh(value, given)
        for number in (*given, *kwargs.values()):
            if isinstance(number, int) and abs(number) > _WIDEST:
                raise SecurityError(f"{name} takes numbers up to {_WIDEST}")
        if name == "join":  # value is joined by the argument
            kept = [budget.printable(part) for part in value]
            _measure(budget, name, str(given[0]) if given else "", (kept,), {})
            args = (*args[:skip], kept, *given)
        elif isinstance(value, str):
            _measure(budget, name, value, given, kwargs)
        elif name in ("string", "tojson"):
            budget.printable(value)
        return budget.paid(function(*args, **kwargs))

    return counting


def _weighing(budget: Budget, function: Any) -> Any:
    """A test (`x is equalto y`) whose operands are weighed first."""

    @functools.wraps(function)
    def weighing(*args: Any, **kwargs: Any) -> Any:
        budget.weigh(args)
        return function(*args, **kwargs)

    return weighing


def _measure(budget: Budget, name: str, text: str, args: tuple, kwargs: dict[str, Any]) -> None:
    """Pay in advance for the two text operations that can grow by a factor in one step."""
    if name == "replace":
        old, new = (*args, *kwargs.values(), "", "")[:2]
        budget.spend(text.count(str(old)) * len(str(new)))
    elif name == "join" and args and isinstance(args[0], (list, tuple)):
        budget.spend(sum(len(text) + len(str(part)) for part in args[0]))


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > 100 or re.search(r"\d{3}", form):  # C libraries pad "%1000000Y"
        raise SecurityError(f"strftime_now takes a plain format, found {form[:100]!r}")
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """As JSON without HTML escapes, which jinja2's own filter would put in."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


if tuple(int(part) for part in re.findall(r"\d+", jinja2.__version__)[:3]) < (3, 1, 6):
    raise RuntimeError(
        f"chat templates need jinja2 3.1.6 or newer, whose sandbox holds, found "
        f'{jinja2.__version__}: pip install -U "jinja2>=3.1.6"'
    )
