"""Options as fields of frozen dataclasses: flags, config files and the docs are made from them.

A field that `option` made carries its help, its check, its flags and whether a resumed run may
differ in it; its type says how the command line spells a value. To add an option, add the field
and use it.
"""

import argparse
import dataclasses
import difflib
import functools
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from minilora.files.wording import one_line, short

MOST = 2**31 - 1  # of what is counted: rows, steps, epochs

# (value, name) → the value, as it is or brought to one form; raises ValueError or TypeError.
Check = Callable[[Any, str], Any]


def must_be(must: str, holds: Callable[[Any], object]) -> Check:
    """Return the check that raises ValueError, "NAME must be …", unless `holds` is true."""

    def check(value: Any, name: str) -> Any:
        if not holds(value):
            raise ValueError(f"{name} must be {must}, found {short(value)}")
        return value

    return check


def whole(least: int = 1, most: int = MOST, none: bool = False) -> Check:
    """Return the check for an integer in [least, most], or None."""

    def holds(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return _or_none(f"a whole number of at least {least}, at most {most:,}", holds, none)


def number(must: str, holds: Callable[[float], bool], none: bool = False) -> Check:
    """Return the check for a finite number of which `holds` is true, or None."""
    return _or_none(must, lambda value: is_number(value) and holds(value), none)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite int or float."""
    # Compared, not converted: an int beyond any float is refused, and NaN compares false.
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and abs(value) <= sys.float_info.max


def _one_of(values: list[Any]) -> Check:
    *most, last = (f"'{one}'" if isinstance(one, str) else str(one) for one in values)
    return must_be(
        f"{', '.join(most)} or {last}",
        lambda value: any(type(value) is type(one) and value == one for one in values),
    )


def _or_none(must: str, holds: Callable[[Any], bool], none: bool) -> Check:
    if none:
        return must_be(f"{must}, or None", lambda value: value is None or holds(value))
    return must_be(must, holds)


def option(
    default: Any,
    help: str,
    check: Check | None = None,
    flags: tuple[str, ...] | None = None,
    metavar: str | None = None,
    may_differ: bool = False,
) -> Any:
    """Return a dataclass field for an option.

    Args:
        default: its value if it is not given.
        help: what it does; `--help` shows the first sentence, the docs all of it.
        check: called with value and name; None: where the type is a union of `bool`, None and
            literals, the value must be one of them.
        flags: spellings on the command line; None: `--` and the name with hyphens; (): none.
        metavar: what a value is called on the command line.
        may_differ: whether a resumed run may have another value.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "check": check,
            "flags": flags,
            "metavar": metavar,
            "may_differ": may_differ,
        },
    )


def check_options(options: Any) -> None:
    """Check each field of a dataclass and bring its value to the form its check returns."""
    kind: Any = type(options)
    for name, check in _checks(kind).items():
        object.__setattr__(options, name, check(getattr(options, name), name))


@functools.cache
def _checks(options: type) -> dict[str, Check]:
    hints = typing.get_type_hints(options)
    return {
        field.name: field.metadata["check"] or _check_of_type(hints[field.name])
        for field in dataclasses.fields(options)
    }


def _check_of_type(hint: Any) -> Check:
    values: list[Any] = []
    for one in _alternatives(hint):
        values += [True, False] if one is bool else [None] if one is type(None) else [one]
    if any(one is Any or isinstance(one, type) or typing.get_origin(one) for one in values):
        return lambda value, name: value
    return _one_of(values)


def described(options: type) -> type:
    """Add the attributes and their help to a dataclass's docstring."""
    lines = [f"    {f.name}: {f.metadata['help']}" for f in dataclasses.fields(options)]
    options.__doc__ = "\n".join([f"{options.__doc__}\n\nAttributes:", *lines])
    return options


def flags_of(field: dataclasses.Field) -> tuple[str, ...]:
    """Return an option's spellings on the command line."""
    flags = field.metadata["flags"]
    return (f"--{field.name.replace('_', '-')}",) if flags is None else flags


def add_flags(parser: Any, options: type) -> None:
    """Add the flags of a dataclass's options to an argparse parser; `given` reads them.

    By the field's type: `int`, `float`, `str` and choices of strings take one word, tuples several,
    `bool` none (`--name`, `--no-name`); `bool | Literal["x"]` also has `--name-x`. The word `none`
    stands for None where the type has it.
    """
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        flags = flags_of(field)
        sentence = field.metadata["help"].partition(". ")[0].rstrip(".").replace("%", "%%")
        shown = "" if field.default in (None, ()) else f" (default: {field.default})"
        settings: dict[str, Any] = {
            "dest": f"{options.__name__}.{field.name}",
            "default": argparse.SUPPRESS,
            "help": f"{sentence}{shown}",
        }
        of = _alternatives(hints[field.name])
        if not flags:
            continue
        if bool in of:
            values = [True, False, *(value for value in of if isinstance(value, str))]
            parser.add_argument(*flags, action=_Switch, values=values, **settings)
        else:
            read, nargs, word = _word(of, field.name, _checks(options)[field.name])
            metavar = field.metadata["metavar"] or word
            parser.add_argument(*flags, type=read, nargs=nargs, metavar=metavar, **settings)


