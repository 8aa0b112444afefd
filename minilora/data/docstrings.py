"""Data that every Python brings along: functions of its standard library and their docstrings."""

import ast
import functools
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

SPLITS = ("train", "valid", "test")
_SKIP = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}


def docstring_pairs(part: str | None = None) -> dict[str, list[dict[str, str]]]:
    """Collect prompt and completion per top-level module of the standard library.

    Args:
        part: one of `SPLITS`: read its modules alone. None: all.
    """
    root = Path(sysconfig.get_path("stdlib"))
    pairs: dict[str, list[dict[str, str]]] = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        module = parts[0].removesuffix(".py")
        if _SKIP.intersection(parts) or part not in (None, _part_of(module)):
            continue
        try:
            text = file.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in old modules
                tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                pair = docstring_pair(node)
                if pair is not None:
                    pairs.setdefault(module, []).append(pair)
    return pairs


def docstring_pair(node: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, str] | None:
    """Take the docstring off a function; None if there is none or nothing else."""
    docstring = ast.get_docstring(node)
    if not docstring or len(node.body) < 2:
        return None
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    if not 10 <= len(paragraph) <= 300:
        return None
    node.body = node.body[1:]
    return {"prompt": ast.unparse(node) + "\n\n# What it does:", "completion": " " + paragraph}


def _part_of(module: str) -> str:
    draw = hashlib.sha256(module.encode()).digest()[0] % 10
    return "test" if draw == 0 else "valid" if draw == 1 else "train"


def split(pairs: dict[str, list[dict[str, str]]]) -> dict[str, list[dict[str, str]]]:
    """Put whole top-level modules into train, valid or test, by a hash of their names."""
    parts: dict[str, list[dict[str, str]]] = {part: [] for part in SPLITS}
    for module, records in sorted(pairs.items()):
        parts[_part_of(module)] += records
    return parts


@functools.cache
def docstring_rows(part: str) -> tuple[dict[str, str], ...]:
    """Return questions and answers of one of `SPLITS`: what does this function do?"""
    asked, end = "What does this Python function do?\n\n", "\n\n# What it does:"
    return tuple(
        {
            "question": asked + pair["prompt"].removesuffix(end),
            "answer": pair["completion"].strip(),
        }
        for pair in split(docstring_pairs(part))[part]
    )


def built_in(name: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows of `@docstrings`, or of a part of it (`@docstrings/valid`), with places."""
    known = {"@docstrings": "train", **{f"@docstrings/{part}": part for part in SPLITS}}
    if name not in known:
        raise ValueError(f"built-in data is one of {', '.join(known)}, found {name!r:.60}")
    for number, row in enumerate(docstring_rows(known[name]), 1):
        yield f"{name}:{number}", row
