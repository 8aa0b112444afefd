"""Regular expressions that come from files, matched in bounded time.

Python's `re` tries one way after another, and a pattern such as `(a|a)+!` has it try without end.
Only patterns with at most two repeats of a character and one branch are left to it. All others are
matched here along all ways at once (Thompson 1968): an int stands for a set of positions in the
name, bit i for the one before character i.
"""

import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

try:
    from re import _constants as ops  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_constants as ops  # type: ignore[no-redef]
    import sre_parse as parser  # type: ignore[no-redef]

from minilora.files import short

LONGEST_PATTERN, LONGEST_NAME = 100_000, 1_000  # characters
MOST_STEPS = 20_000  # for one name: under 10 ms
_REPEATS = (ops.MAX_REPEAT, ops.MIN_REPEAT)
_SINGLE = (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN)
_LOOKS = (ops.ASSERT, ops.ASSERT_NOT)
_CLASSES = {"DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": lambda c: c.isalnum() or c == "_"}


class Pattern:
    """A regular expression that is matched against whole dotted names; `what` is for messages.

    Backreferences, atomic groups, flags, and lookarounds within lookarounds are refused where `re`
    is not used.
    """

    def __init__(self, text: str, what: str):
        self.text, self.what = text, what
        if len(text) > LONGEST_PATTERN:
            raise ValueError(
                f"{what} must be a regular expression of at most {LONGEST_PATTERN:,} characters, "
                f"found {len(text):,}"
            )
        try:
            self.plain = re.compile(text)
            self.tree = parser.parse(text)
            parts = list(_parts(self.tree))
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{what} must be a valid regular expression, {short(text)}: {error}"
            ) from None
        repeats = sum(_repeats(op, value) for op, value, _ in parts)
        branches = sum(op is ops.BRANCH for op, _, _ in parts)
        self.simple = repeats <= 2 and branches <= 1
        refused = None if self.simple else self._refused(parts)
        if refused:
            raise ValueError(
                f"{what} must be a pattern that is matched in bounded time, {short(text)} repeats "
                f"or branches several times and has {refused}; write a simpler one"
            )

    def fullmatch(self, name: str, starts: Iterable[int] = (0,)) -> bool:
        """Return whether the pattern matches all of a name, from one of these places on."""
        if len(name) > LONGEST_NAME:
            raise ValueError(
                f"a module's name must have at most {LONGEST_NAME:,} characters, found "
                f"{len(name):,}: {short(name)}"
            )
        if self.simple:
            return any(self.plain.fullmatch(name, start) for start in starts)
        try:
            ends = _Match(name).ends(self.tree, sum(1 << start for start in starts))
            return bool(ends >> len(name) & 1)
        except TimeoutError:
            raise ValueError(
                f"{self.what} must be a pattern that is matched in {MOST_STEPS:,} steps, "
                f"{short(self.text)} takes more for {short(name)}; write a simpler one"
            ) from None

    def ends(self, name: str) -> bool:
        """Return whether the pattern matches an ending of a dotted name, from a dot on, or all."""
        return self.fullmatch(name, [0, *after_dots(name)])

    def _refused(self, parts: list[tuple[Any, Any, bool]]) -> str | None:
        """Name what `_Match` does not follow, None where it follows all."""
        for op, value, looking in parts:
            if self.plain.flags & ~re.UNICODE or (op is ops.SUBPATTERN and (value[1] or value[2])):
                return "flags"
            if op in _LOOKS and looking:
                return "a lookaround within another"
            if op not in (*_SINGLE, *_REPEATS, *_LOOKS, ops.BRANCH, ops.SUBPATTERN, ops.AT,
                          ops.FAILURE):  # fmt: skip
                return str(op).lower().replace("_", " ")
        return None


def after_dots(name: str) -> list[int]:
    """Return the places behind a name's dots."""
    return [i + 1 for i, character in enumerate(name) if character == "."]


compiled_pattern = functools.lru_cache(maxsize=10_000)(Pattern)


def compile_ending(pattern: str, what: str) -> Pattern:
    """Compile a pattern whose `ends` is PEFT's rule for the keys of rank_pattern."""
    if not isinstance(pattern, str):
        raise TypeError(f"{what} must have regex strings as keys, found {short(pattern)}")
    return compiled_pattern(pattern, what)


def pattern_value(name: str, patterns: Mapping[str, float] | None, default: float) -> float:
    """Return the value of the first pattern that ends `name`; see `compile_ending`."""
    for pattern, value in (patterns or {}).items():
        if compile_ending(pattern, "a pattern").ends(name):
            return value
    return default