def _alternatives(hint: Any) -> list[Any]:
    """Return the types and literal values that a type hint is a union of."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [one for part in typing.get_args(hint) for one in _alternatives(part)]
    return list(typing.get_args(hint)) if typing.get_origin(hint) is typing.Literal else [hint]


def _word(of: list[Any], name: str, check: Check) -> tuple[Callable[[str], Any], Any, str]:
    """Return what reads a word of the command line, how many there are, and what one is called."""
    kind, nargs = of[0], None
    if typing.get_origin(kind) is tuple:
        kind, *rest = typing.get_args(kind)
        nargs = "+" if rest == [...] else 1 + len(rest)
    choices = [value for value in of if isinstance(value, str)]

    def read(text: str) -> Any:
        value: Any = text
        try:
            if text == "none" and type(None) in of:
                value = None
            elif kind in (int, float):
                value = kind(text)
            elif nargs is not None:
                return text
        except ValueError:
            pass  # which the check tells
        try:  # what takes several words is checked when all of them are there
            return check(value, name) if nargs is None else value
        except (ValueError, TypeError) as error:
            raise argparse.ArgumentTypeError(_as_typed(error)) from None

    word = f"{{{','.join(choices)}}}" if choices else {int: "N", float: "X"}.get(kind, "NAME")
    return read, nargs, word


class _Switch(argparse.Action):
    """`--name`, `--no-name`, and `--name-VALUE` for values other than True and False."""

    def __init__(self, option_strings: list[str], values: Iterable[Any], **settings: Any):
        self.spelled = {
            {True: name, False: f"--no-{name[2:]}"}.get(value, f"{name}-{value}"): value
            for name in option_strings
            for value in values
        }
        super().__init__(list(self.spelled), nargs=0, **settings)

    def format_usage(self) -> str:
        """Return all spellings, as argparse asks for them."""
        return " | ".join(self.option_strings)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        value = self.spelled[option_string]
        if getattr(namespace, self.dest, value) != value:
            parser.error(f"{option_string} contradicts what was given before it; leave one out")
        setattr(namespace, self.dest, value)


def given(namespace: argparse.Namespace, options: type) -> dict[str, Any]:
    """Return the fields of a dataclass that were given on the command line."""
    prefix = f"{options.__name__}."
    told = vars(namespace).items()
    return {key.removeprefix(prefix): value for key, value in told if key.startswith(prefix)}


def read_options(file: Path, tables: Mapping[str, type]) -> dict[str, dict[str, Any]]:
    """Read a TOML file with one table of options for each dataclass.

    Args:
        file: as in `[train]` with `lr = 1e-3` below it; the string "none" stands for None.
        tables: the dataclasses by their tables' names.

    Returns:
        For each table its fields that the file sets.

    Raises:
        ValueError: no such file, not TOML, an unknown table or option, or a bad value.
        RuntimeError: Python 3.10, which reads no TOML.
    """
    try:
        import tomllib
    except ModuleNotFoundError:
        raise RuntimeError("a config file needs Python 3.11 or newer; pass flags instead") from None
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be a TOML file, found: {one_line(error, 200)}") from None
    result: dict[str, dict[str, Any]] = {name: {} for name in tables}
    for name, table in found.items():
        if name not in tables or not isinstance(table, dict):
            known = " and ".join(f"[{key}]" for key in tables)
            hint = nearest(name, tables)
            raise ValueError(
                f"{file} must hold the tables {known} alone, found {short(name)}{hint}"
            )
        hints = typing.get_type_hints(tables[name])
        for key, value in table.items():
            if key not in hints:
                raise ValueError(
                    f"{file}: [{name}] has no option {short(key)}{nearest(key, hints)}"
                )
            none = value == "none" and type(None) in _alternatives(hints[key])
            try:
                result[name][key] = _checks(tables[name])[key](None if none else value, key)
            except (ValueError, TypeError) as error:
                raise type(error)(f"{file}: {_as_typed(error)}") from None
    return result


def _as_typed(error: Exception) -> str:
    """Say what is wrong with a word in a command or file, where None is written `none`."""
    return str(error).replace(" or None, found", " or none, found")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; nearest: …" with the known word that is most like one, or nothing."""
    spelled = {each.lower(): each for each in known}
    found = difflib.get_close_matches(word.lower(), spelled, n=1, cutoff=0.5)
    return f"; nearest: {spelled[found[0]]}" if found else ""