def nearest(entry: str, names: Iterable[str]) -> str:
    """Say which names may have been meant: whole ones and their endings, by spelling."""
    names = list(names)
    pool = {name[start:] for name in names for start in (0, *after_dots(name))}
    if close := difflib.get_close_matches(entry, sorted(pool), n=3, cutoff=0.5):
        return f"did you mean {', '.join(close)}?"
    last = sorted({name.rpartition(".")[2] for name in names})[:12]
    return f"the linears end in: {', '.join(last)}"


def _parts(tree: Any, looking: bool = False) -> Iterator[tuple[Any, Any, bool]]:
    """Yield all parts of a pattern, and whether each lies in a lookaround."""
    for op, value in tree:
        yield op, value, looking
        inner: list[Any] = []
        if op is ops.BRANCH or op in _LOOKS:
            inner = value[1] if op is ops.BRANCH else [value[1]]
        elif op in _REPEATS or op is ops.SUBPATTERN:
            inner = [value[-1]]
        for one in inner:
            yield from _parts(one, looking or op in _LOOKS)


def _repeats(op: Any, value: Any) -> int:
    """Return what a part counts: a repeat of one character 1, of more, and what else repeats, 3."""
    if op in (*_SINGLE, ops.BRANCH, ops.SUBPATTERN, ops.AT):
        return 0
    body = list(value[-1]) if op in _REPEATS else []
    return 1 if len(body) == 1 and body[0][0] in _SINGLE else 3


class _Match:
    """Follows a pattern through one name."""

    def __init__(self, name: str):
        self.name, self.steps = name, 0
        self.all = (1 << (len(name) + 1)) - 1
        self.where: dict[str, int] = {}  # the places before each character
        for i, character in enumerate(name):
            self.where[character] = self.where.get(character, 0) | 1 << i

    def ends(self, tree: Any, at: int) -> int:
        """Return where a pattern can end that begins at one of these places."""
        for op, value in tree:
            self.steps += 1
            if self.steps > MOST_STEPS:
                raise TimeoutError
            if not at:
                return 0
            if op in _SINGLE:
                at = (at & self._places(op, value)) << 1
            elif op is ops.BRANCH:
                at = functools.reduce(int.__or__, (self.ends(way, at) for way in value[1]))
            elif op is ops.SUBPATTERN:
                at = self.ends(value[-1], at)
            elif op in _REPEATS:
                at = self._repeat(at, *value)
            elif op is ops.AT:
                at &= self._anchor(str(value))
            elif op is ops.FAILURE:
                return 0
            else:
                at = self._look(at, op is ops.ASSERT, *value)
        return at

    def _repeat(self, at: int, low: int, high: int, body: Any) -> int:
        for _ in range(low):
            before, at = at, self.ends(body, at)
            if at == before:
                break
        reached = new = at
        for _ in range(low, high):
            if not new:
                break
            new = self.ends(body, new) & ~reached
            reached |= new
        return reached

    def _look(self, at: int, wanted: bool, direction: int, body: Any) -> int:
        """Keep the places where a lookaround holds."""
        width = 0 if direction > 0 else body.getwidth()[0]
        kept = 0
        for place in range(len(self.name) + 1):
            if at >> place & 1:
                found = self.ends(body, 1 << (place - width)) if place >= width else 0
                found &= self.all if direction > 0 else 1 << place
                kept |= (bool(found) is wanted) << place
        return kept

    def _places(self, op: Any, value: Any) -> int:
        """Return the places before the characters that a part stands for."""
        return sum(bits for c, bits in self.where.items() if _is_one(c, op, value))

    def _anchor(self, name: str) -> int:
        last = 1 << len(self.name)
        if name.startswith("AT_BEGINNING"):
            return 1
        if name.startswith("AT_END"):
            return last | (last >> 1 if name == "AT_END" and self.name.endswith("\n") else 0)
        word = sum(bits for c, bits in self.where.items() if _CLASSES["WORD"](c))
        edge = word ^ (word << 1)
        return edge if name == "AT_BOUNDARY" else self.all & ~edge


def _is_one(character: str, op: Any, value: Any) -> bool:
    """Return whether a character is one of those that a part stands for."""
    if op is ops.ANY:
        return character != "\n"
    if op is ops.LITERAL:
        return ord(character) == value
    if op is ops.NOT_LITERAL:
        return ord(character) != value
    if op is ops.RANGE:
        return value[0] <= ord(character) <= value[1]
    if op is ops.CATEGORY:
        kind = str(value).removeprefix("CATEGORY_")
        return _CLASSES[kind.removeprefix("NOT_")](character) is not kind.startswith("NOT_")
    negated = value[0][0] is ops.NEGATE
    return any(_is_one(character, *part) for part in value[negated:]) is not negated
